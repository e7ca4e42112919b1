"""How many neurons a batch reads: the union of the experts of B different prompts, which share some of them.

    python benchmarks/union.py MODEL DATA -o results/union/MODEL.csv

Prompts of four kinds of text run through the full model one by one. The mean over all batches of B of them follows
exactly from how many prompts select each neuron (`griffin.analysis.flocking.union_share`); the spread over batches is
measured on random ones. `all` mixes the kinds; a batch of one kind has more in common. Figures only are written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from texts import sequences
from torch import Tensor

import griffin
from griffin.analysis import files, flocking, machine

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DRAWN = 200  # batches that the spread is measured on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--densities", default="0.25,0.5,0.75,0.9")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=32, help="of each kind of text")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    files.check_writable(args.output)
    model, tokenizer = griffin.load(args.model)
    names, ids = sequences(tokenizer, args.data, args.prompt - 1, 1, args.prompts)
    found: list[dict[int, Tensor]] = []
    for row in ids.split(1):
        found.append(flocking.energies(model, [row]))
        print(f"\r{len(found)} of {len(ids)} prompts", end="", file=sys.stderr)
    print(file=sys.stderr)
    energies = {layer: torch.cat([own[layer] for own in found]) for layer in found[0]}
    groups = {"all": range(len(ids))} | {
        kind: [at for at, name in enumerate(names) if name == kind] for kind in dict.fromkeys(names)
    }
    rows = []
    for texts, members in groups.items():
        own = {layer: energy[list(members)] for layer, energy in energies.items()}
        for density in map(float, args.densities.split(",")):
            # of more than half of the prompts all batches are nearly the same one
            batches = [batch for batch in BATCHES if 2 * batch <= len(members)]
            rows += [row_of(own, texts, density, batch) | {"prompt_tokens": args.prompt} for batch in batches]
    about = {"model": args.model, "dtype": str(model.dtype).removeprefix("torch.")} | machine.versions()
    files.write_text(args.output, files.csv_text(rows, about, {"cpu": machine.machine()["cpu"]}))
    for own_row in rows:
        if own_row["texts"] == "all":
            print(
                f"{own_row['density']:5g} batch {own_row['batch']:3}  union {own_row['union']:.3f} "
                f"({own_row['union_p5']:.3f} to {own_row['union_p95']:.3f}), independent {own_row['independent']:.3f}"
            )


def row_of(energies: dict[int, Tensor], texts: str, density: float, batch: int) -> dict[str, float | int | str]:
    """Shapes: energies by layer, each (N, D_ff)."""
    layers = flocking.union_share(energies, density, batch)
    n = next(iter(energies.values())).shape[0]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(n, generator=generator)[:batch] for _ in range(DRAWN)]
    experts = [flocking.kept(own, density) for own in energies.values()]
    drawn = torch.tensor(
        [sum(float(own[one].amax(dim=0).mean()) for own in experts) / len(experts) for one in batches],
        dtype=torch.float64,
    )
    low, high = drawn.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return {
        "texts": texts,
        "prompts": n,
        "density": density,
        "batch": batch,
        "union": round(float(layers.mean()), 5),
        "union_p5": round(low, 5),  # over batches, the mean of the layers
        "union_p95": round(high, 5),
        "union_lowest_layer": round(float(layers.min()), 5),
        "union_highest_layer": round(float(layers.max()), 5),
        "independent": round(1 - (1 - density) ** batch, 5),
    }


if __name__ == "__main__":
    main()
