# SPDX-License-Identifier: Apache-2.0
"""Inputs of bench/training_step.sh that qeft-llm does not make itself.

    training_step.py block --out DIR
    training_step.py ranks --model DIR
    training_step.py watch --out FILE COMMAND...

block writes a Llama of one block with the shapes of Llama-2 7B, random weights in FP16 from a fixed
seed and the 256 bytes as its tokens: next to the block its embedding and its head are nothing.

ranks prints for each kind of LoRA the rank with which it trains about as many parameters as there
are in 16 weak columns: of all linears (lora), of all over means of 32 inputs (qa-lora), and of
those of the MLP (platypus).

watch runs a command and writes a JSON object with its largest memory: peak_bytes, all that was
resident, and step_bytes, what was its own (RssAnon: without mapped files) from the first line on
that it printed, which is that of the first step. The standard output is a file.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import safetensors.numpy
import tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples/llm/prepare"))
import files  # noqa: E402

SEED = 20240529
WEAK_COLUMNS, QA_LORA_GROUP = 16, 32
SPREAD = 0.02  # standard deviation of weights, that of Llama's initialisation

BLOCK = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "vocab_size": 256, "bos_token_id": None, "eos_token_id": 0,
    "torch_dtype": "float16",
}


def linears(config):
    """(name, OC, IC) of a block."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    return [("self_attn.q_proj", query, hidden), ("self_attn.k_proj", key, hidden),
            ("self_attn.v_proj", key, hidden), ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner)]


def byte_tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def write_block(out):
    random = np.random.Generator(np.random.PCG64(SEED))

    def weight(rows, columns):
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return (np.float32(SPREAD) * values).astype(np.float16)

    hidden, vocabulary = BLOCK["hidden_size"], BLOCK["vocab_size"]
    block = "model.layers.0."
    tensors = {f"{block}{name}.weight": weight(rows, columns)
               for name, rows, columns in linears(BLOCK)}
    tensors["model.embed_tokens.weight"] = weight(vocabulary, hidden)
    tensors["lm_head.weight"] = weight(vocabulary, hidden)
    for norm in (block + "input_layernorm", block + "post_attention_layernorm", "model.norm"):
        tensors[norm + ".weight"] = np.ones(hidden, np.float16)
    files.make_directory(out)
    with files.replacing(out / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    files.write_text(out / "tokenizer.json", byte_tokenizer().to_str())
    files.write_text(out / "config.json", json.dumps(BLOCK, indent=2))


def ranks(config):
    shapes = linears(config)
    wanted = WEAK_COLUMNS * sum(rows for _, rows, _ in shapes)
    per_rank = {
        "lora": sum(rows + columns for _, rows, columns in shapes),
        "qa-lora": sum(rows + -(-columns // QA_LORA_GROUP) for _, rows, columns in shapes),
        "platypus": sum(rows + columns for name, rows, columns in shapes if "mlp" in name),
    }
    return {kind: max(1, round(wanted / size)) for kind, size in per_rank.items()}


def own_bytes(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines()
                 if line.startswith("RssAnon")), 0)


def watch(command, out):
    process = subprocess.Popen(command)
    step_bytes = 0
    while process.poll() is None:
        if os.fstat(sys.stdout.fileno()).st_size > 0:
            step_bytes = max(step_bytes, own_bytes(process.pid))
        time.sleep(0.02)
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    files.write_text(out, json.dumps({"peak_bytes": peak, "step_bytes": step_bytes}))
    return process.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for_block, for_ranks, for_watch = map(commands.add_parser, ("block", "ranks", "watch"))
    for command in (for_block, for_watch):
        command.add_argument("--out", type=pathlib.Path, required=True)
    for_watch.add_argument("watched", nargs=argparse.REMAINDER)
    for_ranks.add_argument("--model", type=pathlib.Path, required=True)
    o = parser.parse_args()
    try:
        if o.command == "block":
            write_block(o.out)
        elif o.command == "watch":
            return watch(o.watched, o.out)
        else:
            config = json.loads((o.model / "config.json").read_text())
            for kind, rank in ranks(config).items():
                print(kind, rank)
    except files.PrepareError as error:
        print(f"training_step: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
