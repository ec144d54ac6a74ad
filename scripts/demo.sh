#!/usr/bin/env bash
# From nothing to a trained, checked, released model on this machine's CPU.
#
#   bash scripts/demo.sh [OUT] [--until STEP] [--budget tiny|default] [--setup-only]
#
# OUT defaults to runs/demo. Interrupt it whenever you like: the same command goes on where it was.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
arguments=()
setup_only=false
for argument in "$@"; do
  case "$argument" in
    --setup-only) setup_only=true ;;
    *) arguments+=("$argument") ;;
  esac
done

bash "$root/scripts/setup.sh" demo rewards serve
if [ "$setup_only" = true ]; then
  exit 0
fi
exec "$root/.venv/bin/python" "$root/scripts/demo/run.py" "${arguments[@]}"
