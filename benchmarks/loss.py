"""What methods lose at equal bytes: KL to the full model and agreement on four kinds of text, beside plain griffin.

    python benchmarks/loss.py MODEL DATA --weights bf16 --densities 0.5,0.75 -o results/loss/MODEL-bf16.csv

Ratios of mean KL to plain griffin's (`topk`) at the same density, with a paired bootstrap over the sequences. The bytes
are those that the native library counted (`handle.ff_bytes_per_token` is what is claimed; a test holds them together).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from texts import sequences

import griffin
from griffin.analysis import files, machine, perplexity
from griffin.analysis.bootstrap import mean_interval
from griffin.attachment import attach
from griffin.config import GriffinConfig
from griffin.layouts import find_ff_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--densities", default="0.5,0.75")
    parser.add_argument("--methods", default="topk,prior+topk,dynamic+topk,prior+dynamic+topk")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=4, help="of each kind of text")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    files.check_writable(args.output)
    model, tokenizer = griffin.load(args.model, weights=args.weights)
    names, ids = sequences(tokenizer, args.data, args.prompt, args.generate, args.sequences)
    configs = [
        GriffinConfig(density=float(density), selection=method)
        for density in args.densities.split(",")
        for method in args.methods.split(",")
    ]
    steps = len(ids) * len(configs)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        print(f"\r{done} of {steps}", end="", file=sys.stderr)

    measured = perplexity.measure(model, ids, args.prompt, configs, progress=tick)
    print(file=sys.stderr)
    whole = sum(block.nbytes for block in find_ff_blocks(model))
    rows = []
    for own in measured:
        plain = next(m for m in measured if m.config.selection == "topk" and m.config.density == own.config.density)
        kl, base = (m.kl.double().mean(dim=1) for m in (own, plain))
        value, ratio = mean_interval(kl), mean_interval(kl / base, weights=base)
        with attach(model, own.config) as handle:
            read = handle.ff_bytes_per_token / whole
        row: dict[str, float | int | str | None] = {
            "density": own.config.density,
            "method": own.config.selection,
            "ff_bytes": round(read, 4),
            "prompt_tokens": args.prompt,
            "generated_tokens": args.generate,
            "sequences": len(ids),
            "kl": value.value,
            "kl_low": value.low,
            "kl_high": value.high,
            "ratio": ratio.value,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "agreement": float(own.agreement.double().mean()),
        }
        for kind in dict.fromkeys(names):
            of_kind = torch.tensor([name == kind for name in names])
            row[f"kl_{kind}"] = float(kl[of_kind].mean())
        rows.append(row)
        print(
            f"{own.config.density:5g} {own.config.selection:18} bytes {read:.3f}  KL {value.value:.4f} "
            f"({value.low:.4f} to {value.high:.4f})  {ratio.value:.3f}x ({ratio.low:.3f} to {ratio.high:.3f})  "
            f"agreement {row['agreement']:.3f}"
        )
    about = {"model": args.model, "weights": args.weights} | machine.versions() | {"cpu": machine.machine()["cpu"]}
    files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
