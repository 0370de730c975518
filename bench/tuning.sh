#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fine-tuning by weak columns and by the paper's baselines on German text, and merging, as tables:
#   bench/tuning.sh [--model DIR | --perturbed] [--rows PATTERNS] [--steps N] [--batch N]
#                   [--seq-len L] [--seeds N] [--rates LIST] [--eval-tokens N] [--samples N]
#                   [--threads N]
# Without --model: of SmolLM2-135M-Instruct, as its file has it or, with --perturbed, with weights
# off the grid of that file. PATTERNS, separated by commas, choose rows: 'QEFT-*,LoRA*,merging'.
# LIST has ascending learning rates, separated by commas, which every method tries; where the best
# one is the first or the last, up to two more beyond it. SEEDS runs are made with the best one.
# Writes bench/results/DATE-tuning.md and .json (JSON lines), or with --rows or --model
# build/tuning/part.md and .json, which also show what is done while the script runs. What is in
# build/tuning from the same program, inputs and settings is not made again, and a killed script
# goes on where it was.
set -euo pipefail

model="" perturbed="" patterns='*' steps=48 batch=2 seq_len=512 seeds=3 rates=3e-4,1e-3,3e-3
eval_tokens=16384 samples=64 threads=0
usage() { sed -n '3,15s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=$(realpath -e -- "${2:?--model needs a directory}"); shift 2 ;;
    --perturbed) perturbed=-perturbed; shift ;;
    --rows) patterns=${2:?}; shift 2 ;;
    --steps) steps=${2:?}; shift 2 ;;
    --batch) batch=${2:?}; shift 2 ;;
    --seq-len) seq_len=${2:?}; shift 2 ;;
    --seeds) seeds=${2:?}; shift 2 ;;
    --rates) rates=${2:?}; shift 2 ;;
    --eval-tokens) eval_tokens=${2:?}; shift 2 ;;
    --samples) samples=${2:?}; shift 2 ;;
    --threads) threads=${2:?}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
[ -z "$model" ] || [ -z "$perturbed" ] || { echo "--perturbed is without --model" >&2; exit 2; }
cd "$(dirname "$0")/.."
given=$model
work=build/tuning
source examples/llm/prepare/steps.sh
source bench/support/rows.sh
build_llm
require_packages time
prepare_inputs

# Languages: what is tuned, and another for merging.
target=de-DE other=fr-FR
# Of the optimiser's steps. 8192 tokens of validation text, in whole windows.
warmup=$((steps / 10)) eval_every=$(((steps + 2) / 3))
validation_tokens=$((8192 < eval_tokens ? 8192 : eval_tokens))
validation_tokens=$(((validation_tokens + seq_len - 1) / seq_len * seq_len))
weak_dropout=0.1 l2_sp=10

key_of() { printf '%s' "$*" | sha256sum | cut -c1-16; }

# translated LANGUAGE: its texts.
translated() { "${prepare[@]}" translated --out "$work/text" --language "$1" --validation; }

cut_text() {
  "${inputs[@]}" cut --tokenizer "$model/tokenizer.json" --tokens "$validation_tokens" \
    --text "$work/text/validation_$1.txt" --out "$work/text/validating_$1.txt"
}

inputs=("${prepare[0]}" bench/support/tuning_inputs.py)
program=$(hash_of "$llm")
weights=$(hash_of "$model"/*.safetensors "$model/config.json" "$model/tokenizer.json")
if [ -n "$perturbed" ]; then
  cached "$work/perturbed.log" "$weights $(hash_of examples/llm/prepare/perturb.py)" \
    perturb "$model" "$work/perturbed"
  model=$PWD/$work/perturbed
  weights=$(hash_of "$model"/*.safetensors "$model/config.json" "$model/tokenizer.json")
fi
block=$(basename "${given:-SmolLM2-135M-Instruct$perturbed}")
prepared=$(hash_of examples/llm/prepare/*prose.py bench/support/tuning_inputs.py)
for language in $target $other; do
  cached "$work/text/$language.log" "$prepared" translated "$language"
  cached "$work/text/validating_$language.log" \
    "$prepared $validation_tokens $(hash_of "$model/tokenizer.json")" cut_text "$language"
done
calibration=$(hash_of "$work/text/calibration.txt")
measured_on=$(key_of "$eval_tokens $seq_len" \
  "$(hash_of "$work"/text/{heldout,heldout_$target,heldout_$other,validating_$target}.txt)")

# ---- Models to tune.

# quantise_to DIRECTORY MODEL OPTIONS...: prints what is to know of the result.
quantise_to() {
  local to=$1/model from=$2
  shift 2
  rm -rf "$to" "$to.unfinished.partial"
  "$llm" quantize --model "$from" --out "$to" --threads "$threads" --samples "$samples" \
    --calibration "$work/text/calibration.txt" --seq-len 512 "$@" >&2 || return
  "$llm" inspect --json "$to"
}

# Weak columns of a base are 16 unless it says something else; see steps.sh for the arrays.
declare -A quantised=(
  [QEFT-k16]="--preset default --weak-columns 16"
  [QEFT-k64]="--preset default --weak-columns 64"
  [OWQ-k16]="${owq[*]}"
  [QA-LoRA]="${optq[*]} --zero scaled --group-size 32"
)

# make_base NAME: sets base, the model whose linears are what a method leaves as they are, trained,
# the model that finetune gets, and base_key, which stands for both.
make_base() {
  local dir=$work/bases/$block/$1
  base=$PWD/$dir/model trained=$PWD/$dir/model
  mkdir -p "$dir"
  case "$1" in
    FP16)
      base=$model trained=$model
      base_key=$(key_of "$program $weights")
      cached "$dir/linears.json" "$base_key" "$llm" inspect --json "$model"
      ;;
    NF4 | INT8)
      trained=$model
      base_key=$(key_of "$program $weights $prepared $1")
      cached "$dir/linears.json" "$base_key" "${inputs[@]}" base --model "$model" --out "$base" \
        --method "$([ "$1" = NF4 ] && echo qlora || echo platypus)"
      ;;
    *)
      base_key=$(key_of "$program $weights $calibration $samples ${quantised[$1]}")
      # shellcheck disable=SC2086
      cached "$dir/linears.json" "$base_key" quantise_to "$dir" "$model" ${quantised[$1]}
      ;;
  esac
}

# ---- Measurements.

# perplexity_of FILE KEY MODEL TEXT TOKENS [OPTIONS...]
perplexity_of() {
  local file=$1 key=$2 measured=$3 text=$work/text/$4.txt tokens=$5
  shift 5
  cached "$file" "$(key_of "$key $(hash_of "$text") $seq_len $tokens $*")" "$llm" perplexity \
    --model "$measured" --text "$text" --seq-len "$seq_len" --tokens "$tokens" \
    --threads "$threads" --json "$@"
}

size_of() { cat "$1"/*.safetensors | wc -c; }

# measure DIRECTORY KEY MODEL: everything about a model that KEY stands for.
measure() {
  local dir=$1 key=$2 measured=$3 reference=()
  # Of a model from itself it is 0.
  [ "$measured" = "$model" ] || reference=(--reference "$model")
  perplexity_of "$dir/validation.json" "$key" "$measured" validating_$target 0
  perplexity_of "$dir/target.json" "$key" "$measured" heldout_$target "$eval_tokens"
  perplexity_of "$dir/general.json" "$key" "$measured" heldout "$eval_tokens" "${reference[@]}"
  cached "$dir/size.txt" "$key" size_of "$measured"
  cached "$dir/speed.json" "$key" "$llm" generate --model "$measured" --max-tokens 65 \
    --prompt "A weak column is" --ignore-eos --threads "$threads" --json
}

# with_adapters DIRECTORY KEY MODEL MEASURE ADAPTERS...: merges, and calls MEASURE DIRECTORY KEY
# MERGED; the merged model is removed when that is done.
with_adapters() {
  local dir=$1 key=$2 onto=$3 measure=$4
  shift 4
  current "$dir/measured" "$key $measured_on" && return
  rm -rf "$dir/merged" "$dir/merged.unfinished.partial" "$dir/measured.key"
  mkdir -p "$dir"
  # An adapter of a frozen model belongs to the one that was made of it, too.
  "$llm" merge --model "$onto" --out "$dir/merged" --other-base --json "$@" >"$dir/merge.json" \
    2>"$dir/merge.log" || fail_with "$dir/merge.log"
  "$measure" "$dir" "$key" "$PWD/$dir/merged"
  rm -rf "$dir/merged"
  printf '%s\n' "$key $measured_on" >"$dir/measured.key"
}

# ---- Training.

# finetune_to DIRECTORY KEY OPTIONS...: prints the object of the result.
finetune_to() {
  local dir=$1 key=$2
  local adapter=$dir/adapter.safetensors
  shift 2
  if ! [ "$(cat "$dir/begun" 2>/dev/null)" = "$key" ]; then
    rm -rf "$adapter.unfinished.partial" "$dir/steps.jsonl"  # else a killed run goes on
    printf '%s\n' "$key" >"$dir/begun"
  fi
  rm -rf "$adapter"
  /usr/bin/time -q -o "$dir/peak_kib.txt" -f %M "$llm" finetune --out "$adapter" \
    --log "$dir/steps.jsonl" --json --threads "$threads" "$@" >"$dir/lines.json" || {
    grep -q 'try a lower --lr' "$dir/finetune.json.log" || return
    echo '{"best_loss":null}'
    return
  }
  tail -n 1 "$dir/lines.json"
}

# train LANGUAGE RATE SEED OPTIONS...: sets run, the directory, and run_key. Of $trained.
train() {
  local language=$1 rate=$2 seed=$3
  shift 3
  run=$work/rows/$block/$row_name/$language-rate-$rate-seed-$seed
  local texts="$work/text/tuning_$language.txt $work/text/validating_$language.txt"
  # shellcheck disable=SC2086
  run_key=$(key_of "$base_key $(hash_of $texts) $rate $seed $steps $batch $seq_len $warmup" \
    "$eval_every $*")
  current "$run/finetune.json" "$run_key" || printf '%s: %s, rate %s, seed %s  (%s)\n' \
    "$row_name" "$language" "$rate" "$seed" "$(elapsed)"
  mkdir -p "$run"
  cached "$run/finetune.json" "$run_key" finetune_to "$run" "$run_key" --model "$trained" \
    --data "$work/text/tuning_$language.txt" --validation "$work/text/validating_$language.txt" \
    --seq-len "$seq_len" --steps "$steps" --batch "$batch" --lr "$rate" --schedule cosine \
    --warmup "$warmup" --eval-every "$eval_every" --seed "$seed" "$@"
}

# Of the last run, for sort -g.
validated() { sed 's/.*"best_loss":\([^,}]*\).*/\1/; s/null/inf/' "$run/finetune.json"; }

# beyond EDGE NEIGHBOUR: the rate as far from the edge as that is from its neighbour, as a factor.
beyond() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.1e", a * a / b }'; }

# find_rate OPTIONS...: sets rate, the best one, and tried.
find_rate() {
  local all=() more=2 best next
  IFS=, read -r -a all <<<"$rates"
  while true; do
    tried=()
    for rate in "${all[@]}"; do
      train $target "$rate" 0 "$@"
      tried+=("$(validated) $rate")
    done
    best=$(printf '%s\n' "${tried[@]}" | sort -g | head -n 1)
    rate=${best#* }
    [ ${#all[@]} -gt 1 ] && [ $((more--)) -gt 0 ] || return 0
    if [ "$rate" = "${all[0]}" ]; then
      next=$(beyond "$rate" "${all[1]}")
      all=("$next" "${all[@]}")
    elif [ "$rate" = "${all[-1]}" ]; then
      next=$(beyond "$rate" "${all[-2]}")
      all+=("$next")
    else
      return 0
    fi
  done
}

rows=()     # directories
merging=()  # likewise, one at most
write_table() {  # OUT
  python3 bench/support/tuning_table.py "$1" "$work/setting.json" "${rows[@]}" "${merging[@]}"
}

# tuned NAME BASE OPTIONS...: the runs that find the learning rate. Sets row_name, rate and tried,
# and what make_base does.
tuned() {
  row_name=$1
  make_base "$2"
  shift 2
  find_rate "$@"
}

# finish_row BASE OPTIONS...: the runs of all seeds at $rate, measured, as a row of the table.
finish_row() {
  local of=$1 seed runs=() dir=$work/rows/$block/$row_name
  shift
  printf '%s: measuring the base  (%s)\n' "$row_name" "$(elapsed)"
  measure "$work/bases/$block/$of" "$base_key" "$base"
  for ((seed = 0; seed < seeds; ++seed)); do
    train $target "$rate" "$seed" "$@"
    if [ "$(validated)" = inf ]; then
      echo "$row_name: seed $seed diverged at rate $rate and is left out" >&2
      continue
    fi
    with_adapters "$run" "$run_key" "$base" measure --adapter "$run/adapter.safetensors"
    runs+=("$(basename "$run")")
  done
  [ ${#runs[@]} -gt 0 ] || { echo "$row_name: no run that can be measured" >&2; return; }
  printf 'base %s\noptions %s\nrate %s\nruns %s\n' "$of" "$*" "$rate" "${runs[*]}" >"$dir/row.txt"
  [ ${#tried[@]} -eq 0 ] || printf 'tried %s\n' "${tried[@]}" >>"$dir/row.txt"
  rows+=("$dir")
  write_table "$work/part" >/dev/null
}

# row NAME BASE OPTIONS...
row() {
  chosen "$1" || return 0
  step "$block: $1"
  tuned "$@"
  shift
  finish_row "$@"
}

# regularised NAME OPTIONS...: QEFT-k16 with more options, at its rate.
regularised() {
  local name=$1
  chosen "$name" || return 0
  shift
  step "$block: $name"
  tuned QEFT-k16 QEFT-k16 "${qeft[@]}"
  row_name=$name tried=()
  finish_row QEFT-k16 "${qeft[@]}" "$@"
}

# ---- Merging.

# measure_merged DIRECTORY KEY MODEL
measure_merged() {
  perplexity_of "$1/target.json" "$2" "$3" heldout_$target "$eval_tokens"
  perplexity_of "$1/other.json" "$2" "$3" heldout_$other "$eval_tokens"
  perplexity_of "$1/general.json" "$2" "$3" heldout "$eval_tokens"
}

# merged GROUP NAME MODEL MODEL_KEY [ADAPTER WEIGHT]...: a line of the table of merging; the key of
# an adapter is that of its run.
merged() {
  local group=$1 name=$2 onto=$3 key=$4 dir options=()
  shift 4
  printf 'merging: %s: %s  (%s)\n' "$group" "$name" "$(elapsed)"
  dir=$work/merging/$block/lines/$(key_of "$group $name")
  mkdir -p "$dir"
  while [ $# -gt 0 ]; do
    options+=(--adapter "$1/adapter.safetensors" --weight "$2")
    key+=" $(cat "$1/finetune.json.key") $2"
    shift 2
  done
  if [ ${#options[@]} -eq 0 ]; then
    measure_merged "$dir" "$key" "$onto"
  else
    with_adapters "$dir" "$(key_of "$key")" "$onto" measure_merged "${options[@]}"
  fi
  printf '%s\t%s\t%s\n' "$group" "$name" "$(basename "$dir")" >>"$work/merging/$block/lines.txt"
}

# two_domains GROUP MODEL KEY: of the adapters $for_target and $for_other.
two_domains() {
  local group=$1 onto=$2 key=$3
  merged "$group" "base" "$onto" "$key"
  merged "$group" "base + German" "$onto" "$key" "$for_target" 1
  merged "$group" "base + French" "$onto" "$key" "$for_other" 1
  merged "$group" "base + German + French" "$onto" "$key" "$for_target" 1 "$for_other" 1
  merged "$group" "base + 0.5 German + 0.5 French" "$onto" "$key" "$for_target" 0.5 \
    "$for_other" 0.5
}

# second_model DIRECTORY: a full-precision model that was tuned on French by other means, LoRA. What
# it was made of is forgotten.
second_model() {
  rm -rf "$1/full" "$1/full.unfinished.partial"
  "$llm" merge --model "$model" --adapter "$lora_other/adapter.safetensors" --out "$1/full" >&2 &&
    rm "$1/full/before_merge.qeft"
}

# restores DIRECTORY MODEL ADAPTER: whether unmerge gives the model's bytes back.
restores() {
  rm -rf "$1"/{merged,restored}
  mkdir -p "$1"
  "$llm" merge --model "$2" --adapter "$3" --out "$1/merged" >&2 &&
    "$llm" unmerge --model "$1/merged" --out "$1/restored" >&2 || return
  if cmp "$2/model.safetensors" "$1/restored/model.safetensors" >&2 &&
    cmp "$2/config.json" "$1/restored/config.json" >&2; then echo yes; else echo no; fi
  rm -rf "$1"/{merged,restored}
}

merging_rows() {
  local dir=$work/merging/$block for_target for_other lora_target lora_other second_key
  chosen merging || return 0
  step "$block: merging"
  mkdir -p "$dir"
  rm -f "$dir/lines.txt"

  tuned LoRA-r8 FP16 "${lora[@]}"
  train $target "$rate" 0 "${lora[@]}"
  lora_target=$run
  train $other "$rate" 0 "${lora[@]}"
  lora_other=$run
  for_target=$lora_target for_other=$lora_other
  two_domains "two adapters, LoRA onto FP16" "$model" "$base_key"

  local full_key full=$PWD/$dir/second/full
  full_key=$(key_of "$base_key $(cat "$lora_other/finetune.json.key")")
  cached "$dir/second/full.log" "$full_key" second_model "$dir/second"

  tuned QEFT-k16 QEFT-k16 "${qeft[@]}"
  train $target "$rate" 0 "${qeft[@]}"
  for_target=$run
  train $other "$rate" 0 "${qeft[@]}"
  for_other=$run
  two_domains "two adapters, QEFT onto 4 bits" "$base" "$base_key"
  cached "$dir/restored.txt" "$(key_of "$base_key $(cat "$for_target/finetune.json.key")")" \
    restores "$dir/restore" "$base" "$for_target/adapter.safetensors"

  local group="a second model, FP16 tuned on French, LoRA"
  merged "$group" "second model" "$full" "$full_key"
  merged "$group" "second model + German" "$full" "$full_key" "$lora_target" 1
  second_key=$(key_of "$full_key $base_key $calibration $samples")
  cached "$dir/second/linears.json" "$second_key" quantise_to "$dir/second" "$full" \
    --preset default --weak-columns-from "$base"
  group="the same in 4 bits with the base's weak columns, QEFT"
  merged "$group" "second model" "$PWD/$dir/second/model" "$second_key"
  merged "$group" "second model + German" "$PWD/$dir/second/model" "$second_key" "$for_target" 1
  merging=("$dir")
}

# ---- The rows. Ranks give about as many parameters as 16 weak columns of SmolLM2-135M: with k they
# are 155520 k, with LoRA 305280 r, in the MLP alone 190080 r, with QA-LoRA in groups of 32 columns
# about 163000 r. alpha is 2 r.
qeft=(--method qeft)
lora=(--method lora --rank 8 --alpha 16)

commit=$(git rev-parse --short HEAD)
git diff --quiet HEAD -- include examples bench || commit+=" with changes"
cat >"$work/setting.json" <<EOF
{"commit": "$commit", "program": "$program", "model": "$block", "steps": $steps, "batch": $batch,
 "seq_len": $seq_len, "seeds": $seeds, "warmup": $warmup, "eval_every": $eval_every,
 "samples": $samples, "target": "$target", "other": "$other"}
EOF
row QEFT-k16 QEFT-k16 "${qeft[@]}"
row LoRA-r8 FP16 "${lora[@]}"
row QLoRA-r8 NF4 --method qlora --rank 8 --alpha 16
row QA-LoRA-r16 QA-LoRA --method qa-lora --rank 16 --alpha 32
row OWQ-k16 OWQ-k16 --method owq
row Platypus-r13 INT8 --method platypus --rank 13 --alpha 26
row QEFT-k64 QEFT-k64 "${qeft[@]}"
regularised QEFT-k16-dropout --weak-dropout $weak_dropout
regularised QEFT-k16-L2-SP --l2-sp $l2_sp
merging_rows

step "Result"
out=bench/results/$(date +%F)-tuning
[ "$patterns$given" = '*' ] || out=$work/part
write_table "$out"
