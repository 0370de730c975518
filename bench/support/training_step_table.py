# SPDX-License-Identifier: Apache-2.0
"""Writes what bench/training_step.sh measured as tables and as JSON lines, and prints the tables.

    training_step_table.py OUT COMMIT SEQ_LEN THREADS DIRECTORY...

OUT.md and OUT.json are written. A directory is named MODEL/ROW and holds of each round N
round-N.out, the JSON lines of the process, and round-N.kib, its peak memory; or absent.txt, why
there are none.
"""

import datetime
import json
import pathlib
import statistics
import sys

MIB = 1024 * 1024
QEFT = "QEFT-k16"

MODELS = {
    "SmolLM2-135M-Instruct": "30 blocks; its embedding, which is also its head, has 49152 rows.",
    "Llama-2-7B-block": "One block: hidden size 4096, MLP 11008, 32 heads, random weights; a "
    "vocabulary of 256.",
}


def seconds_of(line, seq_len):
    return line["seconds"] if "seconds" in line else seq_len / line["tokens_per_second"]


def read(directory, seq_len):
    path = pathlib.Path(directory)
    row = {"model": path.parent.name, "row": path.name}
    if (path / "absent.txt").exists():
        return {**row, "absent": (path / "absent.txt").read_text().strip()}
    row.update({"rounds": [], "peak_bytes": 0})
    for file in sorted(path.glob("round-*.out")):
        *steps, result = map(json.loads, file.read_text().splitlines())
        peak = result.pop("peak_kib", None) or int(file.with_suffix(".kib").read_text())
        row["peak_bytes"] = max(row["peak_bytes"], 1024 * peak)
        row["first_loss"] = steps[0]["loss"]
        row["rounds"].append([seconds_of(step, seq_len) for step in steps[1:]])
        for key in ("parameters", "saved_bytes_per_token", "optimiser_bytes", "packages"):
            if key in result:
                row[key] = result[key]
    steps = [second for of_round in row["rounds"] for second in of_round]
    low, row["seconds"], high = statistics.quantiles(steps, n=4, method="inclusive")
    row["quartiles"] = [low, high]
    return row


def named(rows, method):
    """The row of a method of ours."""
    return next((row for row in rows if row["row"].startswith(method)), None)


def times_longer(row, other):
    """Ratio of the medians, and its least and largest value over the rounds."""
    by_round = [statistics.median(a) / statistics.median(b)
                for a, b in zip(row["rounds"], other["rounds"])]
    return row["seconds"] / other["seconds"], min(by_round), max(by_round)


def table(rows):
    against = [(name, other) for name, other in (("QEFT-k16", named(rows, QEFT)),
                                                 ("LoRA", named(rows, "LoRA"))) if other]
    header = ["row", "parameters", "step, s (quartiles)",
              *(f"in steps of {name}" for name, _ in against), "peak memory, MiB",
              "kept per token, KiB", "optimiser, MiB", "loss of step 1"]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        low, high = row["quartiles"]
        yield "| " + " | ".join([
            row["row"], f"{row['parameters']}", f"{row['seconds']:.3f} ({low:.3f}-{high:.3f})",
            *("1" if other is row else "{:.2f} ({:.2f}-{:.2f})".format(*times_longer(row, other))
              for _, other in against),
            f"{row['peak_bytes'] / MIB:.0f}", f"{row['saved_bytes_per_token'] / 1024:.2f}",
            f"{row['optimiser_bytes'] / MIB:.1f}", f"{row['first_loss']:.4f}"]) + " |"


def conclusions(rows):
    qeft = named(rows, QEFT)
    for method, wanted in (("QLoRA", 1.5), ("LoRA", 1.0)):
        other = named(rows, method)
        if qeft and other:
            yield (f"- A step of {method} takes {times_longer(other, qeft)[0]:.2f} times as long "
                   f"as one of {QEFT} (the aim is at least {wanted}).")


def report(date, commit, seq_len, threads, rows):
    first = next(row for row in rows if "rounds" in row)
    rounds, steps = len(first["rounds"]), len(first["rounds"][0])
    yield f"""# Training steps, {date}

Commit {commit}; {threads} threads. A step is forward, backward, clipping and AdamW on one sample of
{seq_len} tokens, the same for all rows. Medians over {rounds * steps} steps: {rounds} rounds, in each
of which every row runs as a process of its own, one step to warm up and {steps} that count. Ratios
are those of the medians; in brackets, the least and the largest of a round. Peak memory is the
largest resident size of the process, with the mapped file of the model and, of `torch` rows, the
libraries. Kept: by the linears of their inputs, for one block's backward pass times the number of
blocks; qeft-llm keeps the input of every block instead and finds these again, and so do the `torch`
rows named `recompute`. Kept of an input that several linears share: qeft-llm counts it for each,
`torch` once. QEFT, OWQ and QA-LoRA have 4 bits, groups of 128 columns, one per channel, and 32; the
frozen weights of LoRA are FP16, of QLoRA NF4 with double quantisation, of Platypus 8 bits; those of
`torch` rows have the type of their name. Ranks are those that train about as many parameters as
{QEFT}."""
    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        measured = [row for row in of_model if "rounds" in row]
        yield f"\n## {name}\n\n{MODELS[name]}\n"
        yield from table(measured)
        yield ""
        yield from conclusions(measured)
        for row in of_model:
            if "absent" in row:
                yield f"- {row['row']} did not run: {row['absent']}"
    packages = {}
    for row in rows:
        packages.update(row.get("packages", {}))
    if packages:
        yield "\nPackages: " + ", ".join(f"{name} {of}" for name, of in packages.items()) + "."


def main():
    out, commit, seq_len, threads, *directories = sys.argv[1:]
    rows = [read(directory, int(seq_len)) for directory in directories]
    text = "\n".join(report(datetime.date.today(), commit, seq_len, threads, rows)) + "\n"
    pathlib.Path(out + ".md").write_text(text)
    run = {"commit": commit, "seq_len": int(seq_len), "threads": int(threads)}
    with open(out + ".json", "w") as file:
        file.writelines(json.dumps({**run, **row}) + "\n" for row in rows)
    print(text)


if __name__ == "__main__":
    main()
