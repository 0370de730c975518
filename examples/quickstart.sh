#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Quantises a real language model with QEFT and its baselines and compares them in one table, then
# fine-tunes the weak columns on German text:
#   examples/quickstart.sh [--model DIR] [--samples N] [--seq-len L] [--eval-tokens N] [--threads N]
# Without --model it prepares SmolLM2-135M-Instruct. It builds qeft-llm in build/release, leaves
# models, text and logs in build/quickstart, and keeps downloads in ~/.cache/qeft.
set -euo pipefail

model="" samples=64 seq_len=512 eval_tokens=16384 threads=0
usage() { sed -n '3,7s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$(realpath -e -- "${2:?--model needs a directory}"); shift 2 ;;
    --samples) samples=${2:?}; shift 2 ;;
    --seq-len) seq_len=${2:?}; shift 2 ;;
    --eval-tokens) eval_tokens=${2:?}; shift 2 ;;
    --threads) threads=${2:?}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
# Paths above are relative to the caller's directory, those below to the project.
cd "$(dirname "$0")/.."
work=build/quickstart
source examples/llm/prepare/steps.sh
build_llm
prepare_inputs

prompt="Explain in two sentences why the sky is blue."
rows=()
row='%-26s %10s %9s %10s %7s %9s'
# perplexity_of DIRECTORY TEXT
perplexity_of() {
  "$llm" perplexity --model "$1" --text "$2" --seq-len "$seq_len" --tokens "$eval_tokens" \
    --threads "$threads" | tail -n 1 | awk '{print $2}'
}
# evaluate NAME DIRECTORY: a row of the table.
evaluate() {
  local name=$1 dir=$2 perplexity change speed size bits
  perplexity=$(perplexity_of "$dir" "$work/text/heldout.txt")
  [ -n "${full_precision-}" ] || full_precision=$perplexity
  change=$(awk -v a="$perplexity" -v b="$full_precision" 'BEGIN { printf "%+.1f%%", 100 * (a / b - 1) }')
  # Every model decodes as many tokens, whatever it says.
  "$llm" generate --model "$dir" --prompt "$prompt" --max-tokens 100 --ignore-eos \
    --threads "$threads" >/dev/null 2>"$work/$name.log" || fail_with "$work/$name.log"
  speed=$(sed -n 's/.*decode[^0-9]*\([0-9.]*\) tokens\/s.*/\1/p' "$work/$name.log" | tail -n 1)
  size=$(du -cbL "$dir"/*.safetensors | tail -n 1 | awk '{printf "%.1f", $1 / 1048576}')
  bits=$("$llm" inspect "$dir" | sed -n 's/.*linear layers:.* \([0-9.]*\) bits per weight.*/\1/p')
  rows+=("$(printf "$row" "$name" "$perplexity" "$change" "$size" "$bits" "$speed")")
  echo "$name: perplexity $perplexity ($change)"
}
# quantise NAME OPTIONS...
quantise() {
  local name=$1
  shift
  step "$name"
  rm -rf "${work:?}/models/$name"
  "$llm" quantize --model "$model" --out "$work/models/$name" --threads "$threads" \
    --calibration "$work/text/calibration.txt" --samples "$samples" --seq-len "$seq_len" "$@"
  evaluate "$name" "$work/models/$name"
}

mkdir -p "$work/models"
step "FP16"
evaluate "FP16" "$model"
quantise "RTN-4bit-g128" "${rtn[@]}"
quantise "OPTQ-4bit-g128" "${optq[@]}"
quantise "OWQ-4bit-per-channel-k16" "${owq[@]}"
quantise "QEFT-4bit-paper" "${paper[@]}"
quantise "QEFT-4bit-default"
quantise "QEFT-4bit-small" --preset small
quantise "RTN-3bit-g128" "${rtn[@]}" --bits 3
quantise "OPTQ-3bit-g128" "${optq[@]}" --bits 3
quantise "QEFT-3bit-paper" "${paper[@]}" --bits 3
quantise "QEFT-3bit-default" --bits 3

step "Fine-tuning on German text"
language=de-DE
"${prepare[@]}" translated --out "$work/text" --language $language
base=$work/models/QEFT-4bit-default
tuned=$work/models/QEFT-4bit-tuned
adapter=$work/models/adapter.safetensors
rm -rf "$adapter" "$adapter.unfinished.partial" "$tuned"
"$llm" finetune --model "$base" --data "$work/text/tuning_$language.txt" --out "$adapter" \
  --steps 60 --batch 2 --lr 1e-3 --schedule cosine --warmup 5 --seq-len "$seq_len" \
  --threads "$threads"
"$llm" merge --model "$base" --adapter "$adapter" --out "$tuned"
tuning_row='%-26s %12s %12s'
tuning=("$(printf "$tuning_row" "perplexity on" "German" "English")")
for dir in "$base" "$tuned"; do
  german=$(perplexity_of "$dir" "$work/text/heldout_$language.txt")
  english=$(perplexity_of "$dir" "$work/text/heldout.txt")
  tuning+=("$(printf "$tuning_row" "$(basename "$dir")" "$german" "$english")")
done

step "Result"
printf "$row\n" model perplexity change MiB bits/w tokens/s
printf '%s\n' "${rows[@]}"
echo
printf '%s\n' "${tuning[@]}"
printf '\nQEFT, 4 bits, answers "%s":\n' "$prompt"
answer() {
  "$llm" generate --model "$work/models/QEFT-4bit-default" --prompt "$prompt" --max-tokens 96 \
    --temperature 0 --threads "$threads" "$@" 2>"$work/answer.log"
}
# A model without the tokens of a chat continues the prompt instead.
answer --chat || answer || fail_with "$work/answer.log"
printf '\nDone in %s. Models and logs are in %s.\n' "$(elapsed)" "$work"
