"""Adaptive Wanda: masked copies of the FF weights, chosen from a prompt's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from griffin.backends import SparseFF
from griffin.backends.masked import MaskedFF
from griffin.config import GriffinConfig
from griffin.layouts import FFBlock
from griffin.method import selection, statistic
from griffin.method.statistics import Conversation
from griffin.weights.projection import rows


def mask_weights(
    blocks: Sequence[FFBlock], sparse: Mapping[int, SparseFF], conversation: Conversation, config: GriffinConfig
) -> None:
    """Keep of every output row of every projection the floor(density * in) weights of largest score.

    A batch shares its masks: its norms are summed as the paper sums its statistic, each over the root of its tokens.

    Raises:
        ValueError: no prompt token came, masks are wanted for several sequences, or an input is not finite.
    """
    for block in blocks:
        own = sparse.get(block.layer)
        if block.layer not in conversation.inputs:
            raise ValueError("no prompt token came: call the model inside handle.prompt_phase()")
        tokens = conversation.tokens[block.layer]
        if config.batch == "per_sequence" and len(tokens) > 1:
            raise ValueError(
                f"selection wanda masks the weights of one sequence or of a shared batch, and this batch has "
                f"{len(tokens)}: set batch to shared, or run the sequences one by one"
            )
        if not isinstance(own, MaskedFF):
            continue  # density 1.0
        x, z = (statistic.shared(energies, tokens) for energies in conversation.inputs[block.layer])
        if not bool(torch.isfinite(x).all() & torch.isfinite(z).all()):
            raise ValueError("the FF inputs hold inf or nan; load the model in bfloat16 or float32")
        projections = [(projection, x) for projection in block.inputs] + [(block.output, z)]
        own.mask(
            [
                selection.wanda(rows(projection)[0].detach(), norms, config.experts_of(len(norms)))
                for projection, norms in projections
            ]
        )
