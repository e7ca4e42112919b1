"""A row's bits do not depend on its neighbours: row i of a call equals that row alone, `==`, whatever is around it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from conftest import tiny_llama
from griffin.attachment import Griffin
from griffin.engine.cache import BufferedCache
from griffin.engine.decoders import Decoders, NativeStep, new_cache
from griffin.engine.forward import Forward
from griffin.engine.native_decoder import Caches, NativeDecoder
from griffin.models.convert import convert
from griffin.native import abi, grouped, kernel, library, operands
from griffin.weights.quantised import QuantisedLinear
from test_kernel import FORMATS, make, matrix
from test_native import STEPPED, build
from test_quantised import blocks

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
GGUF = ("Q8_0", "Q4_K", "Q6_K")
FLOATS = ("f32", "bf16")


# -- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [*FORMATS, *GGUF])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(rows=st.integers(1, 80), d=st.integers(1, 3), d_out=st.integers(1, 90), threads=st.integers(1, 2))
def test_products(fmt: str, rows: int, d: int, d_out: int, threads: int) -> None:
    torch.manual_seed(d_out)
    w = gguf_matrix(fmt, d_out, 256 * d) if fmt in GGUF else matrix(torch.randn(d_out, 64 * d + 7), fmt)
    rows = rows if w.struct.format == abi.GROUPED else min(rows, kernel.MAX_ROWS)
    x = torch.randn(rows, w.d_in)
    together = kernel.matvec(w, x, threads=threads)
    assert torch.equal(together, torch.cat([kernel.matvec(w, row[None], threads=threads) for row in x]))


def gguf_matrix(type: str, d_out: int, d_in: int) -> Any:
    return operands.packed_matrix(grouped.from_gguf(type, blocks(type, d_out, d_in)[0], d_out, d_in))


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 16),
    d=st.integers(1, 200),
    d_ff=st.integers(1, 150),
    shared=st.booleans(),
    threads=st.integers(1, 2),
)
def test_feedforward(fmt: str, rows: int, d: int, d_ff: int, shared: bool, threads: int) -> None:
    torch.manual_seed(d)
    block, x = make(fmt, d_ff, d), torch.randn(rows, d)
    experts = torch.randperm(d_ff)[: (d_ff + 1) // 2].sort().values if shared else None
    together = kernel.ff(block, x, experts, threads=threads)
    alone = [kernel.ff(block, row[None], experts, threads=threads) for row in x]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(rows=st.integers(2, 16), d=st.integers(1, 200), d_ff=st.integers(40, 150), threads=st.integers(1, 2))
def test_feedforward_of_experts_of_their_own(fmt: str, rows: int, d: int, d_ff: int, threads: int) -> None:
    torch.manual_seed(d)
    block, x = make(fmt, d_ff, d), torch.randn(rows, d)
    sets = [torch.randperm(d_ff)[: d_ff // 2].sort().values for _ in range(rows)]
    together = kernel.ff(block, x, *kernel.union(sets, d_ff), threads=threads)
    alone = [kernel.ff(block, row[None], own, threads=threads) for row, own in zip(x, sets, strict=True)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(rows=st.integers(2, 16), d=st.integers(1, 200), d_ff=st.integers(40, 150), threads=st.integers(1, 2))
def test_feedforward_with_dynamic_selection(fmt: str, rows: int, d: int, d_ff: int, threads: int) -> None:
    torch.manual_seed(d)
    block, x = make(fmt, d_ff, d), torch.randn(rows, d)
    dynamic = operands.dynamic(block, torch.rand(d_ff), d_ff // 3)
    together = kernel.ff(block, x, dynamic=dynamic, threads=threads)
    assert torch.equal(
        together, torch.cat([kernel.ff(block, row[None], dynamic=dynamic, threads=threads) for row in x])
    )


# -- the decoding step -----------------------------------------------------------------------------------------------


def to_gguf(model: PreTrainedModel, type: str) -> None:
    """Replace the Linears by random weights of a GGUF type."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                d_out, d_in = child.weight.shape
                raw = blocks(type, d_out, d_in)[0]
                packed = grouped.from_gguf(type, raw, d_out, d_in, neuron_major=name == "down_proj")
                setattr(parent, name, QuantisedLinear([packed], None))


@functools.cache
def model_of(weights: str, family: str | None = None) -> PreTrainedModel:
    if weights in GGUF:
        model: PreTrainedModel = tiny_llama(torch.float32, hidden_size=256, intermediate_size=256)
        to_gguf(model, weights)
    else:
        model = tiny_llama(torch.float32) if family is None else build(STEPPED[family])
        convert(model, weights)
    return model


@contextmanager
def full(model: PreTrainedModel) -> Iterator[tuple[Griffin, NativeDecoder]]:
    with griffin.attach(model, density=1.0) as handle, torch.no_grad():
        native = Decoders(model, handle)._native
        assert native is not None
        yield handle, native


def prompted(model: PreTrainedModel, length: int, seed: int) -> BufferedCache:
    cache = new_cache(model)
    assert isinstance(cache, BufferedCache)
    generator = torch.Generator().manual_seed(seed)
    Forward(model, cache, None)(torch.randint(2, 97, (1, length), generator=generator))
    return cache


def run(native: NativeDecoder, handle: Griffin, caches: list[BufferedCache], tokens: list[Tensor]) -> list[Tensor]:
    experts = native.experts_of(handle.plan.select(handle.gathered))
    logits = native.step(torch.cat(tokens), Caches(caches), experts, None, [len(own) for own in tokens])
    return list(logits.split([len(own) for own in tokens]))


STEPS = [
    *((weights, None) for weights in (*FLOATS, "int8", "int4", *GGUF)),
    *(("int8", family) for family in STEPPED),  # whatever is beside the products: norms, rotary, windows, caps
]


@pytest.mark.parametrize(
    ("weights", "family"),
    STEPS,
)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=4).filter(lambda counts: 1 < sum(counts) <= 16),
    length=st.integers(1, 40),
)
def test_a_step_of_several_rows_and_sequences(weights: str, family: str | None, counts: list[int], length: int) -> None:
    """Several tokens of each of several sequences in one call, against each token's own step: logits, keys, values."""
    model = model_of(weights, family)
    generator = torch.Generator().manual_seed(length)
    tokens = [torch.randint(2, 97, (count,), generator=generator) for count in counts]
    with full(model) as (handle, native):
        caches = [prompted(model, length + 3 * place, place) for place in range(len(counts))]
        copies = copy.deepcopy(caches)
        together = run(native, handle, caches, tokens)
        for cache, own, ids, rows in zip(caches, copies, tokens, together, strict=True):
            alone = torch.cat([run(native, handle, [own], [token[None]])[0] for token in ids])
            assert torch.equal(rows, alone)
            assert cache.length == own.length
            for left, right in zip(cache.layers, own.layers, strict=True):
                assert torch.equal(left.keys, right.keys)
                assert torch.equal(left.values, right.values)


def test_drafted_rows_that_are_cut_off_leave_no_trace() -> None:
    model = model_of("int8")
    with full(model) as (handle, native):
        own = prompted(model, 9, 0)
        other = copy.deepcopy(own)
        run(native, handle, [own], [torch.tensor([5, 17, 3, 88])])
        own.cut(10)
        found = run(native, handle, [own], [torch.tensor([41, 9])])[0]
        run(native, handle, [other], [torch.tensor([5])])
        assert torch.equal(found, run(native, handle, [other], [torch.tensor([41, 9])])[0])


def test_several_tokens_of_a_cache_of_several_sequences_are_refused() -> None:
    model = model_of("int8")
    with full(model) as (handle, native):
        both = new_cache(model)
        assert isinstance(both, BufferedCache)
        Forward(model, both, None)(torch.tensor([[1, 2], [3, 4]]))
        with pytest.raises(ValueError, match="need a cache for each; this one holds 2"):
            run(native, handle, [both], [torch.tensor([5, 6])])


def test_rows_of_a_decoder_equal_its_single_steps() -> None:
    model = model_of("int8")
    with full(model) as (handle, _):
        caches = [prompted(model, 9, 0), prompted(model, 9, 0)]
        selections = handle.plan.select(handle.gathered)
        first, second = (Decoders(model, handle).decoder([cache], selections) for cache in caches)
        assert isinstance(first, NativeStep)
        tokens = torch.arange(2, 18)
        assert torch.equal(first.rows(tokens), torch.cat([second(token[None]) for token in tokens]))
