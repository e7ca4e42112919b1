"""The quantised matrices of a GGUF file, read and packed by threads of their own.

Nothing here needs torch, whose import takes about as long as packing a model of 1 GB: `griffin generate` does both at
once. All of the work is one call of the native library, without Python's lock.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from griffin.errors import GriffinError
from griffin.gguf.names import Source, row_order
from griffin.gguf.reader import GgufFile, GgufTensor
from griffin.native import abi, library

# The numbers of GGUF's block types. Their layouts are in native/src/grouped_pack.cpp.
GGUF_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
}
_PIECE = 1 << 20  # bytes of a file that a thread has in memory at once; a neuron-major matrix is one piece
SLACK = 64
"""Bytes behind the last row that kernels may read."""
_MOST_THREADS = 8  # more do not read memory faster

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PackedTensor:
    """A matrix W (out, in) of a file as the library reads it: what `griffin.native.grouped.Packed` is made of.

    Shapes:
        rows: (blocks, bytes of a block): blocks of 32 rows of W, neuron-major of its columns; `SLACK` readable bytes
            follow
        scales: neuron-major: (bytes,); else None
    """

    type: str
    d_out: int
    d_in: int
    rows: Bytes
    scales: Bytes | None


class Packing:
    """The work of packing a file's matrices, which threads share, and its result.

    Args:
        file: open until `wait` or `close` has returned.
        sources: where its modules are; those of quantised matrices are packed.

    Raises:
        ValueError: there is no native library, or a matrix has a shape that is not read.
    """

    def __init__(self, file: GgufFile, sources: Iterable[Source]) -> None:
        self._file = file
        self._library = library.opened()
        self._packed: dict[str, PackedTensor] = {}
        self._kept: list[Any] = []  # what the structs point to
        pieces = []
        for source in sources:
            tensor = file.tensors.get(f"{source.tensor}.weight")
            if tensor is not None and tensor.type.name in GGUF_TYPES and len(tensor.shape) == 2:
                pieces += self._pieces(tensor, source)
        self._pieces_array = (abi.GgufTensorStruct * len(pieces))(*pieces)
        self._next = ctypes.c_int64(0)
        self._statuses: list[int] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin, on all cores but the one that the caller goes on to use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for _ in range(max(1, min(_MOST_THREADS, cores) - 1)):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def wait(self) -> dict[str, PackedTensor]:
        """Help until all is done; returns the matrices by the names of their tensors.

        Raises:
            GriffinError: the file has become shorter, or cannot be read.
            MemoryError: there is not enough memory.
        """
        self._work()
        for thread in self._threads:
            thread.join()
        if failed := [status for status in self._statuses if status != 0]:
            told = abi.STATUS[failed[0]]
            if told == "out of memory":
                raise MemoryError(f"{self._file.path}: not enough memory to load it")
            raise GriffinError(f"{self._file.path}: {told}; load it again when it is whole")
        return self._packed

    def close(self) -> None:
        """Stop; after `wait` there is nothing to stop."""
        self._next.value = len(self._pieces_array)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        pieces = self._pieces_array
        status = self._library.griffin_pack_tensors(ctypes.addressof(pieces), len(pieces), ctypes.addressof(self._next))
        self._statuses.append(status)

    def _pieces(self, tensor: GgufTensor, source: Source) -> list[abi.GgufTensorStruct]:
        """A tensor's matrix, described in pieces."""
        (d_out, d_in), type = tensor.shape, GGUF_TYPES[tensor.type.name]
        major = source.tensor.endswith("ffn_down")
        matrix = abi.MatrixStruct(d_in=d_in, d_out=d_out, format=abi.GROUPED, neuron_major=int(major))
        weights, size = ctypes.c_int32(), ctypes.c_int32()
        self._library.griffin_gguf_format(
            type, ctypes.addressof(matrix.grouped), ctypes.addressof(weights), ctypes.addressof(size)
        )
        parts, scale_bytes = parts_of(self._library, matrix)
        if scale_bytes < 0:
            raise ValueError(f"{self._file.path}: tensor {tensor.name}: no matrix of shape {tensor.shape} is read")
        blocks, block_bytes = -(-(d_in if major else d_out) // parts.block), parts.block * parts.bytes
        rows = huge_pages(blocks * block_bytes + SLACK)
        scales = huge_pages(scale_bytes + SLACK)[:scale_bytes] if major else None
        matrix.weight = rows.ctypes.data
        matrix.scales = None if scales is None else scales.ctypes.data
        order = None if source.heads is None else row_order(d_out, source.heads)
        rows = rows[: blocks * block_bytes].reshape(blocks, block_bytes)
        self._packed[tensor.name] = PackedTensor(tensor.type.name, d_out, d_in, rows, scales)
        self._kept.append(order)
        step = d_out  # or whole blocks
        if not major and order is None:
            step = parts.block * max(1, _PIECE // (parts.block * tensor.row_bytes))
        pieces = []
        for first in range(0, d_out, step):
            n = min(step, d_out - first)
            piece = abi.GgufTensorStruct(
                matrix, None if order is None else order.ctypes.data, tensor.offset + first * tensor.row_bytes,
                n * tensor.row_bytes, tensor.part.file.fileno(), type,
            )  # fmt: skip
            piece.matrix.d_out = n
            piece.matrix.weight = matrix.weight + first * parts.bytes
            pieces.append(piece)
        return pieces


def parts_of(loaded: ctypes.CDLL, matrix: abi.MatrixStruct) -> tuple[abi.PartsStruct, int]:
    """How a matrix's rows lie, and the bytes of its scales if they are apart; -1: there is no such matrix."""
    parts = abi.PartsStruct()
    scale_bytes = loaded.griffin_grouped_bytes(ctypes.addressof(matrix), ctypes.addressof(parts))
    return parts, int(scale_bytes)


def huge_pages(nbytes: int) -> Bytes:
    """New memory of zeros, in huge pages if the system gives them; it is there when it is touched."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
