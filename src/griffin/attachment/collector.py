"""Collects the statistics of one prompt phase from the FF blocks as they run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from griffin.layouts import FFBlock
from griffin.method import statistic
from griffin.method.statistics import Statistics


class Collector:
    """Adds the tokens of one prompt phase, over its chunks, to `Statistics`. Padding never counts.

    Args:
        statistics: what is added to.
        masks: which of the phase's tokens are real, (B, S); `None`: read the two-dimensional mask of each forward call.
        needs: what is gathered beside the flocking statistic, as `griffin.methods.Method.needs` names it.
    """

    def __init__(self, statistics: Statistics, masks: Tensor | None = None, needs: Collection[str] = ()) -> None:
        self._statistics, self._masks = statistics, masks
        self._inputs, self._ups = "inputs" in needs, "ups" in needs
        self._mask: Tensor | None = None  # of the forward call that runs
        self._batch: int | None = None
        self._tokens: dict[int, int] = {}  # so far, by layer
        self._x: Tensor | None = None  # input of the FF block that runs
        self._up: Tensor | None = None  # its up projection's output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def see_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn batch size and padding from the arguments of the model's forward.

        Raises:
            ValueError: a mask that is not two-dimensional, and none was given.
        """
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        assert isinstance(tokens, Tensor)
        self._batch = tokens.shape[0]
        mask = given.get("attention_mask")
        if mask is None or self._masks is not None:
            self._mask = None
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask[:, -tokens.shape[1] :].bool()
        else:
            raise ValueError(
                "the prompt phase cannot tell padding from an attention mask that is not two-dimensional; say it: "
                "handle.prompt_phase(attention_mask=mask) with a mask of shape (B, S)"
            )

    def see_input(self, x: Tensor) -> None:
        """An FF block begins with this input."""
        if self._inputs:
            self._x = x.detach()

    def see_up(self, block: FFBlock, output: Tensor) -> None:
        """The block's last input projection gave this: up, or gate and up."""
        if self._ups and block.gated:
            self._up = output.detach()[..., -block.width :]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add(self, block: FFBlock, z: Tensor) -> None:
        """Add the tokens of one forward pass to the statistic of one layer.

        Shapes:
            z: (B, S, D_ff), or (B * S, D_ff) where the model flattens its tokens (OPT).
        """
        if self._batch is not None:
            z = z.reshape(self._batch, -1, z.shape[-1])
        z = z.detach()
        seen = self._tokens.get(block.layer, 0)
        mask = self._mask if self._masks is None else self._masks[:, seen : seen + z.shape[1]]
        self._tokens[block.layer] = seen + z.shape[1]
        if self._inputs:
            assert self._x is not None
            x = self._x.reshape(*z.shape[:2], -1)
            energies = statistic.input_energy(x, mask), statistic.input_energy(z, mask)
            self._statistics.add_inputs(block.layer, *energies)
        if self._ups and block.gated:
            assert self._up is not None
            self._statistics.add_ups(block.layer, statistic.input_energy(self._up.reshape(z.shape), mask))
        self._statistics.add(block.layer, z, mask)
