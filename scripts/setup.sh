#!/usr/bin/env bash
# Creates .venv and installs emu35 into it; the second time it only compares a stamp.
#
#   bash scripts/setup.sh EXTRA...          e.g. bash scripts/setup.sh demo dev quantize serve verify
#
# The stamp holds a hash of pyproject.toml, constraints.txt and the Python version, and the extras
# that are in. pip's own settings (index, certificates, proxy) are left as the machine has them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
stamp="$venv/emu35-setup"
unfinished="$venv/emu35-setup-unfinished"

say() { printf '[setup] %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
      >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say "no Python 3.11 or 3.12 found; install python3.11, or name one: PYTHON=/path/to/python3.11"
  return 2
}

fingerprint() {
  { "$1" --version; cat pyproject.toml constraints.txt; } | sha256sum | cut -c1-16
}

# What is still missing: prints the union of installed and wanted extras, fails when all are in.
missing_extras() {
  local print="$1" have="" wanted
  shift
  if [ -f "$stamp" ] && [ "$(cut -d' ' -f1 "$stamp")" = "$print" ]; then
    have="$(cut -s -d' ' -f2- "$stamp")"
    for wanted in "$@"; do
      case " $have " in *" $wanted "*) ;; *) wanted="+"; break ;; esac
    done
    [ "${wanted:-}" = "+" ] || return 1
  fi
  printf '%s\n' $have "$@" | sort -u | paste -sd' '
}

install() {
  local python print extras
  python="$(find_python)"
  if [ -f "$unfinished" ]; then
    # pip killed half-way can leave a package that looks installed and is not.
    say "the last installation was cut short; starting over"
    rm -rf "$venv"
  fi
  if [ -d "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say ".venv has no working pip; making it anew"
    rm -rf "$venv"
  fi
  print="$(fingerprint "$([ -d "$venv" ] && echo "$venv/bin/python" || echo "$python")")"
  extras="$(missing_extras "$print" "$@")" || return 0

  mkdir -p "$venv"
  touch "$unfinished"
  rm -f "$stamp"
  if [ ! -x "$venv/bin/python" ]; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
      say "could not create .venv; on Debian the package python3.11-venv provides this"
      return 2
    }
  fi
  say "installing emu35[${extras// /,}] (about 1 GB on disk; a few minutes the first time)"
  # On a terminal pip shows what it fetches; in a log only what went wrong.
  local quiet=()
  [ -t 2 ] || quiet=(-qq)
  "$venv/bin/python" -m pip install "${quiet[@]}" \
    --constraint constraints.txt --editable ".[${extras// /,}]"
  printf '%s %s\n' "$print" "$extras" > "$stamp.new"
  mv "$stamp.new" "$stamp"
  rm -f "$unfinished"
  say "ready"
}

# Two scripts started together must not install into one folder at once. The lock belongs to
# this subshell, so that whatever runs afterwards does not hold it.
(
  if command -v flock >/dev/null 2>&1; then
    exec 9> "$root/.venv.lock"
    flock 9
  fi
  install "$@" < /dev/null
)
