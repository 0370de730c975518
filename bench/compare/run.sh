#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compares the headers of a commit with those of the working tree, job by job, as a table:
#   bench/compare/run.sh COMMIT [SECONDS per job] [JOBS]
# JOBS is a file, - for standard input, of lines of
# `exact|int8|fp16|repack|unpack|permute_rows OC IC BITS TOKENS THREADS`; by default the list below.
# CXX is g++ by default.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '3,7s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(realpath -- "$(dirname -- "$0")/../..")
cxx=${CXX:-g++}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git -C "$root" archive "$1" include | tar -x -C "$scratch"

flags=(-std=c++17 -O3 -DNDEBUG -march=native -pthread)
probe() {
  "$cxx" "${flags[@]}" -fPIC -shared -I"$1" -I"$root/bench" "$root/bench/compare/probe.cpp" -o "$2"
}
probe "$scratch/include" "$scratch/before.so"
probe "$root/include" "$scratch/after.so"
"$cxx" "${flags[@]}" "$root/bench/compare/main.cpp" -o "$scratch/compare" -ldl

jobs() {
  if [ -n "$1" ]; then cat -- "$1"; return; fi
  for bits in 4 3; do
    for job in repack unpack permute_rows; do echo "$job 4096 4096 $bits 1 1"; done
    for job in exact int8; do
      for tokens in 1 8 512; do echo "$job 4096 4096 $bits $tokens 1"; done
      echo "$job 4096 4096 $bits 1 2"
    done
  done
  echo "fp16 4096 4096 4 1 1"
}
jobs "${3-}" | "$scratch/compare" "$scratch/before.so" "$scratch/after.so" "${2:-4}"
