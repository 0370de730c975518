# SPDX-License-Identifier: Apache-2.0
"""Steps of LoRA by PyTorch and peft on a CPU, for bench/training_step.sh.

    training_step_torch.py --model DIR --text FILE --seq-len L --steps N --threads N
                           --variant NAME --rank R

The text is one sample. A variant is the type of the frozen weights, and whether activations are
found again in the backward pass, block by block: fp32, fp32-recompute, bf16-recompute,
nf4-recompute (bitsandbytes, double quantisation, BF16 products), int8-recompute (torchao). Prints a
JSON object per step and one for the result. What is missing is the last line on stderr.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import peft
    import tokenizers
    import torch
    import transformers
except ImportError as missing:
    sys.exit(str(missing))

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(directory, weights):
    """(model, packages it needs)"""
    options = {"dtype": torch.float32 if weights == "fp32" else torch.bfloat16}
    packages = ["torch", "transformers", "peft"]
    if weights == "nf4":
        packages.append("bitsandbytes")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
    elif weights == "int8":
        packages.append("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        options["quantization_config"] = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, device_map="cpu", **options)
    return model, packages


def address(tensor):
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # of a wrapper, as torchao's weights are
        return None


def saved_bytes(model, ids):
    """What the linears keep of their inputs for the backward pass, each tensor counted once."""
    kept, weights = {}, {None, *map(address, model.parameters())}

    def pack(tensor):
        at = address(tensor)
        if at not in weights and tensor.shape[-2:-1] == ids.shape[-1:]:
            kept[at] = tensor.nbytes
        return tensor

    def watched(forward):
        def run(*given, **named):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*given, **named)
        return run

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            module.forward = watched(module.forward)
    output = model(input_ids=ids)  # keeps what is counted, so that no address is used twice
    size = sum(kept.values())
    del output
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    for option in ("--seq-len", "--steps", "--threads", "--rank"):
        parser.add_argument(option, type=int, required=True)
    parser.add_argument("--variant", required=True)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    tokenizer = tokenizers.Tokenizer.from_file(str(o.model / "tokenizer.json"))
    ids = tokenizer.encode(o.text.read_text("utf-8"), add_special_tokens=False).ids
    if len(ids) != o.seq_len:
        sys.exit(f"{o.text} has {len(ids)} tokens, but must have {o.seq_len}")
    ids = torch.tensor([ids])

    weights, _, recompute = o.variant.partition("-")
    model, packages = load(o.model, weights)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=o.rank, lora_alpha=o.rank, lora_dropout=0.0, target_modules=PROJECTIONS,
        task_type="CAUSAL_LM"))
    model.config.use_cache = False
    model.train()
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    for step in range(1, o.steps + 1):
        begin = time.perf_counter()
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimiser.step()
        seconds = time.perf_counter() - begin
        print(json.dumps({"step": step, "loss": loss.item(), "seconds": seconds}), flush=True)

    del loss
    if recompute:
        model.gradient_checkpointing_disable()
    moments = [t for state in optimiser.state.values() for name, t in state.items()
               if name in ("exp_avg", "exp_avg_sq")]
    print(json.dumps({
        "parameters": sum(p.numel() for p in trained),
        "saved_bytes_per_token": saved_bytes(model, ids) / o.seq_len,
        "optimiser_bytes": sum(t.nbytes for t in moments),
        "packages": {name: importlib.metadata.version(name) for name in packages}}))


if __name__ == "__main__":
    main()
