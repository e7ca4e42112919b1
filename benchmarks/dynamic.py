"""Time of the native FF call with dynamic neuron selection, as a ratio to plain experts that read the same bytes.

Quantised weights also by planes of bits (`planes+`), with random gates and neurons, and plain experts also in copies
one behind the other (`compact`).

    python benchmarks/dynamic.py [--densities 0.5,0.75] [--rounds 40] [-o results/MACHINE/dynamic.csv]

The weights are random, in the shapes of real models, with enough layers that no CPU cache holds them. Plain, dynamic
and dense calls are interleaved within a round. The dynamic result is compared with torch before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from block_numbers import numbers
from torch import nn
from torch.nn import functional as F

from griffin.analysis import files, machine
from griffin.layouts import FFBlock, find_ff_blocks
from griffin.method import dynamic, planes
from griffin.models.convert import convert
from griffin.native import kernel, library, operands

SHAPES = {
    "smollm2-135m": (576, 1536, 60, "silu"),
    "gemma3-270m": (640, 2048, 40, "gelu_pytorch_tanh"),
    "tinyllama-1.1b": (2048, 5632, 10, "silu"),
}
FORMATS = ("bf16", "int8", "int4")


def _model(d: int, width: int, layers: int, activation: str, weights: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=d, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=d // 64,
        num_key_value_heads=1, vocab_size=64, hidden_act=activation,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    convert(model, weights)
    return model


@torch.no_grad()
def measure(shape: str, weights: str, densities: list[float], rounds: int) -> list[dict[str, float | int | str | None]]:
    from griffin.backends.native import native_block

    d, width, layers, activation = SHAPES[shape]
    ff = find_ff_blocks(_model(d, width, layers, activation, weights))
    blocks = [native_block(block) for block in ff]
    x, weight = torch.randn(1, d), torch.rand(width)
    rows: list[dict[str, float | int | str | None]] = []
    for density in densities:
        split = dynamic.split(ff[0], density)
        experts = [torch.randperm(width)[: split.experts].sort().values for _ in ff]
        plain = [torch.randperm(width)[: int(density * width)].sort().values for _ in ff]
        sketches = [
            None if split.gate is None else operands.packed_matrix(dynamic.sketch(block, split.gate)) for block in ff
        ]
        selections = [operands.dynamic(b, weight, split.chosen, gate=s) for b, s in zip(blocks, sketches, strict=True)]
        _check(blocks[0], x, weight, experts[0], selections[0], sketches[0], split.chosen, activation)
        before = library.ff_bytes()
        kernel.ff(blocks[0], x, experts[0], dynamic=selections[0])
        read = (library.ff_bytes() - before) / blocks[0].weight_bytes
        seconds: dict[str, list[float]] = {"dense": [], "plain": [], "dynamic": []}
        by_planes = None if weights == "bf16" else _by_planes(ff[0], blocks, weight, density)
        copies = []
        if by_planes is not None:
            seconds |= {"planes": [], "compact": []}
            copies = [operands.compact(block, p) for block, p in zip(blocks, plain, strict=True)]
        for number in range(rounds + 3):
            for name, times in seconds.items():
                start = time.perf_counter()
                for i, (block, e, p, t) in enumerate(zip(blocks, experts, plain, selections, strict=True)):
                    if name == "dynamic":
                        kernel.ff(block, x, e, dynamic=t)
                    elif name == "planes":
                        kernel.ff(block, x, by_planes[0], dynamic=by_planes[1])
                    elif name == "compact":
                        kernel.ff(block, x, p, compact=copies[i])
                    else:
                        kernel.ff(block, x, p if name == "plain" else None)
                if number >= 3:  # the first rounds warm up
                    times.append((time.perf_counter() - start) / layers)
        ratios = {
            name: statistics.median(ours / base for ours, base in zip(times, seconds["plain"], strict=True))
            for name, times in seconds.items()
        }
        rows.append(
            {
                "shape": shape, "weights": weights, "density": density, "gate": split.gate or "own",
                "experts": split.experts, "chosen": split.chosen, "ff_bytes": round(read, 4),
                "dense_us": 1e6 * statistics.median(seconds["dense"]),
                "plain_us": 1e6 * statistics.median(seconds["plain"]),
                "dynamic_us": 1e6 * statistics.median(seconds["dynamic"]),
                "dynamic_to_plain": ratios["dynamic"],
                "planes_us": 1e6 * statistics.median(seconds["planes"]) if by_planes else None,
                "planes_to_plain": ratios.get("planes"),
                "compact_us": 1e6 * statistics.median(seconds["compact"]) if by_planes else None,
                "compact_to_plain": ratios.get("compact"),
            }
        )  # fmt: skip
        row = rows[-1]
        print(
            f"{shape:15} {weights:5} {density:5g}  bytes {row['ff_bytes']:.3f}  dense {row['dense_us']:7.0f} us  plain "
            f"{row['plain_us']:7.0f} us  dynamic {row['dynamic_us']:7.0f} us  {row['dynamic_to_plain']:.3f}x"
            + ("" if by_planes is None else f"  planes {row['planes_us']:7.0f} us  {row['planes_to_plain']:.3f}x")
            + ("" if by_planes is None else f"  copied {row['compact_us']:7.0f} us  {row['compact_to_plain']:.3f}x")
        )
    return rows


def _by_planes(
    ff: FFBlock, blocks: list[operands.Block], weight: torch.Tensor, density: float
) -> tuple[torch.Tensor, operands.Dynamic]:
    """Random experts, some with whole gates, in the split that `planes+` has for this density."""
    split = planes.split(ff, density)
    experts = torch.randperm(ff.width)[: split.experts].sort().values
    whole = torch.zeros(split.experts, dtype=torch.int32)
    whole[torch.randperm(split.experts)[: split.whole]] = 1
    read = operands.Planes(whole.to(torch.uint16), split.first, split.levels)
    return experts, operands.dynamic(blocks[0], weight, split.chosen, planes=read)


def _check(
    block: operands.Block,
    x: torch.Tensor,
    weight: torch.Tensor,
    experts: torch.Tensor,
    selection: operands.Dynamic,
    sketch: operands.Matrix | None,
    k: int,
    activation: str,
) -> None:
    """Exit if the result differs from torch by more than 8-bit inputs, and ties at the k-th score, explain."""
    gate, up, down = map(numbers, block.matrices)
    if sketch is not None:
        gate = numbers(sketch)
    act = F.silu if activation == "silu" else lambda v: F.gelu(v, approximate="tanh")
    gates = act(x @ gate[experts].T)
    best = (gates.abs() * weight[experts]).topk(k).indices[0]
    chosen = experts[best]
    expected = (gates[:, best] * (x @ up[chosen].T)) @ down[chosen]
    off = float((kernel.ff(block, x, experts, dynamic=selection) - expected).norm() / expected.norm())
    if off > 0.15:
        raise SystemExit(f"the dynamic result is off by {off:.3f}; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--densities", default="0.5,0.75")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    densities = [float(density) for density in args.densities.split(",")]
    rows = [
        row
        for shape in args.shapes.split(",")
        for weights in FORMATS
        for row in measure(shape, weights, densities, args.rounds)
    ]
    if args.output is not None:
        about = machine.versions() | {name: machine.machine()[name] for name in ("cpu", "native_library")}
        files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
