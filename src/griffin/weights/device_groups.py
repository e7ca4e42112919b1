"""Weights in groups as the Triton kernels read them: the same codes, scales and offsets as `griffin.native.grouped`.

Nothing is rounded: `weight = s * (code - zero) - m`, where a group's s and m are made of what the format stores. A row
has a byte a code (8, 6 and 5 bits), or two codes a byte (4, 3 and 2 bits): the low half of byte i is column i, the high
half column i + half a row. Rows are padded so that a half row has whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin.native.grouped import Format, Packed, empty
from griffin.native.packing import SLACK

_SUPER = 256  # weights that share a scale which the groups' bytes multiply
_BLOCK = 4096  # rows that are converted at a time: whole blocks


@dataclass(frozen=True, eq=False)
class DeviceGroups:
    """A matrix in groups, a row a neuron; `n` groups and `p` spans (of weights that share `scale`) along the input.

    Args:
        bits: 4 or 8: of a stored code.
        padded: columns, padding included.

    Shapes, of rows along the input (gate, up):
        codes: (neurons, padded * bits / 8) uint8
        scale: (neurons, p) float16 or float32; offset: (neurons, p) float16 or uint8, or None
        sub, sub_offset: (neurons, n) uint8 or int8, or None
    of neuron-major rows (down), whose groups run over neurons: codes (neurons, padded * bits / 8), scale and offset
    (p, padded), sub and sub_offset (n, padded).
    """

    format: Format
    bits: int
    padded: int
    neuron_major: bool
    codes: Tensor
    scale: Tensor
    sub: Tensor | None
    offset: Tensor | None
    sub_offset: Tensor | None

    @property
    def span(self) -> int:
        """Weights that share a scale."""
        return _SUPER if self.format.supers else self.format.span

    @property
    def zero(self) -> int:
        """What is subtracted from a code."""
        return self.format.zero if self.format.offset == "none" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.sub, self.offset, self.sub_offset) if t is not None)

    def numbers(self) -> Tensor:
        """The weights as float32, (neurons, padded): what the format says, for tests."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=1)
        neurons, axis = codes.shape[0], 0 if self.neuron_major else 1

        def spread(values: Tensor, weights: int) -> Tensor:
            return values.float().repeat_interleave(weights, dim=axis)[:neurons, : self.padded]

        s = spread(self.scale, self.span)
        if self.sub is not None:
            s = s * spread(self.sub, self.format.group)
        numbers = s * (codes.float() - self.zero)
        if self.format.offset == "f16":
            assert self.offset is not None
            return numbers + spread(self.offset, self.span)
        if self.format.offset == "code":
            assert self.offset is not None
            return s * (codes.float() - spread(self.offset, self.span))
        if self.format.offset == "sub":
            assert self.offset is not None
            assert self.sub_offset is not None
            return numbers - spread(self.offset, self.span) * spread(self.sub_offset, self.format.group)
        return numbers


def why_not_device(packed: Packed) -> str | None:
    """Why a matrix has no such form; `None` if it has one."""
    return "its codes are places in a table" if packed.format.table else None


def device_groups(packed: Packed, device: torch.device) -> DeviceGroups:
    """Codes, scales and offsets of a matrix, moved into this form.

    Raises:
        ValueError: a format with a table (NF4, FP8).
    """
    if (reason := why_not_device(packed)) is not None:
        raise ValueError(f"{packed.format.name} weights have no form for a GPU: {reason}")
    neurons, columns = (packed.d_in, packed.d_out) if packed.neuron_major else (packed.d_out, packed.d_in)
    unit = 2 * packed.format.group
    padded = -(-columns // unit) * unit
    stored = _neuron_major_scales(packed) if packed.neuron_major else _row_scales(packed)
    scale, offset, sub, sub_offset = (
        None if each is None else _wide(each, wanted).to(device)
        for each, wanted in zip(stored, _widths(packed, padded), strict=True)
    )
    assert scale is not None
    bits = 4 if packed.format.bits <= 4 else 8
    codes = torch.empty(neurons, padded * bits // 8, dtype=torch.uint8, device=device)
    for begin in range(0, neurons, _BLOCK):
        part = _wide(_codes(packed, begin, min(begin + _BLOCK, neurons)), padded)
        if bits == 4:
            part = part[:, : padded // 2] | part[:, padded // 2 :] << 4
        codes[begin : begin + len(part)] = part.to(device)
    return DeviceGroups(packed.format, bits, padded, packed.neuron_major, codes, scale, sub, offset, sub_offset)


def _widths(packed: Packed, padded: int) -> tuple[int, int, int, int]:
    """Columns of scale, offset, sub and sub_offset for rows of so many columns."""
    if packed.neuron_major:
        return (padded,) * 4
    span = _SUPER if packed.format.supers else packed.format.span
    spans, groups = -(-padded // span), padded // packed.format.group
    return spans, spans, groups, groups


def _wide(values: Tensor, columns: int) -> Tensor:
    """Cut or padded with zeros to so many columns."""
    if values.shape[1] >= columns:
        return values[:, :columns].contiguous()
    return torch.nn.functional.pad(values, (0, columns - values.shape[1]))


_Stored = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
_BYTES = {"f32": 4, "f16": 2, "code": 1}


def _row_scales(packed: Packed) -> _Stored:
    """Scales and offsets at the start of the rows (`row_plan` in native/src/grouped.cpp)."""
    format, at = packed.format, 0
    scales = packed.part(0)[:, :, : packed.codes_at].flatten(0, 1)[: packed.d_out]

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal at
        part = scales[:, at : at + count * dtype.itemsize].contiguous().view(dtype)
        at += count * dtype.itemsize
        return part

    n = format.padded(packed.d_in)
    spans, groups = -(-n // (_SUPER if format.supers else format.span)), n // format.group
    scale = take(spans, torch.float32 if format.scale == "f32" else torch.float16)
    offset = None
    if format.offset != "none":
        offset = take(spans, torch.uint8 if format.offset == "code" else torch.float16)
    sub = take(groups, _sub_dtype(format)) if format.supers else None
    sub_offset = take(groups, torch.uint8) if format.offset == "sub" else None
    return scale, offset, sub, sub_offset


def _neuron_major_scales(packed: Packed) -> _Stored:
    """Scales and offsets of groups of neurons (`neuron_plan` in native/src/grouped.cpp)."""
    assert packed.scales is not None
    format, flat = packed.format, packed.scales
    d = -(-packed.d_out // 64) * 64
    spans = -(-packed.d_in // (_SUPER if format.supers else format.span))
    groups = -(-packed.d_in // format.group)
    scale_bytes = _BYTES["f32" if format.scale == "f32" else "f16"] * d
    offset_bytes = 0
    if format.offset != "none":
        offset_bytes = _BYTES["code" if format.offset == "code" else "f16"] * d
    of_spans = flat[: spans * (scale_bytes + offset_bytes)].view(spans, -1)
    scale = of_spans[:, :scale_bytes].contiguous().view(torch.float32 if format.scale == "f32" else torch.float16)
    offset = sub = sub_offset = None
    if offset_bytes:
        offset = of_spans[:, scale_bytes:].contiguous()
        offset = offset if format.offset == "code" else offset.view(torch.float16)
    if format.supers:
        of_groups = flat[of_spans.numel() :][: groups * d * (2 if format.offset == "sub" else 1)].view(groups, -1)
        sub = of_groups[:, :d].contiguous().view(_sub_dtype(format))
        sub_offset = of_groups[:, d:].contiguous() if format.offset == "sub" else None
    return scale, offset, sub, sub_offset


def _sub_dtype(format: Format) -> torch.dtype:
    return torch.int8 if format.scale == "sub signed" else torch.uint8


def _codes(packed: Packed, first: int, last: int) -> Tensor:
    """Codes of rows, (rows, columns) uint8: the library unpacks them where every scale is 1 and every offset 0."""
    plain, count = replace(packed.format, scale="f16", offset="none", zero=0, span=packed.format.group), last - first
    blocks = slice(first // packed.part(0).shape[1], -(-last // packed.part(0).shape[1]))
    if packed.neuron_major:
        d = -(-packed.d_out // 64) * 64
        ones = torch.ones(-(-count // plain.group), d, dtype=torch.float16)
        scales = torch.zeros(ones.nbytes + SLACK, dtype=torch.uint8)[: ones.nbytes]
        scales[:] = ones.view(torch.uint8).view(-1)
        return Packed(plain, packed.d_out, count, _with_slack(packed.rows[blocks]), scales).unpack().to(torch.uint8)
    moved, n = empty(plain, count, packed.d_in), plain.padded(packed.d_in)
    ones = torch.ones(n // plain.group, dtype=torch.float16).view(torch.uint8)
    moved.part(0)[:, :, : len(ones)] = ones
    moved.part(0)[:, :, moved.codes_at :][:, :, : n // 4] = packed.part(0)[blocks, :, packed.codes_at :][:, :, : n // 4]
    for plane in range(1, len(plain.planes)):
        moved.part(plane)[:] = packed.part(plane)[blocks]
    return moved.unpack().to(torch.uint8)


def _with_slack(rows: Tensor) -> Tensor:
    """A copy of rows that may be read beyond the last."""
    flat = torch.zeros(rows.numel() + SLACK, dtype=torch.uint8)
    flat[: rows.numel()] = rows.reshape(-1)
    return flat[: rows.numel()].view(rows.shape)
