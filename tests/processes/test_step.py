"""The compiled step with the Triton kernels in it: one graph across selections, densities, turns and handles."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/test_triton.py runs these in a process with Triton's interpreter", allow_module_level=True)

import griffin
from conftest import tiny_llama
from griffin.attachment import Griffin
from griffin.engine import compiled
from griffin.engine.decoders import Decoders
from griffin.engine.step import generate_step

PROMPT = torch.arange(2, 13)[None]


@torch.no_grad()
def steps(model: Any, prompt: Tensor, handle: Griffin, step: str, count: int = 3) -> Tensor:
    generator = generate_step(model, prompt, handle=handle, step=step)
    return torch.stack([each.logits for each in itertools.islice(generator, count)])


def test_one_graph_across_densities_selections_and_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    own = compiled._compiled(counter)
    monkeypatch.setattr(compiled, "_compiled", lambda backend: own)
    model = tiny_llama(torch.float32, num_hidden_layers=2, intermediate_size=16, hidden_size=32)
    experts: list[Tensor] = []
    for density in (0.5, 0.25, 1.0):
        for prompt in (PROMPT, PROMPT.flip(1)):
            settings: dict[str, Any] = {"density": density, "selection": "topk", "layers": [1]}  # layer 0 stays whole
            with griffin.attach(model, **settings, backend="triton") as handle:
                assert Decoders(model, handle, "compiled").name == "compiled"
                found = steps(model, prompt, handle, "compiled")
                experts.append(handle.experts[1])
            with griffin.attach(model, **settings, backend="reference") as handle:
                expected = steps(model, prompt, handle, "eager")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
            assert counter.frame_count == 1, density
    assert not torch.equal(experts[0], experts[1])
    assert [len(each) for each in experts[::2]] == [8, 4, 16]
    torch._dynamo.reset()
