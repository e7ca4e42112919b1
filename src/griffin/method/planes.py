"""Precision by prompt and token: of every neuron's weights a token reads all bits, the high ones, or none.

Codes are stored in planes of 2 bits, the highest first, so that the first planes of a row are a coarser copy of it that
takes no bytes of its own: the bits left out stand at their mean. For every token:

1. The gates `a_j = act(g_j)` of the experts, the c neurons of largest flocking statistic: of the best w of them from
   whole rows, of the others from the first p planes.
2. Scores as in `griffin.method.dynamic`, `|a_j| * rms(u_j) * ||W_2[:, j]||`. The `n_l` neurons of largest score have
   level l at least, for l = 1, 2, ...
3. Up and down of a neuron of level l are read to their first l planes; of level 0 not at all.

So the prompt decides how precisely a gate is read, and the token how precisely up and down are. A uniform quantisation
to fewer bits is one point of this family.

`split` decides c, w, p and the n_l for a share of a block's bytes. It takes the smallest expected share of the block's
output energy that is lost: neurons left out lose theirs, neurons read to fewer bits lose a share of it that is a
number of the bits (`noise`). How the energy is spread over the neurons is a `Curve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import torch
from torch import Tensor

from griffin.layouts import FFBlock
from griffin.native.grouped import Packed
from griffin.weights.quantised import QuantisedLinear

_SHARES = tuple(step / 10 for step in range(11))
_STEPS = 28  # of the search for the price of a byte


@dataclass(frozen=True)
class PlaneSplit:
    """How an FF block's bytes are spent on a token.

    Args:
        experts: c, neurons whose gates are computed.
        whole: w, those of them whose gate rows are read whole.
        first: p, planes of the gate's rows of the others.
        levels: n_1 >= n_2 >= ...: neurons whose up and down are read to 1, 2, ... planes at least.
        nbytes: bytes of weights read for a token, all scales of the down projection among them.
    """

    experts: int
    whole: int
    first: int
    levels: tuple[int, ...]
    nbytes: int

    @property
    def chosen(self) -> int:
        """Neurons whose up and down are read."""
        return self.levels[0]

    @property
    def gate(self) -> None:
        """No copy of the gate is read."""
        return None


@dataclass(frozen=True)
class Curve:
    """How a block's output energy is spread over its neurons: shares of twentieths of them, together 1.

    Args:
        token: neurons in the order of a token's scores.
        prompt: neurons in the order of the flocking statistic.
    """

    token: tuple[float, ...]
    prompt: tuple[float, ...]


# The mean of SmolLM2-135M's and Gemma 3 270M's curves as `griffin profile` measures them, over their layers.
TYPICAL = Curve(
    token=(0.614, 0.119, 0.065, 0.038, 0.027, 0.023, 0.020, 0.017, 0.015, 0.013, 0.012, 0.010, 0.008, 0.007, 0.005,
           0.0035, 0.0022, 0.0010, 0.0003, 0.0),
    prompt=(0.431, 0.097, 0.064, 0.049, 0.042, 0.036, 0.029, 0.029, 0.024, 0.029, 0.023, 0.021, 0.020, 0.020, 0.017,
            0.017, 0.017, 0.014, 0.012, 0.009),
)  # fmt: skip
# With gates of few bits a token's order is worse: the energy left out grows by this share, where all are of few bits.
_WORSE_ORDER = 0.35


def noise(bits: int, kept: int) -> float:
    """The share of its energy that a product with a matrix loses where of its `bits` only the highest are kept.

    Bits left out at their mean err by a 12th of their step's square, and a group's codes span about 5 deviations of
    its weights.
    """
    return 0.0 if kept >= bits else 0.12 * 4.0 ** (2 - kept)


@dataclass(frozen=True)
class _Matrix:
    """What a split needs of a matrix: bytes of a neuron's row, and noise, by the number of planes that are read."""

    read: tuple[int, ...]
    noise: tuple[float, ...]

    @classmethod
    def of(cls, part: Packed) -> _Matrix:
        counts = range(1, len(part.format.planes) + 1)
        kept = [sum(part.format.planes[:count]) for count in counts]
        return cls(tuple(map(part.row_bytes, counts)), tuple(noise(part.format.bits, each) for each in kept))

    def level(self, planes: int) -> tuple[int, float]:
        """Bytes and noise at a level, which may be above what the matrix has."""
        at = min(planes, len(self.read)) - 1
        return self.read[at], self.noise[at]


def parts(block: FFBlock) -> tuple[Packed, Packed, Packed]:
    """A block's gate, up and down.

    Raises:
        ValueError: the block has no gate, or weights that have no planes.
    """
    if not block.gated or block.activation is None:
        raise ValueError(
            f"{block.path} has no gate or an unknown activation, and planes+ chooses by the gate; use dynamic+, or topk"
        )
    found = [part for p in (*block.inputs, block.output) if isinstance(p, QuantisedLinear) for part in p.parts]
    if len(found) != 3 or any(part.format.table for part in found):
        raise ValueError(
            f"{block.path} has weights that are not stored in planes of bits, which planes+ reads; load a quantised "
            "file (.gguf, GPTQ, AWQ) as it is or with weights='int8' or 'int4', or use dynamic+"
        )
    gate, up, down = found
    return gate, up, down


def split(block: FFBlock, density: float, curve: Curve = TYPICAL) -> PlaneSplit:
    """Spend a share of a block's bytes as well as is known.

    Raises:
        ValueError: as `parts`, or the bytes do not suffice for one neuron beside the scales of the down projection.
    """
    gate, up, down = parts(block)
    assert down.scales is not None
    budget = int(density * block.nbytes) - down.scales.numel()
    found = _split(block.width, _Matrix.of(gate), _Matrix.of(up), _Matrix.of(down), budget, curve)
    if found is None:
        raise ValueError(
            f"density {density:g} of {block.path} is too small for planes+: the down projection's scales, which are "
            f"read for every token, are {down.scales.numel() / block.nbytes:.2f} of its bytes; give a larger density"
        )
    return PlaneSplit(found.experts, found.whole, found.first, found.levels, found.nbytes + down.scales.numel())


@cache
def _split(width: int, gate: _Matrix, up: _Matrix, down: _Matrix, budget: int, curve: Curve) -> PlaneSplit | None:
    levels = range(1, max(len(up.read), len(down.read)) + 1)
    pairs = [(up.level(level), down.level(level)) for level in levels]
    costs = torch.tensor([0.0] + [float(of_up[0] + of_down[0]) for of_up, of_down in pairs])
    lost = torch.tensor([1.0] + [of_up[1] + of_down[1] for of_up, of_down in pairs])
    energy = _fine(curve.token)
    best: tuple[float, PlaneSplit] | None = None
    for first, c, w in product(range(1, len(gate.read) + 1), _SHARES[4:], _SHARES):
        if w > c or (first == len(gate.read)) != (w == c):
            continue
        experts, whole = round(c * width), round(w * width)
        gates = whole * gate.read[-1] + (experts - whole) * gate.read[first - 1]
        if gates >= budget:
            continue
        coarse = _behind(curve.prompt, w)
        order = 1 + _WORSE_ORDER * coarse * (first == 1)
        chances = torch.cat([lost[:1] * order, lost[1:]])
        counts = _levels(energy, chances, costs, (budget - gates) / width, c)
        if counts is None:
            continue
        own = gate.noise[first - 1] * coarse
        at = torch.tensor(counts)
        loss = _behind(curve.prompt, c) + own + float((energy * chances[_level_of(at, len(energy))]).sum())
        if best is None or loss < best[0]:
            numbers = tuple(min(experts, int(n * width / len(energy))) for n in counts)
            best = loss, _filled(PlaneSplit(experts, whole, first, numbers, gates), costs, budget)
    return None if best is None else best[1]


def _levels(energy: Tensor, lost: Tensor, costs: Tensor, budget: float, most: float) -> list[int] | None:
    """How many of the places (energies descend) have level 1, 2, ... at least, for the least loss in a mean budget.

    A price of a byte decides at every place; the price at which the budget suffices is searched.
    """
    allowed = torch.arange(len(energy)) < most * len(energy)
    low, high = 1e-12, 1e6
    for _ in range(_STEPS):
        price = (low * high) ** 0.5
        level = (energy[:, None] * lost + price * costs / len(energy)).argmin(dim=1) * allowed
        low, high = (price, high) if float(costs[level].mean()) > budget else (low, price)
    level = (energy[:, None] * lost + high * costs / len(energy)).argmin(dim=1) * allowed
    counts = [int((level >= each).sum()) for each in range(1, len(costs))]
    return counts if counts[0] else None


def _level_of(counts: Tensor, places: int) -> Tensor:
    return (torch.arange(places)[:, None] < counts).sum(dim=1)


def _filled(split: PlaneSplit, costs: Tensor, budget: int) -> PlaneSplit:
    """The split with what is left of the budget spent: on the highest level that is used, then on the first."""
    counts = list(split.levels)
    steps = [int(above - below) for below, above in pairwise(costs.tolist())]
    read = split.nbytes + sum(n * step for n, step in zip(counts, steps, strict=True))
    for level in (max(i for i, n in enumerate(counts) if n), *range(len(counts))):
        room = (counts[level - 1] if level else split.experts) - counts[level]
        more = max(0, min(room, (budget - read) // max(1, steps[level])))
        counts[level], read = counts[level] + more, read + more * steps[level]
    return PlaneSplit(split.experts, split.whole, split.first, tuple(counts), read)


def _fine(curve: Sequence[float], places: int = 120) -> Tensor:
    """A curve's twentieths, cut finer; together 1."""
    values = torch.nn.functional.interpolate(torch.tensor(curve)[None, None], size=places, mode="linear")[0, 0]
    return values / values.sum()


def _behind(curve: Sequence[float], share: float) -> float:
    """The energy of the neurons behind the best share of them."""
    place = share * len(curve)
    whole = int(place)
    rest = sum(curve[whole:]) - (place - whole) * (curve[whole] if whole < len(curve) else 0.0)
    return rest / sum(curve)
