"""The prompt phase beside Transformers' own, and Transformers' own generation loop, interleaved in one run.

    python benchmarks/prompt_phase.py [-m smollm2-135m --weights bf16 --tokens 512,1024 --repeats 9]

Three forward passes a round over the same prompt: the untouched model, the same with GRIFFIN attached but outside of a
phase (what neuron-major storage costs), and the prompt phase (statistic included, selection not). Medians. What the
attached model predicts is checked against the untouched one before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import griffin

PASSAGE = Path(griffin.__file__).parent / "analysis" / "passage.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--tokens", default="512,1024")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    model, tokenizer = griffin.load(args.model, dtype=args.weights)
    text = tokenizer(PASSAGE.read_text(encoding="utf-8"), return_tensors="pt").input_ids

    def seconds(ids: Tensor) -> tuple[float, Tensor]:
        start = time.perf_counter()
        logits = model(ids, use_cache=True, logits_to_keep=1).logits
        return time.perf_counter() - start, logits

    for tokens in map(int, args.tokens.split(",")):
        ids = text.repeat(1, -(-tokens // text.shape[1]))[:, :tokens]
        times: list[list[float]] = [[], [], []]
        with torch.no_grad():
            for round_ in range(args.repeats + 1):
                full, expected = seconds(ids)
                with griffin.attach(model, density=0.5, selection="topk") as handle:
                    attached, found = seconds(ids)
                    with handle.prompt_phase():
                        prompt, _ = seconds(ids)
                if round_ == 0:  # warms up, and is checked: a GEMM over transposed weights may round otherwise
                    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
                    continue
                for own, taken in zip(times, (full, attached, prompt), strict=True):
                    own.append(taken)
        full, attached, prompt = map(statistics.median, times)
        print(
            f"{args.model} {args.weights} {tokens} tokens: Transformers {tokens / full:.0f} tokens/s; "
            f"neuron-major {full / attached:.3f}x; prompt phase with statistic {full / prompt:.3f}x"
        )
    rates = [
        griffin.generate(
            model, tokenizer, "Once upon a time there was", density=1.0, max_tokens=40
        ).generation_tokens_per_s
        for _ in range(3)
    ]
    print(
        f"{args.model} {args.weights}: generation by Transformers' own forward {statistics.median(rates):.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
