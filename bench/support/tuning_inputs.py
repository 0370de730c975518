# SPDX-License-Identifier: Apache-2.0
"""Inputs of bench/tuning.sh that qeft-llm does not make itself.

    tuning_inputs.py cut  --tokenizer FILE --tokens N --text FILE --out FILE
    tuning_inputs.py base --method qlora|platypus --model DIR --out DIR

cut writes the beginning of a text that has exactly N tokens, so that `finetune` and `perplexity`,
which leaves out the last part of a window, see the same.

base writes the frozen model of a method in 16 bits, each linear as the method holds it: NF4 with
double quantisation, or 8 bits rounded to nearest. qeft-llm makes both in memory when it trains and
has no file for them, but LoRA adapters merge onto such a model. Prints a JSON object with what the
linears would take: weights, bytes, bits_per_weight.
"""

import argparse
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import safetensors.numpy
import tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples/llm/prepare"))
import files  # noqa: E402

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
WEIGHTS = "model.safetensors"

NF4_LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022833234, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32)
NF4_BLOCK, NF4_BLOCKS_PER_SCALE, NF4_LARGEST_CODE = 64, 256, 127
INT8_GROUP, INT8_CODES = 128, 255


def cut(tokenizer, count, text):
    """The beginning of `text` with `count` tokens."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens.ids) < count:
        raise files.PrepareError(f"the text has {len(tokens.ids)} tokens, but {count} are wanted")
    # A text that ends inside a word may have other tokens there than the whole one.
    for end in range(tokens.offsets[count - 1][0], len(text) + 1):
        found = len(tokenizer.encode(text[:end], add_special_tokens=False).ids)
        if found == count:
            return text[:end]
        if found > count + 8:
            break
    raise files.PrepareError(f"no beginning of the text has {count} tokens")


def nf4(weight):
    """(as stored, bytes). As nf4_matrix of examples/llm."""
    rows, columns = weight.shape
    blocks = -(-columns // NF4_BLOCK)
    padded = np.zeros((rows, blocks * NF4_BLOCK), np.float32)
    padded[:, :columns] = weight
    padded = padded.reshape(rows * blocks, NF4_BLOCK)
    most = np.abs(padded).max(axis=1)
    shares = padded / np.where(most > 0, most, np.float32(1))[:, None]
    above = np.clip(np.searchsorted(NF4_LEVELS, shares), 1, len(NF4_LEVELS) - 1)
    nearer = NF4_LEVELS[above] - shares < shares - NF4_LEVELS[above - 1]
    codes = np.where(nearer, above, above - 1)

    mean = np.float32(most.astype(np.float64).mean())
    offset = most - mean
    starts = np.arange(0, len(offset), NF4_BLOCKS_PER_SCALE)
    scales = np.maximum.reduceat(np.abs(offset), starts) / np.float32(NF4_LARGEST_CODE)
    each = np.repeat(scales, NF4_BLOCKS_PER_SCALE)[:len(offset)]
    code = np.rint(offset / np.where(each > 0, each, np.float32(1)))
    stored = mean + each * np.clip(code, -NF4_LARGEST_CODE, NF4_LARGEST_CODE).astype(np.float32)
    values = (NF4_LEVELS[codes] * stored[:, None]).reshape(rows, -1)[:, :columns]
    return values, rows * (-(-columns // 2) + blocks) + 4 * len(scales) + 4


def int8(weight):
    """(as stored, bytes): the range of each group, FP16 scales, integer zero points."""
    values = np.empty_like(weight)
    for first in range(0, weight.shape[1], INT8_GROUP):
        group = weight[:, first:first + INT8_GROUP]
        low = np.minimum(group.min(axis=1, keepdims=True), 0)
        high = np.maximum(group.max(axis=1, keepdims=True), 0)
        scale = ((high - low) / INT8_CODES).astype(np.float16).astype(np.float32)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.clip(np.rint(-low / scale), 0, INT8_CODES)
        code = np.clip(np.rint(group / scale) + zero, 0, INT8_CODES)
        values[:, first:first + INT8_GROUP] = scale * (code - zero)
    rows, columns = weight.shape
    return values, rows * (columns + 3 * -(-columns // INT8_GROUP))


def write_base(method, model, out):
    tensors = safetensors.numpy.load_file(model / WEIGHTS)
    total = stored = 0
    for name in filter(LINEAR.fullmatch, tensors):
        values, size = method(tensors[name].astype(np.float32))
        tensors[name] = values.astype(np.float16)
        total += values.size
        stored += size
    if total == 0:
        raise files.PrepareError(f"{model / WEIGHTS} has no linear layers of a Llama model")
    files.make_directory(out)
    with files.replacing(out / WEIGHTS) as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    for path in model.glob("*.json"):
        shutil.copyfile(path, out / path.name)
    return {"weights": total, "bytes": stored, "bits_per_weight": 8 * stored / total}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for_cut = commands.add_parser("cut")
    for_cut.add_argument("--tokenizer", type=pathlib.Path, required=True)
    for_cut.add_argument("--tokens", type=int, required=True)
    for_cut.add_argument("--text", type=pathlib.Path, required=True)
    for_base = commands.add_parser("base")
    for_base.add_argument("--method", choices=["qlora", "platypus"], required=True)
    for_base.add_argument("--model", type=pathlib.Path, required=True)
    for command in (for_cut, for_base):
        command.add_argument("--out", type=pathlib.Path, required=True)
    o = parser.parse_args()
    try:
        if o.command == "cut":
            tokenizer = tokenizers.Tokenizer.from_file(str(o.tokenizer))
            files.write_text(o.out, cut(tokenizer, o.tokens, o.text.read_text("utf-8")))
        else:
            method = nf4 if o.method == "qlora" else int8
            print(json.dumps(write_base(method, o.model, o.out)))
    except files.PrepareError as error:
        print(f"tuning_inputs: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
