"""A GGUF file, or the parts of a split one: metadata and tensors, every number checked before it is believed.

The format: a header (magic, version, counts), the metadata (keys with typed values), the table of tensors (name,
dimensions, type, offset), and the tensors' bytes, each at a multiple of the alignment. All of it is little-endian.
Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from griffin.errors import GriffinError
from griffin.gguf.types import REFUSED, TYPES, TensorType

AGAIN = "fetch the file again"
MAX_KEYS = 10_000  # real files have less than a hundred
MAX_TENSORS = 100_000
MAX_STRINGS = 1 << 22  # in all arrays together; the largest vocabularies have 800,000 with their merges
MAX_METADATA = 1 << 28  # bytes of metadata and table
MAX_DIMENSIONS = 4  # ggml's own limit
MAX_PARTS = 10_000
_CHUNK = 1 << 22  # bytes of the header that are read at once
_ALIGNMENT = 32
_VERSIONS = (2, 3)
# How llama.cpp's llama-gguf-split names the parts of a file.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)

# The types of values in the metadata, by number.
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

Bytes = npt.NDArray[np.uint8]


class _DamagedError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file; its bytes stay there until they are asked for.

    Args:
        name: in the file, such as "blk.0.ffn_up.weight".
        type: how its values are stored; a block never spans rows.
        shape: as numpy and torch say it, the last dimension contiguous: (outputs, inputs) of a matrix.
        offset: its first byte in the file.
        part: the file.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    part: Part = field(repr=False)

    @property
    def rows(self) -> int:
        """The rows of the tensor seen as a matrix; 1 of a vector."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return self.type.nbytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def data(self) -> Bytes:
        """The tensor's bytes where the file is mapped: read-only, (rows, row_bytes).

        If another program cuts the file off, touching them ends this process, as with any mapped file; `read` raises
        an error.
        """
        start = self.offset
        return self.part.mapped[start : start + self.nbytes].reshape(self.rows, self.row_bytes)

    def read(self, start: int = 0, stop: int | None = None, out: Bytes | None = None) -> Bytes:
        """A copy of some rows' bytes: (stop - start, row_bytes).

        Args:
            start: first row.
            stop: last row, exclusive; `None`: all that follow.
            out: where to put them, contiguous and of that shape; `None`: in new memory.

        Raises:
            GriffinError: the file has become shorter, or cannot be read.
        """
        stop = self.rows if stop is None else stop
        if out is None:
            out = np.empty((stop - start, self.row_bytes), np.uint8)
        self.part.read_into(out, self.offset + start * self.row_bytes)
        return out

    def forget(self) -> None:
        """Let the system drop the mapped pages that only this tensor touches; `data` brings them back."""
        self.part.forget(self.offset, self.nbytes)


class Part:
    """One file on the disk, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = path.open("rb")
        self._opened = self._state()
        self.size = self._opened[0]
        self._map: mmap.mmap | None = None

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def unchanged(self) -> bool:
        """Whether the file has the size and the time of its last change that it was opened with."""
        return self._state() == self._opened

    @property
    def mapped(self) -> Bytes:
        """The whole file, read-only."""
        if self._map is None:
            try:
                self._map = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise self._shorter() from error
        return np.frombuffer(self._map, np.uint8)

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop the mapped pages that lie within these bytes."""
        page = mmap.PAGESIZE
        first, last = -(-offset // page) * page, (offset + nbytes) // page * page
        if self._map is not None and last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def read_into(self, out: Bytes, offset: int) -> None:
        """Fill `out` with the bytes at an offset; raises GriffinError where the file ends before."""
        view = out.data.cast("B")
        done = 0
        while done < len(view):
            try:
                count = _pread_into(self.file, view[done:], offset + done)
            except OSError as error:
                raise GriffinError(f"{self.path} cannot be read: {error.strerror}; check its disk") from error
            if count == 0:
                raise self._shorter()
            done += count

    def _shorter(self) -> GriffinError:
        return GriffinError(f"{self.path} has become shorter while it was read; load it again when it is whole")


def _pread_into(file: BinaryIO, view: memoryview, offset: int) -> int:
    """Read at an offset; returns how many bytes. Where the system has `preadv`, several threads may."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    file.seek(offset)
    return file.readinto(view)  # type: ignore[attr-defined, no-any-return, unused-ignore]


class GgufFile:
    """A GGUF file or all parts of a split one, open: metadata and the table of tensors.

    Args:
        path: the file, or any part of a split one; the other parts are beside it.

    Raises:
        ValueError: there is no such file, its version or its byte order is not read, or a tensor is of a type that is
            not read.
        GriffinError: it is no GGUF file, is damaged or cut off, or parts are missing.

    Attributes:
        paths: all files.
        version: of the format.
        metadata: numbers as int, float or bool, strings, lists of strings, and arrays of numbers as numpy arrays.
        tensors: by name, in the files' order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = _open(path)
        self._parts = [opened]
        try:
            with _told(opened):
                header = _Header(opened)
                count, number = header.count("split.count"), header.count("split.no") + 1
            self.version = header.version
            if count > 1:
                self._parts, header = self._all(opened, header, number, count)
            self.metadata: Mapping[str, Any] = header.metadata
            self.tensors: dict[str, GgufTensor] = header.tensors
        except BaseException:
            self.close()
            raise
        self.paths = [part.path for part in self._parts]

    @property
    def architecture(self) -> str:
        """The value of general.architecture.

        Raises:
            GriffinError: the file does not say it.
        """
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise GriffinError(f"{self.path} is damaged: it names no general.architecture; {AGAIN}")
        return found

    def unchanged(self) -> bool:
        """Whether no file has been written to since it was opened: to be asked after the bytes were taken."""
        return all(part.unchanged() for part in self._parts)

    def check_unchanged(self) -> None:
        """Raise if a file has been written to since it was opened.

        Raises:
            GriffinError: it has.
        """
        if not self.unchanged():
            raise GriffinError(f"{self.path} has changed while it was read; load it again when it is whole")

    def close(self) -> None:
        """Close the files. Mapped bytes that are still in use stay."""
        for part in self._parts:
            part.file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(self, opened: Part, header: _Header, number: int, count: int) -> tuple[list[Part], _Header]:
        """All parts in order, and the first one's header with all tensors."""
        parts: list[Part] = []
        headers: list[_Header] = []
        for index, path in enumerate(_names(opened.path, number, count)):
            part = opened if index + 1 == number else _open(path)
            parts.append(part)
            if part is not opened:
                self._parts.append(part)
            with _told(part):
                own = header if part is opened else _Header(part)
                if (own.count("split.no") + 1, own.count("split.count")) != (index + 1, count):
                    raise _DamagedError(f"it does not say that it is part {index + 1} of {count}")
                headers.append(own)
        first = headers[0]
        with _told(opened):
            for other in headers[1:]:
                if twice := sorted(first.tensors.keys() & other.tensors.keys()):
                    raise _DamagedError(f"tensor {twice[0]} is in two parts")
                first.tensors.update(other.tensors)
            said = first.count("split.tensors.count")
            if said and said != len(first.tensors):
                raise _DamagedError(f"the parts have {len(first.tensors)} tensors, split.tensors.count says {said}")
        return parts, first


def _open(path: Path) -> Part:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; expected a .gguf file")
    try:
        return Part(path)
    except PermissionError as error:
        raise GriffinError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


def _names(path: Path, number: int, count: int) -> list[Path]:
    """The paths of all parts, given that `path` is part `number`; all are there."""
    problem = f"{path} is part {number} of {count} of a model"
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count or int(named[2]) != number or count > MAX_PARTS:
        raise GriffinError(
            f"{problem}; give the parts their own names again, in one folder: NAME-00001-of-{count:05}.gguf and so on"
        )
    paths = [path.with_name(f"{named[1]}-{part:05}-of-{named[3]}{named[4]}") for part in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        verb = "is" if len(missing) == 1 else "are"
        raise GriffinError(f"{problem}; {shown} {verb} missing in {path.parent}: fetch all")
    return paths


@contextmanager
def _told(part: Part) -> Iterator[None]:
    """Turns what the parser raises into errors that name the file."""
    path = part.path
    try:
        yield
    except OSError as error:
        raise GriffinError(f"{path} cannot be read: {error.strerror}; check its disk") from error
    except (_DamagedError, UnicodeDecodeError) as error:
        text = "a name or text in it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        damage = f"is damaged or cut off ({part.size} bytes)"
        raise GriffinError(f"{path} {damage}{_part_hint(path)}: {text}; {AGAIN}") from error


def _part_hint(path: Path) -> str:
    named = _PART.fullmatch(path.name)
    return f" (its name says that it is part {int(named[2])} of {int(named[3])})" if named else ""


class _Header:
    """The metadata and the table of tensors of one file."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._file = part.file
        self._end = min(part.size, MAX_METADATA)
        self._buffer = bytearray()
        self._at = 0
        self._strings = 0
        self.version, tensors, keys = self._start()
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in self.metadata:
                raise _DamagedError(f"the key {key[:80]!r} comes twice")
            self.metadata[key] = self._value(self._u32(), key)
        self.tensors = {tensor.name: tensor for tensor in self._table(tensors)}

    def count(self, key: str) -> int:
        """A number that tells of parts; 0 where the metadata has none."""
        value = self.metadata.get(key, 0)
        if not isinstance(value, int) or value < 0:
            raise _DamagedError(f"{key} is {str(value)[:80]}, expected a count")
        return value

    # -- the pieces of the format -----------------------------------------------------------------------------------

    def _start(self) -> tuple[int, int, int]:
        path = self._part.path
        magic = self._part.file.read(4)
        self._part.file.seek(0)
        if magic != b"GGUF":
            says = f"it starts with {magic!r}, expected b'GGUF'"
            raise GriffinError(f"{path} is no GGUF file{_part_hint(path)}: {says}; {AGAIN}")
        self._take(4)
        version = self._u32()
        if version not in _VERSIONS:
            if version & 0xFFFF == 0 and version:
                raise ValueError(f"{path} is big-endian, which is not read; fetch the little-endian file")
            expected = " or ".join(map(str, _VERSIONS))
            raise ValueError(f"{path} is of GGUF version {version}, expected {expected}; fetch a newer file")
        tensors, keys = self._u64(), self._u64()
        for what, found, most in (("tensors", tensors, MAX_TENSORS), ("metadata keys", keys, MAX_KEYS)):
            if found > most:
                raise _DamagedError(f"it claims {found:,} {what}, expected at most {most:,}")
        return version, tensors, keys

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self._u32(), self._u64()
        return self._texts(count, key) if kind == _STRING else self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> npt.NDArray[Any]:
        if (dtype := _SCALARS.get(kind)) is None:
            raise _DamagedError(f"the value of {key[:80]!r} is of type {kind}, which GGUF does not have here")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _texts(self, count: int, key: str) -> list[str]:
        """An array of strings: a vocabulary, so the loop is kept short."""
        self._strings += count
        if self._strings > MAX_STRINGS or 8 * count > self._end - self._at:
            raise _DamagedError(f"{key[:80]!r} claims {count:,} strings, more than there can be")
        texts: list[str] = []
        append, length_at, buffer, at = texts.append, _U64.unpack_from, self._buffer, self._at
        there = len(buffer)
        for _ in range(count):
            start = at + 8
            if start > there:
                there = self._extend(start)
            at = start + length_at(buffer, at)[0]
            if at > there:
                there = self._extend(at)
            append(buffer[start:at].decode())
        self._at = at
        return texts

    def _table(self, count: int) -> Iterator[GgufTensor]:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {str(alignment)[:80]}, expected a power of two")
        rows = [(self._string(), self._dimensions(), self._u32(), self._u64()) for _ in range(count)]
        start = -(-self._at // alignment) * alignment
        end, last = start, ""
        names: set[str] = set()
        tensors = []
        for name, shape, number, offset in sorted(rows, key=lambda row: row[3]):
            kind = self._type(name, number)
            if name in names:
                raise _DamagedError(f"tensor {name[:80]!r} comes twice")
            names.add(name)
            if shape[-1] % kind.block:
                raise _DamagedError(f"tensor {name[:80]!r} has rows of {shape[-1]} values, not in {kind.block}s")
            tensor = GgufTensor(name, kind, shape, start + offset, self._part)
            if offset % alignment:
                raise _DamagedError(f"tensor {name[:80]!r} starts at {offset}, no multiple of {alignment}")
            if tensor.offset < end:
                raise _DamagedError(f"tensor {name[:80]!r} starts inside of {last[:80]!r}")
            end, last = tensor.offset + tensor.nbytes, name
            if end > self._part.size:
                raise _DamagedError(f"tensor {name[:80]!r} ends at byte {end}")
            tensors.append(tensor)
        return iter(tensors)

    def _dimensions(self) -> tuple[int, ...]:
        count = self._u32()
        if not 1 <= count <= MAX_DIMENSIONS:
            raise _DamagedError(f"a tensor has {count} dimensions, expected 1 to {MAX_DIMENSIONS}")
        shape = struct.unpack(f"<{count}Q", self._take(8 * count))[::-1]
        if 0 in shape or prod(shape) > 8 * self._part.size:  # no type has less than a bit a value
            raise _DamagedError(f"a tensor has the shape {shape}")
        return shape

    def _type(self, name: str, number: int) -> TensorType:
        if number in TYPES:
            return TYPES[number]
        if number in REFUSED:
            readable = ", ".join(kind.name for kind in TYPES.values())
            raise ValueError(
                f"{self._part.path}: tensor {name[:80]} is of type {REFUSED[number]}, which is not read; expected "
                f"{readable}; fetch the model in one of these, such as Q4_K_M"
            )
        raise _DamagedError(f"tensor {name[:80]!r} is of type {number}, which is not known")

    # -- bytes ------------------------------------------------------------------------------------------------------

    def _string(self) -> str:
        return self._take(self._u64()).decode()

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._take(8))[0])

    def _take(self, count: int) -> bytearray:
        start, stop = self._at, self._at + count
        if stop > len(self._buffer):
            self._extend(stop)
        self._at = stop
        return self._buffer[start:stop]

    def _extend(self, stop: int) -> int:
        """Read on until the buffer holds that many bytes of the file; returns how many it holds."""
        if stop > self._end:
            if self._end == MAX_METADATA:
                raise _DamagedError(f"its metadata goes beyond {MAX_METADATA >> 20} MiB")
            raise _DamagedError(f"it should go on to byte {stop:,}")
        while len(self._buffer) < stop:
            read = self._file.read(min(max(_CHUNK, stop - len(self._buffer)), self._end - len(self._buffer)))
            if not read:
                raise _DamagedError("it has become shorter while it was read")
            self._buffer += read
        return len(self._buffer)
