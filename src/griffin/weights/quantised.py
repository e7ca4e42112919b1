"""Linears and embeddings over weights in groups (`griffin.native.grouped`), in place, on the CPU.

The packed weights are multiplied where they lie, a prompt's rows as well as a step's: inputs are quantised to two bytes
in groups of the weights' size, and the products of a group are summed exactly (weights of a table, such as NF4's, meet
float32 inputs). No whole dequantised copy ever exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from griffin.native import grouped, kernel, operands
from griffin.native.grouped import Packed
from griffin.weights import float32_gemm

FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32}
QUANTISED = tuple(grouped.MADE)
WEIGHTS = (*FLOATS, *QUANTISED)


class _Quantised(nn.Module):
    """A module over packed matrices, which are its buffers too, so that `state_dict` holds them."""

    parts: tuple[Packed, ...]

    def __init__(self, parts: Sequence[Packed]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        for i, part in enumerate(self.parts):
            self.register_buffer(f"rows_{i}", part.rows)
            self.register_buffer(f"scales_{i}", part.scales)

    @property
    def format(self) -> str:
        """Name of the weights' format."""
        return self.parts[0].format.name

    @property
    def stored(self) -> Tensor:
        """The first part's rows: what identifies the weights."""
        return self.parts[0].rows

    @property
    def nbytes(self) -> int:
        """Bytes of the packed rows and their scales."""
        return sum(part.nbytes for part in self.parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`model.to(dtype)` is for the bias: packed rows and their scales stay what and where they are."""
        if (device := fn(torch.empty(0)).device).type != "cpu":
            raise ValueError(f"{self.format} weights are for the CPU and cannot go to {device}; load with dtype=")
        for parameter in self.parameters(recurse=False):
            parameter.data = fn(parameter.data)
        self.reset()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.reset()  # what was derived from the bias
        super()._load_from_state_dict(*args)

    def reset(self) -> None:
        """Forget what was derived from the bias, after it has changed."""


class QuantisedLinear(_Quantised):
    """`y = x W^T + b` over packed parts of `W`, for inference.

    Args:
        parts: one, or two for a fused gate and up (the gate's outputs come first). Neuron-major for the output
            projection of an FF block.
        bias: (out_features,) or None; kept as it is.

    Raises:
        ValueError: several parts that are neuron-major.
    """

    bias: Tensor | None

    def __init__(self, parts: Sequence[Packed], bias: Tensor | None = None) -> None:
        super().__init__(parts)
        if len(self.parts) > 1 and any(part.neuron_major for part in self.parts):
            raise ValueError(f"{len(self.parts)} neuron-major parts; an output projection has one")
        self.in_features = self.parts[0].d_in
        self.out_features = sum(part.d_out for part in self.parts)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._matrices: list[operands.Matrix] | None = None

    @property
    def neuron_major(self) -> bool:
        """Whether a row of the storage has the weights of one input."""
        return self.parts[0].neuron_major

    def matrices(self) -> list[operands.Matrix]:
        """The parts as the native library sees them; biases are in them."""
        if self._matrices is None:
            sizes = [part.d_out for part in self.parts]
            biases = [None] * len(sizes) if self.bias is None else torch.split(self.bias, sizes)
            self._matrices = [operands.packed_matrix(*pair) for pair in zip(self.parts, biases, strict=True)]
        return self._matrices

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in_features); returns (..., out_features) of the same dtype."""
        flat = x.reshape(-1, self.in_features)
        if flat.dtype not in FLOATS.values():
            flat = flat.float()  # float16, which the library's inputs are not
        out = flat.new_empty(flat.shape[0], self.out_features)
        at = 0
        for matrix in self.matrices() if len(flat) else ():
            kernel.matvec(matrix, flat, out=out[:, at : at + matrix.d_out])
            at += matrix.d_out
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantised(self, indices: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as numbers, or of every part those at `indices`: for tests and the reference backend.

        Shapes: indices (k,); returns (P * k, in_features), which is `W`, or neuron-major (k, out_features), `W^T`.
        """
        parts = [part.unpack(indices, dtype=dtype) for part in self.parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def row_norms(self) -> list[Tensor]:
        """L2 norm of every stored row, a tensor (n,) of float32 a part."""
        return [part.row_norms() for part in self.parts]

    def reset(self) -> None:
        """See the base."""
        self._matrices = None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        kind = ", neuron-major" if self.neuron_major else ""
        return f"{self.in_features}, {self.out_features}, {self.format}, bias={self.bias is not None}{kind}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": None}  # addresses are of this process


class QuantisedEmbedding(_Quantised):
    """Rows of a packed matrix, looked up.

    Args:
        packed: (V, D).
        scale: what a row is multiplied by (Gemma's square root of D), a scalar tensor; None: 1.
        dtype: of the result.
    """

    embed_scale: Tensor | None

    def __init__(self, packed: Packed, *, scale: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__((packed,))
        self.num_embeddings, self.embedding_dim = packed.d_out, packed.d_in
        self.register_buffer("embed_scale", scale, persistent=False)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (...,) int64; returns (..., D)."""
        found = self.parts[0].unpack(ids.reshape(-1), dtype=self.dtype).view(*ids.shape, self.embedding_dim)
        return found if self.embed_scale is None else found * self.embed_scale.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


def forget_ties(model: nn.Module) -> None:
    """Let a Transformers model's `tie_weights` leave packed embeddings and outputs alone: they have no `weight`."""
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        if getattr(model, name, None):
            object.__setattr__(model, name, {})


def quantised_format(model: nn.Module) -> str | None:
    """Formats of a model's quantised projections, the most frequent first ("Q4_K+Q6_K"); `None`: it has none."""
    names = Counter(part.format.name for m in model.modules() if isinstance(m, QuantisedLinear) for part in m.parts)
    return "+".join(name for name, _ in names.most_common()) or None


def parameter_count(model: nn.Module) -> int:
    """The number of weights; those of quantised layers are counted from their shapes, and tied ones once."""
    packed: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            own = next((buffer.data_ptr() for buffer in module.buffers(recurse=False)), id(module))
            size = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
            packed[own] = size + getattr(module, "num_embeddings", 0) * getattr(module, "embedding_dim", 0)
    return sum(parameter.numel() for parameter in model.parameters()) + sum(packed.values())


def prompt_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
    """The dtype in which a model of `dtype` multiplies prompts; "int8" where weights are quantised, but float32 where
    only with tables."""
    modules = list(model.modules())
    formats = [part.format for module in modules if isinstance(module, QuantisedLinear) for part in module.parts]
    if formats:
        return torch.float32 if all(format.table for format in formats) else "int8"
    converted = any(isinstance(module, float32_gemm.Float32GemmLinear) for module in modules)
    return float32_gemm.product_dtype(dtype) if converted else dtype
