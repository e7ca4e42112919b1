"""The native library against float64: every format, instruction set, activation, thread count and odd shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin.native import abi, kernel, library, operands

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))

ISAS = library.isas() if library.why_not() is None else []
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# float32 sums of up to some thousand products; the expected values are float64 over the same rounded weights and inputs
SUMMATION = 3e-5
BF16_OUTPUT = 4e-3  # bfloat16 has 8 bits: each output is rounded by up to 2^-9 of itself


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library.set_isa(request.param)
    assert library.isa().split()[0] == request.param
    yield request.param
    library.set_isa(None)


def make(
    fmt: str, d_ff: int, d: int, gated: bool = True, activation: str = "silu", biased: bool = False
) -> operands.Block:
    gate, up, down = (torch.randn(d_ff, d) / d**0.5 for _ in range(3))
    biases = {
        "gate_bias": torch.randn(d_ff) if gated else None,
        "up_bias": torch.randn(d_ff),
        "out_bias": torch.randn(d),
    }
    biases = biases if biased else {}
    if fmt not in DTYPES:
        return operands.quantise_ff(gate if gated else None, up, down, format=fmt, activation=activation, **biases)
    gate, up, down = (part.to(DTYPES[fmt]) for part in (gate, up, down))
    return operands.ff_block(gate if gated else None, up, down, activation=activation, **biases)


def seen(x: Tensor, fmt: str) -> Tensor:
    """What weights of a format see of x, in float64: int8 and int4 see it in groups of 32, rounded to 1/127 of the
    group's maximum. With the same rounding here, their tolerance is the float formats' own."""
    x = x.float()
    if fmt in DTYPES:
        return x.double()
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    top = padded.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    inverse = torch.full_like(top, 127) / top  # `127 / top` is 127 times a rounded reciprocal in torch
    return (torch.round(padded * inverse).double() * (top / 127).double()).flatten(1)[:, : x.shape[1]]


def activate(name: str, v: Tensor) -> Tensor:
    functional = torch.nn.functional
    if name.startswith("gelu"):
        return functional.gelu(v, approximate="tanh" if name == "gelu_tanh" else "none")
    return functional.silu(v) if name == "silu" else functional.relu(v) ** (2 if name == "relu2" else 1)


def expected(
    block: operands.Block, x: Tensor, activation: str, wanted: Tensor, biases: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The result, and the sums of its terms' absolute values.

    Shapes: x (B, D); wanted (B, D_ff) bool; returns (B, D) float64 twice.
    """
    parts = [part.double() for part in operands.unpack(block)]
    down, x = parts[-1], seen(x, block.format)
    products = [x @ part.T for part in parts[:-1]]
    if biases:
        products = [p + b.double() for p, b in zip(products, biases, strict=False)]
    z = activate(activation, products[0])
    if block.gated:
        z = z * products[1]
    z, bias = z * wanted, biases[-1].double() if biases else torch.zeros(down.shape[1]).double()
    return z @ down + bias, z.abs() @ down.abs() + bias.abs()


def close(y: Tensor, truth: Tensor, size: Tensor | None = None) -> None:
    limit = BF16_OUTPUT if y.dtype == torch.bfloat16 else SUMMATION
    error = float((y.double() - truth).norm() / ((truth if size is None else size).norm() + 1e-3))
    assert error < limit, error  # NaN, a poisoned output that was not written, fails too


@pytest.mark.parametrize("fmt", abi.FORMATS)
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
    biases = block.tensors[-3 if gated else -2 :] if biased else ()
    truth, terms = expected(block, x, activation, wanted, biases)
    # AVX2 rounds the factors of int4's down rows to 15 bits: small against the terms, not against a sum that cancels.
    close(y, truth, terms if fmt == "int4" and library.isa() == "avx2" else None)
    assert out[:, :2].isnan().all()
    assert out[:, d + 2 :].isnan().all()


@pytest.mark.parametrize("fmt", abi.FORMATS)
@pytest.mark.parametrize("d_in", [1, 33, 576, 1000])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_matvec_equals_float64(fmt: str, d_in: int, rows: int) -> None:
    torch.manual_seed(d_in)
    weight, bias, x = torch.randn(77, d_in) / d_in**0.5, torch.randn(77), torch.randn(rows, d_in)
    if fmt in DTYPES:
        matrix = operands.matrix(weight.to(DTYPES[fmt]), bias)
    else:
        matrix = operands.quantise_matrix(weight, format=fmt, bias=bias)
    for dtype in (torch.float32, torch.bfloat16):
        y = kernel.matvec(matrix, x.to(dtype), out=torch.full((rows, 77), float("nan")), threads=2)
        close(y, seen(x.to(dtype), fmt) @ operands.unpack(matrix)[0].double().T + bias.double())


@pytest.mark.parametrize("fmt", abi.FORMATS)
def test_rows_do_not_depend_on_their_neighbours(fmt: str) -> None:
    """A row of a batch with its own experts equals that row alone, up to the order of summation."""
    torch.manual_seed(0)
    block, x = make(fmt, 50, 200), torch.randn(9, 200)
    sets = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(9)])
    together = kernel.ff(block, x, *kernel.union(sets, 50))
    for row, own, y in zip(x, sets, together, strict=True):
        close(y[None], kernel.ff(block, row[None], own).double())


def test_same_call_same_bits() -> None:
    block, x = make("int8", 300, 576), torch.randn(2, 576)
    first = kernel.ff(block, x, threads=2)
    assert all(torch.equal(first, kernel.ff(block, x, threads=2)) for _ in range(20))


def test_relu_reads_nothing_for_dead_neurons() -> None:
    """Their down rows are not touched: even NaN there does not show."""
    up, down = torch.ones(4, 8), torch.ones(4, 8)
    up[1], down[1] = -1, float("nan")
    block = operands.ff_block(None, up, down, activation="relu")
    assert torch.equal(kernel.ff(block, torch.ones(1, 8)), torch.full((1, 8), 24.0))


@pytest.mark.parametrize("fmt", abi.FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_comes_out(fmt: str, bad: float) -> None:
    x = torch.randn(2, 100)
    x[1, 70] = bad
    y = kernel.ff(make(fmt, 20, 100), x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize(("fmt", "limit"), [("int8", 0.012), ("int4", 0.12)])
def test_quantised_weights_are_near(fmt: str, limit: float) -> None:
    """int8: step max/127 of a row of normal values, error step / sqrt(12); int4: step max/8 of 32 values."""
    torch.manual_seed(0)
    weights = [torch.randn(64, 576) for _ in range(3)]
    block = operands.quantise_ff(*weights, format=fmt, activation="silu")
    for before, after in zip(weights, operands.unpack(block), strict=True):
        assert (after - before).norm() / before.norm() < limit
        assert torch.equal(operands.unpack(block, 10, 20)[0], operands.unpack(block)[0][10:20])


def test_records_can_be_kept_and_used_again() -> None:
    for fmt in ("int8", "int4"):
        block, x = make(fmt, 40, 96), torch.randn(1, 96)
        scales = block.tensors[1].clone() if fmt == "int8" else None
        again = operands.ff_records(block.tensors[0].clone(), scales, d_model=96, gated=True, activation="silu")
        assert torch.equal(kernel.ff(again, x), kernel.ff(block, x))
        assert library.calls() > 0


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
        kernel.ff(block, torch.randn(2, 16), torch.empty(0, dtype=torch.int64)), block.tensors[-1].expand(2, -1)
    )


def test_wrong_use_is_refused() -> None:
    block, x = make("bf16", 8, 16), torch.randn(1, 16)
    weight = torch.randn(8, 16)
    for call in (
        lambda: kernel.ff(block, torch.randn(1, 15)),
        lambda: kernel.ff(block, torch.randn(17, 16)),
        lambda: kernel.ff(block, x.double()),
        lambda: kernel.ff(block, x, torch.tensor([0.5])),
        lambda: kernel.ff(block, x, out=torch.empty(1, 17)),
        lambda: kernel.ff(block, x, row_mask=torch.ones(8, dtype=torch.uint16)),
        lambda: operands.ff_block(weight, weight, weight.bfloat16(), activation="silu"),
        lambda: operands.ff_block(weight, weight, torch.randn(16, 8).T, activation="silu"),
        lambda: operands.ff_block(weight, weight, weight, activation="swish"),
        lambda: operands.quantise_ff(weight, weight, weight, format="int3", activation="silu"),
        lambda: library.set_isa("mmx"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
