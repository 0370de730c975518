#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Time, memory and saved activations of one training step (forward, backward, optimiser; batch 1) by
# every method of `qeft-llm finetune`, beside PyTorch and peft, as tables:
#   bench/training_step.sh [--seq-len L] [--rounds N] [--steps N] [--threads N] [--rows PATTERNS]
# Of SmolLM2-135M-Instruct and of one block of Llama-2 7B with random weights. In every round each
# row is a process of its own: one step to warm up, then STEPS that count. PATTERNS, separated by
# commas, choose MODEL/ROW: 'SmolLM2*/QEFT*,*/*LoRA*'.
# PyTorch is that of $QEFT_TORCH_PYTHON, else of python3; it needs torch, transformers and peft, and
# for one row each bitsandbytes and torchao. What is absent is named below the table.
# Writes bench/results/DATE-training-step.md and .json (JSON lines), or with --rows
# build/training_step/part.md and .json. Models stay in build/training_step; times are taken anew.
# Needs 8 GiB of memory, 4 GiB of disk and a machine that does nothing else.
set -euo pipefail

seq_len=512 rounds=3 steps=4 threads=$(nproc) patterns='*'
usage() { sed -n '3,14s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --seq-len) seq_len=${2:?}; shift 2 ;;
    --rounds) rounds=${2:?}; shift 2 ;;
    --steps) steps=${2:?}; shift 2 ;;
    --threads) threads=${2:?}; shift 2 ;;
    --rows) patterns=${2:?}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
[ $((rounds * steps)) -ge 2 ] || { echo "--rounds x --steps must be at least 2" >&2; exit 2; }
cd "$(dirname "$0")/.."
model="" work=build/training_step
source examples/llm/prepare/steps.sh
source bench/support/rows.sh
build_llm
prepare_inputs

helper=("${prepare[0]}" bench/support/training_step.py)
torch=("${QEFT_TORCH_PYTHON:-python3}" bench/support/training_step_torch.py)
program=$(hash_of "$llm")

# quantise_to DIRECTORY OPTIONS...: quickly, for times do not depend on how good codes are.
quantise_to() {
  rm -rf "${1:?}" "$1.unfinished.partial"
  "$llm" quantize --model "$model" --out "$1" --preset paper --method rtn --search minmax \
    --calibration "$work/text/calibration.txt" --samples 4 --seq-len 512 --threads "$threads" \
    "${@:2}"
}

# watched DIRECTORY ROUND COMMAND...: leaves round-N.out, .log and .memory.
watched() {
  local to=$1/round-$2
  shift 2
  rm -f "$to".{out,log,memory}
  "${helper[@]}" watch --out "$to.memory" "$@" >"$to.out" 2>"$to.log"
}

# finetune_row DIRECTORY ROUND BASE OPTIONS...
finetune_row() {
  local dir=$1 round=$2 base=$3
  shift 3
  rm -rf "$dir/adapter" "$dir/adapter.unfinished.partial"
  watched "$dir" "$round" "$llm" finetune --model "$base" --data "$sample" \
    --out "$dir/adapter" --seq-len "$seq_len" --batch 1 --steps $((steps + 1)) --lr 1e-4 \
    --validation-share 0 --checkpoint-every 0 --threads "$threads" --json "$@" ||
    fail_with "$dir/round-$round.log"
  rm -rf "$dir/adapter"
}

# torch_row DIRECTORY ROUND VARIANT RANK: a variant that does not run is left out, with a remark.
torch_row() {
  local dir=$1 round=$2
  [ -f "$dir/absent.txt" ] && return
  watched "$dir" "$round" "${torch[@]}" --model "$model" --text "$sample" \
    --seq-len "$seq_len" --steps $((steps + 1)) --threads "$threads" --variant "$3" --rank "$4" &&
    return
  tail -n 1 "$dir/round-$round.log" >"$dir/absent.txt"
  echo "$(basename "$dir") is left out: $(cat "$dir/absent.txt")" >&2
}

# add KIND NAME ARGUMENTS...: a row, and what makes a round of it.
names=() jobs=()
add() {
  local dir=$work/rows/$block/$2
  chosen "$block/$2" || return 0
  rm -rf "${dir:?}"
  mkdir -p "$dir"
  names+=("$2")
  jobs+=("$1_row $dir ROUND ${*:3}")
}

# add_quantised NAME OPTIONS_OF_QUANTIZE OPTIONS_OF_FINETUNE...: of a model that is quantised for
# it.
add_quantised() {
  local base=$work/bases/$block/$1
  chosen "$block/$1" || return 0
  # shellcheck disable=SC2086
  cached "$base.txt" "$program $weights $2" quantise_to "$base" $2
  add finetune "$1" "$base" "${@:3}"
}

# measure BLOCK: the rows of $model.
measure() {
  block=$1 names=() jobs=() sample=$work/text/$1.txt
  local weights kind round at job
  local -A rank
  step "$block: models"
  weights=$(hash_of "$model"/*.safetensors "$model/config.json" "$model/tokenizer.json")
  cached "$work/text/$block.log" "$weights $seq_len" "${prepare[0]}" \
    bench/support/tuning_inputs.py cut --tokenizer "$model/tokenizer.json" --tokens "$seq_len" \
    --text "$work/text/heldout.txt" --out "$sample"
  while read -r kind at; do rank[$kind]=$at; done < <("${helper[@]}" ranks --model "$model")

  add_quantised QEFT-k16 "--weak-columns 16" --method qeft
  add finetune "LoRA-r${rank[lora]}" "$model" --method lora --rank "${rank[lora]}"
  add finetune "QLoRA-r${rank[lora]}" "$model" --method qlora --rank "${rank[lora]}"
  add_quantised "QA-LoRA-r${rank[qa-lora]}" "--weak-columns 0 --zero scaled --group-size 32" \
    --method qa-lora --rank "${rank[qa-lora]}"
  add_quantised OWQ-k16 "--weak-columns 16 --group-size -1 --reorder off" --method owq
  add finetune "Platypus-r${rank[platypus]}" "$model" --method platypus --rank "${rank[platypus]}"
  add_quantised QEFT-k64 "--weak-columns 64" --method qeft
  for kind in fp32 fp32-recompute bf16-recompute nf4-recompute int8-recompute; do
    add torch "torch-LoRA-r${rank[lora]}-$kind" "$kind" "${rank[lora]}"
  done

  [ ${#names[@]} -gt 0 ] || return 0
  for ((round = 1; round <= rounds; ++round)); do
    step "$block: round $round of $rounds"
    for ((at = 0; at < ${#jobs[@]}; ++at)); do
      # Every other round backwards, for a machine that becomes slower or faster.
      job=${jobs[round % 2 == 1 ? at : ${#jobs[@]} - 1 - at]}
      # shellcheck disable=SC2086
      ${job/ROUND/$round}
    done
  done
  for job in "${names[@]}"; do rows+=("$work/rows/$block/$job"); done
}

rows=()  # directories
model=$work/model
measure SmolLM2-135M-Instruct
model=$work/llama2_block
cached "$model.log" "$(hash_of "${helper[1]}")" "${helper[@]}" block --out "$model"
measure Llama-2-7B-block

step "Result"
commit=$(git rev-parse --short HEAD)
git diff --quiet HEAD -- include examples bench || commit+=" with changes"
out=bench/results/$(date +%F)-training-step
[ "$patterns" = '*' ] || out=$work/part
python3 bench/support/training_step_table.py "$out" "$commit" "$seq_len" "$threads" \
  "${rows[@]}"
