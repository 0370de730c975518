#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Gradients of a QEFT checkpoint by PyTorch's autograd, for llm_backward (backward_test.cpp).

  python -m venv venv && venv/bin/pip install torch tokenizers
  venv/bin/python tests/llm/compare_autograd.py --model DIR --text FILE --out $QEFT_TEST_DATA

DIR is a Llama quantised to 4 bits with integer zero points. OUT/autograd/NAME/ gets `model` (a
link) and `reference.safetensors`: `tokens`, `counted`, their `loss` (the sum of -log p) and, under
the name of each parameter, its gradient. All arithmetic is FP64.
"""

import argparse
import ctypes
import json
import math
import pathlib
import shutil
import struct
import sys

try:
    import torch
    import tokenizers
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8,
         "I32": torch.int32}
NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32"}


def read_safetensors(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + at for at in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=TYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    header, parts, at = {}, [], 0
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        parts.append(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def nibbles(packed):
    """Four-bit numbers of bytes, the lower half first."""
    packed = packed.to(torch.int64)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(start_dim=-2)


class Model:
    """A Llama of which the weak columns and the norms are trained."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = read_safetensors(directory / "model.safetensors")
        self.parameters = {}
        self.weights = {}
        quantization = self.config["quantization_config"]
        for name, layer in quantization["layers"].items():
            self.weights[name] = self.dequantize(name, {**quantization, **layer})
        for name, tensor in self.tensors.items():
            if "norm" in name:
                self.parameters[name] = tensor.double().reshape(1, -1).requires_grad_()

    def dequantize(self, name, layer):
        if layer["bits"] != 4 or layer["zero"] != "integer":
            sys.exit(f"{name} has {layer['bits']} bits, {layer['zero']} zeros; 4, integer needed")
        rows, columns, k = layer["out_channels"], layer["in_channels"], layer["weak_columns"]
        scales = self.tensors[name + ".scales"].double()
        group = layer["group_size"] if layer["group_size"] > 0 else columns - k
        of_group = torch.arange(columns - k) // group
        codes = nibbles(self.tensors[name + ".codes"])[:, : columns - k]
        zeros = nibbles(self.tensors[name + ".zeros"])[: scales.numel()].reshape(scales.shape)
        dense = scales[:, of_group] * (codes - zeros[:, of_group])
        weak = self.tensors[name + ".weak"].double().requires_grad_()
        self.parameters[name + ".weak"] = weak
        if layer["weak"] == "tail":
            return torch.cat([dense, weak], dim=1)
        if layer["weak"] != "indexed":
            sys.exit(f"{name} has {layer['weak']} weak columns; tail or indexed needed")
        where = self.tensors[name + ".weak_index"].long()
        is_weak = torch.zeros(columns, dtype=torch.bool)
        is_weak[where] = True
        order = torch.empty(columns, dtype=torch.long)
        order[~is_weak] = torch.arange(columns - k)
        order[where] = torch.arange(columns - k, columns)
        return torch.cat([dense, weak], dim=1)[:, order]

    def norm(self, x, name):
        rms = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * rms * self.parameters[name + ".weight"]

    def attention(self, x, block):
        c = self.config
        dim, count = c["head_dim"], x.shape[0]
        pairs = torch.arange(0, dim, 2, dtype=torch.float64)
        frequency = c["rope_theta"] ** (-pairs / dim)
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()

        def heads(part):  # (heads, tokens, dim)
            y = x @ self.weights[f"{block}.self_attn.{part}_proj"].T
            return y.reshape(count, -1, dim).transpose(0, 1)

        def rotated(y):
            a, b = y[..., : dim // 2], y[..., dim // 2 :]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        shared = c["num_attention_heads"] // c["num_key_value_heads"]
        q, k = rotated(heads("q")), rotated(heads("k")).repeat_interleave(shared, dim=0)
        v = heads("v").repeat_interleave(shared, dim=0)
        scores = q @ k.transpose(1, 2) / math.sqrt(dim)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        mixed = mixed.transpose(0, 1).reshape(count, -1)
        return mixed @ self.weights[f"{block}.self_attn.o_proj"].T

    def mlp(self, x, block):
        gate, up, down = (self.weights[f"{block}.mlp.{part}_proj"] for part in
                          ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def loss(self, tokens, counted):
        embedding = self.tensors["model.embed_tokens.weight"].double()
        tied = self.config["tie_word_embeddings"]
        head = embedding if tied else self.tensors["lm_head.weight"].double()
        x = embedding[tokens]
        for index in range(self.config["num_hidden_layers"]):
            block = f"model.layers.{index}"
            x = x + self.attention(self.norm(x, f"{block}.input_layernorm"), block)
            x = x + self.mlp(self.norm(x, f"{block}.post_attention_layernorm"), block)
        logits = self.norm(x, "model.norm")[:-1] @ head.T
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        return (losses * counted[1:]).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=pathlib.Path, help="QEFT checkpoint")
    parser.add_argument("--text", required=True, help="text file, of 96 tokens at least")
    parser.add_argument("--out", required=True, help="the test data directory")
    arguments = parser.parse_args()
    tokenizer = tokenizers.Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    text = pathlib.Path(arguments.text).read_text(encoding="utf-8")[:4000]
    tokens = torch.tensor(tokenizer.encode(text).ids[:96])
    counted = (torch.arange(len(tokens)) >= 32).double()  # a prompt, and its response

    model = Model(arguments.model)
    loss = model.loss(tokens, counted)
    loss.backward()
    results = {name: p.grad.float() for name, p in model.parameters.items()}
    results["tokens"] = tokens.int()
    results["counted"] = counted.int()
    results["loss"] = loss.detach().float().reshape(1)

    root = pathlib.Path(arguments.out) / "autograd"
    unfinished = root.with_name("autograd.unfinished")  # renamed once it is complete
    shutil.rmtree(unfinished, ignore_errors=True)
    out = unfinished / arguments.model.name
    out.mkdir(parents=True)
    (out / "model").symlink_to(arguments.model.resolve())
    write_safetensors(out / "reference.safetensors", results)
    shutil.rmtree(root, ignore_errors=True)
    unfinished.rename(root)
    print(f"wrote {root}")


if __name__ == "__main__":
    main()
