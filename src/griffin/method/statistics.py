"""What prompt tokens add up to: energies and token counts, over the chunks and turns of a conversation."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from griffin.method import statistic

# The statistic belongs to the tokens in a key/value cache, so it travels with that cache, also through copy.deepcopy,
# the usual way to reuse a prompt.
_ATTRIBUTE = "_griffin_statistics"


@dataclass(eq=False)
class Statistics:
    """Energies of the flocking statistic, of all prompt tokens so far.

    Args:
        energies: by layer, each (B, D_ff), float32.
        tokens: by layer, the number of real tokens behind every row, (B,), int64.
        inputs: by layer, the squared norms of the FF block's inputs, (B, D), and of the output projection's, (B, D_ff),
            float32; gathered for methods that need them (Wanda).
        ups: by layer, the energy of the up projection's outputs, (B, D_ff), float32; gathered for dynamic neuron
            selection.
    """

    energies: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ups: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, z: Tensor, mask: Tensor | None, squared_norms: Tensor | None = None) -> None:
        """Add the tokens of one forward pass.

        Shapes:
            z: (B, S, D_ff). mask: (B, S), true where a token is real; `None` means all are.
            squared_norms: (B, S), of the whole rows where `z` holds only some of the neurons.

        Raises:
            ValueError: the batch has another size than the conversation's earlier tokens.
        """
        energies = statistic.energy(z, mask, squared_norms)
        counts = torch.full(z.shape[:1], z.shape[1]) if mask is None else mask.sum(dim=1).cpu()
        if layer not in self.energies:
            self.energies[layer], self.tokens[layer] = energies, counts
            return
        if self.energies[layer].shape != energies.shape:
            raise ValueError(
                f"the conversation has {self.energies[layer].shape[0]} sequences, but this prompt has {z.shape[0]}; "
                "continue it with the same batch, or start a new prompt phase"
            )
        self.energies[layer] = self.energies[layer] + energies
        self.tokens[layer] = self.tokens[layer] + counts

    def add_inputs(self, layer: int, x: Tensor, z: Tensor) -> None:
        """Add the squared norms of one forward pass's inputs. Call it before `add`, which checks the batch.

        Shapes:
            x: (B, D). z: (B, D_ff).

        Raises:
            ValueError: the conversation holds tokens whose inputs are unknown.
        """
        if layer in self.inputs and self.inputs[layer][0].shape == x.shape:
            x, z = self.inputs[layer][0] + x, self.inputs[layer][1] + z
        elif layer in self.energies:
            raise ValueError(
                "the conversation began with another selection or batch, so the inputs that wanda needs are unknown; "
                "start a new one"
            )
        self.inputs[layer] = x, z

    def add_ups(self, layer: int, energies: Tensor) -> None:
        """Add the energy of one forward pass's up projection. Call it before `add`, which checks the batch.

        Shapes:
            energies: (B, D_ff).

        Raises:
            ValueError: the conversation holds tokens whose up projection is unknown.
        """
        if layer in self.ups and self.ups[layer].shape == energies.shape:
            energies = self.ups[layer] + energies
        elif layer in self.energies:
            raise ValueError(
                "the conversation began with another selection or batch, so the up projections that dynamic neuron "
                "selection needs are unknown; start a new one"
            )
        self.ups[layer] = energies

    def keep_only(self, needs: Collection[str]) -> None:
        """Drop what the next tokens will not add to beside the flocking statistic: it would not be of all tokens."""
        for name in {"inputs", "ups"} - set(needs):
            getattr(self, name).clear()

    def copy(self) -> Statistics:
        """An independent copy: `add` replaces tensors and never writes into them, so the dicts are enough."""
        return Statistics(dict(self.energies), dict(self.tokens), dict(self.inputs), dict(self.ups))


def cached_tokens(cache: Any) -> int:
    """Number of tokens that a Transformers cache holds; 0 for no cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def of_cache(cache: Any) -> Statistics:
    """The conversation that a cache holds, to be continued; a new one for an empty cache or none.

    Warns (`UserWarning`) where the cache holds tokens that GRIFFIN has not seen: their statistic is missing, and
    experts are then selected from the new tokens alone.
    """
    if cached_tokens(cache) == 0:
        return Statistics()
    known = getattr(cache, _ATTRIBUTE, None)
    if known is None:
        warnings.warn(
            f"the key/value cache holds {cached_tokens(cache)} tokens that were computed before GRIFFIN was attached; "
            "their statistic is unknown, so experts are selected from the new tokens alone",
            stacklevel=2,
        )
        return Statistics()
    assert isinstance(known, Statistics)
    return known.copy()


def keep_with_cache(statistics: Statistics, cache: Any) -> None:
    """Store the statistics on the cache that holds their tokens."""
    if cache is not None:
        setattr(cache, _ATTRIBUTE, statistics)
