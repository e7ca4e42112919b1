"""Weights in groups: codes of 2 to 8 bits, and for every group of 16 or 32 weights a scale s and an offset m.

`weight = s * code - m`, or `s * table[code]` (NF4, FP8). One description serves the block types of GGUF files, GPTQ,
AWQ, compressed-tensors, bitsandbytes, and the formats that float weights are quantised to: codes, scales and offsets
are moved into the library's layout (`native/src/grouped.h`) as they are, never rounded. Adding one is a `Format`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from griffin.native import abi, library
from griffin.native.packing import GGUF_TYPES, SLACK, PackedTensor, huge_pages, parts_of

_COLUMNS = 256  # a column range of neuron-major weights begins at a multiple of this
GROUP = 32
"""Weights of a group, and inputs that share a scale where they meet them, in the formats made here."""


@dataclass(frozen=True)
class Format:
    """A format of weights in groups.

    Args:
        name: as messages and tables show it.
        bits: of a code: 2, 3, 4, 5, 6 or 8.
        group: weights of a group along the input: 16 or 32.
        scale: where a group's scale comes from: "sub unsigned" or "sub signed" (a float16 for 256 weights times a byte
            of the group's own), or "f16" or "f32" for `span` weights.
        offset: where its offset comes from: "none" (`s * zero`), "sub" (a float16 for 256 weights times an unsigned
            byte of the group's own), "f16" (minus a float16) or "code" (s times an unsigned byte), for `span` weights.
        zero: with offset "none": the code that means 0.
        span: weights that share a scale of their own, a power of two from the group's to 256.
        table: the 2^bits numbers that the codes stand for, or none; with scales of their own and offset "none".
    """

    name: str
    bits: int
    group: int
    scale: str
    offset: str
    zero: int
    span: int
    table: tuple[float, ...] = ()

    @cached_property
    def struct(self) -> abi.GroupedStruct:
        """As the library takes it."""
        scale, offset = abi.SCALES.index(self.scale), abi.OFFSETS.index(self.offset)
        return abi.GroupedStruct(self.bits, self.group, scale, offset, self.zero, self.span)

    @cached_property
    def numbers(self) -> Tensor | None:
        """The table as the library takes it: (2^bits,) float32."""
        return torch.tensor(self.table, dtype=torch.float32) if self.table else None

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of the planes that codes are stored in, the highest first: 2 each, and an odd bit the last."""
        return (2,) * (self.bits // 2) + (1,) * (self.bits % 2)

    @property
    def supers(self) -> bool:
        """Whether 256 weights share a scale that the groups' bytes multiply."""
        return self.scale.startswith("sub")

    def padded(self, d_in: int) -> int:
        """d_in, rounded up to whole groups."""
        return -(-d_in // self.group) * self.group


ROW_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of inputs and outputs, and the interface's numbers."""
INT8 = Format("int8", 8, GROUP, "f16", "none", 128, GROUP)
INT4 = Format("int4", 4, GROUP, "sub unsigned", "sub", 0, 256)
MADE = {"int8": INT8, "int4": INT4}
"""What float weights can be quantised to."""


@cache
def gguf_format(name: str) -> tuple[Format, int, int]:
    """The format of a GGUF block type, and its weights and bytes a block. Raises KeyError for another type."""
    struct, weights, size = abi.GroupedStruct(), ctypes.c_int32(), ctypes.c_int32()
    library.check(
        library.loaded().griffin_gguf_format(
            GGUF_TYPES[name], ctypes.addressof(struct), ctypes.addressof(weights), ctypes.addressof(size)
        )
    )
    scale, offset = abi.SCALES[struct.scale], abi.OFFSETS[struct.offset]
    return Format(name, struct.bits, struct.group, scale, offset, struct.zero, struct.span), weights.value, size.value


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix W (out, in) in a format, as the library reads it.

    Shapes:
        rows: (blocks, bytes of a block) uint8: blocks of 32 rows of W, neuron-major of its columns, part after part;
            `SLACK` readable bytes follow
        scales: neuron-major: (bytes,) uint8, scales and offsets of all groups; else None (they are in the rows)
    """

    format: Format
    d_out: int
    d_in: int
    rows: Tensor
    scales: Tensor | None

    @staticmethod
    def of(tensor: PackedTensor) -> Packed:
        """A matrix of a GGUF file, in the same memory."""
        scales = None if tensor.scales is None else torch.from_numpy(tensor.scales)
        return Packed(gguf_format(tensor.type)[0], tensor.d_out, tensor.d_in, torch.from_numpy(tensor.rows), scales)

    @property
    def neuron_major(self) -> bool:
        """Whether a row has what one input writes, a column of W."""
        return self.scales is not None

    @property
    def nbytes(self) -> int:
        """Bytes of rows and scales."""
        return self.rows.numel() + (0 if self.scales is None else self.scales.numel())

    def row_bytes(self, planes: int | None = None) -> int:
        """Bytes of a row that is read to its first planes; None: all. Neuron-major: without scales."""
        count = self._layout.planes
        return int(self._layout.begin[count if planes is None else min(planes, count)])

    @cached_property
    def _layout(self) -> abi.PartsStruct:
        return parts_of(library.loaded(), self.struct())[0]

    @property
    def codes_at(self) -> int:
        """Bytes of a row's first part before the codes: its scales and offsets."""
        return int(self._layout.codes)

    def part(self, plane: int) -> Tensor:
        """The rows' parts with a plane, of the padding rows of the last block too: (blocks, 32, bytes), a view."""
        block, begin = self._layout.block, self._layout.begin
        own = self.rows[:, block * begin[plane] : block * begin[plane + 1]]
        return own.view(len(own), block, -1)

    def reduced(self, planes: int) -> Reduced:
        """The matrix as its first planes say it, in copies of it.

        Raises:
            ValueError: the codes stand for numbers of a table.
        """
        if self.format.table:
            raise ValueError(
                f"{self.format.name} codes stand for numbers of a table, so their high bits alone say little"
            )
        low, high = (empty(self.format, self.d_out, self.d_in, neuron_major=self.neuron_major) for _ in range(2))
        for each, bits in ((low, 0), (high, 255)):
            each.rows.copy_(self.rows)
            each.rows[:, self._layout.block * self.row_bytes(planes) :] = bits
            if each.scales is not None and self.scales is not None:
                each.scales.copy_(self.scales)
        return Reduced(low, high)

    def struct(self, bias: Tensor | None = None) -> abi.MatrixStruct:
        """As the library takes it; the caller keeps the tensors alive. bias: (out,) float32, contiguous."""
        return abi.MatrixStruct(
            self.d_in, self.d_out, abi.GROUPED, int(self.neuron_major), self.format.struct, self.rows.data_ptr(),
            0, library.address(self.scales), library.address(bias),
            library.address(self.format.numbers),
        )  # fmt: skip

    def unpack(
        self,
        rows: Tensor | None = None,
        *,
        first: int = 0,
        last: int | None = None,
        columns: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
    ) -> Tensor:
        """Rows of W (neuron-major: columns) as numbers: float32 exactly as the format says, bfloat16 rounded from that.

        Args:
            rows: which, (n,) int64; None: first..last.
            columns: neuron-major only: the outputs begin..end, begin a multiple of 256.

        Shapes: returns (n, in), neuron-major (n, out or end - begin).
        """
        count, width = (self.d_in, self.d_out) if self.neuron_major else (self.d_out, self.d_in)
        begin, end = columns or (0, width)
        last = count if last is None else min(last, count)
        wanted = None if rows is None else rows.to(device="cpu", dtype=torch.int64).contiguous()
        n = last - first if wanted is None else wanted.numel()
        out = torch.empty(n, end - begin, dtype=dtype if dtype in ROW_TYPES else torch.float32)
        if out.numel() == 0:
            return out.to(dtype)
        struct = self.struct()
        library.check(
            library.loaded().griffin_unpack(
                ctypes.addressof(struct), library.address(wanted), first, n, begin, end, out.data_ptr(),
                ROW_TYPES[out.dtype], out.stride(0), threads or torch.get_num_threads(),
            )
        )  # fmt: skip
        return out.to(dtype)

    def row_norms(self) -> Tensor:
        """L2 norms of the rows of W; neuron-major: of its columns.

        Shapes: returns (out,), neuron-major (in,), float32.
        """
        norms = torch.empty(self.d_in if self.neuron_major else self.d_out)
        struct = self.struct()
        library.check(
            library.loaded().griffin_row_norms(ctypes.addressof(struct), norms.data_ptr(), torch.get_num_threads())
        )
        return norms


@dataclass(frozen=True, eq=False)
class Reduced:
    """A matrix that is read to its first planes: the bits behind them stand at their mean, (2^left - 1) / 2.

    Args:
        low, high: the matrix with these bits all 0, and all 1.
    """

    low: Packed
    high: Packed

    def unpack(self, rows: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Packed.unpack`."""
        return ((self.low.unpack(rows) + self.high.unpack(rows)) / 2).to(dtype)


def bytes_of_rows(like: Packed, count: int) -> int:
    """Bytes of so many rows of a packed matrix, in its layout, `SLACK` behind them included."""
    return -(-count // int(like._layout.block)) * like.rows.shape[1] + SLACK


def row_bytes(format: Format, d_in: int) -> int:
    """Bytes of a row of W, scales included."""
    return int(parts_of(library.loaded(), abi.MatrixStruct(d_in, 1, abi.GROUPED, 0, format.struct))[0].bytes)


def empty(format: Format, d_out: int, d_in: int, *, neuron_major: bool = False) -> Packed:
    """Memory for a matrix, in huge pages if the system gives them; of zeros.

    Raises:
        ValueError: a row longer than the library's longest (131,072).
    """
    struct = abi.MatrixStruct(d_in, d_out, abi.GROUPED, int(neuron_major), format.struct)
    parts, scale_bytes = parts_of(library.loaded(), struct)
    if scale_bytes < 0:
        raise ValueError(f"{format.name}: no matrix of shape ({d_out}, {d_in})")
    blocks = -(-(d_in if neuron_major else d_out) // parts.block)
    size = parts.block * parts.bytes
    rows = torch.from_numpy(huge_pages(blocks * size + SLACK))[: blocks * size].view(blocks, size)
    # kernels read whole vectors of scales too
    scales = torch.zeros(scale_bytes + SLACK, dtype=torch.uint8)[:scale_bytes] if neuron_major else None
    return Packed(format, d_out, d_in, rows, scales)


def from_gguf(
    type: str, blocks: Tensor, d_out: int, d_in: int, *, neuron_major: bool = False, row_order: Tensor | None = None
) -> Packed:
    """A matrix from the blocks of a GGUF tensor: the same codes and scales in another order.

    Shapes:
        blocks: (bytes,) uint8, rows of W one after the other
        row_order: (out,) int64: row r of the matrix is row row_order[r] of the file's

    Raises:
        ValueError: the bytes do not fit the shape, or `d_in` is no multiple of the type's block.
    """
    format, weights, size = gguf_format(type)
    if d_in % weights or blocks.numel() != d_out * d_in // weights * size or blocks.dtype != torch.uint8:
        raise ValueError(f"{blocks.numel()} bytes of {type} blocks are no matrix of shape ({d_out}, {d_in})")
    if row_order is not None and (row_order.shape != (d_out,) or row_order.dtype != torch.int64):
        raise ValueError(f"row_order: {tuple(row_order.shape)} {row_order.dtype}, expected ({d_out},) int64")
    packed = empty(format, d_out, d_in, neuron_major=neuron_major)
    struct = packed.struct()
    order = None if row_order is None else row_order.contiguous()
    library.check(
        library.loaded().griffin_pack_gguf(
            ctypes.addressof(struct), GGUF_TYPES[type], blocks.contiguous().data_ptr(), library.address(order),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return packed


def from_codes(
    format: Format,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    sub: Tensor | None = None,
    sub_offset: Tensor | None = None,
    *,
    d_in: int | None = None,
    neuron_major: bool = False,
) -> Packed:
    """A matrix from its codes and what its scales and offsets are made of.

    Shapes, all of rows of W, n = in rounded up to whole groups:
        codes: (out, n) uint8
        scale: (out, n / span rounded up) float16 or float32 as the format says; with sub-scales (out, n / 256 rounded
            up) float16
        offset: as many, float16 or (offset "code") uint8; None where the format has none
        sub, sub_offset: (out, n / group) uint8 (signed bytes as they are); None where the format has none

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    d_out, n = codes.shape
    d_in = n if d_in is None else d_in
    spans = -(-n // (256 if format.supers else format.span))
    groups = n // format.group
    scale_dtype = torch.float32 if format.scale == "f32" else torch.float16
    offset_dtype = torch.uint8 if format.offset == "code" else torch.float16
    expected = {
        "codes": (codes, (d_out, format.padded(d_in)), torch.uint8),
        "scale": (scale, (d_out, spans), scale_dtype),
        "offset": (offset, (d_out, spans) if format.offset != "none" else None, offset_dtype),
        "sub": (sub, (d_out, groups) if format.supers else None, torch.uint8),
        "sub_offset": (sub_offset, (d_out, groups) if format.offset == "sub" else None, torch.uint8),
    }
    kept = []
    for name, (tensor, shape, dtype) in expected.items():
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if found != (None if shape is None else (shape, dtype)):
            raise ValueError(f"{format.name}: {name} is {found}, expected {None if shape is None else (shape, dtype)}")
        kept.append(None if tensor is None else tensor.contiguous())
    packed = empty(format, d_out, d_in, neuron_major=neuron_major)
    struct, given = packed.struct(), abi.CodesStruct(*map(library.address, kept))
    library.check(
        library.loaded().griffin_pack_codes(ctypes.addressof(struct), ctypes.addressof(given), torch.get_num_threads())
    )
    return packed


def quantise(
    weight: Tensor,
    format: str,
    *,
    neuron_major: bool = False,
    importance: Tensor | None = None,
    threads: int | None = None,
) -> Packed:
    """Float weights in "int8" (symmetric, a float16 scale for 32 weights) or "int4" (asymmetric, groups of 32).

    int4's scales and offsets are searched for the least squares of what is lost, and stored as bytes of two float16 for
    256 weights.

    Shapes:
        weight: (out, in), any float dtype
        importance: (in,): weights of the squares, such as the mean squares of the inputs; None: all alike
    """
    made = MADE[format]
    d_out, d_in = weight.shape
    n = made.padded(d_in)
    spans = -(-n // made.span)
    codes = torch.empty(d_out, n, dtype=torch.uint8)
    scale = torch.empty(d_out, spans, dtype=torch.float16)
    offset = torch.empty(d_out, spans, dtype=torch.float16) if made.supers else None
    sub, sub_offset = (
        torch.empty(d_out, n // made.group, dtype=torch.uint8) if made.supers else None for _ in range(2)
    )
    given = None if importance is None else importance.to(device="cpu", dtype=torch.float32).contiguous()
    for begin in range(0, d_out, 4096):  # float32 of a slice at a time
        part = weight[begin : begin + 4096].detach().to(device="cpu", dtype=torch.float32).contiguous()
        tensors = [None if t is None else t[begin : begin + 4096] for t in (codes, scale, offset, sub, sub_offset)]
        out = abi.CodesStruct(*map(library.address, tensors))
        library.check(
            library.loaded().griffin_quantise(
                ctypes.addressof(made.struct), part.data_ptr(), len(part), d_in, library.address(given),
                ctypes.addressof(out), threads or torch.get_num_threads(),
            )
        )  # fmt: skip
    return from_codes(made, codes, scale, offset, sub, sub_offset, d_in=d_in, neuron_major=neuron_major)
