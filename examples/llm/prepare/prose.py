# SPDX-License-Identifier: Apache-2.0
"""English prose from Debian packages, split by document into calibration and held-out text.

A document is a page of a manual or a run of entries of the Jargon File. One document in eight,
chosen by the hash of its name, is held out, so that the split depends neither on the order of the
files nor on the machine. A held-out paragraph that shares a run of `OVERLAP` words with the
calibration text (quotations, notices repeated on many pages) is dropped.
"""

import gzip
import hashlib
import html.parser
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import files
from files import PrepareError

# Package: the pages to take, relative to /usr/share/doc. The first is much longer than the others.
SOURCES = {
    "anarchism": "anarchism/html/sec[A-C]*.html",
    "debian-handbook": "debian-handbook/html/en-US/*.html",
    "harden-doc": "harden-doc/html/en-US/*.html",
    "jargon-text": "jargon-text/jargon.txt.gz",
}
MINIMUM_BYTES = {"calibration.txt": 1_500_000, "heldout.txt": 200_000}
HELD_OUT_SHARE = 8  # one document in so many
OVERLAP = 13        # words
ENTRIES = 100       # paragraphs of the Jargon File that make a document

BLOCKS = frozenset("address article aside blockquote body br dd div dl dt figure footer "
                   "h1 h2 h3 h4 h5 h6 header hr html li main nav ol p pre section table td th tr "
                   "ul".split())
SKIPPED = frozenset("dl head nav pre script style table".split())  # dl: tables of contents


class ParagraphParser(html.parser.HTMLParser):
    """Collects the text between the boundaries of block elements."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs = []
        self._text = []
        self._skipped = []  # open elements whose text is left out

    def _end_paragraph(self):
        self.paragraphs.append("".join(self._text))
        self._text.clear()

    def handle_starttag(self, tag, attrs):
        if tag in BLOCKS:
            self._end_paragraph()
        if tag in SKIPPED:
            self._skipped.append(tag)

    def handle_endtag(self, tag):
        if tag in BLOCKS:
            self._end_paragraph()
        if tag in self._skipped:
            while self._skipped.pop() != tag:
                pass

    def handle_startendtag(self, tag, attrs):
        if tag in BLOCKS:
            self._end_paragraph()

    def handle_data(self, data):
        if not self._skipped:
            self._text.append(data)

    def close(self):
        super().close()
        self._end_paragraph()


def html_paragraphs(text):
    parser = ParagraphParser()
    parser.feed(text)
    parser.close()
    return parser.paragraphs


def jargon_paragraphs(text):
    """Paragraphs of the Jargon File without its code and dialogue, which it indents further."""
    blocks = re.split(r"\n\s*\n", text)
    return [re.sub(r"[{}]", "", block)  # {links}
            for block in blocks if "\n        " not in "\n" + block]


def clean(paragraph):
    """One line without the marks of footnotes; split() also turns no-break spaces into spaces."""
    return " ".join(re.sub(r"\s*\[\d+\]", "", paragraph).split())


def is_prose(paragraph):
    if len(paragraph) < 80 or "\N{REPLACEMENT CHARACTER}" in paragraph or "FIXME" in paragraph:
        return False
    plain = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    sentence = paragraph[-1] in ".!?\"')]:”’" and re.search(r"[a-z]{2}", paragraph)
    return bool(sentence) and plain >= 0.93 * len(paragraph)


def fetch_package(package, cache):
    """Path of the .deb of `package`, or None when the archive does not have it."""
    if found := sorted(cache.glob(f"{package}_*.deb")):
        return found[-1]
    # As root apt drops its privileges for downloads and then often cannot write to the folder.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            files.run(["apt-get", "download", *sandbox, package], f"getting {package}", cwd=folder)
        except PrepareError as error:
            print(f"prepare: warning: {error}", file=sys.stderr)
            return None
        deb = next(Path(folder).glob("*.deb"))
        return Path(shutil.move(deb, cache / deb.name))


def documents(package, deb):
    """Pairs of document name and list of paragraphs."""
    with tempfile.TemporaryDirectory() as folder:
        files.run(["dpkg-deb", "-x", str(deb), folder], f"unpacking {deb.name}")
        for path in sorted(Path(folder, "usr/share/doc").glob(SOURCES[package])):
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode("utf-8", errors="replace")
            if path.suffix == ".gz":
                paragraphs = jargon_paragraphs(text)
                for start in range(0, len(paragraphs), ENTRIES):
                    yield f"{package}/{start // ENTRIES:04}", paragraphs[start:start + ENTRIES]
            else:
                yield f"{package}/{path.name}", html_paragraphs(text)


def word_runs(paragraph):
    words = re.findall(r"\w+", paragraph.lower())
    return {" ".join(words[i:i + OVERLAP]) for i in range(max(1, len(words) - OVERLAP + 1))}


def part_of(name):
    """Which of HELD_OUT_SHARE parts the document of this name is in."""
    return hashlib.sha256(name.encode()).digest()[-1] % HELD_OUT_SHARE


def split(all_documents, held_out_part=0):
    """(calibration, held out): lists of paragraphs.

    The documents are in the order of the hashes of their names, which mixes the packages, so that
    any part of the files is a sample of all of them.
    """
    hashed = sorted((hashlib.sha256(name.encode()).digest(), name, paragraphs)
                    for name, paragraphs in all_documents)
    parts = {False: [], True: []}
    for _, name, paragraphs in hashed:
        parts[part_of(name) == held_out_part] += filter(is_prose, map(clean, paragraphs))
    calibration = list(dict.fromkeys(parts[False]))
    known = set().union(*map(word_runs, calibration))
    held_out = [p for p in dict.fromkeys(parts[True]) if known.isdisjoint(word_runs(p))]
    if not set(calibration).isdisjoint(held_out):
        raise AssertionError("a held-out paragraph is part of the calibration text")
    return calibration, held_out


def prepare(out, cache):
    files.make_directory(cache)
    all_documents = []
    for package in SOURCES:
        if deb := fetch_package(package, cache):
            found = list(documents(package, deb))
            print(f"prepare: {deb.name}: {len(found)} documents", file=sys.stderr)
            all_documents += found
    write(out, MINIMUM_BYTES, split(all_documents),
          "are the package lists there (apt-get update)?")


def write(out, minimum_bytes, parts, remedy):
    """Writes paragraphs; minimum_bytes gives the names of the files and what each must have.

    `remedy` is what a message about too little text ends with.
    """
    for name, paragraphs in zip(minimum_bytes, parts):
        text = "".join(paragraph + "\n\n" for paragraph in paragraphs)
        size = len(text.encode())
        if size < minimum_bytes[name]:
            raise PrepareError(f"only {size} bytes of text for {name}, {minimum_bytes[name]} are "
                               f"needed; {remedy}")
        files.make_directory(out)
        try:
            files.write_text(out / name, text)
        except OSError as error:
            raise PrepareError(f"cannot write {out / name}: {error.strerror}") from error
        print(f"prepare: wrote {out / name}: {len(paragraphs)} paragraphs, {size} bytes, "
              f"SHA-256 {files.sha256(out / name)[:16]}", file=sys.stderr)
