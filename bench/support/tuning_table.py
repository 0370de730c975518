# SPDX-License-Identifier: Apache-2.0
"""Writes what bench/tuning.sh measured as tables and as JSON lines, and prints the tables.

    tuning_table.py OUT SETTING DIRECTORY...

OUT.md and OUT.json are written. SETTING is a JSON object of what all rows have in common. A
directory with row.txt is a row of fine-tuning, one with lines.txt is the table of merging. Losses
are natural logarithms per token, from the perplexities that qeft-llm prints.
"""

import datetime
import json
import math
import pathlib
import statistics
import sys

MIB = 2**20

# What is trained, by row or else by base.
ABOUT = {
    "QEFT-k16": "16 weak columns per linear of a 4-bit checkpoint, g = 128",
    "QEFT-k64": "64 weak columns per linear of a 4-bit checkpoint, g = 128",
    "OWQ-k16": "16 weak columns in place (indexed), 4 bits, one scale per channel",
    "QA-LoRA": "LoRA on means over groups of 32 columns, 4 bits with scaled zero points, "
    "into which it merges",
    "FP16": "LoRA on all linears of the FP16 model",
    "NF4": "LoRA on all linears over NF4, blocks of 64, double quantisation",
    "INT8": "LoRA on the MLP over 8 bits rounded to nearest",
    "QEFT-k16-dropout": "QEFT-k16 with weak-column dropout",
    "QEFT-k16-L2-SP": "QEFT-k16 with decay towards the initial columns",
}
# qeft-llm has no file for these: what is measured is a copy of the merged model in 16 bits.
IN_MEMORY = ("NF4", "INT8")


def load(path):
    return json.loads(path.read_text())


def loss(path):
    return math.log(load(path)["perplexity"])


def measures(directory):
    """Of a model: losses, KL to the FP16 model, bytes, decoding speed."""
    general = load(directory / "general.json")
    speed = load(directory / "speed.json")
    return {"target": loss(directory / "target.json"),
            "validation": loss(directory / "validation.json"),
            "general": math.log(general["perplexity"]), "kl": general.get("kl", 0.0),
            "target_tokens": load(directory / "target.json")["tokens"],
            "general_tokens": general["tokens"],
            "bytes": int((directory / "size.txt").read_text()),
            "tokens_per_second": (len(speed["tokens"]) - 1) / speed["decode_seconds"]}


def run_of(directory, setting):
    """Of one seed."""
    result = load(directory / "finetune.json")
    steps = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    speeds = [step["tokens_per_second"] for step in steps if "tokens_per_second" in step]
    tokens = setting["batch"] * setting["seq_len"]
    return {"run": directory.name, **measures(directory), "best_loss": result["best_loss"],
            "start_loss": result["start_loss"], "best_step": result["best_step"],
            "parameters": result["parameters"],
            "saved_bytes_per_token": result["saved_bytes_per_token"],
            "optimiser_bytes": result["optimiser_bytes"],
            "step_seconds": tokens / statistics.median(speeds),
            "peak_bytes": 1024 * int((directory / "peak_kib.txt").read_text().split()[-1]),
            "adapter_bytes": (directory / "adapter.safetensors").stat().st_size}


def read_row(directory, setting):
    lines = [line.split(" ", 1) for line in (directory / "row.txt").read_text().splitlines()]
    of = dict(lines)
    base_directory = directory.parents[2] / "bases" / directory.parent.name / of["base"]
    linears = load(base_directory / "linears.json")
    tried = sorted((float(rate), float(validated)) for key, value in lines if key == "tried"
                   for validated, rate in [value.split()])
    return {"row": directory.name, "base": of["base"], "options": of["options"].split(),
            "rate": float(of["rate"]),
            "tried": [{"rate": rate, "validation": None if math.isinf(v) else v}
                      for rate, v in tried],
            "linears": {k: linears[k] for k in ("weights", "bytes", "bits_per_weight")},
            "before": measures(base_directory),
            "runs": [run_of(directory / name, setting) for name in of["runs"].split()]}


def spread(values, digits=3):
    """Mean and standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def of_runs(row, key):
    return [run[key] for run in row["runs"]]


def table(header, lines):
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def quality(rows, names, seeds):
    header = ["row", "trained parameters", "learning rate", f"{names['target']}: loss before",
              "after", "change", "English: loss before", "after", "change", "KL before", "KL after"]

    def line(row):
        before = row["before"]
        name = row["row"]
        if len(row["runs"]) < seeds:
            name += f" ({seeds - len(row['runs'])} of {seeds} seeds diverged)"
        cells = [name, f"{row['runs'][0]['parameters'] / 1e6:.2f} M", f"{row['rate']:g}"]
        for text in ("target", "general"):
            after = of_runs(row, text)
            cells += [f"{before[text]:.3f}", spread(after),
                      spread([value - before[text] for value in after])]
        return cells + [f"{before['kl']:.3f}", spread(of_runs(row, "kl"))]
    return table(header, map(line, rows))


def tuned_size(row):
    """Bytes of what the method keeps of a tuned model, and whether it is what was measured."""
    run = row["runs"][0]
    if row["base"] not in IN_MEMORY:
        return run["bytes"], True
    others = run["bytes"] - 2 * row["linears"]["weights"]
    return row["linears"]["bytes"] + others + run["adapter_bytes"], False


def cost(rows):
    header = ["row", "seconds per step", "peak memory, MiB", "kept per token, KiB",
              "optimiser, MiB", "linears, bits per weight", "tuned model, MiB",
              "decoding, tokens/s"]

    def line(row):
        size, measured = tuned_size(row)
        runs = row["runs"]
        speed = max(of_runs(row, "tokens_per_second"))
        return [row["row"], f"{statistics.median(of_runs(row, 'step_seconds')):.2f}",
                f"{max(of_runs(row, 'peak_bytes')) / MIB:.0f}",
                f"{runs[0]['saved_bytes_per_token'] / 1024:.1f}",
                f"{runs[0]['optimiser_bytes'] / MIB:.1f}",
                f"{row['linears']['bits_per_weight']:.2f}",
                f"{size / MIB:.1f}" + ("" if measured else " *"),
                f"{speed:.1f}" + ("" if measured else " *")]
    return table(header, map(line, rows))


def rates(rows):
    every = sorted({one["rate"] for row in rows for one in row["tried"]})

    def line(row):
        found = {one["rate"]: one["validation"] for one in row["tried"]}
        edge = row["rate"] in (min(found), max(found)) and len(found) > 1
        yield row["row"]
        for rate in every:
            value = found.get(rate, "")
            cell = "diverged" if value is None else value and f"{value:.4f}"
            yield f"**{cell}**" + (" (edge)" if edge else "") if rate == row["rate"] else cell
    return table(["row", *(f"{rate:g}" for rate in every)],
                 (list(line(row)) for row in rows if row["tried"]))


def exactness(rows):
    header = ["row", "loss of the base when training starts", "the same of its file",
              "best loss in training", "loss of the merged model", "largest difference of the two"]

    def line(row):
        runs = row["runs"]
        differences = [abs(run["validation"] - run["best_loss"]) for run in runs]
        return [row["row"], f"{runs[0]['start_loss']:.6f}", f"{row['before']['validation']:.6f}",
                f"{runs[0]['best_loss']:.6f}", f"{runs[0]['validation']:.6f}",
                f"{max(differences):.1e}"]
    return table(header, map(line, rows))


def read_merging(directory):
    lines = []
    for line in (directory / "lines.txt").read_text().splitlines():
        group, name, place = line.split("\t")
        lines.append({"group": group, "line": name,
                      **{text: loss(directory / "lines" / place / f"{text}.json")
                         for text in ("target", "other", "general")}})
    return {"row": "merging", "lines": lines,
            "restored": (directory / "restored.txt").read_text().strip() == "yes"}


def merged(merging, names):
    header = ["model", *(f"{names[text]}: loss{change}" for text in ("target", "other", "general")
                         for change in ("", ", change"))]
    for group in dict.fromkeys(line["group"] for line in merging["lines"]):
        lines = [line for line in merging["lines"] if line["group"] == group]

        def cells(line, first):
            yield line["line"]
            for text in ("target", "other", "general"):
                yield f"{line[text]:.3f}"
                yield "" if line is first else f"{line[text] - first[text]:+.3f}"
        yield f"\n{group[0].upper()}{group[1:]}:\n"
        yield from table(header, (list(cells(line, lines[0])) for line in lines))


def report(date, setting, rows, merging):
    language = {"de-DE": "German", "fr-FR": "French"}
    names = {"target": language[setting["target"]], "other": language[setting["other"]],
             "general": "English"}
    s = setting
    yield f"""# Fine-tuning and merging, {date}

Commit {s['commit']}; model {s['model']}.

Tuned on {names['target']} pages of Debian's handbook (package debian-handbook), split by page into
tuning, validation and held-out text: {s['steps']} steps of {s['batch']} x {s['seq_len']} tokens,
AdamW, the learning rate rising over {s['warmup']} steps and falling to 0 as a cosine,
gradients clipped to a norm of 0.3. The adapter of a run is that of the step that validates best,
out of every {s['eval_every']}th. Every row tries the same learning rates with seed 0; the one that
validates best runs with {s['seeds']} seed{'s' * (s['seeds'] > 1)}, which are other samples in
another order, and other initial values of LoRA. Losses are nats per token of text that was used for
nothing else; ± is the standard deviation over the seeds. 4-bit checkpoints are calibrated
on English prose, {s['samples']} x 512 tokens."""
    if s["model"] == "SmolLM2-135M-Instruct":
        yield """
The model's weights come from a Q4_1 file, a grid in groups of 32 columns with scaled zeros: that
is QA-LoRA's format, whose base looks better on them than it is. `--perturbed` has weights off that
grid."""
    if rows:
        about = "\n".join(f"- {row['row']}: "
                          f"{ABOUT.get(row['row'], ABOUT.get(row['base'], row['base']))} "
                          f"(`{' '.join(row['options'])}`)" for row in rows)
        first = rows[0]["runs"][0]
        yield f"""
{about}

## What tuning gains and what it forgets

Before: the frozen model that a row starts from. {first['target_tokens']} tokens of
{names['target']} held-out text, {first['general_tokens']} of English prose, whose KL is
KL(FP16 || row).
"""
        yield from quality(rows, names, s['seeds'])
        yield """
## What it costs

Seconds per step are medians, on a machine that may do other things as well. Peak memory is the
process's largest resident size, which has the mapped file of the model in it. Kept: what all
linears keep of a token's inputs for the backward pass. Decoding: the best of the runs' models, one
prompt.
"""
        yield from cost(rows)
        if any(row["base"] in IN_MEMORY for row in rows):
            yield """
\\* The size is that of the quantised linears, the adapter and the rest of the model. qeft-llm makes
this base in memory for training and cannot run it otherwise: losses and speed are those of a copy
in 16 bits, adapter merged."""
        if any(row["tried"] for row in rows):
            yield """
## Learning rates tried

Validation loss at best, seed 0. Where the best rate is the first or the last one, up to two more
are tried beyond it.
"""
            yield from rates(rows)
        yield """
## A merged model is the tuned one

Validation loss as `finetune` has it in memory and as `perplexity` finds it for the files of the
base and of base + adapter, seed 0; the difference is the largest over the seeds. Below 1e-13 it is
that of a logarithm; the rest is what rounding the merged weights, or QA-LoRA's zero points, to 16
bits costs: of a small change, what is below half a unit in the last place is lost.
"""
        yield from exactness(rows)
    if merging:
        restored = "gives" if merging["restored"] else "DOES NOT give"
        yield f"""
## Merging adapters

Held-out loss; changes are from the first line of each table. Adapters of seed 0, each tuned at the
learning rate that its method had best in {names['target']}. The second model is the FP16 model
tuned on {names['other']} with LoRA and saved; in 4 bits it has the weak columns that the base has.
`unmerge` of base + {names['target']} {restored} the base's bytes back."""
        yield from merged(merging, names)


def main():
    out, setting, *directories = sys.argv[1:]
    setting = load(pathlib.Path(setting))
    rows, merging = [], None
    for directory in map(pathlib.Path, directories):
        if (directory / "row.txt").exists():
            rows.append(read_row(directory, setting))
        else:
            merging = read_merging(directory)
    text = "\n".join(report(datetime.date.today(), setting, rows, merging)) + "\n"
    pathlib.Path(out + ".md").write_text(text)
    with open(out + ".json", "w") as file:
        file.writelines(json.dumps({**setting, **row}) + "\n"
                        for row in rows + ([merging] if merging else []))
    print(text)


if __name__ == "__main__":
    main()
