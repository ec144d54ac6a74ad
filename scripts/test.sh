#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, format, types, import direction, tests.
#
#   bash scripts/test.sh [--setup-only] [PYTEST ARGUMENTS]     e.g. bash scripts/test.sh -k tokens -x
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh" demo dev quantize rewards serve tokenizer verify
if [ "${1:-}" = "--setup-only" ]; then
  exit 0
fi
PYTHON="$root/.venv/bin/python" exec bash "$root/scripts/check.sh" "$@"
