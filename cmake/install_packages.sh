# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run.sh and examples/llm/prepare/steps.sh: makes sure Debian packages are installed.

# require_packages PACKAGE...: installs what is missing when run as root, otherwise says exactly what
# to install and fails.
require_packages() {
  command -v dpkg-query >/dev/null || {
    echo "This is not a Debian-like system; please install the equivalents of: $*" >&2
    return 0
  }
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
      missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -ne 0 ]; then
    echo "Missing packages. Please run:  sudo apt-get install ${missing[*]}" >&2
    return 1
  fi
  echo "Installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -q "${missing[@]}" >/dev/null 2>&1 ||
    { apt-get update -q >/dev/null && apt-get install -y -q "${missing[@]}" >/dev/null; } ||
    { echo "Could not install (is the package archive reachable?): ${missing[*]}" >&2; return 1; }
}
