# SPDX-License-Identifier: Apache-2.0
# Sourced behind examples/llm/prepare/steps.sh by benchmarks that make a table row by row, and make
# nothing again that is there from the same inputs.

hash_of() { cat "$@" | sha256sum | cut -c1-16; }
current() { [ -f "$1.key" ] && [ "$(cat "$1.key")" = "$2" ]; }

# cached FILE KEY COMMAND...: the output of the command in FILE, unless it is there from this KEY.
cached() {
  local file=$1 key=$2
  shift 2
  current "$file" "$key" && return
  rm -f "$file.key"
  mkdir -p "$(dirname "$file")"
  "$@" >"$file" 2>"$file.log" || fail_with "$file.log"
  printf '%s\n' "$key" >"$file.key"
}

# chosen ROW: whether one of $patterns, separated by commas, is of its name.
chosen() {
  local pattern
  local -a all
  IFS=, read -r -a all <<<"$patterns"
  for pattern in "${all[@]}"; do
    # shellcheck disable=SC2053
    [[ $1 == $pattern ]] && return
  done
  return 1
}

# perturb MODEL DIRECTORY
perturb() {
  rm -rf "${2:?}"
  "${prepare[@]}" perturb --model "$1" --out "$2"
}
