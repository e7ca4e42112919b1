"""The kernels against the reference backend: dtypes, activations, layouts, rows, index lists, weights in groups."""

from __future__ import annotations

import os
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/test_triton.py runs these in a process with Triton's interpreter", allow_module_level=True)

from griffin.activation import ACTIVATIONS
from griffin.backends.reference import ReferenceFF
from griffin.backends.triton import TritonFF
from griffin.families import Layout
from griffin.layouts import FFBlock
from griffin.native import grouped
from griffin.weights.device_groups import device_groups
from griffin.weights.quantised import QuantisedLinear

D, WIDTH = 40, 24
GATED, FUSED, UNGATED = (
    Layout(("gate", "up"), "down"),
    Layout(("gate_up",), "down", fused=True),
    Layout(("up",), "down"),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the reference's rounded z


def block_of(
    layout: Layout, activation: str, dtype: torch.dtype = torch.float32, bias: bool = False, d: int = D, f: int = WIDTH
) -> FFBlock:
    module = nn.Module()
    module.act_fn = SimpleNamespace() if activation is None else ACTIVATIONS[activation]
    for name in layout.inputs:
        setattr(module, name, nn.Linear(d, 2 * f if layout.fused else f, bias=bias))
    setattr(module, layout.output, nn.Linear(f, d, bias=bias))
    module = module.to(dtype).requires_grad_(False)
    inputs = tuple(getattr(module, name) for name in layout.inputs)
    return FFBlock(0, "mlp", layout, module, inputs, getattr(module, layout.output), f)


def run(kind: Any, block: FFBlock, experts: list[Tensor], x: Tensor) -> Tensor:
    """As the model's own forward runs a block."""
    with ExitStack() as undo:
        ff = kind(block, undo)
        ff.select(experts)
        outputs = [ff.read(which, x) for which in range(len(block.inputs))]
        gate, up = outputs[0].chunk(2, dim=-1) if block.layout.fused else (outputs[0], outputs[-1])
        act = block.module.act_fn
        y: Tensor = ff.write(act(gate) * up if block.gated else act(up))
        assert ff.calls == 1
        return y


def expert_sets(sets: int, k: int, width: int = WIDTH) -> list[Tensor]:
    return [torch.randperm(width)[:k].sort().values for _ in range(sets)]


@pytest.mark.parametrize(
    ("layout", "activation", "dtype", "bias", "sets", "shape"),
    [
        (GATED, "silu", torch.float32, False, 1, (1, 1)),
        (GATED, "silu", torch.bfloat16, True, 1, (3, 1)),
        (GATED, "gelu", torch.float16, True, 2, (2, 1)),
        (GATED, "gelu_tanh", torch.float32, True, 3, (3, 2)),
        (FUSED, "silu", torch.float32, True, 1, (8, 1)),
        (FUSED, "gelu_tanh", torch.bfloat16, False, 2, (2, 1)),
        (UNGATED, "relu", torch.float32, True, 1, (3, 3)),  # more tokens than one read of the weights serves
        (UNGATED, "relu2", torch.float16, False, 2, (2,)),  # tokens flattened by the model
        (UNGATED, "gelu", torch.float32, False, 1, (2, 1)),
    ],
)
def test_it_equals_the_reference(
    layout: Layout, activation: str, dtype: torch.dtype, bias: bool, sets: int, shape: tuple[int, ...]
) -> None:
    block = block_of(layout, activation, dtype, bias)
    experts = expert_sets(sets, 9)
    x = torch.randn(*shape, D).to(dtype)
    found, expected = run(TritonFF, block, experts, x), run(ReferenceFF, block, experts, x)
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_the_same_bits_every_time_and_in_every_batch() -> None:
    block = block_of(GATED, "silu")
    experts = expert_sets(1, 11) * 2
    x = torch.randn(2, 1, D)
    together = run(TritonFF, block, experts, x)
    assert torch.equal(together, run(TritonFF, block, experts, x))
    assert torch.equal(together[1:], run(TritonFF, block, experts[:1], x[1:]))


def test_lists_stay_where_they_are_and_nothing_is_copied() -> None:
    block = block_of(GATED, "silu")
    before = [p.data_ptr() for p in block.module.parameters()]
    values = block.output.weight.clone()
    places = []
    for k in (3, 24, 1):
        with ExitStack() as undo:
            ff = TritonFF(block, undo)
            ff.select(expert_sets(1, k))
            places.append([buffer.data_ptr() for buffer in ff.buffers])
            assert ff.buffers[1].tolist() == [k]
            assert [p.data_ptr() for p in block.module.parameters()] == before
            assert block.output.weight.stride() == (1, D)
        assert block.output.weight.stride() == (WIDTH, 1)
        assert torch.equal(block.output.weight, values)
    assert places[0] == places[1] == places[2]


FORMATS = ["int8", "int4", "Q4_K", "Q6_K", "Q4_0", "Q5_1", "gptq"]


def packed(name: str, d_out: int, d_in: int, neuron_major: bool) -> grouped.Packed:
    if name in grouped.MADE:
        return grouped.quantise(torch.randn(d_out, d_in) / 8, name, neuron_major=neuron_major)
    own = {"gptq": grouped.Format("gptq", 4, 32, "f16", "code", 0, 128)}
    format = own[name] if name in own else grouped.gguf_format(name)[0]
    n = format.padded(d_in)
    spans, n_groups = -(-n // (256 if format.supers else format.span)), n // format.group

    def numbers(columns: int) -> Tensor:
        return torch.randint(1, 16, (d_out, columns), dtype=torch.uint8)

    offset = None
    if format.offset != "none":
        offset = numbers(spans) if format.offset == "code" else torch.rand(d_out, spans).half() / 16
    return grouped.from_codes(
        format, torch.randint(0, 2**format.bits, (d_out, n), dtype=torch.uint8), torch.rand(d_out, spans).half() / 64,
        offset, numbers(n_groups) if format.supers else None, numbers(n_groups) if format.offset == "sub" else None,
        d_in=d_in, neuron_major=neuron_major,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*FORMATS, "Q2_K", "Q3_K", "Q5_K", "Q8_0"])
@pytest.mark.parametrize("neuron_major", [False, True])
def test_the_layout_for_a_gpu_holds_the_same_numbers(name: str, neuron_major: bool) -> None:
    matrix = packed(name, 70, 352, neuron_major)
    found = device_groups(matrix, torch.device("cpu"))
    columns = matrix.d_out if neuron_major else matrix.d_in
    assert torch.equal(found.numbers()[:, :columns], matrix.unpack())
    assert found.bits == (4 if matrix.format.bits <= 4 else 8)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_groups(name: str) -> None:
    d, f = 96, 64
    block = block_of(GATED, "silu", d=d, f=f)
    bias = torch.randn(f)
    gate, up = (QuantisedLinear([packed(name, f, d, False)], bias) for _ in range(2))
    down = QuantisedLinear([packed(name, d, f, True)], torch.randn(d))
    block = FFBlock(0, "mlp", GATED, block.module, (gate, up), down, f)
    experts = expert_sets(2, 9, f)
    x = torch.randn(2, 1, d)
    found, expected = run(TritonFF, block, experts, x), run(ReferenceFF, block, experts, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # a group is summed before it is scaled
    fused = FFBlock(
        0, "mlp", FUSED, block.module, (QuantisedLinear([gate.parts[0], up.parts[0]], bias.repeat(2)),), down, f
    )
    assert torch.equal(run(TritonFF, fused, experts[:1], x[:1]), run(TritonFF, block, experts[:1], x[:1]))


def test_what_it_cannot_read_is_refused_by_name() -> None:
    block = block_of(GATED, "silu", torch.float64)
    with pytest.raises(ValueError, match=r"triton backend cannot be used: mlp has weights of torch.float64"):
        run(TritonFF, block, expert_sets(1, 3), torch.randn(1, 1, D).double())
    table = grouped.Format("nf4", 4, 32, "f32", "none", 0, 64, tuple(torch.randn(16).tolist()))
    codes, scale = torch.zeros(WIDTH, 64, dtype=torch.uint8), torch.ones(WIDTH, 1)
    linear = QuantisedLinear([grouped.from_codes(table, codes, scale, d_in=D)])
    block = block_of(GATED, "silu")
    block = FFBlock(0, "mlp", GATED, block.module, (linear, linear), block.output, WIDTH)
    with pytest.raises(ValueError, match=r"weights of nf4, and its codes are places in a table"):
        TritonFF(block, ExitStack())
    block = block_of(GATED, "silu")
    with pytest.raises(ValueError, match="selected for a batch of 2 sequences"):
        run(TritonFF, block, expert_sets(2, 3), torch.randn(3, 1, D))
