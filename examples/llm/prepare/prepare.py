#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prepares what the examples run on: a small real model, prose and source code.

    prepare.py model      --out DIR [--gguf FILE]
    prepare.py perturb    --out DIR --model DIR
    prepare.py text       --out DIR
    prepare.py translated --out DIR --language de-DE [--validation]

All need the packages of requirements.txt; texts also apt-get and dpkg-deb, but no root.
"""

import argparse
import pathlib
import sys

import files


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for_model = commands.add_parser("model",
                                    help="SmolLM2-135M-Instruct as a Hugging Face directory")
    for_model.add_argument("--gguf", type=pathlib.Path, metavar="FILE",
                           help="another GGUF file of a Llama model with a SmolLM tokenizer")
    for_perturbed = commands.add_parser("perturb", help="a model with slightly other weights, which "
                                        "are not on the grid of a quantised file")
    for_perturbed.add_argument("--model", type=pathlib.Path, required=True, metavar="DIR",
                               help="what `prepare.py model` wrote")
    for_text = commands.add_parser("text", help="calibration.txt and heldout.txt from Debian "
                                   "packages, heldout_code.txt from Python packages")
    for_translated = commands.add_parser("translated", help="tuning_LANGUAGE.txt and "
                                         "heldout_LANGUAGE.txt from a Debian package")
    for_translated.add_argument("--language", required=True,
                                help="one with Latin letters, such as de-DE or fr-FR")
    for_translated.add_argument("--validation", action="store_true",
                                help="also write validation_LANGUAGE.txt, of pages that "
                                "tuning_LANGUAGE.txt then lacks")
    for command in (for_model, for_perturbed, for_text, for_translated):
        command.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    for command in (for_model, for_text, for_translated):
        command.add_argument("--cache", type=pathlib.Path, default=files.default_cache(),
                             metavar="DIR", help="where downloads are kept (default: %(default)s)")
    options = parser.parse_args()
    try:
        if options.command == "model":
            import model
            model.prepare(options.out, options.gguf, options.cache)
        elif options.command == "perturb":
            import perturb
            perturb.prepare(options.model, options.out)
        elif options.command == "translated":
            import translated_prose
            translated_prose.prepare(options.out, options.cache, options.language,
                                     options.validation)
        else:
            import prose
            import source_code
            prose.prepare(options.out, options.cache)
            source_code.prepare(options.out)
    except files.PrepareError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
