#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the situations that users of the library and the command met:

    cases.py CASES LLM TEST_LLM_LLAMA INCLUDE CXX [MODEL]

CASES/cases and CASES/cases_api hold them (needs numpy); what they show is also tested by kind in the
tests beside this file. MODEL, if it is there, is one that takes seconds to quantise. The last line is
`ok` where every case ends as its first lines say. Exit code 77: no cases, or no numpy."""

import json
import os
import pathlib
import re
import shlex
import struct
import subprocess
import sys
import tempfile

try:
    import numpy
except ImportError:
    print(f"skipped: {sys.executable} has no numpy")
    sys.exit(77)

faults = []


def run(command, timeout=300, **options):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=timeout, text=True, errors="replace", **options)
    return done.returncode, done.stdout


def report(name, good, detail=""):
    print(f"{'ok   ' if good else 'FAULT'} {name}" + (f": {detail}" if detail and not good else ""), flush=True)
    if not good:
        faults.append(name)


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, (kind, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class suite:
    def __init__(self, cases, llm, test_llama, include, compiler, model, work):
        self.cases, self.llm, self.test_llama = cases / "cases", llm, test_llama
        self.api, self.include, self.compiler, self.model, self.work = cases / "cases_api", include, compiler, model, work
        self.text = work / "calibration.txt"
        self.text.write_text("the quick brown fox jumps over the lazy dog " * 400)

    def directories(self, script):
        """What a script makes: every directory that holds a config."""
        out = self.work / script
        status, text = run([sys.executable, self.cases / f"{script}.py", out])
        report(f"{script} is made", status == 0, text)
        return sorted(path.parent for path in out.rglob("config.json"))

    def quantize(self, model, *options, out="quantised"):
        return run([self.llm, "quantize", "--model", model, "--out", self.work / out, "--calibration", self.text,
                    "--samples", 4, "--seq-len", 64, "--group-size", 32, "--weak-columns", 4, *options])

    def refused_at_once(self, name, result, pattern):
        """A message, nothing quantised, nothing left."""
        status, text = result
        report(name, status == 1 and re.search(pattern, text) and "quantising:" not in text and
               not list(self.work.glob("quantised*")), f"exit code {status}, {text[-300:]}")

    def same_logits(self):
        """Every directory with logits.npy, in the form in which test_llm_llama compares them."""
        folder = self.work / "data" / "transformers"
        for script in sorted(path.stem for path in self.cases.glob("*.py") if path.stem != "tiny_model"):
            for model in self.directories(script):
                if (model / "logits.npy").exists() and script != "f32_weights_below_fp16":
                    place = folder / f"{script}.{model.name}"
                    place.mkdir(parents=True)
                    (place / "model").symlink_to(model)
                    ids = numpy.load(model / "ids.npy").astype(numpy.int32)
                    write_safetensors(place / "reference.safetensors", {
                        "tokens": ("I32", ids), "logits": ("F32", numpy.load(model / "logits.npy").astype(numpy.float32)),
                        "prompt": ("I32", ids[:4]), "greedy": ("I32", ids[:0])})
        status, text = run([self.test_llama, "logits and greedy text*"],
                           env={**os.environ, "QEFT_TEST_DATA": str(folder.parent)})
        report(f"logits of {len(list(folder.iterdir()))} models", status == 0 and "relative error" in text, text)

    def values(self):
        generate = [self.llm, "generate", "--prompt", "hello", "--max-tokens", 8, "--model"]
        status, text = run([*generate, self.work / "f32_weights_below_fp16"])
        report("f32_weights_below_fp16", re.search("F32|f32|rounded|FP16", text), text)
        for temperature in (0, 1):
            status, text = run([*generate, self.work / "logits_not_finite", "--temperature", temperature])
            report(f"logits_not_finite at temperature {temperature}", status == 1 and "logits are not finite" in text, text)
        for directory in sorted((self.work / "bf16_layer_below_fp16_scales").iterdir()):
            for weak in (0, 4):
                status, text = self.quantize(directory, "--method", "rtn", "--bits", 8, "--weak-columns", weak, out="q8")
                config = json.loads((self.work / "q8" / "config.json").read_text()) if status == 0 else {}
                name = "model.layers.0.mlp.down_proj"
                squares = json.loads((directory / "squares.json").read_text())[f"{name}.weight"]
                error = (squared_error(config, name) / squares) ** 0.5 if config else 1
                report(f"8-bit error of {directory.name}, {weak} weak columns: {error:.4f}", error < 0.006, text)
                run(["rm", "-rf", self.work / "q8"])
        status, text = self.quantize(self.work / "bf16_weak_column_above_fp16", "--bits", 4, "--weak-columns", 64, out="weak")
        report("bf16_weak_column_above_fp16", status == 0 or "up_proj" in text and "quantising:" not in text, text)

    def early_refusals(self):
        made = self.work / "fault_found_after_quantising"
        self.refused_at_once("head_inf", self.quantize(made / "head_inf"), "lm_head")
        self.refused_at_once("side_file", self.quantize(made / "side_file"), "special_tokens_map")
        self.refused_at_once("activations_not_finite", self.quantize(self.work / "activations_not_finite"),
                             r"(?s)layers?[. ]1.*not finite|not finite.*layers?[. ]1")
        for path in sorted((self.work / "tokenizer_type_errors").iterdir()):
            status, text = run([self.llm, "generate", "--prompt", "a", "--max-tokens", 1, "--model", path])
            key = {"special_is_text": r"added_tokens\[0\]\.special", "id_is_null": r"added_tokens\[1\]\.id",
                   "content_is_missing": r"added_tokens\[2\]\.content"}.get(path.name, path.name.split("_")[0])
            report(f"tokenizer_type_errors/{path.name}", status == 1 and re.search(key, text) and "json.exception" not in text,
                   text)

    def tokens(self):
        for path in sorted((self.work / "added_token_ids").iterdir()):
            expected = json.loads((path / "ids.json").read_text())
            status, text = run([self.llm, "generate", "--max-tokens", 1, "--model", path, "--prompt", expected["text"]])
            report(f"added_token_ids/{path.name}", status == 0 and f"({len(expected['ids'])} tokens)" in text or
                   status == 1 and "<new>" in text, text)
        status, text = run([self.llm, "generate", "--chat", "--prompt", "hi", "--max-tokens", 1, "--model",
                            self.work / "chat_template_has_a_system_turn"])
        report("chat_template_has_a_system_turn", status == 0 and "(46 tokens)" in text, text)

    def tied_head(self):
        status, text = self.quantize(self.work / "tied_config_with_a_head_of_its_own", out="tied")
        written = (self.work / "tied" / "model.safetensors").read_bytes()[:100000] if status == 0 else b""
        report("the quantised copy keeps its head", b'"lm_head.weight"' in written, text)

    def scripts(self):
        for name in ("hostile_tokenizer", "leftovers", "truncated_input", "many_tensors"):
            status, text = run(["bash", self.api / f"{name}.sh", self.llm], timeout=600)
            report(f"{name}.sh", status == 0 and "FAULT" not in text, text)
        model = self.work / "config_python_json"
        if os.geteuid() == 0:
            status, text = run(["bash", self.cases / "output_directory_is_a_mount_point.sh", self.llm, model, self.text])
            report("output_directory_is_a_mount_point.sh", text.startswith("mount:") or  # is not allowed here
                   "config.json" in text or "exit code 1" in text and "quantising:" not in text, text)
        if self.model is not None:
            out = self.work / "interrupted"
            status, text = run(["bash", self.cases / "signal_leaves_partial.sh", self.llm, self.model, self.text, out])
            report("signal_leaves_partial.sh", "exit code 143, left: \n" in text and "exit code 129, left: \n" in text, text)

    def programs(self):
        build = [*shlex.split(self.compiler), "-std=c++17", "-O2", "-pthread", "-I", self.include]
        for name, arguments in (("fork", []), ("reentrant", ["32"]), ("reentrant", ["4000"])):
            program = self.work / name
            status, text = run([*build, self.api / f"{name}.cpp", "-o", program])
            if status == 0:
                status, text = run([program, *arguments], timeout=60)
            report(" ".join([f"{name}.cpp", *arguments]), status == 0 and "FAULT" not in text, text)
        for flags in (["-ffast-math"], ["-ffast-math", "-march=native"], ["-ffinite-math-only", "-march=native"]):
            status, text = run([*build, "-fsyntax-only", "-isystem", "/usr/include/eigen3", *flags, self.api / "fast_math.cpp"])
            report(f"fast_math.cpp {' '.join(flags)}", status != 0 and "compile without -ffast-math" in text, text)


def squared_error(node, layer):
    """The provenance of a layer, wherever config.json keeps it."""
    if isinstance(node, dict):
        if isinstance(node.get(layer), dict) and "squared_error" in json.dumps(node[layer]):
            return squared_error(node[layer], layer)
        if "squared_error" in node:
            return node["squared_error"]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return next((e for e in (squared_error(c, layer) for c in children) if e is not None), None)


def main():
    cases, *arguments = sys.argv[1:]
    if not cases or not (pathlib.Path(cases) / "cases").is_dir():
        print("skipped: no cases (QEFT_CASES_DIR)")
        return 77
    llm, test_llama, include, compiler, *rest = arguments
    model = pathlib.Path(rest[0]) if rest and (pathlib.Path(rest[0]) / "config.json").exists() else None
    with tempfile.TemporaryDirectory() as work:
        s = suite(pathlib.Path(cases), llm, test_llama, include, compiler, model, pathlib.Path(work))
        for part in (s.same_logits, s.values, s.early_refusals, s.tokens, s.tied_head, s.scripts, s.programs):
            part()
    print(f"{len(faults)} faults: {', '.join(faults)}" if faults else "ok")
    return 1 if faults else 0


sys.exit(main())
