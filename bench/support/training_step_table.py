# SPDX-License-Identifier: Apache-2.0
"""Writes what bench/training_step.sh measured as tables and as JSON lines, and prints the tables.

    training_step_table.py OUT COMMIT SEQ_LEN THREADS DIRECTORY...

OUT.md and OUT.json are written. A directory is named MODEL/ROW and holds of each round N
round-N.out, the JSON lines of the process, and round-N.memory, its largest memory; or absent.txt,
why there are none.
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
    row.update({"rounds": [], "peak_bytes": 0, "step_bytes": 0})
    for file in sorted(path.glob("round-*.out")):
        *steps, result = map(json.loads, file.read_text().splitlines())
        for key, size in json.loads(file.with_suffix(".memory").read_text()).items():
            row[key] = max(row[key], size)
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
              *(f"in steps of {name}" for name, _ in against), "memory in steps, MiB", "peak, MiB",
              "kept per token, KiB", "optimiser, MiB", "loss of step 1"]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        low, high = row["quartiles"]
        yield "| " + " | ".join([
            row["row"], f"{row['parameters']}", f"{row['seconds']:.3f} ({low:.3f}-{high:.3f})",
            *("1" if other is row else "{:.2f} ({:.2f}-{:.2f})".format(*times_longer(row, other))
              for _, other in against),
            f"{row['step_bytes'] / MIB:.0f}", f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['saved_bytes_per_token'] / 1024:.2f}",
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

Commit {commit}; {threads} threads. A step is forward, backward, clipping and AdamW on a sample of
{seq_len} tokens, the same for all rows. In each of {rounds} rounds every row runs as a process of
its own: a step to warm up, then {steps} that count. Seconds are the median of all of them, ratios
those of medians; in brackets, the quartiles, and the least and largest ratio of a round.

Ranks are those that train about as many parameters as {QEFT}. QEFT has 4 bits in groups of 128
columns, OWQ in one group per channel, QA-LoRA in groups of 32 without weak columns. The frozen
weights of LoRA are FP16, of QLoRA NF4 with double quantisation, of Platypus 8 bits; `torch` rows
are named by theirs. qeft-llm keeps the input of every block and finds the rest again in the
backward pass, and so do the `torch` rows named `recompute`.

Memory in steps is the largest that a process had of its own behind the warm-up; the peak is all
that was resident at any time, with loading, the mapped file of the model and libraries. `torch`
rows have the libraries' own memory in both. Kept per token: what backward needs of the inputs of
the linears, in all blocks. An input that several linears share is counted for each by qeft-llm, and
once for `torch`."""
    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        measured = [row for row in of_model if "rounds" in row]
        yield f"\n## {name}\n\n{MODELS[name]}\n"
        yield from table(measured)
        yield ""
        yield from conclusions(measured)
        for reason in dict.fromkeys(row["absent"] for row in of_model if "absent" in row):
            names = [row["row"] for row in of_model if row.get("absent") == reason]
            yield f"- Did not run ({reason}): {', '.join(names)}."
    packages = {}
    for row in rows:
        packages.update(row.get("packages", {}))
    if packages:
        yield "\nPackages: " + ", ".join(f"{name} {of}" for name, of in packages.items()) + "."


def main():
    out, commit, seq_len, threads, *directories = sys.argv[1:]
    rows = [read(directory, int(seq_len)) for directory in directories]
    if all("absent" in row for row in rows):
        sys.exit("training_step_table: no row was measured")
    text = "\n".join(report(datetime.date.today(), commit, seq_len, threads, rows)) + "\n"
    pathlib.Path(out + ".md").write_text(text)
    run = {"commit": commit, "seq_len": int(seq_len), "threads": int(threads)}
    with open(out + ".json", "w") as file:
        file.writelines(json.dumps({**run, **row}) + "\n" for row in rows)
    print(text)


if __name__ == "__main__":
    main()
