"""From a tensor's bytes to codes and scales, and to float32: every type that `griffin.gguf.types` reads.

A quantised value is scale * code + offset, where scale and offset belong to a group of neighbouring values. The
layouts of the blocks are ggml's (ggml-common.h); what follows from them is written here in numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from griffin.gguf import types
from griffin.gguf.types import TensorType

_STEP = 1 << 17  # values that are dequantised at once: what they need fits a core's cache

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Groups:
    """Some quantised blocks, taken apart. A value is `scales * codes + offsets`, in float32 and in this order.

    Shapes:
        codes: (blocks, groups, values), uint8 or int8. scales, offsets: (blocks, groups, 1), float32.
    """

    codes: npt.NDArray[Any]
    scales: Floats
    offsets: Floats | None = None


def dequantise(data: Bytes, kind: TensorType, out: Floats | None = None) -> Floats:
    """The values of whole blocks.

    Args:
        data: the blocks' bytes, contiguous, of any shape.
        kind: their type.
        out: where to put the values, contiguous; `None`: in new memory.

    Shapes:
        Returns (values,), float32.

    Raises:
        ValueError: the bytes are no whole number of blocks.
    """
    if data.size % kind.bytes:
        raise ValueError(f"{data.size} bytes are no whole number of {kind.name} blocks of {kind.bytes} bytes")
    blocks = data.reshape(-1, kind.bytes)
    values = np.empty(len(blocks) * kind.block, np.float32) if out is None else out.reshape(-1)
    step = _STEP // kind.block
    for start in range(0, len(blocks), step):
        part = values[start * kind.block : (start + step) * kind.block]
        if kind.block == 1:
            part[:] = _plain(blocks[start : start + step].reshape(-1), kind)
            continue
        groups = unpack(blocks[start : start + step], kind)
        part = part.reshape(groups.codes.shape)
        part[:] = groups.codes
        part *= groups.scales
        if groups.offsets is not None:
            part += groups.offsets
    return values


def unpack(blocks: Bytes, kind: TensorType) -> Groups:
    """Codes, scales and offsets of quantised blocks.

    Shapes:
        blocks: (blocks, kind.bytes).

    Raises:
        ValueError: the type holds plain numbers.
    """
    if kind.number not in _UNPACK:
        raise ValueError(f"{kind.name} has no blocks; expected a quantised type")
    return _UNPACK[kind.number](blocks)


def _plain(data: Bytes, kind: TensorType) -> npt.NDArray[Any]:
    if kind is types.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f4" if kind is types.F32 else "<f2")


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte of every block: (blocks, 1, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)[:, :, None]


def _nibbles(packed: Bytes, width: int) -> Bytes:
    """Four bits a code: of every `width` bytes the low halves, then the high halves. (blocks, bytes) -> (..., width)"""
    packed = packed.reshape(len(packed), -1, 1, width)
    codes = np.empty((*packed.shape[:2], 2, width), np.uint8)
    np.bitwise_and(packed[:, :, 0], 15, out=codes[:, :, 0])
    np.right_shift(packed[:, :, 0], 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1, width)


def _crumbs(packed: Bytes, width: int) -> Bytes:
    """Two bits a code: of every `width` bytes the lowest pairs, then the next ones. (blocks, bytes) -> (..., width)"""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8(3)).reshape(len(packed), -1, width)


def _bits(packed: Bytes, width: int) -> Bytes:
    """A bit a code: of every `width` bytes the lowest bits, then the next ones. (blocks, bytes) -> (..., width)"""
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    return (packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8(1)).reshape(len(packed), -1, width)


def _fifth(blocks: Bytes, at: int) -> Bytes:
    """The fifth bits of 32 codes, in the order of the codes: (blocks, 1, 32)."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")[:, None]


def _q4_0(blocks: Bytes) -> Groups:
    codes = _nibbles(blocks[:, 2:], 16).reshape(-1, 1, 32).view(np.int8)
    return Groups(codes - np.int8(8), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 4:], 16).reshape(-1, 1, 32), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Groups:
    codes = _nibbles(blocks[:, 6:], 16).reshape(-1, 1, 32) | _fifth(blocks, 2) << 4
    return Groups(codes.view(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Groups:
    codes = _nibbles(blocks[:, 8:], 16).reshape(-1, 1, 32) | _fifth(blocks, 4) << 4
    return Groups(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Groups:
    return Groups(blocks[:, 2:].view(np.int8)[:, None], _half(blocks, 0))


def _q2_k(blocks: Bytes) -> Groups:
    packed = blocks[:, :16, None]
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    offsets = _half(blocks, 82) * -(packed >> 4).astype(np.float32)
    return Groups(_crumbs(blocks[:, 16:80], 32).reshape(-1, 16, 16), scales, offsets)


def _q3_k(blocks: Bytes) -> Groups:
    low = _nibbles(blocks[:, 96:104], 8).reshape(-1, 16)
    high = _crumbs(blocks[:, 104:108], 4).reshape(-1, 16)
    six = (low | high << 4).view(np.int8) - np.int8(32)
    # the code is three bits with the highest one inverted, less four
    third = _bits(blocks[:, :32], 32)
    codes = (_crumbs(blocks[:, 32:96], 32) | third << 2).view(np.int8) - np.int8(4)
    return Groups(codes.reshape(-1, 16, 16), _half(blocks, 108) * six[:, :, None].astype(np.float32))


def _scales_and_offsets(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of Q4_K and Q5_K: eight groups' scales and offsets of six bits each, packed into 12 bytes.

    Bytes 0 to 3 hold the scales of groups 0 to 3 in their low six bits, bytes 4 to 7 the offsets. Bytes 8 to 11 hold
    the low four bits of scale and offset of groups 4 to 7, whose high two bits are the free ones of the bytes before.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)[:, :, None].astype(np.float32)
    offsets = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)[:, :, None].astype(np.float32)
    return _half(blocks, 0) * scales, _half(blocks, 2) * -offsets


def _q4_k(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 16:], 32), *_scales_and_offsets(blocks))


def _q5_k(blocks: Bytes) -> Groups:
    codes = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32) << 4
    return Groups(codes, *_scales_and_offsets(blocks))


def _q6_k(blocks: Bytes) -> Groups:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 8, 32)
    codes = (low | _crumbs(blocks[:, 128:192], 32) << 4).view(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8)[:, :, None].astype(np.float32)
    return Groups(codes.reshape(-1, 16, 16), _half(blocks, 208) * scales)


_UNPACK: dict[int, Callable[[Bytes], Groups]] = {
    types.Q4_0.number: _q4_0,
    types.Q4_1.number: _q4_1,
    types.Q5_0.number: _q5_0,
    types.Q5_1.number: _q5_1,
    types.Q8_0.number: _q8_0,
    types.Q2_K.number: _q2_k,
    types.Q3_K.number: _q3_k,
    types.Q4_K.number: _q4_k,
    types.Q5_K.number: _q5_k,
    types.Q6_K.number: _q6_k,
}
