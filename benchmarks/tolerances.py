"""What the limits of `griffin.analysis.verification` stand on: roundings against a defect, on a real model.

    python benchmarks/tolerances.py [-m smollm2-135m --weights bf16,int8,int4 --prompts 6]

For each format, prompt length and density, over several prompts: the difference of the native backend from the
reference; of the reference whose FF inputs are disturbed by 0.7% at random (about what rounding inputs to 8 bits does
to an FF block) from itself; and of the reference with one expert in ten missing from itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin.analysis.verification import STEPS, difference
from griffin.analysis.workload import passage_prompts
from griffin.attachment import Statistics, attach
from griffin.backends.reference import ReferenceFF
from griffin.config import GriffinConfig
from griffin.engine.step import generate_step

PASSAGE = Path(griffin.__file__).parent / "analysis" / "passage.txt"
DISTURBED = 0.007
Run = tuple[Tensor, list[Tensor], Statistics]


def run(model: PreTrainedModel, config: GriffinConfig, prompt: Tensor, like: Run | None = None) -> Run:
    """Logits, tokens and statistic of a prompt and some steps; with `like` on that run's tokens and statistic."""
    logits, tokens = [], []
    with attach(model, config) as handle:
        for number, step in enumerate(islice(generate_step(model, prompt, handle=handle), STEPS + 1)):
            gathered = handle.gathered.copy()
            if like is not None and number == 0:
                with handle.prompt_phase(statistics=like[2]):
                    pass
            if like is not None:
                step.tokens.copy_(like[1][number])
            logits.append(step.logits)
            tokens.append(step.tokens.clone())
    return torch.stack(logits), tokens, gathered


def with_change(name: str, change: Callable[..., object], measure: Callable[[], Run]) -> Run:
    """Run with one method of the reference backend changed."""
    with ExitStack() as undo:
        undo.callback(setattr, ReferenceFF, name, getattr(ReferenceFF, name))
        setattr(ReferenceFF, name, change)
        return measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--weights", default="bf16,int8,int4")
    parser.add_argument("--prompts", type=int, default=6)
    args = parser.parse_args()
    read, select = ReferenceFF.read, ReferenceFF.select

    def disturbed(own: ReferenceFF, which: int, x: Tensor) -> Tensor:
        return read(own, which, x + DISTURBED * x.square().mean(dim=-1, keepdim=True).sqrt() * torch.randn_like(x))

    def fewer(own: ReferenceFF, experts: list[Tensor]) -> None:
        select(own, [each[: len(each) * 9 // 10] for each in experts])

    for weights in args.weights.split(","):
        model, tokenizer = griffin.load(args.model, weights=weights, dtype=None if weights == "f32" else "bf16")
        ids = tokenizer(PASSAGE.read_text(encoding="utf-8"))["input_ids"]
        prompts = passage_prompts(ids, tokenizer.bos_token_id, args.prompts, 64)
        for length in (16, 64):
            for density in (0.5, 0.25):
                found: dict[str, list[float]] = {"native": [], "disturbed": [], "one in ten missing": []}
                config = GriffinConfig(density=density, selection="topk", backend="reference")
                for row in range(args.prompts):
                    torch.manual_seed(row)
                    prompt = prompts[row : row + 1, :length]
                    truth = run(model, config, prompt)
                    again = partial(run, model, config, prompt, truth)
                    native = run(model, replace(config, backend="native"), prompt, truth)
                    found["native"].append(difference(native[0], truth[0]))
                    found["disturbed"].append(difference(with_change("read", disturbed, again)[0], truth[0]))
                    found["one in ten missing"].append(difference(with_change("select", fewer, again)[0], truth[0]))
                shown = "; ".join(f"{name} {' '.join(f'{v:.3f}' for v in own)}" for name, own in found.items())
                print(f"{args.model} {weights}, {length} tokens, density {density}: {shown}", flush=True)


if __name__ == "__main__":
    main()
