"""How long griffin's evaluation takes beside the harness's own `hf`, on the same tasks, in turns.

python benchmarks/evaluation_time.py DATA [-m smollm2-135m --tasks copa,coqa --limit 20 --densities 1.0,0.5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM

import griffin
from griffin.config import GriffinConfig
from griffin.integrations.lm_eval import evaluate
from griffin.integrations.lm_eval.tasks import manager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of local data files, see docs/evaluation.md")
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="copa,coqa")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--densities", default="1.0,0.5")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = griffin.load(args.model, dtype="f32")
    task_manager = manager({"data": str(args.data)})
    densities = [float(density) for density in args.densities.split(",")]
    for task in args.tasks.split(","):
        seconds: dict[str, list[float]] = {name: [] for name in ("hf", *map(str, densities))}
        for _ in range(args.rounds):
            start = time.perf_counter()
            hf = HFLM(model, tokenizer=tokenizer)
            lm_eval.simple_evaluate(hf, tasks=[task], task_manager=task_manager, limit=args.limit, bootstrap_iters=0)
            seconds["hf"].append(time.perf_counter() - start)
            for density in densities:
                start = time.perf_counter()
                config = GriffinConfig(density=density, selection="topk")
                evaluate(model, tokenizer, config, tasks=[task], data=args.data, limit=args.limit)
                seconds[str(density)].append(time.perf_counter() - start)
        whole = statistics.median(seconds["hf"])
        shown = ", ".join(f"{name} {statistics.median(own):.1f} s" for name, own in seconds.items())
        ratios = ", ".join(
            f"{name} {statistics.median(a / b for a, b in zip(own, seconds['hf'], strict=True)):.2f}x"
            for name, own in seconds.items()
        )
        print(f"{task}, {args.limit} examples: {shown} (hf {whole:.1f} s); as shares of hf: {ratios}", flush=True)


if __name__ == "__main__":
    main()
