"""The job of a sweep that looks at flocking: its pictures, and how the experts of different texts overlap."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.analysis import flocking
from griffin.analysis.cells import FULL, CellResult, Key, Metric
from griffin.analysis.sweep import Job, Tick
from griffin.generation.text import context_length
from griffin.layouts import find_ff_blocks

DENSITIES = (0.25, 0.5, 0.75)
_SEQUENCES = 8
_PICTURE = (64, 384)  # tokens and neurons that a picture shows at most
_BRIGHTEST = (
    0.995  # quantile of the text's picture at which the scale of all three ends, as a few values are far larger
)


def flocking_job(
    model: PreTrainedModel, name: str, ids: Sequence[int], bos: int | None, tokens: int, seed: int, source: str
) -> Job:
    """One cell: pictures of three layers for a text, its tokens permuted, and random tokens; experts of several texts.

    Args:
        name: of the text.
        ids: its tokens, without special ones; cut into sequences that do not overlap.
        bos: the token that the model expects at the beginning.
        tokens: most tokens of a sequence.
        seed: of the permutation and of the random tokens.
        source: distinguishes this text from others of the same name.
    """
    most = min(tokens, context_length(model) or tokens, len(ids) // _SEQUENCES)
    key = Key("flocking", FULL, 1.0, task=name, source=source, prompt=most, limit=_SEQUENCES, seed=seed)

    def measure(todo: Sequence[Key], tick: Tick) -> Iterator[CellResult]:
        if most < 2:
            raise ValueError(f"the text has {len(ids)} tokens; expected at least {2 * _SEQUENCES}")
        first = [] if bos is None else [bos]
        step, size = len(ids) // _SEQUENCES, most - len(first)
        texts = torch.tensor([[*first, *ids[at * step : at * step + size]] for at in range(_SEQUENCES)])
        energies = flocking.energies(model, texts.split(1))  # type: ignore[no-untyped-call]
        tick(0.8)
        yield _measured(energies, _pictures(model, texts[:1], seed))

    return Job((key,), measure)


def _measured(energies: Mapping[int, Tensor], pictures: list[dict[str, object]]) -> CellResult:
    """Shapes: energies by layer, each (N, D_ff)."""
    n = next(iter(energies.values())).shape[0]
    pairs = torch.triu_indices(n, n, 1)
    series: dict[str, dict[str, list[float]]] = {"jaccard": {}, "energy": {}}
    for density in DENSITIES:
        overlaps = flocking.jaccard(energies, density)[:, pairs[0], pairs[1]]
        series["jaccard"][f"{density:g}"] = overlaps.mean(dim=1).tolist()
        series["energy"][f"{density:g}"] = flocking.energy_share(energies, density).mean(dim=1).tolist()
    metrics = {
        f"{what} at {density}": Metric(sum(values) / len(values))
        for what, own in series.items()
        for density, values in own.items()
    }
    chance = {f"{density:g}": density / (2 - density) for density in DENSITIES}
    return CellResult(metrics, n, data={**series, "chance": chance}, samples={"pictures": pictures})


def _pictures(model: PreTrainedModel, text: Tensor, seed: int) -> list[dict[str, object]]:
    """Three layers' pictures of a text, of its tokens permuted, and of random tokens. Shapes: text (1, S)."""
    versions = flocking.compared(text.to(model.device), model.config.get_text_config().vocab_size, seed)
    layers = len(find_ff_blocks(model))
    chosen = sorted({layers // 4, layers // 2, 3 * layers // 4})
    found = {name: flocking.relative_activations(model, own, chosen) for name, own in versions.items()}
    pictures: list[dict[str, object]] = []
    for layer in chosen:
        shown = {name: own[layer][: _PICTURE[0], : _PICTURE[1]] for name, own in found.items()}
        most = max(float(shown["original"].quantile(_BRIGHTEST)), 1e-12)
        maps = {name: {"shape": list(own.shape), "bytes": _bytes(own / most)} for name, own in shown.items()}
        pictures.append({"layer": layer, "shape": maps["original"]["shape"], "maps": maps})
    return pictures


def _bytes(values: Tensor) -> str:
    """Values from 0 to 1 as a byte each, in base64."""
    rounded = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return base64.b64encode(bytes(rounded.flatten().tolist())).decode("ascii")
