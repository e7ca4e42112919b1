"""The paper's unstructured baseline, adaptive Wanda. It prunes single weights instead of neurons and saves no time.

Every output row of every FF projection keeps the floor(density * in) weights of largest `|W_ij| * ||X_:,j||_2`, where X
are the prompt's inputs of the projection (Sun et al., arXiv 2306.11695). Dong et al., arXiv 2404.01365, section 5, make
it adaptive to the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.attachment import GATHER_ONLY, Griffin, attach
from griffin.attachment.patching import patch
from griffin.attachment.plan import Plan
from griffin.config import GriffinConfig
from griffin.families import Layout
from griffin.layouts import FFBlock
from griffin.method import selection, statistic
from griffin.method.statistics import Statistics
from griffin.weights.projection import rows

_ROWS_AT_A_TIME = (
    1024  # rows of a weight; their float32 scores and int64 indices take six times the bytes of a 16-bit weight
)


def attach_any(model: nn.Module, config: GriffinConfig) -> Griffin:
    """Attach with `wanda` if the config selects by it, otherwise with `griffin.attach`.

    Raises:
        ValueError: as those functions.
    """
    return wanda(model, config) if config.method.name == "wanda" else attach(model, config)


def wanda(model: nn.Module, config: GriffinConfig, layout: Layout | None = None) -> Wanda:
    """Attach adaptive Wanda to a model; returns a context manager, like `griffin.attach`.

        with wanda(model, GriffinConfig(density=0.5, selection="wanda")) as handle:
            with handle.prompt_phase():
                model(prompt, past_key_values=cache)
            with handle.generation_phase():
                model(token, past_key_values=cache)

    Raises:
        ValueError: as `griffin.attach`, or the weights are quantised.
    """
    handle = Wanda(model, config, layout)
    handle.attach()
    return handle


class Wanda(Griffin):
    """A handle whose generation phase computes all neurons, over masked copies of the FF weights."""

    def __init__(self, model: nn.Module, config: GriffinConfig, layout: Layout | None = None) -> None:
        super().__init__(model, replace(config, backend="reference"), layout)
        if any(block.quantised for block in self.blocks):
            raise ValueError(
                f"{self.blocks[0].path} has quantised weights, which selection wanda cannot mask; load it in bf16"
            )
        self._masked: dict[
            int, list[Tensor]
        ] = {}  # by layer: weights of the input projections, then of the output projection
        self._calls = 0

    @property
    def config(self) -> GriffinConfig:
        """The config."""
        return self._config

    @property
    def experts(self) -> Mapping[int, Tensor | list[Tensor]]:
        """Always empty, as single weights of all neurons are kept."""
        return {}

    @property
    def sparse_calls(self) -> int:
        """Number of FF blocks computed with masked weights since `wanda`."""
        return self._calls

    @property
    def ff_bytes_per_token(self) -> int:
        """Bytes of FF weights that a token reads, which are all of them."""
        return sum(block.nbytes for block in self.blocks)

    def _plan(self, config: GriffinConfig) -> Plan:
        self._config = config
        whole = replace(GATHER_ONLY, layers=config.layers, batch=config.batch)
        return Plan.of(self.blocks, whole)

    def select(self, statistics: Statistics) -> None:
        """Mask the weights. The sequences of a batch share the masks; norms are summed as the paper sums its statistic.

        Raises:
            ValueError: no prompt token came, `batch` asks for masks of each sequence, or an input is not finite.
        """
        for block in self._chosen:
            if block.layer not in statistics.inputs:
                raise ValueError("no prompt token came: call the model inside handle.prompt_phase()")
            count = len(statistics.tokens[block.layer])
            if self.config.batch == "per_sequence" and count > 1:
                raise ValueError(
                    f"selection wanda masks the weights of one sequence or of a shared batch, and this batch has "
                    f"{count}: set batch to shared, or run the sequences one by one"
                )
        if self.config.density < 1.0:
            self._masked = {block.layer: self._masks(block, statistics) for block in self._chosen}
        super().select(statistics)

    @torch.no_grad()
    def _masks(self, block: FFBlock, statistics: Statistics) -> list[Tensor]:
        tokens = statistics.tokens[block.layer]
        x, z = (statistic.shared(energies, tokens) for energies in statistics.inputs[block.layer])
        if not bool(torch.isfinite(x).all() & torch.isfinite(z).all()):
            raise ValueError("the FF inputs hold inf or nan; load the model in bfloat16 or float32")
        pairs = [(projection, x) for projection in block.inputs] + [(block.output, z)]
        return [
            mask(rows(projection)[0].detach(), norms, self.config.experts_of(len(norms))) for projection, norms in pairs
        ]

    @contextmanager
    def prompt_phase(
        self, *, attention_mask: Tensor | None = None, statistics: Statistics | None = None
    ) -> Iterator[None]:
        """See `Griffin.prompt_phase`; this frees the masks of the previous prompt."""
        self._masked = {}
        self._forget()
        with self.gather(statistics, attention_mask=attention_mask, needs={"inputs"}) as gathered:
            yield
        self.select(gathered)

    @contextmanager
    def generation_phase(self, *, rows: Sequence[int] | None = None) -> Iterator[None]:
        """See `Griffin.generation_phase`; the masks are the same for all rows."""
        with super().generation_phase(), ExitStack() as stack:
            for block in self.blocks:
                for projection, weight in zip(
                    (*block.inputs, block.output), self._masked.get(block.layer, ()), strict=False
                ):
                    patch(
                        stack,
                        projection,
                        "forward",
                        partial(self._forward, projection, weight, projection is block.output),
                    )
            yield

    def _forward(self, projection: nn.Module, weight: Tensor, last: bool, x: Tensor) -> Tensor:
        self._calls += last
        return F.linear(x, weight, rows(projection)[1])

    def detach(self) -> None:
        """See `Griffin.detach`."""
        self._masked = {}
        super().detach()


def mask(weight: Tensor, norms: Tensor, k: int) -> Tensor:
    """A copy of a projection's weight that keeps the k weights of largest `|W_ij| * ||X_:,j||_2` in every output row.

    Shapes:
        weight: (out, in). norms: (in,), float32. Returns (out, in), in the weight's dtype.
    """
    kept = torch.zeros_like(weight)
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        part = weight[start : start + _ROWS_AT_A_TIME]
        chosen = selection.topk(part.float().abs() * norms, k)
        kept[start : start + _ROWS_AT_A_TIME].scatter_(1, chosen, part.gather(1, chosen))
    return kept
