"""The job of a sweep that looks at flocking: its pictures, and how the experts of different texts overlap."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.analysis.cells import FULL, Key, Measured, Metric
from griffin.analysis.flocking import relative_activations
from griffin.analysis.sweep import Job, Tick
from griffin.attachment import attach
from griffin.config import GriffinConfig
from griffin.generation.text import context_length
from griffin.layouts import find_ff_blocks

DENSITIES = (0.25, 0.5, 0.75)
_SEQUENCES = 8
_PICTURE = (128, 1024)  # tokens and neurons that a picture shows at most
_BRIGHTEST = (
    0.995  # quantile of the text's picture at which the scale of all three ends, as a few values are far larger
)


def flocking(
    model: PreTrainedModel, name: str, ids: Sequence[int], bos: int | None, tokens: int, seed: int, source: str
) -> Job:
    """One cell: pictures of three layers for a text, its tokens permuted, and random tokens; experts of several texts.

    Args:
        name: of the text.
        ids: its tokens, without special ones; cut into sequences that do not overlap.
        bos: the token that the model expects at the beginning.
        tokens: most tokens of a sequence.
        seed: of the permutation and of the random tokens.
        source: what tells this text from another of the same name.
    """
    most = min(tokens, context_length(model) or tokens, len(ids) // _SEQUENCES)
    key = Key("flocking", FULL, 1.0, task=name, source=source, prompt=most, limit=_SEQUENCES, seed=seed)

    def measure(todo: Sequence[Key], tick: Tick) -> Iterator[Measured]:
        if most < 2:
            raise ValueError(f"the text has {len(ids)} tokens; expected at least {2 * _SEQUENCES}")
        first = [] if bos is None else [bos]
        step, size = len(ids) // _SEQUENCES, most - len(first)
        texts = torch.tensor([[*first, *ids[at * step : at * step + size]] for at in range(_SEQUENCES)])
        energies = []
        for text in texts:
            energies.append(_energies(model, text[None]))
            tick(0.8 / _SEQUENCES)
        pictures = _pictures(model, texts[0], len(first), seed)
        yield _measured(energies, pictures)

    return Job((key,), measure)


def _measured(energies: Sequence[list[Tensor]], pictures: list[dict[str, object]]) -> Measured:
    """Shapes: energies of each sequence, of each layer (D_ff,)."""
    jaccard: dict[str, list[float]] = {}
    held: dict[str, list[float]] = {}
    for density in DENSITIES:
        name, config = f"{density:g}", GriffinConfig(density=density)
        jaccard[name], held[name] = [], []
        for layer in zip(*energies, strict=True):
            tops = [own.topk(config.experts_of(own.shape[0])) for own in layer]
            masks = [
                torch.zeros_like(own, dtype=torch.bool).index_fill(0, top.indices, True)
                for own, top in zip(layer, tops, strict=True)
            ]
            overlaps = [float((one & other).sum() / (one | other).sum()) for one, other in combinations(masks, 2)]
            jaccard[name].append(sum(overlaps) / len(overlaps))
            shares = [float(top.values.sum() / own.sum()) for own, top in zip(layer, tops, strict=True)]
            held[name].append(sum(shares) / len(shares))
    metrics = {
        f"{what} at {density}": Metric(sum(values) / len(values))
        for what, series in (("jaccard", jaccard), ("energy", held))
        for density, values in series.items()
    }
    chance = {f"{density:g}": density / (2 - density) for density in DENSITIES}
    return Measured(
        metrics=metrics,
        n=len(energies),
        data={"jaccard": jaccard, "chance": chance, "energy": held},
        samples={"pictures": pictures},
    )


@torch.no_grad()
def _energies(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Energy of every neuron, by layer. Shapes: ids (1, S); returns (D_ff,) each."""
    with attach(model, backend="reference") as handle, handle.prompt_phase():
        model(ids.to(model.device), use_cache=False)
        gathered = handle.conversation.energies
    return [gathered[layer][0].cpu() for layer in sorted(gathered)]


def _pictures(model: PreTrainedModel, text: Tensor, kept: int, seed: int) -> list[dict[str, object]]:
    """Of three layers: the text, its tokens permuted but the first `kept`, and random ones in their place."""
    generator = torch.Generator().manual_seed(seed)
    size = text.shape[0] - kept
    permuted = torch.cat([text[:kept], text[kept:][torch.randperm(size, generator=generator)]])
    drawn = torch.cat(
        [text[:kept], torch.randint(model.config.get_text_config().vocab_size, (size,), generator=generator)]
    )
    layers = len(find_ff_blocks(model))
    chosen = sorted({layers // 4, layers // 2, 3 * layers // 4})
    versions = {"text": text, "tokens permuted": permuted, "random tokens": drawn}
    found = {name: relative_activations(model, own[None].to(model.device), chosen) for name, own in versions.items()}
    pictures: list[dict[str, object]] = []
    for layer in chosen:
        shown = {name: own[layer][: _PICTURE[0], : _PICTURE[1]] for name, own in found.items()}
        most = max(float(shown["text"].quantile(_BRIGHTEST)), 1e-12)
        maps = {name: {"shape": list(own.shape), "bytes": _bytes(own / most)} for name, own in shown.items()}
        pictures.append({"layer": layer, "shape": maps["text"]["shape"], "maps": maps})
    return pictures


def _bytes(values: Tensor) -> str:
    """Values from 0 to 1 as a byte each, in base64."""
    rounded = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return base64.b64encode(bytes(rounded.flatten().tolist())).decode("ascii")
