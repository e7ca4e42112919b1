"""A fresh process for `gguf_speed.py`: load a GGUF file, answer with one token, then generate for the peak memory.

    python benchmarks/gguf_start.py FILE DENSITY THREADS TOKENS PROMPT

The first token's moment is that of the first byte on stdout; the line says how many seconds `griffin.load` took.
"""

from __future__ import annotations

import sys
import time

import torch

import griffin


def main() -> None:
    file, density, threads, tokens, prompt = sys.argv[1:]
    torch.set_num_threads(int(threads))
    load, generate = griffin.load, griffin.generate  # the imports behind them are not the load time
    begin = time.perf_counter()
    model, tokenizer = load(file)
    load_s = time.perf_counter() - begin
    generate(model, tokenizer, prompt, density=float(density), temperature=0.0, max_tokens=1)
    print(load_s, flush=True)
    generate(model, tokenizer, prompt, density=float(density), temperature=0.0, max_tokens=int(tokens))


if __name__ == "__main__":
    main()
