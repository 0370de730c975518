# SPDX-License-Identifier: Apache-2.0
"""Prose in another language than English, to tune a model on: pages of Debian's handbook.

Split by page as prose.py splits its documents; with validation text, another eighth of the pages is
taken out of the tuning text. Paragraphs that are not translated are left out.
"""

import tempfile
from pathlib import Path

import files
import prose
from files import PrepareError

PACKAGE = "debian-handbook"
MINIMUM_BYTES = {"tuning": 400_000, "heldout": 50_000, "validation": 40_000}
VALIDATION_PART = 1  # of prose.part_of


def pages(root, language):
    """Page name to list of paragraphs."""
    found = sorted((root / "usr/share/doc" / PACKAGE / "html" / language).glob("*.html"))
    return {page.name: list(map(prose.clean, prose.html_paragraphs(page.read_text("utf-8"))))
            for page in found}


def prepare(out, cache, language, validation):
    files.make_directory(cache)
    deb = prose.fetch_package(PACKAGE, cache)
    if deb is None:
        raise PrepareError(f"the package {PACKAGE} is needed")
    with tempfile.TemporaryDirectory() as folder:
        files.run(["dpkg-deb", "-x", str(deb), folder], f"unpacking {deb.name}")
        translated = pages(Path(folder), language)
        english = {p for page in pages(Path(folder), "en-US").values() for p in page}
    if not translated:
        raise PrepareError(f"{deb.name} has no pages in {language}; languages are written as in "
                           "de-DE")
    documents = [(f"{PACKAGE}/{language}/{name}", [p for p in page if p not in english])
                 for name, page in translated.items()]
    parts = prose.split(documents)
    if validation:
        rest = [(name, page) for name, page in documents if prose.part_of(name) != 0]
        tuning, validating = prose.split(rest, VALIDATION_PART)
        parts = (tuning, parts[1], validating)
    names = {f"{part}_{language}.txt": size for part, size in MINIMUM_BYTES.items()}
    prose.write(out, names, parts,
                "prose is told by Latin letters and full stops, so that languages such as de-DE "
                "and fr-FR work, but not zh-CN or ja-JP")
