#!/usr/bin/env bash
# Try clients that people use against `griffin serve`: llm, LangChain, ollama. They are installed into .venv-clients.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ ! -e .venv-clients/installed ]; then
  "${PYTHON:-python3}" -m venv .venv-clients
  .venv-clients/bin/python -m pip install --quiet --disable-pip-version-check \
    "llm>=0.36,<1" "langchain-openai>=1.7,<2" "ollama>=0.6,<1"
  touch .venv-clients/installed
fi

log=$(mktemp)
"${GRIFFIN:-.venv/bin/griffin}" serve -m "${MODEL:-smollm2-135m}" --name griffin-test --port 0 --log-format json 2> "$log" &
server=$!
trap 'kill $server; rm -f "$log"' EXIT
for _ in $(seq 600); do
  url=$(grep -o 'http://127\.0\.0\.1:[0-9]*' "$log" | head -n 1 || true)
  [ -n "$url" ] && break
  kill -0 $server || { cat "$log"; exit 1; }
  sleep 0.5
done
.venv-clients/bin/python tests/clients/check.py "$url" griffin-test
