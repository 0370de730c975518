# SPDX-License-Identifier: Apache-2.0
"""Helpers of the subcommands: errors, replacing files, hashing, the download cache."""

import contextlib
import hashlib
import os
import pathlib
import subprocess


class PrepareError(Exception):
    """Something the user can act on; reported in one line with exit status 1."""


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside `path`, renamed to it on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"cannot make the directory {path}: {error.strerror}") from error


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def default_cache():
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "qeft"


def run(command, purpose, **options):
    """Runs `command` quietly; on failure the error carries the end of what it printed."""
    try:
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, **options)
    except FileNotFoundError as error:
        raise PrepareError(f"{purpose}: the program {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        tail = "\n  ".join(error.stdout.strip().splitlines()[-5:])
        raise PrepareError(f"{purpose}: {' '.join(command)} failed:\n  {tail}") from error
