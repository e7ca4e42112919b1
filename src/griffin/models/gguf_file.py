"""GGUF files before they are loaded: whether one is whole, one of several parts, or something else."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from griffin.errors import GriffinError
from griffin.models.cache_entry import one_line

AGAIN = "fetch the file again"
# How llama.cpp's llama-gguf-split names the parts of a file.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


def check_gguf(path: Path) -> str:
    """The architecture named in a GGUF file, after checking that the file is whole.

    Raises:
        ValueError: there is no such file.
        GriffinError: it is no GGUF file, ends before its header, metadata or tensors do, or is one of several parts.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; expected a .gguf file")
    named = _PART.fullmatch(path.name)
    hint = f" (its name says that it is part {int(named[2])} of {int(named[3])})" if named else ""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise GriffinError(f"{path} is no GGUF file{hint}: it starts with {magic!r}, expected b'GGUF'; {AGAIN}")
        size = path.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy overflows on nonsense sizes
            reader = _BoundedReader(path)
        for tensor in reader.tensors:
            if (end := tensor.data_offset + tensor.n_bytes) > size:
                raise ValueError(f"tensor {tensor.name} ends at byte {end}")
        if (parts := _number(reader, "split.count")) is not None and parts > 1:
            raise GriffinError(_split(path, (_number(reader, "split.no") or 0) + 1, parts))
        field = reader.get_field("general.architecture")
        if field is None:
            raise ValueError("it names no general.architecture")
        return str(field.contents())
    except GriffinError:
        raise
    except PermissionError as error:
        raise GriffinError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except Exception as error:  # the reader raises whatever numpy does on a short or garbled file
        size = path.stat().st_size
        raise GriffinError(f"{path} is damaged or cut off ({size} bytes){hint}: {one_line(error)}; {AGAIN}") from error


def _number(reader: GGUFReader, key: str) -> int | None:
    field = reader.get_field(key)
    return None if field is None else int(field.contents())


def _split(path: Path, number: int, parts: int) -> str:
    """What to say of a file whose metadata calls it part `number` of `parts`: they have to be joined first."""
    problem = f"{path} is part {number} of {parts} of a model; expected a model in one file"
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != parts:
        return (
            f"{problem}; give the parts their own names again (NAME-00001-of-{parts:05}.gguf and so on) and join them: "
            f"llama-gguf-split --merge NAME-00001-of-{parts:05}.gguf NAME.gguf"
        )
    names = [f"{named[1]}-{part:05}-of-{named[3]}{named[4]}" for part in range(1, parts + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        todo = (
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in {path.parent}: fetch and join all"
        )
    else:
        todo = f"all are in {path.parent}: join them"
    first, whole = path.parent / names[0], path.parent / f"{named[1]}{named[4]}"
    return f"{problem}; {todo}: llama-gguf-split --merge {first} {whole}"


class _BoundedReader(GGUFReader):  # type: ignore[misc, unused-ignore]
    """gguf's reader takes a read beyond the end for a shorter one, and may loop for long on a garbled length."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
        array = super()._get(offset, dtype, count, *args, **kwargs)
        if array.size != int(count):
            raise ValueError(f"{int(count)} values expected at byte {int(offset)}, {array.size} are there")
        return array
