#!/usr/bin/env bash
# The checks themselves, in an environment that is already there; extra arguments go to pytest.
#
#   bash scripts/check.sh                   with .venv
#   PYTHON=python bash scripts/check.sh     with another environment
#
# All checks run even when one fails, so that one run shows everything; the exit code tells.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
failed=()

check() {
  local name="$1"
  shift
  printf '\n== %s\n' "$name"
  "$@" < /dev/null || failed+=("$name")
}

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check .
check "pyright" "$python" -m pyright --pythonpath "$("$python" -c 'import sys; print(sys.executable)')"
check "import-linter" "$python" -c \
  'import sys; from importlinter.cli import lint_imports_command as c; sys.argv[0] = "lint-imports"; c()'
check "pytest" "$python" -m pytest -m "not gpu and not slow" "$@"

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nfailed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
  exit 1
fi
