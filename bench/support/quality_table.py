# SPDX-License-Identifier: Apache-2.0
"""Writes what bench/quality.sh measured as a table and as JSON lines, and prints the table.

    quality_table.py OUT COMMIT SAMPLES SEQ_LEN PROGRAM DIRECTORY...

OUT.md and OUT.json are written. A directory holds linears.json, heldout.json and
heldout_code.json, and is named BLOCK/ROW; every block begins with the row FP16.
"""

import datetime
import json
import pathlib
import sys

TEXTS = {"heldout": "prose", "heldout_code": "code"}

REMARKS = {
    "SmolLM2-135M-Instruct": "Its weights come from a Q4_1 file, a grid in groups of 32 columns: "
    "rows with small groups, or with\nscaled zeros, look better on them than they are.",
    "SmolLM2-135M-Instruct-perturbed": "The same weights off that grid: each moved at random by up "
    "to half a step of it. FP16, also as the\nreference of KL, is these weights.",
}


def read(directory, program):
    path = pathlib.Path(directory)
    linears = json.loads((path / "linears.json").read_text())
    texts = {text: json.loads((path / f"{text}.json").read_text()) for text in TEXTS}
    return {"model": path.parent.name, "row": path.name, "program": program,
            "options": (path / "linears.json.key").read_text().split()[5:],
            "bits_per_weight": linears["bits_per_weight"], "seconds": linears.get("seconds"),
            **texts}


def cells(row, full):
    """Of one row, the columns of one text after the other; `full` is the block's FP16."""
    for text in TEXTS:
        found = row[text]
        yield f"{found['perplexity']:.2f}"
        if row is full:
            yield from ("", "", "")
            continue
        yield f"{100 * (found['perplexity'] / full[text]['perplexity'] - 1):+.1f} %"
        error = found["kl_standard_error"]
        yield f"{found['kl']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        yield f"{100 * found['top1_agreement']:.1f} %"


def table(rows):
    header = ["row", "bits per weight"]
    for text in TEXTS.values():
        header += [f"{text}: perplexity", "change", "KL", "top-1"]
    header.append("quantised in")
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        time = "" if row["seconds"] is None else f"{row['seconds']} s"
        yield "| " + " | ".join([row["row"], f"{row['bits_per_weight']:.2f}",
                                 *cells(row, rows[0]), time]) + " |"


def report(date, commit, samples, seq_len, rows):
    prose, code = (rows[0][text]["tokens"] for text in TEXTS)
    yield f"""# Quality, {date}

Commit {commit}. Calibrated on {samples} samples of {seq_len} tokens of prose; evaluated on
{prose} tokens of other prose and {code} of Python source code, in windows of {seq_len}. KL is
KL(FP16 || row) per token in nats, with its standard error over the windows; these are the same for
all rows, so the error of a difference between rows is smaller. top-1: how often both find the same
token most probable. The seconds are of a machine that may do other things as well."""
    for name in dict.fromkeys(row["model"] for row in rows):
        yield f"\n## {name}\n"
        if name in REMARKS:
            yield REMARKS[name] + "\n"
        yield from table([row for row in rows if row["model"] == name])


def main():
    out, commit, samples, seq_len, program, *directories = sys.argv[1:]
    rows = [read(directory, program) for directory in directories]
    text = "\n".join(report(datetime.date.today(), commit, samples, seq_len, rows)) + "\n"
    pathlib.Path(out + ".md").write_text(text)
    run = {"commit": commit, "samples": int(samples), "seq_len": int(seq_len)}
    with open(out + ".json", "w") as file:
        file.writelines(json.dumps({**run, **row}) + "\n" for row in rows)
    print(text)


if __name__ == "__main__":
    main()
