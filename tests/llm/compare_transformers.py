#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs models with `transformers` and leaves what llm_llama (llama_test.cpp) compares itself with.

  python -m venv venv && venv/bin/pip install torch transformers
  venv/bin/python tests/llm/compare_transformers.py --model DIR --text FILE --out $QEFT_TEST_DATA

OUT/transformers/NAME/ gets `model` (a link, or a random model of the family) and
`reference.safetensors`: `tokens` and their `logits` in FP32, and `greedy`, the continuation of
`prompt`. Weights are FP16; all arithmetic is FP32.
"""

import argparse
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

GREEDY_TOKENS = 64


def write_reference(model, tokens, prompt, path):
    model = model.float().eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float()
        greedy = []
        step, cache = list(prompt), None
        for _ in range(GREEDY_TOKENS):
            output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            step, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
            greedy += step
    save_file(
        {
            "tokens": torch.tensor(tokens, dtype=torch.int32),
            "logits": logits.contiguous(),
            "prompt": torch.tensor(prompt, dtype=torch.int32),
            "greedy": torch.tensor(greedy, dtype=torch.int32),
        },
        path,
    )


def real_model(directory, text, out):
    """256 tokens of a text; a chat prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float16, attn_implementation="eager"
    )
    tokens = tokenizer(text)["input_ids"][:256]
    prompt = tokenizer(
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    )["input_ids"]
    (out / "model").symlink_to(pathlib.Path(directory).resolve())
    write_reference(model, tokens, prompt, out / "reference.safetensors")


def random_models():
    """A small model for each feature of the family that the real model lacks."""
    small = dict(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=512, rms_norm_eps=1e-5,
        initializer_range=0.1, tie_word_embeddings=False,
    )
    llama3 = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64, rope_theta=10000.0,
    )
    yield "llama-biases", transformers.LlamaConfig(
        **{**small, "attention_bias": True, "mlp_bias": True}
    )
    yield "llama3-rope", transformers.LlamaConfig(**small, rope_parameters=llama3)
    yield "linear-rope", transformers.LlamaConfig(
        **small, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
    )
    yield "mistral-window", transformers.MistralConfig(**small, sliding_window=40, head_dim=32)
    yield "qwen2", transformers.Qwen2Config(**{**small, "tie_word_embeddings": True})


def random_model(config, out):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start as constants, which would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.half().save_pretrained(out / "model")
    # half() has also rounded the frequencies of the rotary embedding: read the weights back.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out / "model", dtype=torch.float16, attn_implementation="eager"
    )
    tokens = torch.randint(config.vocab_size, (256,)).tolist()
    write_reference(model, tokens, tokens[:20], out / "reference.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--text", required=True, help="text file, of 256 tokens at least")
    parser.add_argument("--out", required=True, help="the test data directory")
    arguments = parser.parse_args()
    root = pathlib.Path(arguments.out) / "transformers"
    unfinished = root.with_name("transformers.unfinished")  # renamed once it is complete
    shutil.rmtree(unfinished, ignore_errors=True)

    def fresh(name):
        (unfinished / name).mkdir(parents=True)
        return unfinished / name

    text = pathlib.Path(arguments.text).read_text(encoding="utf-8")
    real_model(arguments.model, text[:20000], fresh(pathlib.Path(arguments.model).name))
    for name, config in random_models():
        random_model(config, fresh(name))
    shutil.rmtree(root, ignore_errors=True)
    unfinished.rename(root)
    print(f"wrote {root}")


if __name__ == "__main__":
    main()
