"""Dynamic neuron selection: for every token anew, which of its experts' up and down rows are worth reading.

Relatives: TEAL (arXiv 2408.14690) and CATS (arXiv 2404.08763) leave out what an activation threshold says; here a token
computes the k neurons of largest score. A gated neuron adds `act(g_j) * u_j * W_2[:, j]` to the block's output. Its
gate says most about how much that will be, so the gates are computed first, of all experts, and up and down only of
those with the largest

    |act(g_j)| * rms(u_j) * ||W_2[:, j]||_2

where `rms(u_j)` is the root mean square of the prompt's `u_j`. A neuron without a gate adds `act(u_j) * W_2[:, j]`: all
`u_j` are computed first, and `W_2[:, j]` is read where `|act(u_j)| * ||W_2[:, j]||_2` is largest.

What comes first may be read from a copy in fewer bits (a *sketch*), which leaves more bytes for the rest; the
activation is then computed from the sketch, too. `split` decides how many bytes go where. `density` means bytes: the
share of the block's weights that are read for a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from griffin.layouts import FFBlock
from griffin.method.planes import PlaneSplit
from griffin.method.statistics import Statistics
from griffin.native import grouped, library
from griffin.weights.fingerprint import fingerprint
from griffin.weights.projection import nbytes_of, shape_of
from griffin.weights.quantised import QuantisedLinear

# What a split costs, in nats of KL a token: neurons that a token leaves out, those left out for all tokens (which
# matter the more, the more a token takes), and the noise of the sketch. Fitted to SmolLM2-135M (results/ablation),
# where it is right to a quarter but for the smallest densities. It only ranks the splits of one density.
_LEFT_OUT = (3.5, 4.0)  # times (share left out)^4
_NOT_EXPERTS = (7.0, 1.5, 1.3)  # times (share left out for all)^1.5 (share chosen)^1.3
_NOISE = {None: 0.0, "int8": 0.001, "int4": 0.025}
_SHARES = tuple(step / 20 for step in range(1, 21))


@dataclass(frozen=True)
class Split:
    """How an FF block's bytes are spent on a token.

    Args:
        experts: neurons whose gates (without gates: ups) are computed.
        chosen: of them, those whose up and down (down) are computed.
        gate: format of the gate's (up's) copy that is read; `None`: it is read itself.
        nbytes: bytes of weights read for a token.
    """

    experts: int
    chosen: int
    gate: str | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class Dynamic:
    """How one layer's neurons are selected for every token.

    Args:
        split: how many neurons, and with a `PlaneSplit` how precisely.
        weights: what a token's gates are multiplied by: one row for all sequences, or one for each.
        whole: with a `PlaneSplit`, which of the experts' gates are read whole: one row for every set of experts.

    Shapes:
        weights: (1 or B, D_ff), float32. whole: (sets, experts), bool.
    """

    split: Split | PlaneSplit
    weights: Tensor
    whole: Tensor | None = None

    def of_sequence(self, n: int) -> Dynamic:
        """Of one sequence, where sequences have weights and gates of their own."""
        weights, whole = (t if t is None or len(t) == 1 else t[n : n + 1] for t in (self.weights, self.whole))
        assert weights is not None
        return Dynamic(self.split, weights, whole)


def dynamic(
    block: FFBlock, split: Split | PlaneSplit, statistics: Statistics, batch: str, whole: Tensor | None = None
) -> Dynamic:
    """Weights `rms(u_j) * ||W_2[:, j]||`, of the prompt's `u_j`; without a gate `||W_2[:, j]||`.

    With a shared batch every sequence counts the same, however long its prompt is.

    Raises:
        ValueError: the statistics hold no energies of the up projection.
    """
    norms = output_norms(block)
    if not block.gated:
        return Dynamic(split, norms[None], whole)
    if block.layer not in statistics.ups:
        raise ValueError("the prompt phase gathered no up projections, which dynamic neuron selection needs")
    ups = statistics.ups[block.layer]
    squares = ups / statistics.tokens[block.layer].clamp_min(1)[:, None].to(ups.device)
    if batch == "shared":
        squares = squares.mean(dim=0, keepdim=True)
    return Dynamic(split, squares.sqrt() * norms.to(squares.device), whole)


def joined(sets: Sequence[Dynamic | None]) -> Dynamic | None:
    """One `Dynamic` for sequences that have one each, or `None` where none has.

    Raises:
        ValueError: their splits differ.
    """
    given = [each for each in sets if each is not None]
    if not given:
        return None
    if len(given) < len(sets) or any(each.split != given[0].split for each in given):
        raise ValueError(
            "sequences of one batch need the same split of dynamic neuron selection, or none of them has one"
        )
    if len(given) == 1:
        return given[0]
    whole = [each.whole for each in given if each.whole is not None]
    weights = torch.cat([each.weights for each in given])
    return Dynamic(given[0].split, weights, torch.cat(whole) if whole else None)


def split(block: FFBlock, density: float) -> Split:
    """Spend a share of a block's bytes as well as is known.

    Raises:
        ValueError: the block has an activation that is not known.
    """
    if block.activation is None:
        raise ValueError(
            f"{block.path} has an activation that dynamic neuron selection does not know; leave dynamic+ out"
        )
    noise = _NOISE if library.why_not() is None else {None: 0.0}
    first = nbytes_of(block.inputs[0]) / block.width / (2 if block.layout.fused else 1)
    return _split(shape_of(block.output)[0], block.width, block.nbytes, first, density, tuple(noise.items()))


@cache
def _split(
    d: int, width: int, nbytes: int, first: float, density: float, noises: tuple[tuple[str | None, float], ...]
) -> Split:
    """first: bytes of a neuron's row that is read for all experts, its gate's or its up's."""
    noise = dict(noises)
    neuron = nbytes / width
    known: dict[str | None, float] = {
        None: first,
        **{name: grouped.row_bytes(format, d) for name, format in grouped.MADE.items()},
    }
    sizes = {gate: known[gate] for gate in noise}

    def spent(gate: str | None, share: float) -> Split:
        experts = max(1, math.floor(share * width))
        left = round(density * width * neuron - experts * sizes[gate], 6)
        chosen = min(experts, math.floor(left / (neuron - first)))
        return Split(experts, chosen, gate, math.ceil(experts * sizes[gate] + chosen * (neuron - first)))

    def loss(candidate: Split) -> float:
        chosen, left_out, not_experts = (
            candidate.chosen / width,
            1 - candidate.chosen / width,
            1 - candidate.experts / width,
        )
        scale, power, of_chosen = _NOT_EXPERTS
        for_all: float = scale * not_experts**power * chosen**of_chosen
        for_token: float = _LEFT_OUT[0] * left_out ** _LEFT_OUT[1]
        return for_all + for_token + noise[candidate.gate]

    candidates = [
        spent(gate, share) for gate, size in sizes.items() for share in _SHARES if gate is None or size < first
    ]
    possible = [candidate for candidate in candidates if candidate.chosen >= 1]
    return min(possible, key=loss) if possible else Split(1, 1, None, math.ceil(neuron))


# Sketches and norms are of the weights alone, so all handles of a model share them, for as long as it lives.
_KEPT: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


@torch.no_grad()
def sketch(block: FFBlock, format: str) -> grouped.Packed:
    """The block's gate, or up where it has none, in another format, (D_ff, D), without its bias."""
    gate = block.inputs[0]

    def make() -> grouped.Packed:
        weight = gate.parts[0].unpack() if isinstance(gate, QuantisedLinear) else block.input_weights()[0]
        return grouped.quantise(weight, format)

    return _kept(gate, format, make)  # type: ignore[no-any-return]


def make_sketches(blocks: Sequence[FFBlock], splits: Mapping[int, Split | PlaneSplit]) -> None:
    """Make the sketches that are not there yet, as many at a time as torch has threads."""
    wanted = [(block, splits[block.layer].gate) for block in blocks if block.layer in splits]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda each: sketch(*each), [(block, gate) for block, gate in wanted if gate is not None]))


def reduced(projection: QuantisedLinear, part: int, planes: int) -> grouped.Packed | grouped.Reduced:
    """A part of a projection as its first planes say it; itself where it has no more."""
    packed = projection.parts[part]
    if planes >= len(packed.format.planes):
        return packed
    return _kept(projection, f"{planes} planes of part {part}", lambda: packed.reduced(planes))  # type: ignore[no-any-return]


def output_norms(block: FFBlock) -> Tensor:
    """`||W_2[:, j]||_2`, (D_ff,), float32."""
    return _kept(block.output, "norms", block.output_norms)  # type: ignore[no-any-return]


def _kept(projection: nn.Module, name: str, make: Any) -> Any:
    weight = projection.stored if isinstance(projection, QuantisedLinear) else projection.weight
    assert isinstance(weight, Tensor)
    state = fingerprint(weight)
    kept = _KEPT.setdefault(projection, {})
    if name not in kept or kept[name][0] != state:
        kept[name] = state, make()
    return kept[name][1]
