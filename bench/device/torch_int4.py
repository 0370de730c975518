# SPDX-License-Identifier: Apache-2.0
"""PyTorch's int4 product (tinygemm) on some of the shapes of bench/device/operands.cuh, as the same
lines of JSON: BF16 activations, g = 128, rotated weights, CUDA graphs."""
import json
import statistics

import torch

SHAPES = [("llama2_7b/qkv", 12288, 4096), ("llama2_7b/o", 4096, 4096),
          ("llama2_7b/gate_up", 22016, 4096), ("llama2_7b/down", 4096, 11008),
          ("llama3_8b/qkv", 6144, 4096), ("llama3_8b/gate_up", 28672, 4096),
          ("llama3_8b/down", 4096, 14336)]
GROUP = 128


def measure(oc, ic, tokens):
    """Quartiles of a call, in microseconds."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(8, -(-4 * cache // (oc * ic // 2)))
    packed = torch._convert_weight_to_int4pack(
        torch.randint(0, 255, (oc, ic // 2), dtype=torch.uint8, device="cuda"), 8)
    weights = [packed.clone() for _ in range(copies)]
    parameters = torch.rand(ic // GROUP, oc, 2, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, ic, dtype=torch.bfloat16, device="cuda")

    def run():
        for w in weights:
            torch._weight_int4pack_mm(x, w, GROUP, parameters)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for i in range(17):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.quantiles(times, n=4)


for name, oc, ic in SHAPES:
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        low, median, high = measure(oc, ic, tokens)
        print(json.dumps({"what": "gemm", "shape": name, "variant": "torch_int4", "tokens": tokens,
                          "us": median, "us_low": low, "us_high": high}), flush=True)
