"""The native library against float64: every format, instruction set, activation, thread count and odd shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.native import abi, grouped, kernel, library, operands

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))

ISAS = library.isas() if library.why_not() is None else []
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FORMATS = (*DTYPES, *grouped.MADE)
# float32 sums of up to some thousand products; the expected values are float64 over the same rounded weights
SUMMATION = 3e-5
# Weights in groups meet inputs in steps of max / 16256 of a group: 2e-5 of the group's maximum, which is 2 to 3 times
# its root mean square; a squared ReLU doubles it.
INPUTS = 3e-4
NEURONS = 1e-2  # neuron-major ones meet inputs in steps of max / 127: 0.0023 of a maximum of 2 to 4 root mean squares
BF16_OUTPUT = 4e-3  # bfloat16 has 8 bits: each output is rounded by up to 2^-9 of itself


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library.set_isa(request.param)
    assert library.isa().split()[0] == request.param
    yield request.param
    library.set_isa(None)


def matrix(weight: Tensor, fmt: str, bias: Tensor | None = None, *, neuron_major: bool = False) -> operands.Matrix:
    """W (out, in), in a format."""
    if fmt in DTYPES:
        weight = weight.to(DTYPES[fmt])
        return operands.matrix(weight.T.contiguous() if neuron_major else weight, bias, neuron_major=neuron_major)
    return operands.packed_matrix(grouped.quantise(weight, fmt, neuron_major=neuron_major), bias)


def values(matrix: operands.Matrix) -> Tensor:
    """What a matrix's weights mean, as they are stored, in float64."""
    stored: Tensor | grouped.Packed = matrix.kept[0]
    return (stored.unpack() if isinstance(stored, grouped.Packed) else stored).double()


def make(
    fmt: str, d_ff: int, d: int, gated: bool = True, activation: str = "silu", biased: bool = False
) -> operands.Block:
    gate, up, down = torch.randn(d_ff, d) / d**0.5, torch.randn(d_ff, d) / d**0.5, torch.randn(d, d_ff) / d**0.5
    gate_bias, up_bias, out_bias = (torch.randn(n) if biased else None for n in (d_ff, d_ff, d))
    return operands.ff_block(
        matrix(gate, fmt, gate_bias) if gated else None,
        matrix(up, fmt, up_bias),
        matrix(down, fmt, out_bias, neuron_major=True),
        activation=activation,
    )


def activate(name: str, v: Tensor) -> Tensor:
    functional = torch.nn.functional
    if name.startswith("gelu"):
        return functional.gelu(v, approximate="tanh" if name == "gelu_tanh" else "none")
    return functional.silu(v) if name == "silu" else functional.relu(v) ** (2 if name == "relu2" else 1)


def expected(block: operands.Block, x: Tensor, activation: str, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the sums of its terms' absolute values.

    Shapes: x (B, D); wanted (B, D_ff) bool; returns (B, D) float64 twice.
    """
    *inputs, down = block.matrices
    products = [x.double() @ values(m).T + (0 if m.kept[1] is None else m.kept[1].double()) for m in inputs]
    z = activate(activation, products[0])
    if block.gated:
        z = z * products[1]
    bias = torch.zeros(block.d_model).double() if down.kept[1] is None else down.kept[1].double()
    z, weight = z * wanted, values(down)
    return z @ weight + bias, z.abs() @ weight.abs() + bias.abs()


def close(
    y: Tensor, truth: Tensor, fmt: str = "f32", size: Tensor | None = None, *, neuron_major: bool = False
) -> None:
    limit = BF16_OUTPUT if y.dtype == torch.bfloat16 else SUMMATION if fmt in DTYPES else INPUTS
    if neuron_major and fmt not in DTYPES:
        limit = max(limit, NEURONS)
    error = float((y.double() - truth).norm() / ((truth if size is None else size).norm() + 1e-3))
    assert error < limit, error  # NaN, a poisoned output that was not written, fails too


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 700),
    d_ff=st.integers(1, 60),
    rows=st.integers(1, 16),
    threads=st.integers(1, 3),
    kind=st.sampled_from(["all", "shared", "own", "one"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(abi.ACTIVATIONS),
    gated=st.booleans(),
    biased=st.booleans(),
)
def test_ff_equals_float64(fmt, d, d_ff, rows, threads, kind, dtype, out_dtype, activation, gated, biased) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(d * 1000 + d_ff)
    block = make(fmt, d_ff, d, gated, activation, biased)
    x = torch.randn(rows, d + 7).to(dtype)[:, 3 : d + 3]  # strided
    out = torch.full((rows, d + 5), float("nan"), dtype=out_dtype)
    y = out[:, 2 : d + 2]
    wanted = torch.zeros(rows, d_ff, dtype=torch.bool)
    experts = mask = None
    k = 1 if kind == "one" else (d_ff + 1) // 2
    if kind == "all":
        wanted[:] = True
    elif kind == "own":
        sets = torch.stack([torch.randperm(d_ff)[:k] for _ in range(rows)])
        wanted.scatter_(1, sets, True)
        experts, mask = kernel.union(sets, d_ff)
    else:
        experts = torch.randperm(d_ff)[:k].to(torch.int32 if rows % 2 else torch.int64)
        wanted[:, experts.long()] = True
    for _ in range(2):
        assert kernel.ff(block, x, experts, mask, out=y, threads=threads) is y
    truth, terms = expected(block, x, activation, wanted)
    # rounded inputs are small against the terms, not against a sum that cancels
    close(y, truth, fmt, None if fmt in DTYPES else terms, neuron_major=True)
    assert out[:, :2].isnan().all()
    assert out[:, d + 2 :].isnan().all()


@pytest.mark.parametrize("fmt", grouped.MADE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("d", "d_ff", "k"), [(33, 70, 37), (256, 512, 200), (320, 64, 64)])
def test_copied_experts_give_the_same_bits(fmt: str, dtype: torch.dtype, d: int, d_ff: int, k: int) -> None:
    torch.manual_seed(0)
    block = make(fmt, d_ff, d, biased=True)
    experts = torch.randperm(d_ff)[:k].sort()[0].to(dtype)
    compact = operands.compact(block, experts)
    again = operands.compact(block, experts, compact.copies)
    assert all(new is old for new, old in zip(again.copies, compact.copies, strict=True))  # written over
    larger = operands.compact(block, torch.arange(d_ff), compact.copies)
    assert not any(new is old for new, old in zip(larger.copies, compact.copies, strict=True)) or k > d_ff - 32
    for rows in (1, 3, 9):
        x = torch.randn(rows, d)
        assert torch.equal(kernel.ff(block, x, experts, compact=compact), kernel.ff(block, x, experts))


def test_rows_that_cannot_be_copied_are_refused() -> None:
    with pytest.raises(ValueError, match="in groups"):
        operands.compact(make("bf16", 64, 32), torch.arange(4))
    with pytest.raises(ValueError, match="expert"):
        operands.compact(make("int8", 64, 32), torch.tensor([3, 64]))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d_in", [1, 33, 576, 1000])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_matvec_equals_float64(fmt: str, d_in: int, rows: int) -> None:
    torch.manual_seed(d_in)
    weight, bias, x = torch.randn(77, d_in) / d_in**0.5, torch.randn(77), torch.randn(rows, d_in)
    made = matrix(weight, fmt, bias)
    for dtype in (torch.float32, torch.bfloat16):
        y = kernel.matvec(made, x.to(dtype), out=torch.full((rows, 77), float("nan")), threads=2)
        close(y, x.to(dtype).double() @ values(made).T + bias.double(), fmt)


@pytest.mark.parametrize("fmt", grouped.MADE)
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 130])
@pytest.mark.parametrize("neuron_major", [False, True])
def test_grouped_weights_meet_any_number_of_rows(fmt: str, rows: int, neuron_major: bool) -> None:
    weight, bias, x = torch.randn(70, 200), torch.randn(70), torch.randn(rows, 200)
    made = matrix(weight, fmt, bias, neuron_major=neuron_major)
    own = values(made) if neuron_major else values(made).T
    for dtype in (torch.float32, torch.bfloat16):
        y = kernel.matvec(made, x.to(dtype), out=torch.full((rows, 70), float("nan")), threads=2)
        close(y, x.to(dtype).double() @ own + bias.double(), fmt, neuron_major=neuron_major)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_do_not_depend_on_their_neighbours(fmt: str) -> None:
    """A row of a batch with its own experts equals that row alone, up to the order of summation."""
    torch.manual_seed(0)
    block, x = make(fmt, 50, 200), torch.randn(9, 200)
    sets = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(9)])
    together = kernel.ff(block, x, *kernel.union(sets, 50))
    for row, own, y in zip(x, sets, together, strict=True):
        close(y[None], kernel.ff(block, row[None], own).double(), fmt)


def test_same_call_same_bits() -> None:
    block, x = make("int8", 300, 576), torch.randn(2, 576)
    first = kernel.ff(block, x, threads=2)
    assert all(torch.equal(first, kernel.ff(block, x, threads=2)) for _ in range(20))


def test_relu_reads_nothing_for_dead_neurons() -> None:
    """Their down rows are not touched: even NaN there does not show."""
    up, down = torch.ones(4, 8), torch.ones(4, 8)
    up[1], down[1] = -1, float("nan")
    block = operands.ff_block(None, operands.matrix(up), operands.matrix(down, neuron_major=True), activation="relu")
    assert torch.equal(kernel.ff(block, torch.ones(1, 8)), torch.full((1, 8), 24.0))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_comes_out(fmt: str, bad: float) -> None:
    x = torch.randn(2, 100)
    x[1, 70] = bad
    y = kernel.ff(make(fmt, 20, 100), x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("down", ["f32", "int8", "int4"])
@pytest.mark.parametrize("gate", ["bf16", "int4"])
@pytest.mark.parametrize("up", ["f16", "int8"])
def test_formats_may_differ(gate: str, up: str, down: str) -> None:
    d, d_ff = 100, 70
    parts = [torch.randn(d_ff, d) / d**0.5, torch.randn(d_ff, d) / d**0.5, torch.randn(d, d_ff) / d**0.5]
    block = operands.ff_block(
        matrix(parts[0], gate), matrix(parts[1], up), matrix(parts[2], down, neuron_major=True), activation="silu"
    )
    assert block.format == "+".join(dict.fromkeys((gate, up, down)))
    x = torch.randn(3, d)
    truth, terms = expected(block, x, "silu", torch.ones(3, d_ff))
    close(kernel.ff(block, x, threads=2), truth, "int4", terms, neuron_major=down != "f32")


def test_union() -> None:
    sets = torch.tensor([[0, 3], [3, 5], [9, 0]])
    experts, mask = kernel.union(sets, 10)
    assert experts.tolist() == [0, 3, 5, 9]
    assert mask.tolist() == [0b101, 0b011, 0b010, 0b100]
    with pytest.raises(ValueError, match=r"outside 0\.\.D_ff-1"):
        kernel.union(sets, 9)


def test_union_of_sets_of_different_sizes() -> None:
    sets = [torch.tensor([0, 4, 7]), torch.tensor([4]), torch.tensor([1, 4, 5, 9])]
    experts, mask = kernel.union(sets, 10)
    assert experts.tolist() == [0, 1, 4, 5, 7, 9]
    assert [int(bits) for bits in mask] == [0b001, 0b100, 0b111, 0b100, 0b001, 0b100]


def test_a_call_is_counted_and_runs_on_torchs_threads() -> None:
    before = library.calls()
    block = make("f32", 8, 16)
    kernel.ff(block, torch.randn(1, 16))
    assert library.calls() == before + 1
    if library._torch_openmp() is not None:
        assert library.threading() == "openmp"


def test_no_experts_leaves_the_bias() -> None:
    block = make("f32", 8, 16, biased=True)
    assert torch.equal(
        kernel.ff(block, torch.randn(2, 16), torch.empty(0, dtype=torch.int64)), block.down.kept[1].expand(2, -1)
    )


def test_wrong_use_is_refused() -> None:
    block, x = make("bf16", 8, 16), torch.randn(1, 16)
    weight = torch.randn(8, 16)
    rows, down = matrix(weight, "f32"), matrix(weight.T, "f32", neuron_major=True)
    for call in (
        lambda: kernel.ff(block, torch.randn(1, 15)),
        lambda: kernel.ff(block, torch.randn(17, 16)),
        lambda: kernel.ff(block, x.double()),
        lambda: kernel.ff(block, x, torch.tensor([0.5])),
        lambda: kernel.ff(block, x, out=torch.empty(1, 17)),
        lambda: kernel.ff(block, x, row_mask=torch.ones(8, dtype=torch.uint16)),
        lambda: operands.ff_block(rows, rows, rows, activation="silu"),
        lambda: operands.ff_block(rows, matrix(weight[:7], "f32"), down, activation="silu"),
        lambda: operands.ff_block(down, rows, down, activation="silu"),
        lambda: operands.ff_block(rows, rows, down, activation="swish"),
        lambda: operands.matrix(weight.double()),
        lambda: operands.matrix(torch.randn(16, 8).T),
        lambda: operands.matrix(weight, torch.randn(9)),
        lambda: kernel.matvec(rows, torch.randn(17, 16)),
        lambda: library.set_isa("mmx"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
