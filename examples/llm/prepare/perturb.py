# SPDX-License-Identifier: Apache-2.0
"""A copy of a model whose linear layers no longer lie on the grid of the file they come from.

The weights of a Q4_1 file take 16 values in every group of 32 columns, so quantisers that use
groups of 32, or as many zero points, find them again and look better than they are. Here
every weight moves by u * step / 2, u uniform in [-1, 1] and step that of its group, which is its
range / 15. The seed is fixed, so the copy is the same everywhere.
"""

import re
import shutil
import sys

import numpy as np
import safetensors.numpy

import files
from files import PrepareError

GROUP = 32
INTERVALS = 15  # between the values of a group
SEED = 20240529
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
WEIGHTS = "model.safetensors"


def perturbed(name, weight, random):
    if weight.ndim != 2 or weight.shape[1] % GROUP != 0 or weight.dtype != np.float16:
        raise PrepareError(f"{name} is {weight.dtype} of shape {weight.shape}, but must be FP16 "
                           f"with a multiple of {GROUP} columns")
    groups = weight.astype(np.float32).reshape(-1, GROUP)
    step = (groups.max(axis=1, keepdims=True) - groups.min(axis=1, keepdims=True)) / INTERVALS
    noise = 2 * random.random(groups.shape, dtype=np.float32) - 1
    half = (groups + noise * step / 2).astype(np.float16).reshape(weight.shape)
    if not np.isfinite(half).all():
        raise PrepareError(f"{name} has values that are not finite in FP16")
    return half


def write_directory(model, out):
    random = np.random.Generator(np.random.PCG64(SEED))
    tensors = safetensors.numpy.load_file(model / WEIGHTS)
    linears = sorted(filter(LINEAR.fullmatch, tensors))
    if not linears:
        raise PrepareError(f"{model / WEIGHTS} has no linear layers of a Llama model in FP16")
    for name in linears:
        tensors[name] = perturbed(name, tensors[name], random)

    files.make_directory(out)
    with files.replacing(out / WEIGHTS) as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    # config.json is the last: a directory that has it is complete.
    others = sorted(path.name for path in model.glob("*.json") if path.name != "config.json")
    for name in others + ["config.json"]:
        with files.replacing(out / name) as temporary:
            shutil.copyfile(model / name, temporary)
    return len(linears)


def prepare(model, out):
    if out.exists() and out.samefile(model):
        raise PrepareError(f"--out {out} is the model itself")
    for name in (WEIGHTS, "config.json"):
        if not (model / name).is_file():
            raise PrepareError(f"{model / name} is not a file")
    try:
        count = write_directory(model, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise PrepareError(f"cannot copy {model} to {out}: {error}") from error
    print(f"prepare: wrote {out}: {count} linear layers perturbed, SHA-256 "
          f"{files.sha256(out / WEIGHTS)[:16]}", file=sys.stderr)
