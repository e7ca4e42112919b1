"""The truth: the experts' rows and columns are taken out of the weights at every step. Slow, exact, any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.activation import ACTIVATIONS
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic, reduced, sketch
from griffin.method.planes import PlaneSplit
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedLinear

_Project = Callable[[Tensor, Tensor], Tensor]
_ALL = 4  # planes, or more


class ReferenceFF:
    """`y = W_2[:, E] (act(W_g[E] x) * (W_1[E] x)) + b_2`, sequence by sequence, by `index_select`.

    With dynamic neuron selection all of them are computed, and those that a token leaves out are multiplied by zero.
    With a `PlaneSplit` this is done for every number of planes, each for the neurons that are read to so many.
    """

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        self._block = block
        self._experts: tuple[Tensor, ...] = ()
        self._dynamic: Dynamic | None = None
        self._gate: Tensor | None = None  # before its activation, of the token that is computed
        self._levels: Tensor | None = None  # of the experts, for the token that is computed; with a PlaneSplit
        self._sketch: tuple[str, Tensor] | None = None  # the gate's copy in fewer bits, as numbers
        self.calls = 0  # tests read it to know which path ran

    def select(self, experts: Sequence[Tensor], dynamic: Dynamic | None = None) -> None:
        """See `SparseFF.select`."""
        self._experts, self._dynamic, self._levels = tuple(experts), dynamic, None

    def refresh(self) -> bool:
        """See `SparseFF.refresh`. The weights are read where they are at every step; a sketch is fetched anew."""
        self._sketch = None
        return False

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """See `SparseFF.buffers`."""
        return self._experts

    def read(self, which: int, x: Tensor) -> Tensor:
        """See `SparseFF.read`."""
        if self._dynamic is None or which > 0:
            if self._levels is not None and which > 0:
                return self._up(x, self._levels)
            return self._read(which, x)
        if isinstance(self._dynamic.split, PlaneSplit):
            gate = self._gates(x, self._dynamic)
            self._levels = self._level(gate, self._dynamic)
            return torch.cat([gate, self._up(x, self._levels)], dim=-1) if self._block.layout.fused else gate
        format, k = self._dynamic.split.gate, self._experts[0].shape[0]
        if format is None:
            y = self._read(which, x)
        elif self._block.layout.fused:
            y = torch.cat([self._sketched(format, x), self._read(which, x)[..., k:]], dim=-1)
        else:
            y = self._sketched(format, x)
        self._gate = y[..., :k]
        return y

    def _read(self, which: int, x: Tensor) -> Tensor:
        projection = self._block.inputs[which]
        if isinstance(projection, QuantisedLinear):
            return self._each(x, lambda part, experts: _dequantised_read(projection, part, experts))
        weight, bias = rows(projection)

        def project(part: Tensor, experts: Tensor) -> Tensor:
            if self._block.layout.fused:
                experts = torch.cat([experts, experts + self._block.width])
            own_bias = None if bias is None else bias.index_select(0, experts)
            return F.linear(part, weight.index_select(0, experts), own_bias)

        return self._each(x, project)

    def write(self, z: Tensor) -> Tensor:
        """See `SparseFF.write`."""
        if not torch.compiler.is_compiling():  # a count that changes would recompile every step
            self.calls += 1
        output = self._block.output
        if self._levels is not None:
            assert isinstance(output, QuantisedLinear)
            y = self._down(z, self._levels)
            return y if output.bias is None else y + output.bias.to(y.dtype)
        if self._dynamic is not None:
            z = z * self._chosen()
        if isinstance(output, QuantisedLinear):
            own_bias = output.bias
            return self._each(z, lambda part, e: F.linear(part, output.dequantised(e, part.dtype).t(), own_bias))
        weight, bias = rows(output)
        return self._each(z, lambda part, experts: F.linear(part, weight.index_select(1, experts), bias))

    def _sketched(self, format: str, x: Tensor) -> Tensor:
        """Gates of the experts from the sketch."""
        weight, bias = self._sketch_of(format, x), getattr(self._block.inputs[0], "bias", None)
        bias_part = None if bias is None else bias[: self._block.width]
        return self._each(x, lambda part, e: F.linear(part, weight[e], None if bias_part is None else bias_part[e]))

    def _sketch_of(self, format: str, like: Tensor) -> Tensor:
        if self._sketch is None or self._sketch[0] != format:
            self._sketch = format, sketch(self._block, format).unpack()
        name, weight = self._sketch
        if (weight.dtype, weight.device) != (like.dtype, like.device):
            self._sketch = name, weight.to(like)
        return self._sketch[1]

    def _chosen(self) -> Tensor:
        """1 where an expert is computed for a token, else 0. Shapes: (..., k)."""
        gate, dynamic = self._gate, self._dynamic
        assert gate is not None
        assert dynamic is not None
        scores = self._scores(gate, dynamic)
        kept = torch.zeros_like(scores).scatter_(2, scores.topk(dynamic.split.chosen).indices, 1.0)
        return kept.view(gate.shape).to(gate.dtype)

    def _scores(self, gate: Tensor, dynamic: Dynamic) -> Tensor:
        """Shapes: gate (..., k), before its activation; returns (sets, tokens, k), float32."""
        name = self._block.activation
        assert name is not None
        values = ACTIVATIONS[name](gate).abs().float()
        weights = dynamic.weights.to(gate.device)
        own = torch.stack([weights[row if len(weights) > 1 else 0][e] for row, e in enumerate(self._experts)])
        return values.view(len(own), -1, own.shape[1]) * own[:, None]

    def _gates(self, x: Tensor, dynamic: Dynamic) -> Tensor:
        """Gates of the experts, of some from whole rows and of the others from the first planes. (..., k)"""
        split, whole = dynamic.split, dynamic.whole
        assert isinstance(split, PlaneSplit)
        assert whole is not None
        gate = self._planes(0, x, split.first)
        if split.whole == 0:
            return gate
        every = self._planes(0, x, _ALL).view(len(self._experts), -1, split.experts)
        return torch.where(whole[:, None], every, gate.view(every.shape)).view(gate.shape)

    def _level(self, gate: Tensor, dynamic: Dynamic) -> Tensor:
        """To how many planes a token reads up and down of every expert. (..., k)"""
        split = dynamic.split
        assert isinstance(split, PlaneSplit)
        scores = self._scores(gate, dynamic)
        best = scores.topk(split.levels[0]).indices
        levels = torch.zeros_like(scores, dtype=torch.int64)
        for level, count in enumerate(split.levels, 1):
            levels.scatter_(2, best[..., :count], level)
        return levels.view(gate.shape)

    def _up(self, x: Tensor, levels: Tensor) -> Tensor:
        """Up of the experts, each to its level's planes; 0 at level 0. (..., k)"""
        y = torch.zeros(levels.shape, dtype=x.dtype)
        for level in range(1, int(levels.max()) + 1):
            y = torch.where(levels == level, self._planes(1, x, level), y)
        return y

    def _planes(self, which: int, x: Tensor, planes: int) -> Tensor:
        """The experts' gates (0) or ups (1) from the first planes of their rows. (..., k)"""
        inputs, fused = self._block.inputs, self._block.layout.fused
        projection = inputs[0 if fused else which]
        assert isinstance(projection, QuantisedLinear)
        bias = projection.bias
        if bias is not None and fused:
            bias = bias.chunk(2)[which]
        weight = reduced(projection, which if fused else 0, planes)
        return self._each(
            x, lambda part, e: F.linear(part, weight.unpack(e, dtype=part.dtype), None if bias is None else bias[e])
        )

    def _down(self, z: Tensor, levels: Tensor) -> Tensor:
        """The block's output without its bias, every neuron's column to its level's planes. (..., D)"""
        output = self._block.output
        assert isinstance(output, QuantisedLinear)
        y = torch.zeros(*z.shape[:-1], output.out_features, dtype=z.dtype)
        for level in range(1, int(levels.max()) + 1):
            unpack = reduced(output, 0, level).unpack

            def project(part: Tensor, e: Tensor, unpack: Any = unpack) -> Tensor:
                return F.linear(part, unpack(e, dtype=part.dtype).t())

            y += self._each(z * (levels == level), project)
        return y

    def _each(self, x: Tensor, project: _Project) -> Tensor:
        if len(self._experts) == 1:
            return project(x, self._experts[0])
        parts = split_rows(x, len(self._experts))
        return torch.cat([project(part, experts) for part, experts in zip(parts, self._experts, strict=True)]).view(
            *x.shape[:-1], -1
        )


def _dequantised_read(projection: QuantisedLinear, x: Tensor, experts: Tensor) -> Tensor:
    bias = projection.bias
    if bias is not None:
        bias = bias.view(len(projection.parts), -1).index_select(1, experts).reshape(-1)
    return F.linear(x, projection.dequantised(experts, x.dtype), bias)


def split_rows(x: Tensor, sequences: int) -> Tensor:
    """View the tokens of a batch sequence by sequence, also where the model flattens them (OPT).

    Shapes:
        x: (B, S, D) or (B * S, D), with B = `sequences`. Returns (B, S, D).

    Raises:
        ValueError: the rows are not a multiple of the sequences that experts were selected for.
    """
    tokens = x.shape[:-1].numel()
    if (x.dim() == 3 and x.shape[0] != sequences) or tokens % sequences:
        raise ValueError(
            f"experts were selected for a batch of {sequences} sequences, but the generation phase got tokens of shape "
            f"{tuple(x.shape[:-1])}; run the prompt phase and the generation phase on the same batch"
        )
    return x.reshape(sequences, tokens // sequences, x.shape[-1])
