"""The truth: the experts' rows and columns are taken out of the weights at every step. Slow, exact, any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.activation import ACTIVATIONS
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic, sketch
from griffin.weights.projection import rows
from griffin.weights.quantised import QuantisedLinear

_Project = Callable[[Tensor, Tensor], Tensor]


class ReferenceFF:
    """`y = W_2[:, E] (act(W_g[E] x) * (W_1[E] x)) + b_2`, sequence by sequence, by `index_select`.

    With dynamic neuron selection all of them are computed, and those that a token leaves out are multiplied by zero.
    """

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        self._block = block
        self._experts: tuple[Tensor, ...] = ()
        self._dynamic: Dynamic | None = None
        self._gate: Tensor | None = None  # before its activation, of the token that is computed
        self._sketch: tuple[str, Tensor] | None = None  # the gate's copy in fewer bits, as numbers
        self.calls = 0  # tests read it to know which path ran

    def select(self, experts: Sequence[Tensor], dynamic: Dynamic | None = None) -> None:
        """See `SparseFF.select`."""
        self._experts, self._dynamic = tuple(experts), dynamic

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
            return self._read(which, x)
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
        if self._dynamic is not None:
            z = z * self._chosen()
        output = self._block.output
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
        name = self._block.activation
        assert name is not None
        values = ACTIVATIONS[name](gate).abs().float()
        weights = dynamic.weights.to(gate.device)
        set_weights = torch.stack([weights[row if len(weights) > 1 else 0][e] for row, e in enumerate(self._experts)])
        scores = values.view(len(set_weights), -1, set_weights.shape[1]) * set_weights[:, None]
        kept = torch.zeros_like(scores).scatter_(2, scores.topk(dynamic.split.chosen).indices, 1.0)
        return kept.view(gate.shape).to(gate.dtype)

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
