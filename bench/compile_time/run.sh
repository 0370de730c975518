#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Seconds to compile each header alone, best of three, slowest first; and seconds of processor time
# and size of the object for the first example at -O2 and at -O3 -march=native (goal: 8 s, 300 kB):
#   bench/compile_time/run.sh [COMPILER] [HEADER...]
#   bench/compile_time/run.sh example [COMPILER]
# COMPILER is g++ by default (clang++ or nvcc otherwise), headers are named as in #include. Without
# headers all of them and the example are compiled.
set -euo pipefail
only_example=false
if [ "${1-}" = example ]; then
  only_example=true
  shift
fi
compiler=${1:-g++}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/../../include"
all=false
if [ $# -gt 0 ]; then
  headers=("$@")
else
  all=true
  mapfile -t headers < <(find qeft -name '*.hpp' | sort)
fi
flags=(-std=c++17 -I. -c -o /dev/null)
case "$compiler" in
  *nvcc) flags+=(-x cu -arch=compute_80) ;;
  *) flags+=(-x c++) ;;
esac
for dir in /usr/include/eigen3; do [ ! -d "$dir" ] || flags+=(-isystem "$dir"); done
source=$(mktemp --suffix=.cpp)
object=$(mktemp --suffix=.o)
trap 'rm -f "$source" "$object"' EXIT

# Compiles the first example with the flags given, once.
example() {
  local TIMEFORMAT='%U %S' used
  used=$({ time "$compiler" -std=c++17 "$@" -I. -c -o "$object" ../examples/01_pack_and_multiply.cpp; } 2>&1) ||
    { printf '%s\n' "$used"; return 1; }
  printf '%8.2f s %8d bytes  %s %s\n' "$(awk '{ print $1 + $2 }' <<<"$used")" \
    "$(stat -c %s "$object")" 01_pack_and_multiply.cpp "$*"
}
examples() {
  case "$compiler" in
    *nvcc) ;;
    *) example -O2 && example -O3 -march=native ;;
  esac
}
if $only_example; then
  examples
  exit
fi

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
! $all || examples
