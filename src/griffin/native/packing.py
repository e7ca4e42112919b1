"""Rows of int8 or int4 weights: float weights into them and back. Formats as in `native/include/griffin_native.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.native import abi, library

GROUP = 32
"""Weights that share an int4 scale, and inputs that share a scale where int8 or int4 weights meet them."""


def row_bytes(format: str, d: int) -> int:
    """Bytes of a row of d int8 or int4 weights, int8's scale not included."""
    if format not in ("int8", "int4"):
        raise ValueError(f"format {format!r}: expected 'int8' or 'int4'")
    return int(library.loaded().griffin_row_bytes(abi.FORMATS.index(format), d))


def pack(format: str, source: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Quantise float weights into rows, and for int8 their scales.

    Shapes:
        source: (n, d), any float dtype; rows: (n or more, bytes of a row or more) uint8, rows contiguous
        scale: int8: (n or more,) or (n or more, 1 or more) float32, of which the first column is filled; int4: None
    """
    n, d = source.shape
    for begin in range(0, n, 1024):  # float32 of a slice at a time
        part = source[begin : begin + 1024].detach().to(device="cpu", dtype=torch.float32).contiguous()
        out, s = rows[begin:], scale[begin:] if scale is not None else None
        library.check(
            library.loaded().griffin_pack(
                abi.FORMATS.index(format), part.data_ptr(), len(part), d, d, out.data_ptr(), rows.stride(0),
                library.address(s), 4 * s.stride(0) if s is not None else 0,
            )
        )  # fmt: skip


def unpack_rows(
    rows: Tensor, scale: Tensor | None, out: Tensor, *, d: int, begin: int = 0, threads: int | None = None
) -> Tensor:
    """Columns begin, begin + 1, ... of quantised rows, as many as `out` has, dequantised into it.

    Shapes:
        rows: (n, bytes of a row of d weights) uint8, rows contiguous; scale: int8: (n,) float32; None says int4
        out: (n, columns) float32 or bfloat16, rows contiguous; begin is a multiple of 128
    """
    n, format = rows.shape[0], "int4" if scale is None else "int8"
    check_rows("rows", rows, torch.Size((n, row_bytes(format, d))), torch.uint8)
    if (
        out.dtype not in abi.ROW_TYPES
        or out.dim() != 2
        or out.shape[0] != n
        or (out.shape[1] > 1 and out.stride(1) != 1)
    ):
        raise ValueError(f"out: {tuple(out.shape)} {out.dtype}, expected ({n}, columns) float32 or bfloat16")
    if scale is not None and (scale.shape != (n,) or scale.dtype != torch.float32):
        raise ValueError(f"scale: {tuple(scale.shape)} {scale.dtype}, expected ({n},) float32")
    if out.numel() == 0:
        return out
    scale_stride = 0 if scale is None else 4 * scale.stride(0)
    library.check(
        library.loaded().griffin_unpack_block(
            abi.FORMATS.index(format), rows.data_ptr(), n, d, rows.stride(0), library.address(scale), scale_stride,
            begin, begin + out.shape[1], out.data_ptr(), abi.ROW_TYPES[out.dtype], out.stride(0),
            threads or torch.get_num_threads(),
        )
    )  # fmt: skip
    return out


def check_rows(name: str, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raises ValueError for a tensor that the library cannot read in place: another shape, dtype, device, gaps."""
    if weight.shape != shape or weight.dtype != dtype or weight.device.type != "cpu" or weight.dim() != 2:
        raise ValueError(
            f"{name}: {tuple(weight.shape)} {weight.dtype} on {weight.device}, expected {tuple(shape)} {dtype}"
        )
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"{name}: strides {weight.stride()}, expected contiguous rows")
