"""V(m): the time of verifying m tokens of one sequence in one step, over that of a step of one token.

    python benchmarks/verification.py -m MODEL [--weights int8] [--rows 1,2,4,8] [-o results/MACHINE/verification.csv]

The full model, steps of all sizes interleaved within a round, medians. Before anything is timed the rows of a step are
compared with the same tokens' own steps: the logits must be close, and it is printed how many rows are equal bit for
bit, which lossless generation needs. The last columns hold bytes of weights read a second by a step of one token, and
the machine's read bandwidth in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import griffin
from griffin.analysis import files, machine
from griffin.analysis.ceiling import bytes_read_per_token
from griffin.analysis.passage import passage
from griffin.engine.cache import BufferedCache
from griffin.engine.decoders import Decoders, NativeStep, new_cache
from griffin.engine.forward import Forward

CLOSE = 0.05  # of the logits' spread: other orders of summation, in bfloat16 too; a defect gives 0.25 and more


def check(step: NativeStep, cache: BufferedCache, tokens: Tensor, rows: int) -> int:
    """How many of so many rows are equal bit for bit to single steps. Exits if one is not even close."""
    context = cache.length
    single = torch.cat([step(token[None]) for token in tokens[:rows]])
    cache.cut(context)
    together = step.rows(tokens[:rows])
    cache.cut(context)
    off = float((together - single).norm() / (single - single.mean()).norm())
    if not off < CLOSE:
        raise SystemExit(f"a step of {rows} rows is off by {off:.3f}; nothing was timed")
    return int((together == single).all(dim=1).sum())


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, float | int | str | None]]:
    model, tokenizer = griffin.load(args.model, weights=args.weights, dtype=args.dtype)
    ids = tokenizer(passage())["input_ids"]
    sizes = [int(size) for size in args.rows.split(",")]
    needed = args.context + max(sizes)
    ids = torch.tensor((ids * (needed // len(ids) + 1))[:needed])
    cache = new_cache(model, needed)
    with griffin.attach(model, density=1.0) as handle:
        with handle.gather() as statistics_:
            Forward(model, cache, None)(ids[None, : args.context])
        step = Decoders(model, handle).decoder([cache], handle.plan.select(statistics_))
        if not isinstance(step, NativeStep) or not isinstance(cache, BufferedCache):
            raise SystemExit("the native step cannot run this model; nothing was timed")
        tokens = ids[args.context :]
        equal = {rows: check(step, cache, tokens, rows) for rows in sizes}
        seconds: dict[int, list[float]] = {rows: [] for rows in sizes}
        for number in range(args.rounds + 2):
            for rows in sizes if number % 2 else reversed(sizes):
                start = time.perf_counter()
                step.rows(tokens[:rows])
                if number >= 2:  # the first rounds warm up
                    seconds[rows].append(time.perf_counter() - start)
                cache.cut(args.context)
    bandwidth = machine.read_bandwidth()
    one = statistics.median(seconds[1])
    found: list[dict[str, float | int | str | None]] = []
    for rows in sizes:
        ratio = statistics.median(many / single for many, single in zip(seconds[rows], seconds[1], strict=True))
        found.append(
            {
                "model": Path(args.model).name, "weights": args.weights or "as stored",
                "threads": torch.get_num_threads(), "context": args.context, "rows": rows, "equal_rows": equal[rows],
                "ms": round(1e3 * statistics.median(seconds[rows]), 3), "v": round(ratio, 3),
                "gb_per_s": round(bytes_read_per_token(model) / one / 1e9, 2),
                "read_gb_per_s": None if bandwidth is None else round(bandwidth.bytes_per_s / 1e9, 2),
            }
        )  # fmt: skip
        print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--weights")
    parser.add_argument("--dtype")
    parser.add_argument("--rows", default="1,2,4,8", help="sizes of the steps, 1 among them")
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    if args.output is not None:
        about = machine.versions() | {name: machine.machine()[name] for name in ("cpu", "native_library")}
        files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
