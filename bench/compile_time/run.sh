#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Seconds to compile each header alone, best of three, slowest first:
#   bench/compile_time/run.sh [COMPILER] [HEADER...]
# COMPILER is g++ by default (clang++ or nvcc otherwise), headers are named as in #include.
set -euo pipefail
compiler=${1:-g++}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/../../include"
if [ $# -gt 0 ]; then
  headers=("$@")
else
  mapfile -t headers < <(find qeft -name '*.hpp' | sort)
fi
flags=(-std=c++17 -I. -c -o /dev/null)
case "$compiler" in
  *nvcc) flags+=(-x cu -arch=compute_80) ;;
  *) flags+=(-x c++) ;;
esac
for dir in /usr/include/eigen3; do [ ! -d "$dir" ] || flags+=(-isystem "$dir"); done
source=$(mktemp --suffix=.cpp)
trap 'rm -f "$source"' EXIT

# Prints the best of three times of compiling the text on standard input.
seconds() {
  cat >"$source"
  local best="" start end
  for _ in 1 2 3; do
    start=$EPOCHREALTIME
    "$compiler" "${flags[@]}" "$source" || return 1
    end=$EPOCHREALTIME
    best=$(awk -v a="$start" -v b="$end" -v best="$best" \
      'BEGIN { t = b - a; print (best == "" || t < best) ? t : best }')
  done
  printf '%s' "$best"
}

empty=$(seconds <<<"")
printf '%8.2f  (empty file, %s)\n' "$empty" "$compiler"
for header in "${headers[@]}"; do
  case "$compiler:$header" in
    *nvcc:qeft/io/* | *nvcc:qeft/solver/*) continue ;;  # host only
  esac
  if time=$(seconds <<<"#include \"$header\""); then
    printf '%8.2f  %s\n' "$time" "$header"
  else
    printf '  failed  %s\n' "$header"
  fi
done | sort -rn
