#!/usr/bin/env bash
# What one GPU can show: the tests marked gpu, then short benchmarks, into one folder.
#
#   bash scripts/gpu_check.sh [OUT]         default OUT: runs/gpu_check
#   PYTHON=python bash scripts/gpu_check.sh     with another environment than .venv
#
# Without a GPU the tests are collected and skipped, and nothing is measured. The last line of each
# benchmark is JSON; they are gathered in OUT/figures.jsonl. The exit code is that of the tests, or 1
# where a benchmark failed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
out="${1:-runs/gpu_check}"
mkdir -p "$out"

status=0
"$python" -m pytest -m gpu tests/gpu -v 2>&1 | tee "$out/tests.txt" || status=$?

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: nothing to measure"
  exit "$status"
fi
"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$out/device.txt"

: > "$out/figures.jsonl"
for name in mask loss train_step layouts generate; do
  script="scripts/bench/$name.py"
  [ -f "$script" ] || continue
  echo "== $script"
  if "$python" "$script" --rounds 5 | tee "$out/$name.txt"; then
    tail -n 1 "$out/$name.txt" >> "$out/figures.jsonl"
  else
    status=1
  fi
done
cat "$out/figures.jsonl"
exit "$status"
