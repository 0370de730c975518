#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes tests/llm/goldens, which every test run compares itself with: small random models with the logits
and greedy tokens that `transformers` gives, and small tokenizers with the ids that `tokenizers` gives.

  python -m venv venv && venv/bin/pip install torch transformers
  venv/bin/python tests/llm/make_goldens.py            (made with transformers 5.24, tokenizers 0.23)

goldens/models/NAME/ has `model` (config.json as written here, model.safetensors) and
`reference.safetensors`: `tokens` and their `logits` in FP32, and `greedy`, the continuation of `prompt`.
goldens/tokenizers/NAME.json has `tokenizer` (a tokenizer.json) and `cases` of `text` and `ids`."""

import json
import pathlib
import shutil

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

OUT = pathlib.Path(__file__).parent / "goldens"
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LINEAR = {"type": "linear", "factor": 4.0}


def config(drop=(), **changes):
    c = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "vocab_size": 64, "tie_word_embeddings": False}
    c.update(changes)
    return {k: v for k, v in c.items() if k not in drop}


def mistral(**changes):
    return config(architectures=["MistralForCausalLM"], model_type="mistral", **changes)


def qwen2(**changes):
    return config(architectures=["Qwen2ForCausalLM"], model_type="qwen2", **changes)


# What the code treats differently: name -> (config, type of the file, which of the two tied tensors)
MODELS = {
    "llama": (config(), "F16", None),
    "llama_tied": (config(tie_word_embeddings=True), "F16", None),
    "llama_tied_but_own_head": (config(tie_word_embeddings=True), "F16", "both"),
    "llama_tied_only_head": (config(tie_word_embeddings=True), "F16", "head"),
    "llama_biases": (config(attention_bias=True, mlp_bias=True), "F16", None),
    "llama_head_dim": (config(head_dim=12, num_key_value_heads=None), "F16", None),
    "llama_defaults": (config(drop=("rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings",
                                    "num_key_value_heads", "max_position_embeddings")), "F16", None),
    "llama_bf16": (config(torch_dtype="bfloat16"), "BF16", None),
    "llama_f32": (config(dtype="float32"), "F32", None),
    "llama_large_eps": (config(rms_norm_eps=0.3, hidden_act="swish", eos_token_id=64), "F16", None),
    "rope_linear": (config(rope_scaling=LINEAR), "F16", None),
    "rope_llama3": (config(rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=500.0), "F16", None),
    "rope_parameters": (config(drop=("rope_theta",), rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}), "F16", None),
    "rope_parameters_bare": (config(drop=("rope_theta",), rope_parameters={"rope_theta": 50.0}),
                             "F16", None),
    "rope_both": (config(rope_scaling=LINEAR, rope_parameters={"rope_type": "default",
                                                              "rope_theta": 50.0}), "F16", None),
    "mistral_window": (mistral(sliding_window=7), "F16", None),
    "mistral_no_window": (mistral(sliding_window=None, num_key_value_heads=2), "F16", None),
    "qwen2": (qwen2(tie_word_embeddings=True, use_sliding_window=False, sliding_window=7), "F16", None),
    "qwen2_window": (qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=1), "F16", None),
    "qwen2_layer_types": (qwen2(use_sliding_window=True, sliding_window=7, layer_types=[
        "sliding_attention", "full_attention"]), "F16", None),
}


def shapes(c):
    h, f, n = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv, d = c.get("num_key_value_heads") or n, c.get("head_dim") or h // n
    yield "model.embed_tokens.weight", (c["vocab_size"], h)
    yield "lm_head.weight", (c["vocab_size"], h)
    yield "model.norm.weight", (h,)
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (h,)
        yield p + "post_attention_layernorm.weight", (h,)
        for name, rows, columns in (
            ("self_attn.q_proj", n * d, h), ("self_attn.k_proj", kv * d, h),
            ("self_attn.v_proj", kv * d, h), ("self_attn.o_proj", h, n * d),
            ("mlp.gate_proj", f, h), ("mlp.up_proj", f, h), ("mlp.down_proj", h, f),
        ):
            yield p + name + ".weight", (rows, columns)
            qkv = name[-6:] in ("q_proj", "k_proj", "v_proj")
            if ((c["model_type"] == "qwen2" and qkv) or (c.get("attention_bias") and "attn" in name)
                    or (c.get("mlp_bias") and "mlp" in name)):
                yield p + name + ".bias", (rows,)


def weights(c, kind, tied, seed):
    rng = np.random.default_rng(seed)
    w = {}
    for name, shape in shapes(c):
        x = rng.standard_normal(shape)
        x = (1 + 0.1 * x if "norm" in name else 0.3 * x if name.endswith("bias")
             else x if "embed" in name else 1.5 * x / np.sqrt(shape[1]))
        w[name] = torch.tensor(x).to(TYPES[kind])
    if c.get("tie_word_embeddings") and tied != "both":
        del w["model.embed_tokens.weight" if tied == "head" else "lm_head.weight"]
    return w


def make_model(name, seed):
    c, kind, tied = MODELS[name]
    folder = OUT / "models" / name
    (folder / "model").mkdir(parents=True)
    save_file(weights(c, kind, tied, seed), folder / "model" / "model.safetensors", {"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1000 + seed).integers(0, 64, 24).tolist()
    prompt = tokens[:5]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float()
        greedy = []
        for _ in range(16):
            greedy.append(int(model(torch.tensor([prompt + greedy])).logits[0, -1].argmax()))
    ints = lambda x: torch.tensor(x, dtype=torch.int32)
    save_file({"tokens": ints(tokens), "logits": logits.contiguous(), "prompt": ints(prompt),
               "greedy": ints(greedy)}, folder / "reference.safetensors")


TEXT = """The quick brown fox jumps over the lazy dog. It's 12 o'clock, they're late; we'll see 2024.
Das Mädchen über die Brücke; naïve façade — “quoted” … 你好，世界！ Привет, мир. ١٢٣ 🙂🙂 \t tabs\n\n  spaces   end """
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(size, **options):
    t = tokenizers.Tokenizer(models.BPE(**options))
    t.decoder = decoders.ByteLevel()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return t, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def gpt2():
    t, trainer = byte_level(340)
    t.train_from_iterator([TEXT] * 3, trainer)
    t.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("word", single_word=True)])
    return t


def llama3():
    t, trainer = byte_level(340, ignore_merges=True)
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.train_from_iterator([TEXT] * 3, trainer)
    t.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    return t


def qwen2_tokenizer():
    t = llama3()
    t.normalizer = normalizers.NFC()
    t.add_tokens([AddedToken("e\u0301x", normalized=True)])
    return t


def sentencepiece(metaspace):
    t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    if metaspace:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    # Words are learnt apart; the tokenizer itself merges across them, as Llama's does.
    words = TEXT.split(" ")[:20]
    t.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=340, special_tokens=specials[:3]))
    document = json.loads(t.to_str())
    for token in specials[3:]:
        document["model"]["vocab"][token] = len(document["model"]["vocab"])
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def make_tokenizer(name, t):
    fragments = TEXT.split(" ") + ["<tool>", "word", "swords", "<s>", "</s>", "<|endoftext|>", "<|eot_id|>",
                                   "e\u0301x", "\u00e9x", "  ", "\n", "", "\u0000", "\u3000", "<0x41>", "x" * 40]
    rng = np.random.default_rng(7)
    texts = [TEXT] + [" ".join(rng.choice(fragments, rng.integers(1, 9))) for _ in range(40)]
    texts += ["".join(rng.choice(fragments, rng.integers(1, 9))) for _ in range(40)]
    cases = [{"text": x, "ids": t.encode(x, add_special_tokens=False).ids} for x in map(str, texts)]
    (OUT / "tokenizers").mkdir(exist_ok=True)
    (OUT / "tokenizers" / f"{name}.json").write_text(json.dumps(
        {"tokenizer": json.loads(t.to_str()), "cases": cases}, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for seed, name in enumerate(MODELS):
        make_model(name, seed)
    for name, t in {"gpt2": gpt2(), "llama3": llama3(), "qwen2": qwen2_tokenizer(),
                    "llama2": sentencepiece(False), "metaspace": sentencepiece(True)}.items():
        make_tokenizer(name, t)


main()
