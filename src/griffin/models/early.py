"""A GGUF file's weights, read and packed while Python imports torch and transformers, which takes seconds.

`begin` is for who knows which file it will load, before those imports; loading takes up what has begun.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from griffin.errors import GriffinError
from griffin.gguf import config
from griffin.gguf.reader import GgufFile
from griffin.native import library
from griffin.native.packing import GGUF_TYPES, Packing

_begun: dict[Path, tuple[GgufFile, Packing | None]] = {}


def begin(path: Path) -> None:
    """Open a file and start to pack its weights, exactly as they are; what is wrong with it is told by loading it."""
    with suppress(GriffinError, ValueError, OSError):
        _begun[path] = _opened(path)


def taken(path: Path) -> tuple[GgufFile, Packing | None]:
    """A file, open, and the packing of its weights, started; `None`: there is nothing to pack, or nothing packs it.

    Raises:
        ValueError, GriffinError: as `GgufFile`.
    """
    return _begun.pop(path, None) or _opened(path)


def dropped(path: Path) -> None:
    """Give up what was begun of a file, if anything was: its weights are wanted in another form."""
    file, packing = _begun.pop(path, (None, None))
    if packing is not None:
        packing.close()
    if file is not None:
        file.close()


def _opened(path: Path) -> tuple[GgufFile, Packing | None]:
    file = GgufFile(path)
    try:
        quantised = any(tensor.type.name in GGUF_TYPES for tensor in file.tensors.values())
        if not quantised or config.why_not(file) is not None or library.why_not() is not None:
            return file, None
        packing = Packing(file, config.sources_of(file))
        packing.start()
        return file, packing
    except BaseException:
        file.close()
        raise
