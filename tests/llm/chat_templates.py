#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates with jinja2, set up as `transformers` sets it up, and prints what
llm_chat_template (chat_template_test.cpp) compares itself with: a JSON list of
{template, messages, tokens, text or null}. null stands for an error of the template itself.

  python3 tests/llm/chat_templates.py --cases 200 --seed 1     (needs python3-jinja2)

Half of the cases are the published templates of chat_templates/ with random conversations, half are
random templates, mostly about white space."""

import argparse
import json
import pathlib
import random

import jinja2
import jinja2.ext
import jinja2.sandbox

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WORDS = ["hi", "Why is the sky blue?", " two  spaces ", "\nlines\n\n", "é你好", "", "it's", "<|im_end|>",
         "{{ x }}", "\t"]


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def render(env, template, messages):
    try:
        return env.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **TOKENS
        )
    except (jinja2.exceptions.TemplateError, TypeError):
        return None


def conversation(r):
    content = lambda: "".join(r.choice(WORDS) for _ in range(r.randint(1, 3)))
    turns = []
    if r.random() < 0.4:
        turns.append("system")
    for i in range(r.randint(1, 5)):
        turns.append(("user", "assistant")[i % 2] if r.random() < 0.95 else r.choice(["user", "system"]))
    return [{"role": role, "content": content()} for role in turns]


EXPRESSIONS = [
    "messages | length", "messages[0]['content'] | trim", "messages[-1].role", "bos_token ~ 1 + 2 * 3",
    "'a' if messages | length > 2 else 'b'", "'only' if false", "messages[0].role.strip() | upper",
    "missing", "missing | default('none')", "not true or 1 in [1, 2]", "'user' in messages[0].role",
    "(messages | first).role ~ (messages | last)['role']", "-3 % 5", "7 // 2 - 1",
    "messages[0].content | tojson", "[1, 'a', none, true] | tojson", "{'a': 1, 'b': [2]} | tojson",
    "'a,b,c'.split(',') | join('-')", "'aXbX'.replace('X', '')", "messages[0].missing is defined",
    "none is none and tools is none", "messages[0].content is string", "'x' 'y'", "5 is odd",
    "messages | selectattr('role', 'equalto', 'user') | list | length", "'Ab' | lower ~ 'ab' | capitalize",
    "messages[1:][0].role", "messages[:-1] | length", "1 < 2 and 'a' < 'b'", "'a' is not none",
    "messages[0].get('role', 'x')", "range(3) | join", "not messages is string", "'%'", "\"}}\"", "'{{'",
    "'abc'[1:]", "'abc'[-1]", "messages[0]['role'].startswith('us')", "1 is in [1]", "'b' is eq 'b'",
]
PIECES = ["text", " ", "\n", "\n\n", "  \n", "\t", "x ", " y", "{ ", "}", "#"]


def tag(r, kind, body):
    opening, closing = {"%": ("{%", "%}"), "{": ("{{", "}}"), "#": ("{#", "#}")}[kind]
    left = r.choice(["", "", "-", "+" if kind == "%" else ""])
    right = r.choice(["", "", "-", "+" if kind == "%" else ""])
    return f"{opening}{left} {body} {right}{closing}"


def random_template(r, depth=0):
    out = ""
    for _ in range(r.randint(1, 5)):
        out += "".join(r.choice(PIECES) for _ in range(r.randint(0, 3)))
        kind = r.random()
        if kind < 0.35:
            out += tag(r, "{", r.choice(EXPRESSIONS))
        elif kind < 0.45:
            out += tag(r, "#", "a comment")
        elif kind < 0.55:
            out += tag(r, "%", f"set x = {r.choice(EXPRESSIONS)}") + tag(r, "{", "x")
        elif depth < 3 and kind < 0.75:
            out += tag(r, "%", "if " + r.choice(EXPRESSIONS)) + random_template(r, depth + 1)
            if r.random() < 0.5:
                out += tag(r, "%", "elif x") + random_template(r, depth + 1)
            if r.random() < 0.5:
                out += tag(r, "%", "else") + random_template(r, depth + 1)
            out += tag(r, "%", "endif")
        elif depth < 3:
            head = r.choice(["for m in messages", "for m in messages if m.role == 'user'", "for m in []",
                             "for k, v in messages[0].items()"])
            out += tag(r, "%", head) + random_template(r, depth + 1)
            out += tag(r, "{", r.choice(["loop.index", "loop.first", "loop.last", "loop.revindex0", "m.role"]))
            if r.random() < 0.2:
                out += "{% if loop.index0 == 1 %}{% break %}{% endif %}"
            if r.random() < 0.3:
                out += tag(r, "%", "else") + "none"
            out += tag(r, "%", "endfor")
    return out


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--cases", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=1)
    arguments = arguments.parse_args()
    env = environment()
    folder = pathlib.Path(__file__).parent / "chat_templates"
    published = [path.read_text() for path in sorted(folder.glob("*.jinja"))]
    cases = []
    for i in range(arguments.cases):
        r = random.Random(f"{arguments.seed} {i}")
        template = published[i // 2 % len(published)] if i % 2 == 0 else random_template(r)
        messages = conversation(r)
        cases.append({"template": template, "messages": messages, "tokens": TOKENS,
                      "text": render(env, template, messages)})
    print(json.dumps(cases))


main()
