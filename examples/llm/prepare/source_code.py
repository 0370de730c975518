# SPDX-License-Identifier: Apache-2.0
"""Held-out text of another domain than English prose: Python source code.

It comes from packages that requirements.txt pins, so it is the same everywhere: the functions and
classes at the top level of their modules that have no docstrings, which are prose again. They are
in the order of their hashes, so that any part of the file is a sample of all of them.
"""

import ast
import hashlib
import importlib.util
import sys
from pathlib import Path

import files
from files import PrepareError

PACKAGES = ("gguf", "numpy")
NAME = "heldout_code.txt"
MINIMUM_BYTES = 300_000
SMALLEST, LARGEST = 300, 6_000  # characters of a definition


def modules(package):
    """Paths of its modules, but for tests, which are mostly tables of numbers."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise PrepareError(f"the package {package} is not installed (see requirements.txt)")
    root = Path(found.origin).parent
    return sorted(path for path in root.rglob("*.py")
                  if "tests" not in path.relative_to(root).parts)


def definitions(source):
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            yield "\n".join(lines[first - 1:node.end_lineno])


def is_code(definition):
    return (SMALLEST <= len(definition) <= LARGEST and
            '"""' not in definition and "'''" not in definition)


def prepare(out):
    found = {definition for package in PACKAGES for path in modules(package)
             for definition in filter(is_code, definitions(path.read_text(encoding="utf-8")))}
    ordered = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    text = "".join(definition + "\n\n\n" for definition in ordered)
    size = len(text.encode())
    if size < MINIMUM_BYTES:
        raise PrepareError(f"only {size} bytes of text for {NAME}, {MINIMUM_BYTES} are needed; are "
                           "the packages those of requirements.txt?")
    files.make_directory(out)
    try:
        files.write_text(out / NAME, text)
    except OSError as error:
        raise PrepareError(f"cannot write {out / NAME}: {error.strerror}") from error
    print(f"prepare: wrote {out / NAME}: {len(ordered)} definitions, {size} bytes, "
          f"SHA-256 {files.sha256(out / NAME)[:16]}", file=sys.stderr)
