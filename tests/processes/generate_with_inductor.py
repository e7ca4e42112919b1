"""The real compiler and some layers of the real model: the same text, and no recompilation in the second call.

A process of its own: where something has imported pip before, setuptools, which the compiler imports, refuses Python's
own distutils.
"""

from __future__ import annotations

from typing import Any

import torch

import griffin
from griffin.engine.compiled import compiled_graphs


def main() -> None:
    model, tokenizer = griffin.load("smollm2-135m", dtype=torch.float32)
    model.model.layers = model.model.layers[:4]  # of 30, which would take the compiler minutes
    model.config.num_hidden_layers = 4
    settings: dict[str, Any] = {"density": 0.5, "selection": "topk", "backend": "gather", "max_tokens": 12}
    for prompt in ("Once upon a time", "The capital of France is a city where many"):
        found = griffin.generate(model, tokenizer, prompt, step="compiled", **settings)
        assert found.tokens == griffin.generate(model, tokenizer, prompt, step="eager", **settings).tokens
        assert compiled_graphs() == 1
    print(len(found.tokens), "tokens")


if __name__ == "__main__":
    main()
