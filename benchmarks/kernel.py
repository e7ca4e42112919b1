"""The native kernel alone: milliseconds, GB/s and the share of the read bandwidth, by format, density and rows.

    python benchmarks/kernel.py [--d-model 4096 --d-ff 11008 --formats bf16,int8,int4 --rows 1,4,8 --json FILE]

Each call uses the next layer's weights, more than 1 GB in all, so that no cache holds them. Densities are interleaved
and medians compared, and the read bandwidth is measured between them, in the same run. Every format is checked against
float64 first. Rows above 1 have one expert set each; `--overlap` is the part of a set that all rows share, the rest is
drawn for each row, so that the union of sets (column union) is what has to be read.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from block_numbers import numbers
from torch import Tensor

from griffin.native import grouped, kernel, library, memory, operands

Blocks = list[operands.Block]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def make_block(fmt: str, d_ff: int, d: int) -> operands.Block:
    """A gated block of random weights. Rows repeat every 256, which no timing can tell."""
    matrices = []
    for neuron_major in (False, False, True):
        slab = torch.randn(256, d).repeat(-(-d_ff // 256), 1)[:d_ff] / d**0.5
        if fmt in DTYPES:
            weight = torch.empty(d_ff, d, dtype=DTYPES[fmt])
            memory.advise_huge(weight)
            matrices.append(operands.matrix(weight.copy_(slab), neuron_major=neuron_major))
        else:
            packed = grouped.quantise(slab.T if neuron_major else slab, fmt, neuron_major=neuron_major)
            matrices.append(operands.packed_matrix(packed))
    return operands.ff_block(*matrices, activation="silu")


def check(block: operands.Block, x: Tensor, experts: Tensor, mask: Tensor | None) -> float:
    """Relative error against float64 over the dequantised weights; raises if it is more than the format's."""
    y = kernel.ff(block, x, experts, mask, out=torch.full((len(x), block.d_model), float("nan"))).double()
    gate, up, down = (part[experts.long()].double() for part in map(numbers, block.matrices))
    z = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    if mask is not None:
        z *= torch.stack([(mask.int() >> r) & 1 for r in range(len(x))])
    error = float((y - z @ down).norm() / (z @ down).norm())
    limit = 0.02 if block.format.startswith("int") else 1e-4  # int: x is rounded to 1/127 of its group's maximum
    if not error < limit:
        raise SystemExit(f"{block.format}: relative error {error:.2g} is above {limit}")
    return error


def expert_sets(d_ff: int, density: float, rows: int, overlap: float) -> Tensor:
    k = int(density * d_ff)
    order = torch.randperm(d_ff)
    shared, rest = order[: int(k * overlap)], order[int(k * overlap) :]
    own = [rest[torch.randperm(len(rest))[: k - len(shared)]] for _ in range(rows)]
    return torch.stack([torch.cat([shared, part]).sort().values for part in own])


def interleaved(runs: dict[Any, Callable[[], object]], repeats: int, percentile: int) -> dict[Any, float]:
    """Milliseconds at a percentile of each, taking turns."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.quantiles(values, n=100)[percentile - 1] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--d-ff", type=int, default=11008)
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--densities", default="1.0,0.5,0.25")
    parser.add_argument("--rows", default="1,4,8")
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument(
        "--percentile", type=int, default=50, help="50 is the median; lower on a machine with other load"
    )
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of weights that the calls rotate over")
    parser.add_argument("--torch", action="store_true", help="also time torch's dense FF (bf16 and f32 formats)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if reason := library.why_not():
        raise SystemExit(reason)
    d, d_ff, densities = args.d_model, args.d_ff, [float(v) for v in args.densities.split(",")]
    buffer = torch.ones(320 * 2**20)
    memory.advise_huge(buffer)
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {library.isa()}, {threads} threads, {library.threading()}, torch {torch.__version__}")
    print(f"D = {d}, D_ff = {d_ff}, overlap {args.overlap}")
    print("format  B  density   union        ms     GB/s  of read   ratio   error")
    table = []
    for fmt in args.formats.split(","):
        first = make_block(fmt, d_ff, d)
        blocks = [first] + [make_block(fmt, d_ff, d) for _ in range(int(args.gigabytes * 1e9 / first.weight_bytes))]
        turn = 0
        for rows in (int(v) for v in args.rows.split(",")):
            x = torch.randn(rows, d)
            if fmt == "bf16":
                x = x.bfloat16()
            runs: dict[Any, Callable[[], object]] = {"read": lambda: memory.read_bandwidth(buffer)}
            unions: dict[float, int] = {}
            errors: dict[float, float] = {}
            for density in densities:
                experts, mask = kernel.union(expert_sets(d_ff, density, rows, args.overlap), d_ff)
                unions[density] = len(experts)
                shared = mask if rows > 1 and density < 1 else None
                errors[density] = check(blocks[0], x, experts, shared)

                def call(
                    experts: Tensor = experts, mask: Tensor | None = shared, x: Tensor = x, blocks: Blocks = blocks
                ) -> None:
                    nonlocal turn
                    turn += 1
                    kernel.ff(blocks[turn % len(blocks)], x, experts, mask)

                runs[density] = call
            if args.torch and fmt in DTYPES:
                typed = x.to(DTYPES[fmt])

                def dense(x: Tensor = typed, blocks: Blocks = blocks) -> None:
                    nonlocal turn
                    turn += 1
                    gate, up, down = (matrix.kept[0] for matrix in blocks[turn % len(blocks)].matrices)
                    linear = torch.nn.functional.linear
                    linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down.T)

                runs["torch"] = dense
            ms = interleaved(runs, args.repeats, args.percentile)
            read = buffer.numel() * 4 / ms["read"] / 1e6  # GB/s
            for name in [*densities, *(["torch"] if "torch" in ms else [])]:
                share = unions.get(name, d_ff) / d_ff
                speed = first.weight_bytes * share / ms[name] / 1e6
                row = {"format": fmt, "rows": rows, "density": name, "union": share, "ms": ms[name], "gb_per_s": speed}
                row |= {
                    "read_gb_per_s": read,
                    "share_of_read_bandwidth": speed / read,
                    "ratio": ms[name] / ms[densities[0]],
                }
                table.append(row)
                print(
                    f"{fmt:6} {rows:2} {name!s:>8} {share:7.3f} {ms[name]:9.3f} {speed:8.2f} {speed / read:8.1%} "
                    f"{row['ratio']:7.3f} {errors.get(name, 0):7.1g}",
                    flush=True,
                )
        print(f"        read bandwidth {read:.2f} GB/s")
    if args.json:
        machine = {"isa": library.isa(), "threads": threads, "torch": torch.__version__, "d_model": d, "d_ff": d_ff}
        args.json.write_text(json.dumps({"machine": machine, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
