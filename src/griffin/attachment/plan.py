"""A config resolved for one model, and the selection of experts: `Plan.select` is the only place that selects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from griffin.attachment.selection import Selection
from griffin.backends import native, why_not_dynamic
from griffin.config import AUTO, BEST, GriffinConfig
from griffin.layouts import FFBlock
from griffin.method import dynamic, planes, profile, selection
from griffin.method.dynamic import Split
from griffin.method.planes import PlaneSplit
from griffin.method.profile import Profile
from griffin.method.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Plan:
    """What a config means for one model. Made by `plan_for`, or by `Plan.of` for blocks that are no module's.

    Args:
        config: the config, with `auto` and `loss` resolved.
        blocks: the model's FF blocks, all of them.
        pruned: those that are computed for experts only in the generation phase.
        splits: how the bytes of a layer are spent, for a config with dynamic neuron selection.
        profile: the model's profile, if it counts.
    """

    config: GriffinConfig
    blocks: tuple[FFBlock, ...]
    pruned: tuple[FFBlock, ...]
    splits: Mapping[int, Split | PlaneSplit] = field(default_factory=dict)
    profile: Profile | None = None

    @classmethod
    def of(cls, blocks: Sequence[FFBlock], config: GriffinConfig, known: Profile | None = None) -> Plan:
        """The plan of a config that names its method and density.

        Raises:
            ValueError: the config names a layer that the model does not have, leaves its method or density open, or its
                method keeps no neurons.
        """
        if config.selection == AUTO or config.loss is not None:
            raise ValueError("the config leaves method or density open (auto, loss); resolve it for a model: plan_for")
        if config.method.select is None:
            raise ValueError(
                f"selection {config.method} keeps single weights, not neurons, and saves no time; it is a baseline of "
                f"griffin sweep, eval and perplexity, and in Python of griffin.analysis.{config.method}"
            )
        chosen = _chosen(blocks, config)
        splits: dict[int, Split | PlaneSplit] = {}
        if config.density < 1.0 and config.dynamic:
            curves = {} if known is None else known.curves
            splits = {
                block.layer: planes.split(block, config.density, curves.get(block.layer, planes.TYPICAL))
                if config.planes
                else dynamic.split(block, config.density)
                for block in chosen
            }
        pruned = [block for block in chosen if splits or config.experts_of(block.width) < block.width]
        return cls(config, tuple(blocks), tuple(pruned), splits, known)

    @cached_property
    def counts(self) -> Mapping[int, int]:
        """Number of experts by layer, of the pruned layers."""
        return {
            block.layer: self.splits[block.layer].experts if self.splits else self.config.experts_of(block.width)
            for block in self.pruned
        }

    @cached_property
    def ff_bytes(self) -> int:
        """Bytes of FF weights that one sequence's next token reads in the generation phase."""
        total = sum(block.nbytes for block in self.blocks)
        for block in self.pruned:
            split = self.splits.get(block.layer)
            read = block.nbytes * self.counts[block.layer] // block.width if split is None else split.nbytes
            total += read - block.nbytes
        return total

    @property
    def gathers(self) -> bool:
        """Whether the prompt's statistic decides anything."""
        return bool(self.pruned) and not self.config.method.static

    @property
    def needs(self) -> frozenset[str]:
        """What the prompt phase gathers beside the flocking statistic; at density 1.0 too, as a chat may lower it."""
        return self.config.needs

    def prepare(self) -> None:
        """Make what selections derive from the weights (sketches) now instead of at the first prompt."""
        dynamic.make_sketches(self.pruned, self.splits)

    @torch.no_grad()
    def select(self, statistics: Statistics) -> list[Selection]:
        """Select the experts of every pruned layer. Pure: neither plan nor statistics nor model change.

        Args:
            statistics: what the prompt tokens added up to; a static method does not look at it.

        Returns:
            One selection for each sequence with `batch="per_sequence"`, else a single one for all of them.

        Raises:
            ValueError: no prompt token came, or the scores are not finite (on an accelerator, where nothing waits for
                that, the generation phase raises it).
        """
        if self.profile is not None:
            statistics = self.profile.added_to(statistics)
        batch = self.config.batch
        finite = selection.Finite()
        experts = self._experts(statistics, self.counts, finite)
        whole = self._whole(statistics, experts, finite)
        weights = {
            block.layer: dynamic.dynamic(block, self.splits[block.layer], statistics, batch, whole.get(block.layer))
            for block in self.pruned
            if block.layer in self.splits
        }
        own_experts = batch == "per_sequence" and not self.config.method.static
        sets = next((len(tokens) for tokens in statistics.tokens.values()), 1) if own_experts else 1
        return [
            Selection(
                self,
                {layer: of_layer[n] for layer, of_layer in experts.items()},
                {layer: each.of_sequence(n) for layer, each in weights.items()},
                finite,
            )
            for n in range(sets)
        ]

    def _whole(
        self, statistics: Statistics, experts: Mapping[int, Tensor], finite: selection.Finite
    ) -> dict[int, Tensor]:
        """Which of the experts' gates are read whole, with splits that say it. Shapes: each (sets, k), bool."""
        counts = {layer: split.whole for layer, split in self.splits.items() if isinstance(split, PlaneSplit)}
        if not counts:
            return {}
        some = self._experts(statistics, {layer: max(1, count) for layer, count in counts.items()}, finite)
        whole = {}
        for block in self.pruned:
            best, layer = some[block.layer], block.layer
            mask = torch.zeros(len(best), block.width, dtype=torch.bool, device=best.device)
            if counts[layer] > 0:
                mask.scatter_(1, best, True)
            whole[layer] = mask.gather(1, experts[layer])
        return whole

    def _experts(
        self, statistics: Statistics, counts: Mapping[int, int], finite: selection.Finite
    ) -> dict[int, Tensor]:
        """The best by layer, so many. Shapes: each (sets, k), int64, rows ascending."""
        experts: dict[int, Tensor] = {}
        for blocks in self._alike(statistics, counts):
            scores = self.config.method.scores_function(blocks, statistics, self.config.batch)
            layers, sets = scores.shape[:2]
            # Each sequence draws from the same seed, so that its experts do not depend on the batch that it is in.
            seeds = [(self.config.seed * 1_000_003 + block.layer) % 2**63 for block in blocks for _ in range(sets)]
            k = counts[blocks[0].layer]
            chosen = selection.select(scores.flatten(0, 1), k, self.config.method.name, seeds, finite)
            experts |= zip((block.layer for block in blocks), chosen.view(layers, sets, k), strict=True)
        return dict(sorted(experts.items()))

    def _alike(self, statistics: Statistics, counts: Mapping[int, int]) -> Iterable[list[FFBlock]]:
        """Blocks of one width, one number of experts and one device: one call selects for all of them."""
        groups: dict[tuple[int, int, torch.device], list[FFBlock]] = {}
        for block in self.pruned:
            energies = statistics.energies.get(block.layer)
            device = block.device if energies is None else energies.device
            groups.setdefault((block.width, counts[block.layer], device), []).append(block)
        return groups.values()


def plan_for(model: nn.Module, blocks: Sequence[FFBlock], config: GriffinConfig) -> Plan:
    """Resolve a config for a model: `auto` and `loss` become a method and a density, and the profile is found.

    Raises:
        ValueError: a profile is needed and there is none, or it knows no density of so small a loss; or as `Plan.of`.
    """
    if not (config.prior or config.selection == AUTO or config.loss is not None):
        return Plan.of(blocks, config)
    known = profile.find(model, blocks, config.profile)
    if config.selection == AUTO and config.loss is None:
        refinements = ["prior"] * (known is not None) + ["dynamic"] * _dynamic_pays(blocks, config.backend)
        return Plan.of(blocks, replace(config, selection="+".join([*refinements, "topk"])), known)
    if known is None:
        wanted = f"selection {config.selection}" if config.loss is None else f"loss {config.loss:g}"
        raise ValueError(
            f"{wanted} needs a profile of this model, and none is known; make it: griffin profile -m MODEL"
        )
    if config.loss is not None:
        density = known.density_of(profile.format_of(blocks[0]), config.loss)
        config = replace(config, loss=None, density=density, selection=BEST)
    return Plan.of(blocks, config, known)


def _chosen(blocks: Sequence[FFBlock], config: GriffinConfig) -> list[FFBlock]:
    """The blocks of the layers that the config names."""
    if config.layers is None:
        return list(blocks)
    if config.layers[-1] >= len(blocks):
        raise ValueError(f"layers names layer {config.layers[-1]}; this model has layers 0 to {len(blocks) - 1}")
    return [blocks[layer] for layer in config.layers]


def _dynamic_pays(blocks: Sequence[FFBlock], backend: str) -> bool:
    """Whether `auto` selects neurons dynamically: where the native library computes it. The reference does likewise."""
    if backend == "reference":
        return all(block.activation is not None for block in blocks)
    return why_not_dynamic(backend) is None and all(native.why_not(block) is None for block in blocks)
