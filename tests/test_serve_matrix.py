"""A sample of what griffin serve offers, each started; all of it: tests/serve_matrix.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from griffin.native import library
from serve_matrix import SELECTIONS, WEIGHTS, outcome, tiny_model

NATIVE = library.why_not() is None


@pytest.mark.parametrize(
    ("weights", "backend", "selection", "expected"),
    [
        ("f32", "reference", "auto", "answers"),
        ("bf16", "gather", "magnitude", "answers"),
        ("bf16", "gather", "dynamic+topk", "refused: the gather backend"),
        ("int8", "auto", "topk_sample", "answers (step: native"),
        ("int4", "native", "dynamic+topk", "answers (step: native"),
        pytest.param("gguf", "auto", "auto", "answers", marks=pytest.mark.model),
    ],
)
def test_what_serve_offers_starts_and_answers(
    tmp_path: Path, weights: str, backend: str, selection: str, expected: str
) -> None:
    if not NATIVE and (weights.startswith("int") or backend == "native"):
        pytest.skip(str(library.why_not()))
    assert selection in SELECTIONS
    model = "smollm2-135m" if weights == "gguf" else tiny_model(tmp_path / "model")
    found = outcome("-m", model, *WEIGHTS[weights], "--backend", backend, "--selection", selection)
    assert found.startswith(expected), found
