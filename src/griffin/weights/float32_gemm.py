"""Prompts at the speed of float32 where the CPU multiplies 16-bit matrices slowly; the weights stay in 16 bits.

Generation reads every weight for one token, so 16 bits are half the bytes and twice the speed. A prompt multiplies
matrices, and a CPU without instructions for 16-bit ones does so in float32 many times faster than torch does in
bfloat16 (`fast`). So a prompt's product is made in float32, over blocks of the weight that are widened into one small
buffer, and is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.native import kernel, library, operands

BLOCK_VALUES = 2**22
"""Weights in a block: 8 MB of bfloat16 or 16 MB of float32, which the last cache holds. Smaller blocks (an L2's)
were slower, as every block is two parallel regions: 512 rows of 2048 took 26% more time than one plain GEMM, 2048 rows
5%."""
_OUTPUTS = 128
"""A block begins at a multiple of this: that is where packed rows can be entered."""
_NARROW = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def fast(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a dtype on this CPU at least as fast as in float32.

    It does for bfloat16 and float16 if oneDNN has instructions for them; its fallback was measured on Zen 3 (AVX2), in
    GFLOPS: float32 120, bfloat16 16, float16 11 to 22, both about 2 where the weight is neuron-major.
    """
    if dtype not in _NARROW:
        return True
    supported = getattr(torch.ops.mkldnn, _NARROW[dtype], None)  # a torch without oneDNN has neither
    return supported is not None and bool(supported())


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a prompt of this dtype is multiplied on this CPU."""
    return dtype if fast(dtype) else torch.float32


def multiply(
    x: Tensor,
    read: Callable[[int, Tensor], object],
    out: Tensor,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """`out = x W^T + bias`, rounded once to the dtype of `out`, over a weight that never exists whole.

    Args:
        x: in the dtype to multiply in.
        read: `read(begin, block)` fills `block` with what belongs to the outputs begin, begin + 1, ... of W, as many
            as it holds.
        transposed: blocks are columns of W^T instead of rows of W: for a weight that is stored neuron-major.

    Shapes:
        x: (S, in). out: (S, outputs), rows contiguous. bias: (outputs,), any dtype.
        block: (n, in), or (in, n) if `transposed`; contiguous.
    """
    d_in, d_out = x.shape[1], out.shape[1]
    step = max(_OUTPUTS, BLOCK_VALUES // d_in // _OUTPUTS * _OUTPUTS)
    buffer = x.new_empty(min(step, d_out) * d_in)
    bias = None if bias is None else bias.to(x.dtype)
    for begin in range(0, d_out, step):
        target = out[:, begin : begin + step]
        n = target.shape[1]
        block = buffer[: n * d_in].view((d_in, n) if transposed else (n, d_in))
        read(begin, block)
        weight = block if transposed else block.t()
        result = target if out.dtype == x.dtype else x.new_empty(target.shape)
        if bias is None:
            torch.mm(x, weight, out=result)
        else:
            torch.addmm(bias[begin : begin + n], x, weight, out=result)
        if result is not target:
            target.copy_(result)


class Float32GemmLinear(nn.Linear):
    """A Linear with a 16-bit weight that multiplies prompts in float32. Made in place by `use_float32_gemm`.

    Three cases: (1) more than `kernel.MAX_ROWS` rows, or a neuron-major weight: float32 GEMM in blocks, rounded once;
    (2) otherwise the native matrix-vector product, or torch without the library; (3) after `model.to` another dtype or
    device: plain `nn.Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in_features); returns (..., out_features), of the same dtype."""
        weight, count = self.weight, x.shape[:-1].numel()
        if weight.dtype not in _NARROW or x.dtype != weight.dtype or weight.device.type != "cpu":
            return super().forward(x)
        recorded = torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        )
        if count > kernel.MAX_ROWS or (count > 0 and _transposed(weight)):
            return self._in_one(x) if recorded else self._in_blocks(x)
        if recorded or count == 0 or library.why_not() is not None:
            return super().forward(x)
        return self._few(x)

    def _in_one(self, x: Tensor) -> Tensor:
        """By operators that autograd and `torch.compile` can follow; the whole weight is float32 for a moment."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)

    @torch.no_grad()
    def _in_blocks(self, x: Tensor) -> Tensor:
        weight, transposed = self.weight, _transposed(self.weight)

        def read(begin: int, block: Tensor) -> None:
            if transposed:
                block.copy_(weight.t()[:, begin : begin + block.shape[1]])
            else:
                block.copy_(weight[begin : begin + block.shape[0]])

        flat = x.reshape(-1, self.in_features).float()
        out = x.new_empty(flat.shape[0], self.out_features)
        multiply(flat, read, out, bias=self.bias, transposed=transposed)
        return out.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def _few(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if flat.dtype is torch.float16:  # which the library's inputs are not
            flat = flat.float()
        out = torch.empty(flat.shape[0], self.out_features)
        kernel.matvec(operands.matrix(self.weight.detach(), self.bias), flat, out=out)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _transposed(weight: Tensor) -> bool:
    return weight.stride(1) != 1 and weight.shape[1] > 1


def use_float32_gemm(model: nn.Module) -> int:
    """Turn a model's 16-bit Linears into `Float32GemmLinear`s, in place, where the CPU is slow with their dtype.

    The modules and their parameters stay what they are, only the class of the modules changes. Subclasses of Linear,
    such as adapters, are left alone.

    Returns:
        How many were made.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and not fast(module.weight.dtype)
    ]
    for module in linears:
        module.__class__ = Float32GemmLinear
    return len(linears)
