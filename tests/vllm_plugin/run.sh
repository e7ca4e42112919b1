#!/usr/bin/env bash
# Run the tests of the vLLM plugin in their own environment; skipped, and said so, where it cannot be had.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash tests/vllm_plugin/environment.sh
if [ -e .venv-vllm/installed ]; then
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} .venv-vllm/bin/python -m pytest tests/vllm_plugin
fi
