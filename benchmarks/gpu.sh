#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in under nine minutes: checked, printed, and written as CSV.
#
#     benchmarks/gpu.sh [--tiny] [--minutes 8.5] [-o gpu.csv]
#
# Needs a Python with torch, triton and transformers (PYTHON=...), and this repository; nothing is downloaded. On a CPU
# only --tiny makes sense: it runs the same code on tiny shapes, with the kernels interpreted if triton is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
