#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes what Hugging Face `tokenizers` makes of 200 KB of text, for tokenizer_corpus_test.cpp.

    tokenizer_corpus.py --tokenizer DIR/tokenizer.json --out $QEFT_TEST_DATA/tokenizer

From the given tokenizer (SmolLM2) it derives others with the components of GPT-2, Llama 3 and Qwen2
and with the rarer options; on the text itself it trains one in the style of SentencePiece, for those
of Llama 2 and Mistral. For each it writes NAME.tokenizer.json and NAME.cases.json, a list of
{text, ids, plain_ids, decoded, decoded_reversed}: text is hexadecimal and need not be UTF-8;
plain_ids are without the special tokens in the text; decoded and, of the ids from the last to the
first, decoded_reversed are hexadecimal. The text is the same on every run.
"""

import argparse
import copy
import json
import os
import pathlib
import random
import sys
import unicodedata

import tokenizers

GPT4_LIKE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def added(token_id, content, **options):
    return {"id": token_id, "content": content, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": False, **options}


def template(token, token_id):
    """A post-processor that puts a token in front."""
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}


def byte_level_variants(smollm2):
    """Name and document of each tokenizer over bytes to test."""
    yield "smollm2", smollm2

    gpt2 = copy.deepcopy(smollm2)
    gpt2["pre_tokenizer"] = dict(BYTE_LEVEL, add_prefix_space=True, use_regex=True)
    gpt2["model"]["merges"] = [" ".join(pair) for pair in gpt2["model"]["merges"]]
    gpt2["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
    yield "gpt2", gpt2

    llama3 = copy.deepcopy(smollm2)
    llama3["pre_tokenizer"] = sequence(split(GPT4_LIKE % "{1,3}"), BYTE_LEVEL)
    llama3["model"]["ignore_merges"] = True
    llama3["post_processor"] = {"type": "Sequence",
                                "processors": [BYTE_LEVEL, template("<|im_start|>", 1)]}
    yield "llama3", llama3

    qwen2 = copy.deepcopy(smollm2)
    qwen2["normalizer"] = {"type": "NFC"}
    qwen2["pre_tokenizer"] = sequence(split(GPT4_LIKE % ""), BYTE_LEVEL)
    size = len(qwen2["model"]["vocab"])
    qwen2["added_tokens"] += [added(size, "<|object_ref|>", special=True),
                              added(size + 1, "<tool_call>"), added(size + 2, "<tool_call>\n")]
    yield "qwen2", qwen2

    options = copy.deepcopy(smollm2)
    options["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKD"},
                                                                 {"type": "NFKC"}]}
    options["pre_tokenizer"] = sequence(
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated", "invert": False},
        split(r"\S+|\s{2,}", "Removed", invert=True),
        dict(BYTE_LEVEL, add_prefix_space=True))
    options["model"].update(unk_token="<|endoftext|>", fuse_unk=True)
    options["added_tokens"] += [
        added(size, "<mask>", lstrip=True, special=True), added(size + 1, "<sep>", rstrip=True),
        added(options["model"]["vocab"]["the"], "the", single_word=True),
        added(size + 2, "ﬁn", normalized=True),
        added(size + 3, "a b", lstrip=True, rstrip=True, normalized=True, single_word=True)]
    yield "options", options


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def sentencepiece(texts):
    """The document of Llama 2 with 256 byte tokens and merges trained on the texts.

    Its words are whole texts, so that merges reach across spaces and line ends; 600 characters have
    a token.
    """
    named = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.train_from_iterator(
        ["▁" + text.decode("utf-8", errors="replace").replace(" ", "▁") for text in texts],
        tokenizers.trainers.BpeTrainer(vocab_size=3000, min_frequency=3, show_progress=False,
                                       limit_alphabet=600, max_token_length=16,
                                       special_tokens=named + byte_tokens))
    document = json.loads(trained.to_str())
    # All of them became added tokens; byte tokens are not recognised in the text.
    document["added_tokens"] = [added(i, token, special=True) for i, token in enumerate(named)]
    document["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]}
    document["post_processor"] = template("<s>", 1)
    document["decoder"] = {"type": "Sequence", "decoders": [
        replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return document


def without_bytes(document):
    """Renames two byte tokens, so that many characters are unknown after all."""
    vocab = document["model"]["vocab"]
    for byte in (0x82, 0xE1):
        vocab[f"no {byte}"] = vocab.pop(f"<0x{byte:02X}>")


def add(document, content, **options):
    """Adds a token, with a new id unless it is in the vocabulary."""
    vocab = document["model"]["vocab"]
    unused = max(len(vocab), *(token["id"] + 1 for token in document["added_tokens"]))
    document["added_tokens"].append(added(vocab.get(content, unused), content, **options))


def sentencepiece_variants(llama2):
    """Name and document of each tokenizer in the style of SentencePiece to test."""
    yield "llama2", llama2

    mistral = copy.deepcopy(llama2)
    mistral["normalizer"] = None
    mistral["pre_tokenizer"] = metaspace("first", split=False)
    add(mistral, "<|im_start|>", special=True)
    add(mistral, "<|im_end|>", special=True, lstrip=True)
    add(mistral, "<mask>", rstrip=True)
    yield "mistral", mistral

    first = copy.deepcopy(llama2)
    first["normalizer"] = None
    first["pre_tokenizer"] = sequence(
        {"type": "Digits", "individual_digits": True}, split(r"[.:]+", "Removed"),
        metaspace("first", split=True))
    first["model"]["ignore_merges"] = True
    yield "first", first

    always = copy.deepcopy(llama2)
    always["normalizer"] = {"type": "NFKC"}
    always["pre_tokenizer"] = dict(metaspace("always", split=True), add_prefix_space=True)
    always["decoder"] = metaspace("always", split=True)
    add(always, "<sep>")
    add(always, "a b", lstrip=True)
    without_bytes(always)
    always["model"]["fuse_unk"] = False
    yield "always", always

    never = copy.deepcopy(llama2)
    never["normalizer"] = replace("the", "zwölf ")
    never["pre_tokenizer"] = metaspace("never", split=False)
    never["decoder"] = {"type": "Sequence", "decoders": [
        metaspace("never", split=False), {"type": "ByteFallback"}, {"type": "Fuse"}]}
    never["model"].update(byte_fallback=False, unk_token=None)
    yield "never", never

    # As in the first conversions of Llama: added tokens are normalised.
    normalized = copy.deepcopy(llama2)
    for token in normalized["added_tokens"]:
        token["normalized"] = True
    add(normalized, "<|im_end|>", normalized=True, special=True)
    add(normalized, "a b", normalized=True)
    add(normalized, "é", single_word=True)
    normalized["decoder"]["decoders"][-1]["start"] = 3
    without_bytes(normalized)
    yield "normalized", normalized


PROSE = [
    "It's the first time they've said we'll go; I'd rather not, but you're sure? Don't, won't.",
    "The QUICK brown fox JUMPED over 13 lazy dogs, 3.14159 times, on 2024-02-29 at 12:30:05.",
    "“Typographic” quotes—and dashes… and ‘single’, naïve café façade, Ångström, Straße, ŒUVRE.",
    "ALL'S WELL THAT'S 'ENDED, 'S 'T 'RE 'VE 'M 'LL 'D 'ſ o'clock rock'n'roll",
]
CODE = [
    "def f(x: int = 0) -> str:\n\treturn f\"{x!r:>10}\"  # comment\n\n\nclass A(B):\n    pass\n",
    "for (std::size_t i = 0; i < v.size(); ++i) { v[i] <<= 2; } // loop\r\n#include <vector>\r\n",
    "SELECT * FROM `t` WHERE a != 'b' AND c >= 10e-3;\n\n\n\n-- end\n",
    "fn main() { let x: Vec<_> = (0..10).map(|i| i * 2).collect(); println!(\"{:?}\", x); }\n",
    "<div class=\"a b\">&nbsp;&amp;</div>\n<!-- \t -->\n{\"key\": [1, 2.5, null, \"\\u00e9\"]}\n",
    "if [ -n \"$X\" ]; then\n        echo \"${X%%.*}\" | sed 's/^/    /' >&2\nfi\n\t\t\t\n",
]
LANGUAGES = [
    "Привет, мир! Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΟΔΥΣΣΕΥΣ",
    "שלום עולם, זה מבחן. שָׁלוֹם", "مرحبا بالعالم، ١٢٣٤٥ هذا اختبار. العَرَبِيَّة",
    "नमस्ते दुनिया, यह एक परीक्षण है। १२३४५", "สวัสดีชาวโลก นี่คือการทดสอบ ๑๒๓๔๕",
    "你好，世界！这是一个测试。一二三四五",
    "こんにちは世界。これはテストです。カタカナ ﾊﾝｶｸ", "안녕하세요 세계, 이것은 시험입니다.",
    "Xin chào thế giới, đây là một bài kiểm tra.",
    "გამარჯობა მსოფლიო", "Բարեւ աշխարհ", "ሰላም ልዑል", "வணக்கம் உலகம்", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "𐍅𐌿𐌻𐍆𐌹𐌻𐌰 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    "ⅣⅧ ½ ¾ ² ³ ① ⑳ ㊿ 〇 ௧௨௩ ໑໒໓", "ﬁne ﬂow oﬃce ﬅ Å Ω ㎏ ㍿ ﷺ",
]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "☃️", "🧑🏿‍🚀", "❤️‍🔥", "🫠"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u0085", "\u2003", "\u2028",
          "\u2029", "\u200b", "\u180e", "\u202f", "\ufeff", "\u1680", "\u000b", "\u000c",
          "\u001c", "\u205f"]
SPECIAL = ["<s>", "</s>", "<unk>", "<0x41>", "▁", "▁<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<filename>", "<|im_start",
           "|im_end|>", "<mask>", "<sep>", "the", "<tool_call>", "<tool_call>\n", "<|object_ref|>",
           "fin", "ﬁn", "a b", "<<|im_end|>>"]
MARKS = ["\u0301", "\u0308", "\u0327", "\u0323", "\u0300", "\u0e31", "\u064b", "\u05b8", "\u20dd",
         "\u3099"]


def assigned_characters():
    """A character of every block and category, no surrogates or private ones.

    Limited to Unicode 3.2, so that the Unicode version of a library makes no difference.
    """
    old = unicodedata.ucd_3_2_0
    return [chr(c) for c in range(0x30000) if old.category(chr(c)) not in ("Cn", "Cs", "Co")]


def documents(seed):
    """At least 200 KB of bytes in documents of one kind each, and some mixtures."""
    rng = random.Random(seed)
    characters = assigned_characters()

    def spaces():
        return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 6)))

    def some(items, low, high, joints):
        return "".join(rng.choice(items) + rng.choice(joints)
                       for _ in range(rng.randint(low, high)))

    def combining():
        return "".join(rng.choice("aeiouAEInsgk한가カ나ש") +
                       "".join(rng.choice(MARKS) for _ in range(rng.randint(0, 4)))
                       for _ in range(200))

    def noise():
        return "".join(rng.choice(characters) for _ in range(400))

    def mixture():
        parts = PROSE + CODE + LANGUAGES + EMOJI + SPACES + SPECIAL + MARKS
        return "".join(piece if rng.random() < 0.6 else piece[rng.randrange(len(piece)):]
                       for piece in rng.choices(parts, k=60))

    def raw_bytes():
        common = b"ab \xc3\xe2\x80\xf0\xed\xa0\xf4"
        return bytes(rng.choice([rng.randrange(256), rng.choice(common)]) for _ in range(600))

    texts = ["", " ", "\n", "a", "\x00", "<|im_start|>", "  <|im_end|>  ", "e\u0301", "\u0301",
             "\ufffd"]
    texts += [" " * 5000, "a" * 5000, "ab" * 3000, "\n" * 3000, "1" * 1000, "🙂" * 500,
              "\u3000" * 500, " \n" * 500, "-" * 3000 + "x", "\t" * 999 + " x", "é" * 1000, "Ġ" * 500,
              "e\u0301" * 500]
    texts += ["".join(characters[i:i + 500]) for i in range(0, len(characters), 20 * 500)]
    makers = [lambda: some(PROSE, 2, 6, [" ", "\n", "  "]), lambda: some(CODE, 1, 4, ["", "\n"]),
              lambda: some(LANGUAGES, 2, 6, [" ", "\n", "", "。"]),
              lambda: some(EMOJI, 10, 60, ["", " ", "a"]),
              lambda: some(SPECIAL, 5, 30, ["", " ", "\n ", "x"]),
              lambda: "".join(word + spaces()
                              for word in rng.choices("the a I 12 x, . é 你 “".split(), k=80)),
              combining, noise, mixture, mixture, raw_bytes]
    texts += [maker() for _ in range(20) for maker in makers]
    return [text if isinstance(text, bytes) else text.encode() for text in texts]


def cases(tokenizer, texts):
    strings = [text.decode("utf-8", errors="replace") for text in texts]
    results = []
    for special in (True, False):
        tokenizer.encode_special_tokens = not special
        results.append([encoding.ids for encoding in
                        tokenizer.encode_batch(strings, add_special_tokens=False)])
    return [{"text": text.hex(), "ids": ids, "plain_ids": plain,
             "decoded": tokenizer.decode(ids, skip_special_tokens=False).encode().hex(),
             "decoded_reversed":
                 tokenizer.decode(ids[::-1], skip_special_tokens=False).encode().hex()}
            for text, ids, plain in zip(texts, *results)]


def write(path, document):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts = documents(seed=1)
    size = sum(map(len, texts))
    if size < 200_000:
        sys.exit(f"tokenizer_corpus: only {size} bytes of text")
    smollm2 = json.loads(options.tokenizer.read_text(encoding="utf-8"))
    for name, document in [*byte_level_variants(smollm2),
                           *sentencepiece_variants(sentencepiece(texts))]:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
        write(options.out / f"{name}.tokenizer.json", document)
        write(options.out / f"{name}.cases.json", cases(tokenizer, texts))
    print(f"tokenizer_corpus: {len(texts)} texts, {size} bytes, in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
