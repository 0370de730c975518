#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Quality of QEFT's presets and of its baselines at 4 and 3 bits, on two held-out texts, as a table:
#   bench/quality.sh [--model DIR] [--samples N] [--seq-len L] [--eval-tokens N] [--threads N]
#                    [--rows PATTERNS]
# Without --model: of SmolLM2-135M-Instruct, as its file has it and with perturbed weights.
# PATTERNS, separated by commas, choose rows: 'QEFT-*,OPTQ-4bit*'; FP16 is always there. Writes
# bench/results/DATE-quality.md and .json (JSON lines), or with --rows or --model
# build/quality/part.md and .json. Models and measurements stay in build/quality; what is there from
# the same program, inputs and settings is not made again.
set -euo pipefail

model="" samples=128 seq_len=512 eval_tokens=16384 threads=0 patterns='*'
usage() { sed -n '3,10s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$(realpath -e -- "${2:?--model needs a directory}"); shift 2 ;;
    --samples) samples=${2:?}; shift 2 ;;
    --seq-len) seq_len=${2:?}; shift 2 ;;
    --eval-tokens) eval_tokens=${2:?}; shift 2 ;;
    --threads) threads=${2:?}; shift 2 ;;
    --rows) patterns=${2:?}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
cd "$(dirname "$0")/.."
given=$model
work=build/quality
source examples/llm/prepare/steps.sh
source bench/support/rows.sh
build_llm
prepare_inputs

program=$(hash_of "$llm")
calibration=$(hash_of "$work/text/calibration.txt")

# perplexities DIRECTORY MODEL KEY [OPTIONS...]: of the model, which KEY identifies, on both texts.
perplexities() {
  local dir=$1 measured=$2 key=$3 text
  shift 3
  for text in heldout heldout_code; do
    cached "$dir/$text.json" "$key $(hash_of "$work/text/$text.txt") $seq_len $eval_tokens" \
      "$llm" perplexity --model "$measured" --text "$work/text/$text.txt" --seq-len "$seq_len" \
      --tokens "$eval_tokens" --threads "$threads" --json "$@"
  done
}

# quantise_to DIRECTORY OPTIONS...: prints what is to know of the result.
quantise_to() {
  local dir=$1 begin=$SECONDS
  shift
  rm -rf "${dir:?}/model"
  "$llm" quantize --model "$model" --out "$dir/model" --threads "$threads" \
    --calibration "$work/text/calibration.txt" --samples "$samples" --seq-len "$seq_len" "$@" >&2 ||
    return
  "$llm" inspect --json "$dir/model" | sed "s/^{/{\"seconds\": $((SECONDS - begin)), /"
}

rows=()  # directories
# row NAME OPTIONS...
row() {
  local dir=$work/rows/$block/$1 key
  chosen "$1" || return 0
  step "$block: $1"
  shift
  mkdir -p "$dir"
  key="$program $weights $calibration $samples $seq_len $*"
  cached "$dir/linears.json" "$key" quantise_to "$dir" "$@"
  perplexities "$dir" "$dir/model" "$key" --reference "$model"
  rows+=("$dir")
}

# rows_of BLOCK: every row, from $model.
rows_of() {
  local bits full
  block=$1
  weights=$(hash_of "$model"/*.safetensors "$model/config.json" "$model/tokenizer.json")
  step "$block: FP16"
  full=$work/rows/$block/FP16
  mkdir -p "$full"
  cached "$full/linears.json" "$program $weights" "$llm" inspect --json "$model"
  perplexities "$full" "$model" "$program $weights"
  rows+=("$full")
  for bits in 4 3; do
    row "RTN-${bits}bit-g128" "${rtn[@]}" --bits $bits
    row "OPTQ-${bits}bit-g128" "${optq[@]}" --bits $bits
    row "OWQ-${bits}bit-per-channel-k16" "${owq[@]}" --bits $bits
    row "QEFT-paper-${bits}bit-g128-k16" "${paper[@]}" --bits $bits
    row "QEFT-default-${bits}bit-g128-k16" --preset default --bits $bits
    row "QEFT-small-${bits}bit-g64-k16" --preset small --bits $bits
  done
}

if [ -n "$given" ]; then
  rows_of "$(basename "$model")"
else
  rows_of SmolLM2-135M-Instruct
  cached "$work/perturbed.log" "$weights $(hash_of examples/llm/prepare/perturb.py)" \
    perturb "$model" "$work/perturbed"
  model=$PWD/$work/perturbed
  rows_of SmolLM2-135M-Instruct-perturbed
fi

step "Result"
commit=$(git rev-parse --short HEAD)
git diff --quiet HEAD -- include examples bench || commit+=" with changes"
out=bench/results/$(date +%F)-quality
[ "$patterns$given" = '*' ] || out=$work/part  # of the table
python3 bench/support/quality_table.py "$out" "$commit" "$samples" \
  "$seq_len" "$program" "${rows[@]}"
