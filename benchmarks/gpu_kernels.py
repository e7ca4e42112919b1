"""The FF call on a device, for benchmarks/gpu.py: checked against the reference, and timed against its bytes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from gpu_report import Clock, Report
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.activation import ACTIVATIONS
from griffin.backends import triton
from griffin.backends.gather import GatherFF
from griffin.families import Layout
from griffin.layouts import FFBlock
from griffin.native import grouped
from griffin.weights.device_groups import DeviceGroups

_GATED = Layout(("gate", "up"), "down")
_ROTATED = 1.2e9  # bytes of blocks that the calls rotate over, so that no cache holds them
# What a kernel may differ by from float64 over the same weights, relative to the norm: the output's own rounding.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Size:
    """An FF block: model width, neurons, activation."""

    d: int
    width: int
    activation: str = "silu"


def block_of(size: Size, dtype: torch.dtype, device: torch.device) -> FFBlock:
    """A gated block of random weights."""
    module = nn.Module()
    module.act_fn = ACTIVATIONS[size.activation]
    with torch.device(device):
        for name, shape in (
            ("gate", (size.d, size.width)),
            ("up", (size.d, size.width)),
            ("down", (size.width, size.d)),
        ):
            setattr(module, name, nn.Linear(*shape, bias=False, dtype=dtype).requires_grad_(False))
    return FFBlock(0, "ff", _GATED, module, (module.gate, module.up), module.down, size.width)  # type: ignore[arg-type]


def expert_sets(size: Size, density: float, sets: int, device: torch.device) -> list[Tensor]:
    """Random experts."""
    k = max(1, int(density * size.width))
    return [torch.randperm(size.width, device=device)[:k].sort().values for _ in range(sets)]


def run(ff: Any, x: Tensor, activation: str) -> Tensor:
    """As the model's own forward runs a block."""
    gate, up = ff.read(0, x), ff.read(1, x)
    y: Tensor = ff.write(ACTIVATIONS[activation](gate) * up)
    return y


def exact(weights: tuple[Tensor, Tensor, Tensor], experts: list[Tensor], x: Tensor, activation: str) -> Tensor:
    """In float64. Weights: gate, up and (neuron-major) down rows."""
    rows = []
    for row, token in enumerate(x):
        e = experts[row if len(experts) > 1 else 0]
        gate, up, down = (part[e].double() for part in weights)
        token = token.double()
        rows.append((ACTIVATIONS[activation](token @ gate.T) * (token @ up.T)) @ down)
    return torch.stack(rows)


def _weights(block: FFBlock) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = (projection.weight for projection in (*block.inputs, block.output))
    return gate, up, down.t()  # type: ignore[return-value, operator]


def check(report: Report, device: torch.device, size: Size, batches: list[int]) -> None:
    """The kernels against float64; stops the benchmark where one is wrong."""
    for dtype in _TOLERANCE:
        block = block_of(size, dtype, device)
        for batch in batches:
            for sets in sorted({1, batch}):
                with ExitStack() as undo:
                    ff = triton.TritonFF(block, undo)
                    experts = expert_sets(size, 0.5, sets, device)
                    ff.select(experts)
                    x = torch.randn(batch, 1, size.d, device=device).to(dtype)
                    y = run(ff, x, size.activation)[:, 0]
                    again = torch.equal(y, run(ff, x, size.activation)[:, 0])
                    error = _error(y, exact(_weights(block), experts, x[:, 0], size.activation))
                    how = "per_sequence" if sets > 1 else "shared"
                    name = f"{str(dtype).removeprefix('torch.')}, {how}"
                    report.add("check", name, error, "relative error", batch=batch, density=0.5)
                    if not (error <= _TOLERANCE[dtype] and again):
                        raise SystemExit(f"wrong: {name}, batch {batch}: error {error:.2g}, same bits again: {again}")
    for format in (grouped.INT8, grouped.INT4):
        matrices, weights = _in_groups(format, size, device)
        for batch in batches:
            experts = expert_sets(size, 0.5, 1, device)
            x = torch.randn(batch, size.d, device=device)
            y = triton.launch(matrices, (None, None, None), size.activation, size.width, x, *_lists(experts, size))
            error = _error(y, exact(weights, experts, x, size.activation))
            report.add("check", format.name, error, "relative error", batch=batch, density=0.5)
            if not error <= 1e-4:  # a group is summed before it is scaled
                raise SystemExit(f"wrong: {format.name}, batch {batch}: error {error:.2g}")


def time_calls(
    report: Report, clock: Clock, device: torch.device, name: str, size: Size, batches: list[int], read: float
) -> None:
    """Seconds of an FF call against the bytes that it has to read. `read`: bytes/s that the device reads."""
    dtype = torch.bfloat16
    one = 3 * size.d * size.width * dtype.itemsize
    blocks = [block_of(size, dtype, device) for _ in range(1 if clock.tiny else max(2, math.ceil(_ROTATED / one)))]

    def add(what: str, seconds: float, nbytes: float, **place: Any) -> None:
        report.add("ff call", what, seconds * 1e6, "us", shape=name, **place)
        report.add("ff call", what, nbytes / seconds / read, "of read bandwidth", shape=name, **place)

    for batch in batches:
        x = torch.randn(batch, 1, size.d, device=device).to(dtype)
        dense = clock.seconds(_each(lambda b, x=x: _dense(b, x), blocks)) / len(blocks)
        add("torch, full", dense, one, batch=batch, density=1.0)
        for kind, ff_class in (("triton", triton.TritonFF), ("gather", GatherFF)):
            if kind == "triton" and triton.why_not(blocks[0]) is not None:
                continue
            for density in (0.5,) if clock.tiny else (1.0, 0.75, 0.5, 0.25):
                for sets in sorted({1, batch}):
                    if sets > 1 and density != 0.5:
                        continue
                    with ExitStack() as undo:
                        ffs = [ff_class(block, undo) for block in blocks]
                        k = 0
                        for ff in ffs:
                            experts = expert_sets(size, density, sets, device)
                            ff.select(experts)
                            k = experts[0].shape[0]
                        if kind == "triton":  # without what the model's forward would compute on placeholders
                            calls = _each(lambda ff, x=x: ff.compute(x[:, 0], *ff.buffers), ffs)
                        else:
                            calls = _each(lambda ff, x=x: run(ff, x, size.activation), ffs)
                        seconds = clock.seconds(calls) / len(ffs)
                    how = kind if sets == 1 else f"{kind}, per sequence"
                    add(how, seconds, sets * one * k / size.width, batch=batch, density=density)
                    del ffs
    if triton.why_not(blocks[0]) is not None:
        return
    del blocks
    for format in (grouped.INT8, grouped.INT4):
        matrices, _ = _in_groups(format, size, device, exact=False)
        many = [matrices] + [_in_groups(format, size, device, exact=False)[0] for _ in range(0 if clock.tiny else 3)]
        nbytes = sum(part.nbytes for part in matrices)
        for density in (0.5,) if clock.tiny else (1.0, 0.5):
            x = torch.randn(1, size.d, device=device)
            lists = _lists(expert_sets(size, density, 1, device), size)

            def call(m: Any, x: Tensor = x, lists: Any = lists) -> Tensor:
                return triton.launch(m, (None, None, None), size.activation, size.width, x, *lists)

            add(f"triton, {format.name}", clock.seconds(_each(call, many)) / len(many), nbytes * density, batch=1,
                density=density)  # fmt: skip


def _each(call: Callable[[Any], object], many: list[Any]) -> Callable[[], None]:
    def calls() -> None:
        for each in many:
            call(each)

    return calls


def _dense(block: FFBlock, x: Tensor) -> Tensor:
    gate, up, down = block.module.gate, block.module.up, block.module.down
    return F.linear(block.module.act_fn(F.linear(x, gate.weight)) * F.linear(x, up.weight), down.weight)  # type: ignore[operator, arg-type, union-attr]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _lists(experts: list[Tensor], size: Size) -> tuple[Tensor, Tensor]:
    device = experts[0].device
    lists = torch.zeros(len(experts), size.width, dtype=torch.int32, device=device)
    for n, each in enumerate(experts):
        lists[n, : each.shape[0]] = each.int()
    return lists, torch.tensor([each.shape[0] for each in experts], dtype=torch.int32, device=device)


def _in_groups(format: grouped.Format, size: Size, device: torch.device, exact: bool = True) -> tuple[Any, Any]:
    """Gate, up and down of random codes and scales, made without the native library; and their numbers."""
    parts = list(_matrices(format, size, device))
    numbers = tuple(part.numbers() for part in parts) if exact else None
    if numbers is not None:
        gate, up, down = numbers
        numbers = gate[:, : size.d], up[:, : size.d], down[:, : size.d]
    return tuple(parts), numbers


def _matrices(format: grouped.Format, size: Size, device: torch.device) -> Iterator[DeviceGroups]:
    unit = 2 * format.group
    padded = -(-size.d // unit) * unit
    bits = 4 if format.bits <= 4 else 8
    span = 256 if format.supers else format.span
    for neuron_major in (False, False, True):
        rows = size.width
        along = rows if neuron_major else padded
        spans, groups = -(-along // span), -(-along // format.group)
        of_spans, of_groups = ((spans, padded), (groups, padded)) if neuron_major else ((rows, spans), (rows, groups))

        def numbers(shape: tuple[int, int], high: int) -> Tensor:
            return torch.randint(0, high, shape, dtype=torch.uint8, device=device)

        subs = format.supers
        scale = torch.rand(of_spans, device=device) / size.d**0.5 / (64 * 8 if subs else 128)
        offset = scale * 8 if format.offset == "sub" else None
        yield DeviceGroups(
            format, bits, padded, neuron_major, numbers((rows, padded * bits // 8), 256), scale.half(),
            numbers(of_groups, 64) if subs else None, None if offset is None else offset.half(),
            numbers(of_groups, 64) if offset is not None else None,
        )  # fmt: skip


def why_no_kernels(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on the device; `None` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not triton.interpreted():
        return "Triton kernels run on a GPU, or interpreted"
    return None
