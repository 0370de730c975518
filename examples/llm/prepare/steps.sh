# SPDX-License-Identifier: Apache-2.0
# Sourced by examples/quickstart.sh, bench/quality.sh and bench/tuning.sh in the project's root:
# builds qeft-llm and prepares its inputs. $work is the directory for all that is not built.
source cmake/install_packages.sh

mkdir -p "$work"
started=$SECONDS
elapsed() { printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
step() { printf '\n== %s  (%s)\n' "$1" "$(elapsed)"; }
fail_with() { cat "$1" >&2; exit 1; }  # a log

# Sets llm, the program.
build_llm() {
  step "Packages"
  require_packages g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libcli11-dev libpcre2-dev \
    libutf8proc-dev pkg-config python3-venv
  step "Building qeft-llm"
  cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DQEFT_BUILD_TESTS=OFF \
    -DQEFT_BUILD_BENCH=OFF >"$work/build.log"
  cmake --build build/release --target qeft-llm >>"$work/build.log" ||
    { tail -n 40 "$work/build.log" >&2; exit 1; }
  llm=$PWD/build/release/examples/qeft-llm
}

# Makes $work/text and, where $model is empty, a model, which it sets model to. Sets prepare, a
# command.
prepare_inputs() {
  step "Model and text"
  local needed=examples/llm/prepare/requirements.txt
  if [ ! -x "$work/venv/bin/python" ] || ! cmp -s $needed "$work/venv/ready"; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q --disable-pip-version-check -r $needed
    cp $needed "$work/venv/ready"
  fi
  prepare=("$work/venv/bin/python" examples/llm/prepare/prepare.py)
  [ -f "$work/text/heldout_code.txt" ] || "${prepare[@]}" text --out "$work/text"
  if [ -z "$model" ]; then
    model=$PWD/$work/model
    [ -f "$model/config.json" ] || "${prepare[@]}" model --out "$model"
  fi
}

# QEFT as in the paper and what it is compared with, as options of `qeft-llm quantize`; with weak
# columns there are 16.
paper=(--preset paper --act-order)
rtn=("${paper[@]}" --method rtn --weak-columns 0 --search minmax)
optq=("${paper[@]}" --weak-columns 0)
owq=("${paper[@]}" --group-size -1 --reorder off --selection hessian_perturbation)
