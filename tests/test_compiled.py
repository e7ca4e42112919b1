"""The compiled generation step on a CPU: against the model's own forward, and compiled once."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import griffin
from conftest import tiny_llama
from griffin.engine import compiled
from griffin.engine.cache import BufferedCache
from griffin.engine.compiled import bucket, why_not_compiled
from griffin.engine.decoders import Decoders, new_cache
from griffin.engine.step import generate_step
from griffin.native import library
from test_native import STEPPED, build

PROMPT = torch.arange(2, 13)[None]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums in another order
HALF: dict[str, Any] = {"density": 0.5, "backend": "gather", "selection": "topk"}


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """What `torch.compile` hands its graphs to: it counts them, and runs them as they are."""
    torch._dynamo.reset()
    found = CompileCounter()
    own = compiled._compiled(found)
    monkeypatch.setattr(compiled, "_compiled", lambda backend: own)
    yield found
    torch._dynamo.reset()


@torch.no_grad()
def steps(model: Any, prompt: Tensor, count: int, **arguments: Any) -> Tensor:
    return torch.stack([step.logits for step in itertools.islice(generate_step(model, prompt, **arguments), count)])


def both(model: Any, prompt: Tensor, count: int, **arguments: Any) -> None:
    """The compiled step equals the eager one."""
    found = steps(model, prompt, count, step="compiled", **arguments)
    torch.testing.assert_close(found, steps(model, prompt, count, step="eager", **arguments), **CLOSE)


def test_one_graph_across_selections_turns_handles_and_buckets(counter: CompileCounter) -> None:
    model = tiny_llama(torch.float32)
    for turn in range(2):  # a handle each, as griffin.generate attaches one a call
        with griffin.attach(model, **HALF) as handle:
            both(model, PROMPT, 4, handle=handle)
            first = handle.experts[1]
            both(model, PROMPT.flip(1), 4, handle=handle)
            assert not torch.equal(handle.experts[1], first)
            both(model, torch.randint(2, 97, (1, 250)), 12, handle=handle)  # from a bucket of 256 tokens into the next
        assert counter.frame_count == 1, turn


def test_a_second_turn_goes_on_with_the_static_cache(counter: CompileCounter) -> None:
    model = tiny_llama(torch.float32)
    found = {}
    for step in ("compiled", "eager"):
        cache = new_cache(model, step=step)
        with griffin.attach(model, **HALF) as handle:
            first = [
                each.tokens
                for each in itertools.islice(generate_step(model, PROMPT, handle=handle, cache=cache, step=step), 5)
            ]
            other = steps(model, PROMPT.flip(1), 3, handle=handle, step=step)  # another conversation takes the buffers
            longer = torch.cat([PROMPT, torch.stack(first, dim=1), PROMPT.flip(1)], dim=1)
            second = steps(model, longer, 5, handle=handle, cache=cache, step=step)
            found[step] = torch.cat([other, second])
            assert cache.get_seq_length() == longer.shape[1] + 4
    torch.testing.assert_close(found["compiled"], found["eager"], **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
def test_left_padded_batches_whose_sequences_end(batch: str, counter: CompileCounter) -> None:
    model = tiny_llama(torch.float32)
    mask = torch.tensor([[1] * 11, [0] * 5 + [1] * 6, [0] * 9 + [1] * 2])
    ids = torch.randint(2, 97, (3, 11)) * mask
    found = {}
    for step in ("compiled", "eager"):
        with griffin.attach(model, **HALF, batch=batch) as handle, torch.no_grad():
            generator = generate_step(model, ids, attention_mask=mask, handle=handle, step=step)
            logits = [next(generator).logits for _ in range(3)]
            logits.append(generator.send([0, 2]).logits)
            found[step] = torch.cat([*logits, next(generator).logits])
    torch.testing.assert_close(found["compiled"], found["eager"], **CLOSE)
    assert counter.frame_count == 2  # three sequences, and two


@pytest.mark.parametrize("family", ["mistral", "gemma3", "granite", "smollm3"])
def test_other_families(family: str, counter: CompileCounter) -> None:
    """Sliding windows of 6 tokens, scaled embeddings, layers without rotary embeddings."""
    model = build(STEPPED[family])
    with griffin.attach(model, **HALF) as handle:
        both(model, PROMPT, 6, handle=handle)
    assert counter.frame_count == 1


def test_the_full_model_without_griffin(counter: CompileCounter) -> None:
    model = build(STEPPED["gemma3"])  # layers of two kinds, with and without a window
    both(model, PROMPT, 6)
    assert counter.frame_count == 1


def test_the_captured_step_without_torch_compile(counter: CompileCounter) -> None:
    """On a CPU nothing is captured: its static keys and values are what is tested."""
    model = tiny_llama(torch.float32)
    with griffin.attach(model, **HALF) as handle:
        assert Decoders(model, handle, "captured").name == "captured"
        found = steps(model, PROMPT, 6, handle=handle, step="captured")
        torch.testing.assert_close(found, steps(model, PROMPT, 6, handle=handle, step="eager"), **CLOSE)
    assert counter.frame_count == 0


def test_the_native_operator_in_it(counter: CompileCounter) -> None:
    if library.why_not() is not None:
        pytest.skip("the native library is not built here")
    model = tiny_llama(torch.float32)
    with griffin.attach(model, density=0.5, selection="topk", backend="native") as handle:
        assert Decoders(model, handle).name == "native"  # a CPU's default
        assert Decoders(model, handle, "compiled").name == "compiled"
        both(model, PROMPT, 4, handle=handle)
    assert counter.frame_count == 1


@pytest.mark.model
def test_generate_with_inductor() -> None:
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "processes" / "generate_with_inductor.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout == "12 tokens\n"


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 256, 257, 320, 321, 512, 513, 1024, 1025, 2049)] == [
        256, 256, 320, 320, 384, 512, 640, 1024, 1280, 2560,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= max(256, 1.26 * n) for n in range(1, 9000))


def test_what_cannot_be_compiled_says_why() -> None:
    model = tiny_llama(torch.float32)
    handle = griffin.attach(model, density=0.5, selection="topk", backend="reference")
    with handle, pytest.raises(ValueError, match="compiled step cannot be taken: the reference backend indexes"):
        Decoders(model, handle, "compiled")
    with pytest.raises(ValueError, match="step is 'fast'; expected one of auto, native, compiled, captured, eager"):
        Decoders(model, None, "fast")
    with pytest.raises(ValueError, match="native step cannot be taken: the full model, without GRIFFIN"):
        Decoders(model, None, "native")
    caches = [BufferedCache(3), BufferedCache(3)]
    with pytest.raises(ValueError, match="have a key/value cache each"):
        Decoders(model, None, "compiled").decoder(caches, ())
    assert why_not_compiled(model) is None
    model.config.layer_types = ["linear_attention"] * 3
    assert "linear_attention" in (why_not_compiled(model) or "")
    model._can_compile_fullgraph = False
    assert "cannot compile a whole step" in (why_not_compiled(model) or "")
