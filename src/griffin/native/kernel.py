"""What the native library computes: thin, checked calls over torch tensors, handed over as addresses and strides.

Words: D model width, D_ff feedforward width, B rows of input (1 to 16), k experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from griffin.native import abi, library, operands
from griffin.native.grouped import ROW_TYPES

MAX_ROWS = 16
ANY_ROWS = 2**31 - 1


def _io(x: Tensor, d_in: int, d_out: int, out: Tensor | None, most: int = MAX_ROWS) -> tuple[abi.IoStruct, Tensor]:
    if x.dim() != 2 or x.shape[1] != d_in or not 1 <= x.shape[0] <= most or x.dtype not in ROW_TYPES:
        raise ValueError(f"x: {tuple(x.shape)} {x.dtype}, expected (1..{most}, {d_in}) float32 or bfloat16")
    if x.stride(1) != 1 and d_in > 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(x.shape[0], d_out, dtype=x.dtype)
    elif out.shape != (x.shape[0], d_out) or out.dtype not in ROW_TYPES or (d_out > 1 and out.stride(1) != 1):
        raise ValueError(f"out: {tuple(out.shape)} {out.dtype}, expected ({x.shape[0]}, {d_out}), rows contiguous")
    if x.device.type != "cpu" or out.device.type != "cpu":
        raise ValueError(f"x on {x.device}, out on {out.device}: expected both on cpu")
    io = abi.IoStruct(
        x.data_ptr(), out.data_ptr(), x.stride(0) * x.element_size(), out.stride(0) * out.element_size(),
        ROW_TYPES[x.dtype], ROW_TYPES[out.dtype], x.shape[0], 8, None, 0, None, None, None,
    )  # fmt: skip
    io.keep = x  # a copy made above lives as long as its address
    return io, out


def ff(
    block: operands.Block,
    x: Tensor,
    experts: Tensor | None = None,
    row_mask: Tensor | None = None,
    *,
    dynamic: operands.Dynamic | None = None,
    compact: operands.Compact | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """y = W_2[:, E] (act(W_g[E] x + b_g) * (W_1[E] x + b_1)) + b_2; ungated: W_2[:, E] act(W_1[E] x + b_1) + b_2.

    Shapes:
        x: (B, D) float32 or bfloat16, 1 <= B <= 16
        experts: (k,) int32 or int64, contiguous, each in 0..D_ff-1 (not checked here: selection made them), shared by
            all rows; None: all neurons. With row_mask: the union of the rows' sets, both from `union`
        row_mask: (k,) uint16, bit r of entry i: row r wants expert i
        out: (B, D) float32 or bfloat16, must not overlap x; default a new tensor of x's dtype
        returns out

    `dynamic`: dynamic neuron selection; each row is computed with the best of the experts only.

    `compact`: copies of these experts, which are read in place of the block's rows.

    `threads` defaults to torch.get_num_threads(). Raises ValueError for other shapes, dtypes or devices.
    """
    io, out = _io(x, block.d_model, block.d_model, out)
    if experts is not None:
        if experts.dim() != 1 or experts.dtype not in (torch.int32, torch.int64) or not experts.is_contiguous():
            raise ValueError(
                f"experts: {tuple(experts.shape)} {experts.dtype}, expected (k,) int32 or int64, contiguous"
            )
        io.index_bytes, io.n_experts = experts.element_size(), experts.shape[0]
        io.experts = experts.data_ptr() or block.struct.up.weight  # an empty tensor has no address, and NULL means all
    if row_mask is not None:
        if experts is None or row_mask.shape != experts.shape or row_mask.dtype != torch.uint16:
            raise ValueError(
                f"row_mask: {tuple(row_mask.shape)} {row_mask.dtype}, expected uint16, one for each expert"
            )
        io.row_mask = row_mask.data_ptr()
    if dynamic is not None:
        weights = dynamic.kept[0]
        if len(weights) not in (1, x.shape[0]):
            raise ValueError(f"dynamic: weights of {len(weights)} rows, but x has {x.shape[0]}")
        io.dynamic = ctypes.addressof(dynamic.struct)
    if compact is not None:
        io.compact = ctypes.addressof(compact.struct)
    library.check(
        library.loaded().griffin_ff(
            ctypes.addressof(block.struct), ctypes.addressof(io), threads or torch.get_num_threads()
        )
    )
    return out


def matvec(matrix: operands.Matrix, x: Tensor, *, out: Tensor | None = None, threads: int | None = None) -> Tensor:
    """y = W x + bias for every row of x.

    Shapes:
        x: (B, in) float32 or bfloat16, 1 <= B <= 16; weights in groups: any B
        out: (B, out) float32 or bfloat16; default a new tensor of x's dtype
    """
    most = ANY_ROWS if matrix.struct.format == abi.GROUPED else MAX_ROWS
    io, out = _io(x, matrix.d_in, matrix.d_out, out, most)
    address = ctypes.addressof(matrix.struct)
    library.check(library.loaded().griffin_matvec(address, ctypes.addressof(io), threads or torch.get_num_threads()))
    return out


def decode(
    decoder: ctypes.Structure,
    cache: ctypes.Structure,
    experts: Any,
    tokens: Tensor,
    logits: Tensor,
    *,
    threads: int | None = None,
) -> None:
    """One generation step of a whole decoder (`native/include/griffin_decode.h`); fills `logits`.

    Shapes:
        tokens: (B,) int64; logits: (B, V) float32, contiguous; 1 <= B <= 16
    """
    library.check(
        library.loaded().griffin_decode(
            ctypes.addressof(decoder), ctypes.addressof(cache), ctypes.addressof(experts), tokens.data_ptr(),
            tokens.shape[0], logits.data_ptr(), threads or torch.get_num_threads(),
        )
    )  # fmt: skip


def union(experts: Tensor | Sequence[Tensor], d_ff: int) -> tuple[Tensor, Tensor]:
    """One expert set a row, as `ff` wants them: their union, ascending, and who wants which.

    Shapes:
        experts: (B, k) int32 or int64, 1 <= B <= 16; or B sets (k,), each of its own k >= 1
        returns: (n,) int32, (n,) uint16 with bit r of entry i set if row r has expert i

    Raises ValueError for an expert outside 0..d_ff-1.
    """
    if not isinstance(experts, Tensor):  # a smaller set names its last expert again, which changes no union
        most = max(row_experts.shape[0] for row_experts in experts)
        experts = torch.stack(
            [torch.cat([row_experts, row_experts[-1:].expand(most - row_experts.shape[0])]) for row_experts in experts]
        )
    if experts.dim() != 2 or experts.dtype not in (torch.int32, torch.int64) or not 1 <= experts.shape[0] <= MAX_ROWS:
        raise ValueError(f"experts: {tuple(experts.shape)} {experts.dtype}, expected (1..{MAX_ROWS}, k) int32 or int64")
    experts = experts.contiguous()
    rows, k = experts.shape
    room = max(1, min(rows * k, d_ff))
    indices, mask = torch.empty(room, dtype=torch.int32), torch.empty(room, dtype=torch.uint16)
    if k == 0:
        return indices[:0], mask[:0]
    n = int(
        library.loaded().griffin_union(
            experts.data_ptr(), experts.element_size(), rows, k, d_ff, indices.data_ptr(), mask.data_ptr()
        )
    )
    library.check(max(0, -n))
    return indices[:n], mask[:n]
