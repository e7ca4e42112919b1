"""A GGUF file's own weights in the native step against the same file dequantised to float32, token by token.

    python benchmarks/gguf_exact.py FILE [--tokens 64 --prompt TEXT --prompt TEXT] [-o results/MACHINE/NAME.csv]

The full model. The native step generates greedily, the reference, transformers' own forward, runs the same tokens at
once: `equal` of them are the reference's likeliest too before the first that is not, whose `margin` is by how much the
reference's likeliest is more likely, in nats. KL is from the reference to the native step, in nats a token. The first
of the tokens comes from the prompt's forward. Memory: first the file, then 4 bytes a weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import griffin
from griffin.analysis import files, machine
from griffin.engine.decoders import Decoders, NativeStep, new_cache

PROMPTS = (
    "The lighthouse keeper counted the ships that passed, and wrote",
    "def median(values: list[float]) -> float:\n    ",
    "Why is the sky blue? Because",
)


@torch.no_grad()
def generated(file: Path, prompts: list[str], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Prompts as tokens, with the logarithms of what the native step found likely after each token that it took."""
    model, tokenizer = griffin.load(file)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        cache = new_cache(model, ids.shape[1] + tokens)
        with griffin.attach(model, density=1.0, selection="topk") as handle:
            with handle.prompt_phase():
                steps = [model(ids, past_key_values=cache).logits[0, -1].float()]
            decoder = Decoders(model, handle).decoder([cache], handle.selections)
            if not isinstance(decoder, NativeStep):
                raise SystemExit("the native step cannot run this model; nothing was compared")
            while len(steps) < tokens:
                steps.append(decoder(steps[-1].argmax()[None])[0])
        found.append((ids, torch.stack(steps).log_softmax(-1)))
    return found


@torch.no_grad()
def compared(model: torch.nn.Module, ids: Tensor, found: Tensor) -> dict[str, int | float]:
    """One prompt's row. Shapes: ids (1, S), found (tokens, V)."""
    taken = found.argmax(-1)
    whole = model(torch.cat([ids, taken[None, :-1]], dim=1), logits_to_keep=len(found))
    expected = whole.logits[0].float().log_softmax(-1)
    margins = expected.amax(-1) - expected.gather(1, taken[:, None])[:, 0]
    kl = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    equal = int((margins == 0).cumprod(0).sum())
    return {
        "prompt_tokens": ids.shape[1], "tokens": len(found), "equal": equal,
        "margin": float(margins[equal]) if equal < len(found) else 0.0, "kl": float(kl.mean()),
        "largest_kl": float(kl.max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given again (default: three)")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    found = generated(args.file, args.prompt or list(PROMPTS), args.tokens)
    exact, _ = griffin.load(args.file, dtype="f32")
    rows = []
    for number, (ids, steps) in enumerate(found):
        rows.append({"file": args.file.name, "prompt": number, **compared(exact, ids, steps)})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if args.output is not None:
        about = machine.versions() | {name: machine.machine()[name] for name in ("cpu", "native_library")}
        files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
