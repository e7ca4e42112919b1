"""Weights in 8 or 4 bits: every projection of the decoder's layers and the output embeddings, in place, on the CPU.

The formats are the native library's (`griffin_native.h`). A few rows of input are multiplied where the packed weights
lie; a prompt goes through torch's own GEMM, over blocks dequantised into one small buffer (`float32_gemm.multiply`), so
that it runs at the speed of the fastest dtype here and no whole copy of a weight ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from griffin.native import kernel, operands, packing
from griffin.weights import float32_gemm

FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32}
QUANTISED = ("int8", "int4")
WEIGHTS = (*FLOATS, *QUANTISED)


class QuantisedLinear(nn.Module):
    """`y = x W^T + b` over packed rows of `W`, for inference.

    Args:
        packed: (P, n, bytes of a row) uint8, rows contiguous. P is 1, or 2 for a fused gate and up (the gate's rows
            come first in the output). It may be a view into the records of an FF block.
        scales: int8: (P, n) float32, a scale a row. None says int4.
        length: weights in a row.
        bias: (out_features,) or None; kept as it is.
        transposed: a row holds the weights of one input instead of one output (neuron-major: the output projection of
            an FF block). Its forward always dequantises: in the generation phase the native FF call reads the records
            itself, so this one serves the prompt phase and density 1.0 only.
    """

    packed: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self, packed: Tensor, scales: Tensor | None, *, length: int, bias: Tensor | None, transposed: bool = False
    ) -> None:
        super().__init__()
        n = packed.shape[0] * packed.shape[1]
        if transposed and packed.shape[0] != 1:
            raise ValueError(f"packed has {packed.shape[0]} parts; a transposed projection has one")
        self.in_features, self.out_features = (n, length) if transposed else (length, n)
        self.format = "int4" if scales is None else "int8"
        self.transposed = transposed
        self._length = length
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._matrices: list[operands.Matrix] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed rows and their scales."""
        return self.packed.numel() + (0 if self.scales is None else 4 * self.scales.numel())

    def matrices(self) -> list[operands.Matrix]:
        """The parts as the native library sees them, rows of W; biases are in them."""
        if self.transposed:
            raise ValueError("the rows of a transposed projection belong to its inputs: it is no matrix of the library")
        if self._matrices is None:
            biases = [None] * len(self.packed) if self.bias is None else list(self.bias.chunk(len(self.packed)))
            self._matrices = [
                operands.matrix_rows(part, self._scales(p), d_in=self.in_features, bias=biases[p])
                for p, part in enumerate(self.packed)
            ]
        return self._matrices

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in_features); returns (..., out_features) of the same dtype."""
        flat = x.reshape(-1, self.in_features)
        if flat.dtype not in FLOATS.values():
            flat = flat.float()  # float16, which the library's inputs are not
        out = flat.new_empty(flat.shape[0], self.out_features)
        if 1 <= flat.shape[0] <= kernel.MAX_ROWS and not self.transposed:
            at = 0
            for matrix in self.matrices():
                kernel.matvec(matrix, flat, out=out[:, at : at + matrix.d_out])
                at += matrix.d_out
        else:
            self._unpacked(flat.to(float32_gemm.product_dtype(flat.dtype)), out)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _unpacked(self, x: Tensor, out: Tensor) -> None:
        """out = x W^T + bias, over blocks that are dequantised to the dtype of x."""
        parts = len(self.packed)
        biases = [None] * parts if self.bias is None else list(self.bias.chunk(parts))
        for part, target, bias in zip(range(parts), out.chunk(parts, dim=1), biases, strict=True):
            rows, scales = self.packed[part], self._scales(part)

            def read(begin: int, block: Tensor, rows: Tensor = rows, scales: Tensor | None = scales) -> None:
                if self.transposed:
                    packing.unpack_rows(rows, scales, block, d=self._length, begin=begin)
                else:
                    span = slice(begin, begin + block.shape[0])
                    own_scales = None if scales is None else scales[span]
                    packing.unpack_rows(rows[span], own_scales, block, d=self._length)

            float32_gemm.multiply(x, read, target, bias=bias, transposed=self.transposed)

    @torch.no_grad()
    def dequantised(self, indices: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows as numbers, or of every part those at `indices`: for tests and the reference backend.

        Shapes: indices (k,); returns (P * k, length), which is `W`, or `W^T` if `transposed`.
        """
        parts = []
        for p, part in enumerate(self.packed):
            block, scales = part, self._scales(p)
            if indices is not None:
                block, scales = part[indices], None if scales is None else scales[indices]
            out = torch.empty(block.shape[0], self._length, dtype=dtype if dtype in FLOATS.values() else torch.float32)
            parts.append(packing.unpack_rows(block, scales, out, d=self._length).to(dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def row_norms(self) -> list[Tensor]:
        """L2 norm of every row, a tensor (n,) of float32 a part. Dequantises a block at a time."""
        norms, step = [], max(1, float32_gemm.BLOCK_VALUES // self._length)
        for p, part in enumerate(self.packed):
            scales, part_norms = self._scales(p), []
            for at in range(0, part.shape[0], step):
                block = part[at : at + step]
                out = torch.empty(block.shape[0], self._length)
                packing.unpack_rows(block, None if scales is None else scales[at : at + step], out, d=self._length)
                part_norms.append(torch.linalg.vector_norm(out, dim=1))
            norms.append(torch.cat(part_norms))
        return norms

    def reset(self) -> None:
        """Forget what was derived from the bias and the scales, after they have changed."""
        self._matrices = None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        kind = ", neuron-major" if self.transposed else ""
        return f"{self.in_features}, {self.out_features}, {self.format}, bias={self.bias is not None}{kind}"

    def _scales(self, part: int) -> Tensor | None:
        return None if self.scales is None else self.scales[part]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """`model.to(dtype)` is for the bias: packed rows and their scales stay what and where they are."""
        if (device := fn(torch.empty(0)).device).type != "cpu":
            raise ValueError(f"{self.format} weights are for the CPU and cannot go to {device}; load without weights=")
        self._matrices = None
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._matrices = None  # they hold copies of biases and scales
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": None}  # addresses are of this process


def prompt_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of `dtype` multiplies prompts."""
    converted = any(isinstance(module, float32_gemm.Float32GemmLinear | QuantisedLinear) for module in model.modules())
    return float32_gemm.product_dtype(dtype) if converted else dtype
