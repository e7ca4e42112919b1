"""What a new selection costs beside one dense generation step, and beside torch's top-k of the same statistic alone.

    python benchmarks/selection.py [-m smollm2-135m | --shape tinyllama-1.1b] [--weights int8] [--prompt 512]

The selection is the paper's (`topk`), over all layers, with shared experts. The three are timed in turns; figures are
medians in milliseconds. `share` is the cost of the selection beyond the top-k, as a share of a dense step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

import torch

import griffin
from griffin.analysis import shapes, workload
from griffin.attachment import attach
from griffin.config import GriffinConfig
from griffin.engine.step import generate_step

PASSAGE = Path(griffin.__file__).parent / "analysis" / "passage.txt"
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--shape", help="random weights in this shape, instead of a model")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if args.shape:
        model = workload.built(shapes.shape_of(args.shape), args.weights)
        prompt = torch.randint(model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    else:
        model, tokenizer = griffin.load(args.model, weights=args.weights)
        ids = tokenizer(PASSAGE.read_text(encoding="utf-8"))["input_ids"]
        prompt = workload.passage_prompts(ids, tokenizer.bos_token_id, 1, args.prompt)
    times: dict[str, list[float]] = {"selection": [], "top-k": [], "dense step": []}
    with attach(model, GriffinConfig(density=1.0)) as dense:
        stream = generate_step(model, prompt, handle=dense)
        for _ in range(2):
            next(stream)
        gathered = dense.gathered.copy()
        del stream
    for _ in range(args.rounds):
        with attach(model, GriffinConfig(density=args.density, selection="topk")) as handle:
            for _ in range(5):  # the first ones touch memory for the first time
                with handle.prompt_phase(statistics=gathered):
                    pass
            times["selection"].append(handle.selection_s)
            scores = torch.stack([handle.statistic[block.layer] for block in handle.blocks])
            k = handle.config.experts_of(scores.shape[1])
            for _ in range(5):
                scores.topk(k, sorted=False)
            start = time.perf_counter()
            scores.topk(k, sorted=False)
            times["top-k"].append(time.perf_counter() - start)
            least = [handle.experts[block.layer] for block in handle.blocks]
            assert torch.equal(torch.stack(least), scores.topk(k).indices.sort(dim=1).values)
        with attach(model, GriffinConfig(density=1.0)) as dense:
            stream = generate_step(model, prompt[:, :16], handle=dense)
            next(stream)
            next(stream)
            start = time.perf_counter()
            for _ in islice(stream, STEPS):
                pass
            times["dense step"].append((time.perf_counter() - start) / STEPS)
    median = {name: statistics.median(own) * 1e3 for name, own in times.items()}
    share = (median["selection"] - median["top-k"]) / median["dense step"]
    shown = ", ".join(f"{name} {value:.3f} ms" for name, value in median.items())
    print(f"{args.shape or args.model} {args.weights}, density {args.density}: {shown}, share {share:+.1%}")


if __name__ == "__main__":
    main()
