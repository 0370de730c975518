#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and tests the library:
#   tests/run.sh [gcc] [clang] [thread]        all by default
# gcc is C++17, optimised, with CUDA when nvcc is found; clang is C++20 with ASan and UBSan;
# thread is g++ with TSan, for the tests of the executor and of products.
# Builds go to build/ (QEFT_BUILD_DIR); data of the tests of examples/llm to build/test-data
# (QEFT_TEST_DATA), some of it made by a python with torch and transformers (QEFT_TORCH_PYTHON).
# The last line is `N passed, N failed, N skipped`.
set -u
exec </dev/null
case "${1-}" in
  -h | --help) sed -n '3,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
configurations=("$@")
[ $# -gt 0 ] || configurations=(gcc clang thread)
root=$(realpath -- "$(dirname -- "$0")/..") || exit 1
# Absolute, because tests run in other directories.
build_root=$(realpath -m -- "${QEFT_BUILD_DIR:-$root/build}")
QEFT_TEST_DATA=$(realpath -m -- "${QEFT_TEST_DATA:-$root/build/test-data}")
export QEFT_TEST_DATA
cd "$root" || exit 1
source cmake/install_packages.sh
jobs=$(nproc)
started=$SECONDS
passed=0 failed=0 skipped=0
failures=() skips=()

step() { printf '\n== %s  (%d:%02d)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
count_failure() { failed=$((failed + 1)); failures+=("$1"); }

# Adds the results in a CTest log to the totals. A test that could not be started has failed.
count_results() {
  local name=$1 log=$2 line test
  while IFS= read -r line; do
    test=$(sed -E 's/.*Test +#[0-9]+: ([^ ]+) .*/\1/' <<<"$line")
    case "$line" in
      *\*\*\*Skipped*) skipped=$((skipped + 1)); skips+=("$name: $test") ;;
      *\*\*\**) count_failure "$name: $test" ;;
      *Passed*) passed=$((passed + 1)) ;;
    esac
  done < <(grep -E '^ *[0-9]+/[0-9]+ Test +#' "$log")
}

# build_and_test NAME COMPILER [CMAKE ARGUMENT...]
# Builds and runs everything, or only the tests named in the array `only`.
build_and_test() {
  local name=$1 compiler=$2 dir=$build_root/$1
  shift 2
  step "$name: build"
  local settings=(-G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DQEFT_WARNINGS_AS_ERRORS=ON
    -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=9 "$@")
  if command -v ccache >/dev/null; then
    settings+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
  fi
  mkdir -p "$dir"
  if ! cmake -S . -B "$dir" "${settings[@]}" >"$dir/configure.log" 2>&1; then
    tail -n 30 "$dir/configure.log"
    count_failure "$name: configure"
    return
  fi
  grep -- '-- qeft: ' "$dir/configure.log"
  if ! cmake --build "$dir" -j "$jobs" ${only[@]+--target "${only[@]/#/test_}"} -- -k 0 >"$dir/build.log" 2>&1; then
    grep -E -A 8 'error|undefined reference|multiple definition' "$dir/build.log" | head -n 100
    count_failure "$name: build ($dir/build.log)"
  fi
  step "$name: test"
  ctest --test-dir "$dir" -j "$jobs" --output-on-failure --no-tests=error \
    ${only[@]+-R "^($(IFS='|'; echo "${only[*]}"))\$"} >"$dir/test.log" 2>&1
  # Failures with their output, then the summary; what passed is in the log.
  grep -vE ' Passed +[0-9.]+ sec$|^ +Start +[0-9]+: |^(Internal ctest|Test project|Looked in|Could not find exec)|^[^ ]+/test_[^ ]+$' \
    "$dir/test.log"
  count_results "$name" "$dir/test.log"
}

# Results of other implementations, which tests of examples/llm compare themselves with. Without them
# (no network, no torch) those tests are skipped and say so.
prepare_data() {
  local data=$QEFT_TEST_DATA python=$QEFT_TEST_DATA/venv/bin/python reference=${QEFT_TORCH_PYTHON:-python3}
  mkdir -p "$data"
  if [ ! -f "$data/tokenizer/normalized.cases.json" ] || [ ! -f "$data/text/heldout.txt" ]; then
    { [ -f "$data/venv/ready" ] || { python3 -m venv "$data/venv" && timeout 240 "$python" -m pip \
        install -q --disable-pip-version-check --timeout 15 --retries 1 \
        -r examples/llm/prepare/requirements.txt && touch "$data/venv/ready"; }; } &&
      { [ -f "$data/model/config.json" ] ||
        timeout 240 "$python" examples/llm/prepare/prepare.py model --out "$data/model"; } &&
      "$python" tests/llm/tokenizer_corpus.py --tokenizer "$data/model/tokenizer.json" \
        --out "$data/tokenizer" &&
      { [ -f "$data/text/heldout.txt" ] ||
        timeout 240 "$python" examples/llm/prepare/prepare.py text --out "$data/text"; } ||
      { echo "skipped: no model, text or tokenizer results (is the package index reachable?)"; return; }
  fi
  [ ! -d "$data/transformers" ] || return 0
  if "$reference" -c 'import torch, transformers, safetensors' 2>/dev/null; then
    "$reference" tests/llm/compare_transformers.py --model "$data/model" \
      --text "$data/text/heldout.txt" --out "$data" ||
      echo "skipped: compare_transformers.py failed"
  else
    echo "skipped: no torch and transformers in $reference (QEFT_TORCH_PYTHON names another python)"
  fi
}

step "Packages"
if ! require_packages g++ clang cmake ninja-build catch2 libeigen3-dev nlohmann-json3-dev \
  libcli11-dev libpcre2-dev libutf8proc-dev pkg-config libbenchmark-dev python3-venv qemu-user \
  python3-jinja2 python3-numpy libopenmpi-dev openmpi-bin; then
  printf '0 passed, 1 failed, 0 skipped\n'
  exit 1
fi

step "Data of other implementations"
prepare_data 2>&1 | tail -n 5

for configuration in "${configurations[@]}"; do
  only=()
  case "$configuration" in
    gcc)
      build_and_test gcc g++ -DCMAKE_CXX_STANDARD=17 -DCMAKE_CXX_FLAGS_RELEASE='-O2 -DNDEBUG'
      ;;
    clang)
      build_and_test clang clang++ -DCMAKE_CXX_STANDARD=20 -DQEFT_CUDA=OFF -DQEFT_SANITIZE=ON \
        -DQEFT_BUILD_BENCH=OFF -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
      ;;
    thread)
      only=(on_host nested_products cpu_matmul)
      build_and_test thread g++ -DCMAKE_CXX_STANDARD=17 -DQEFT_CUDA=OFF -DQEFT_SANITIZE_THREAD=ON \
        -DQEFT_NATIVE=OFF -DQEFT_BUILD_BENCH=OFF -DCMAKE_BUILD_TYPE=Debug \
        -DCMAKE_CXX_FLAGS_DEBUG=-O1
      ;;
    *) count_failure "unknown configuration $configuration" ;;
  esac
done

step "Result"
[ ${#skips[@]} -eq 0 ] || printf 'skipped  %s\n' "${skips[@]}"
[ ${#failures[@]} -eq 0 ] || printf 'FAILED   %s\n' "${failures[@]}"
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" -eq 0 ]
