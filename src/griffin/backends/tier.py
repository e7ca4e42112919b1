"""The token tier: for every token anew, which of its experts' up and down rows are worth reading.

A gated neuron adds `act(g_j) * u_j * W_2[:, j]` to the block's output. Its gate says most about how much that will be:
so the gates are computed first, of all experts, and up and down only of those with the largest

    |act(g_j)| * rms(u_j) * ||W_2[:, j]||_2

where `rms(u_j)` is the root mean square of the prompt's `u_j`. What is not read is not computed: no neuron's activation
is guessed. A gate may be read from a copy in fewer bits (a *sketch*), which makes room for more of up and down; the
sketch's gate is then what the activation is computed from, too.

Here is how many bytes go where. `density` means bytes: the share of the block's weights that are read for a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from griffin.backends import library, operands, packing
from griffin.backends.activation import activation_of
from griffin.backends.quantised import QuantisedLinear
from griffin.layouts import FFBlock, shape_of

# What a gate in so many bits costs beside an exact one, on the scale of the loss by neurons left out, (1 - share)^4.
# Both were fitted to KL of SmolLM2-135M and Gemma 3 270M (results/ablation).
_NOISE = {None: 0.0, "int8": 0.0003, "int4": 0.01}
_FIRST = 1.5  # own gates of this much more neurons than the density says: the best of some on these two models


@dataclass(frozen=True)
class Split:
    """How an FF block's bytes are spent on a token.

    Args:
        experts: neurons whose gates are computed.
        chosen: of them, those whose up and down are computed.
        gate: format of the gate's copy that is read; `None`: the gate itself is.
        nbytes: bytes of weights read for a token.
    """

    experts: int
    chosen: int
    gate: str | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class Tier:
    """A selection's second tier.

    Args:
        split: how many neurons.
        weights: `rms(u_j) * ||W_2[:, j]||`, a row for all sequences or one for each.

    Shapes:
        weights: (1 or B, D_ff), float32.
    """

    split: Split
    weights: Tensor


def split(block: FFBlock, density: float) -> Split:
    """Spend a share of a block's bytes as well as is known.

    Raises:
        ValueError: the block has no gate, or an activation that is not known.
    """
    if not block.gated:
        raise ValueError(f"{block.path} has no gate, so it has no token tier; use a selection without tier")
    if activation_of(block) is None:
        raise ValueError(f"{block.path} has an activation that the token tier does not know; use one without tier")
    neuron = block.nbytes / block.width
    found = [_split(block, density, neuron, None)]
    if library.available() is None:
        d = shape_of(block.output)[0]
        sizes = {"int8": d + 4, "int4": packing.row_bytes("int4", d)}
        found += [_split(block, density, neuron, name) for name, size in sizes.items() if size < neuron / 3]
    return min(found, key=lambda own: (1 - own.chosen / block.width) ** 4 + _NOISE[own.gate])


def _split(block: FFBlock, density: float, neuron: float, gate: str | None) -> Split:
    width, third = block.width, neuron / 3
    if gate is None:
        experts, each = max(1, math.floor(min(1.0, _FIRST * density) * width)), third
    else:
        d = shape_of(block.output)[0]
        experts, each = width, float(packing.row_bytes(gate, d) + (4 if gate == "int8" else 0))
    left = round(density * width * neuron - experts * each, 6)
    chosen = min(experts, max(1, math.floor(left / (2 * third))))
    return Split(experts, chosen, gate, math.ceil(experts * each + chosen * 2 * third))


# Sketches and norms are of the weights alone, so all handles of a model share them, for as long as it lives.
_KEPT: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


@torch.no_grad()
def sketch(block: FFBlock, format: str) -> operands.Matrix:
    """The block's gate in another format, (D_ff, D), without its bias."""
    gate = block.inputs[0]

    def make() -> operands.Matrix:
        packed = isinstance(gate, QuantisedLinear)
        weight = gate.dequantised()[: block.width] if packed else block.input_weights()[0]
        return operands.quantise_matrix(weight, format=format)

    return _kept(gate, format, make)  # type: ignore[no-any-return]


def output_norms(block: FFBlock) -> Tensor:
    """`||W_2[:, j]||_2`, (D_ff,), float32."""
    return _kept(block.output, "norms", block.output_norms)  # type: ignore[no-any-return]


def _kept(projection: nn.Module, name: str, make: Any) -> Any:
    weight = projection.packed if isinstance(projection, QuantisedLinear) else projection.weight
    assert isinstance(weight, Tensor)
    state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    own = _KEPT.setdefault(projection, {})
    if name not in own or own[name][0] != state:
        own[name] = state, make()
    return own[name][1]
