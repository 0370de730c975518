# SPDX-License-Identifier: Apache-2.0
"""Makes DEVICE.json and DEVICE.md of what bench/gpu_check.sh measured."""
import argparse
import datetime
import json
import math


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def summary(rows):
    """The figures that the project sets itself, as (name, value) pairs."""
    of = {(r["what"], r["shape"], r["variant"], r["tokens"]): r for r in rows}
    shapes = sorted({r["shape"] for r in rows})
    small = [s for s in shapes if s.startswith(("llama2_7b", "llama3_8b"))] or shapes

    def ratios(what, a, b, tokens_a, tokens_b=None, among=shapes):
        pairs = [(of.get((what, s, a, tokens_a)), of.get((what, s, b, tokens_b or tokens_a)))
                 for s in among]
        return [x["us"] / y["us"] for x, y in pairs if x and y]

    for bits in (4, 3):
        v = f"qeft{bits}"
        yield (f"{v}, 1 token: share of the copy bandwidth (geometric mean, 7B and 8B)",
               geometric_mean([of[("gemm", s, v, 1)]["of_copy"] for s in small
                               if ("gemm", s, v, 1) in of]))
        yield f"{v}: time of 16 tokens over time of 1", geometric_mean(ratios("gemm", v, v, 16, 1))
        for tokens in (1, 16, 64, 2048):
            yield (f"{v}, {tokens} tokens: times as fast as cuBLAS FP16",
                   geometric_mean(ratios("gemm", "cublas", v, tokens)))
        yield (f"{v}, 2048 tokens: input gradient over forward",
               geometric_mean([of[("input_gradient", s, v, 2048)]["us"] / of[("gemm", s, v, 2048)]["us"]
                               for s in shapes if ("input_gradient", s, v, 2048) in of]))
        yield (f"{v}, 1 token: times as fast as torch's _weight_int4pack_mm",
               geometric_mean(ratios("gemm", "torch_int4", v, 1)))


def main():
    parser = argparse.ArgumentParser()
    for name in ("device", "commit", "lines", "tests", "sanitizer", "out"):
        parser.add_argument("--" + name, required=True)
    a = parser.parse_args()
    lines = [json.loads(line) for line in open(a.lines)]
    limits = next((r for r in lines if r["what"] == "limits"), {})
    rows = [r for r in lines if r["what"] != "limits"]
    tests = open(a.tests).read()
    sanitizer = open(a.sanitizer).read()
    date = datetime.date.today().isoformat()
    with open(a.out + ".json", "w") as f:
        json.dump({"device": a.device, "commit": a.commit, "date": date, "limits": limits,
                   "tests": tests.splitlines(), "sanitizer": sanitizer.splitlines(),
                   "rows": rows}, f, indent=1)
    with open(a.out + ".md", "w") as f:
        print(f"# {a.device}, {date}, commit {a.commit}\n", file=f)
        print("By `bench/gpu_check.sh`: weights from memory (rotated), CUDA graphs, medians in "
              "microseconds; k = 128, g = 128.\n", file=f)
        if limits:
            print(f"Limits measured in the same run: read {limits['read_bytes_per_s'] / 1e9:.0f} "
                  f"GB/s, copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, cuBLAS FP16 "
                  f"{limits['fp16_flops'] / 1e12:.0f} TFLOP/s.\n", file=f)
        print("| figure | |\n|---|---|", file=f)
        for name, value in summary(rows):
            if not math.isnan(value):
                print(f"| {name} | {value:.2f} |", file=f)
        for what in sorted({r["what"] for r in rows}):
            some = [r for r in rows if r["what"] == what]
            tokens = sorted({r["tokens"] for r in some})
            print(f"\n## {what}\n\n| shape | | " + " | ".join(map(str, tokens)) + " |", file=f)
            print("|---|---|" + "---|" * len(tokens), file=f)
            for shape in dict.fromkeys(r["shape"] for r in some):
                for variant in dict.fromkeys(r["variant"] for r in some if r["shape"] == shape):
                    cells = {r["tokens"]: r for r in some
                             if r["shape"] == shape and r["variant"] == variant}
                    texts = [f"{cells[t]['us']:.1f} ± {(cells[t]['us_high'] - cells[t]['us_low']) / 2:.1f}"
                             if t in cells else "" for t in tokens]
                    print(f"| {shape} | {variant} | " + " | ".join(texts) + " |", file=f)
        for title, text in (("Tests", tests), ("compute-sanitizer", sanitizer)):
            if text:
                print(f"\n## {title}\n\n```\n{text.rstrip()}\n```", file=f)


if __name__ == "__main__":
    main()
