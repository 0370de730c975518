#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, in under 8 minutes: builds for the GPU at hand, runs the device
# tests, some of them under compute-sanitizer, and the benchmarks beside cuBLAS and PyTorch.
#   bench/gpu_check.sh [--quick] [OUT]
# Needs nvcc, g++ and python3; PyTorch where it is installed (QEFT_TORCH_PYTHON names its python).
# Writes OUT/DATE-DEVICE.json and .md; OUT is bench/results by default. With --quick, which is also
# for a simulator (QEFT_GPU_RUN: what runs a program), sizes are small and times mean nothing. Ends
# with 1 when a test failed.
set -uo pipefail
root=$(realpath -- "$(dirname -- "$0")/..")
quick=()
[ "${1-}" != --quick ] || { quick=(--quick); shift; }
out=${1:-$root/bench/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
jobs=$(nproc)
started=$SECONDS
failed=0
step() { printf '== %s  (%d:%02d)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

if [ -n "${QEFT_GPU_RUN-}" ]; then
  read -ra run <<<"$QEFT_GPU_RUN"
  device=simulator architectures=(-gencode arch=compute_80,code=compute_80 --compress-mode=none)
  [ "${CUDASIM_CC-90}" != 90 ] || architectures+=(-gencode arch=compute_90a,code=compute_90a)
else
  run=()
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_') &&
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) ||
    { echo "gpu_check: no GPU (nvidia-smi)"; exit 1; }
  [ "$capability" != 90 ] || capability=90a
  architectures=(-gencode "arch=compute_$capability,code=sm_$capability")
fi
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)

step "Build for $device"
flags=(-std=c++17 -O3 -w -lineinfo --split-compile=0 -cudart shared "${architectures[@]}"
  -I"$root/include" -I"$root/tests" -I"$root/bench")
g++ -std=c++17 -O2 -w -I"$root/include" -I"$root/tests" -c "$root/tests/support/cases.cpp" \
  -o "$work/cases.o" || exit 1
build() { "$nvcc" "${flags[@]}" -o "$work/$(basename "$1" .cu)" "$1" "$work/cases.o" -lcublas; }
export -f build
export nvcc work
declare -p flags >"$work/flags"
cp "$root/bench/device/main.cu" "$work/bench_device.cu"
printf '#define QEFT_TEST_OTHER_FORMATS\n#include "device/gemm_test.cu"\n' >"$work/gemm_other_formats_test.cu"
tests=("$root"/tests/device/*_test.cu "$work/gemm_other_formats_test.cu")
printf '%s\n' "$work/bench_device.cu" "${tests[@]}" |
  xargs -P "$jobs" -I{} bash -c 'source "$work/flags"; build "$1" || echo "gpu_check: {} does not build"' _ {} |
  tee "$work/broken"
[ ! -s "$work/broken" ] || failed=1

step "Tests"
for source in "${tests[@]}"; do
  name=$(basename "$source" .cu)
  [ -x "$work/$name" ] || continue
  result=$(timeout 120 "${run[@]}" "$work/$name" 2>&1)
  status=$?
  case $status in
    0 | 77) result=$(tail -n 1 <<<"$result") ;;  # 77: not for this device
    *) failed=1; tail -n 5 <<<"$result"; result="FAILED ($status)" ;;
  esac
  printf '%-24s %s\n' "$name" "$result" | tee -a "$work/tests"
done

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ ${#run[@]} -eq 0 ] && [ -x "$sanitizer" ]; then
  step "compute-sanitizer"
  until=$((SECONDS + 120))
  for tool in memcheck racecheck initcheck synccheck; do
    for name in gemm_test many_tokens_test backward_test; do
      [ -x "$work/$name" ] || continue
      left=$((until - SECONDS))
      [ $left -gt 0 ] || { echo "$tool $name: no time left" | tee -a "$work/sanitizer"; continue; }
      result=$(timeout $((left < 30 ? left : 30)) "$sanitizer" --tool "$tool" --error-exitcode 99 "$work/$name" 4 1 2>&1)
      status=$?
      # Too slow (124), or a machine that the tool refuses: said, but no failure of ours.
      [ $status -eq 0 ] || [ $status -eq 124 ] || grep -q 'not supported' <<<"$result" ||
        { failed=1; tail -n 15 <<<"$result"; }
      printf '%-10s %-20s %s (exit %s)\n' "$tool" "$name" \
        "$(grep -E 'SUMMARY|not supported' <<<"$result" | tail -n 1)" $status | tee -a "$work/sanitizer"
    done
  done
fi

step "Benchmarks"
timeout 200 "${run[@]}" "$work/bench_device" "${quick[@]}" --replays 15 >"$work/lines" || failed=1
python=${QEFT_TORCH_PYTHON:-python3}
if [ ${#run[@]} -eq 0 ] && "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  timeout 60 "$python" "$root/bench/device/torch_int4.py" >>"$work/lines" ||
    echo "gpu_check: torch_int4.py failed"
fi

step "Results"
mkdir -p "$out"
result=$out/$(date +%Y-%m-%d)-$device
touch "$work/tests" "$work/sanitizer"
python3 "$root/bench/device/table.py" --device "$device" --commit "$commit" --lines "$work/lines" \
  --tests "$work/tests" --sanitizer "$work/sanitizer" --out "$result" || failed=1
cat "$result.md"
exit $failed
