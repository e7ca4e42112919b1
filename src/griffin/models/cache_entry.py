"""Folders in the cache that are made once: what is slow is done in a working folder, and one rename publishes it."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import transformers

from griffin.cache import cache_folder
from griffin.errors import GriffinError
from griffin.text_files import read_text

MANIFEST = "griffin.json"
_PARTIAL = ".partial-"
_PARTIAL_MAX_AGE_S = 24 * 3600


def made_once(
    folder: str, identity: Mapping[str, object], space_bytes: int, make: Callable[[Path, Path], None], name: str
) -> Path:
    """The folder of that name in the cache, made first if it is not there, whole, and of this identity.

    Several processes may do that at once: each works in a folder of its own, one rename wins, the others take the
    winner's. Nothing is ever half made under the final name.

    Args:
        folder: its name in the cache.
        identity: what the manifest must say, such as the source's checksum and the version of the conversion.
        space_bytes: free space that making it needs.
        make: called with a working folder and the path (not there yet) of the folder to make.
        name: of the model, for messages.

    Raises:
        GriffinError: the cache folder cannot be written or is full, or `make` failed.
    """
    cache = cache_folder()
    final = cache / folder
    if is_complete(final, identity):
        return final
    with _outside_errors(name, cache, space_bytes):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        free = shutil.disk_usage(cache).free
        if free < space_bytes:
            raise GriffinError(
                f"{name}: {free / 1e9:.1f} GB free in {cache}, {space_bytes / 1e9:.1f} GB needed to fetch "
                "and convert it; free some space or set GRIFFIN_CACHE to a folder on another disk"
            )
        work = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{folder}-", dir=cache))
        try:
            made = work / "model"
            make(work, made)
            manifest = {**identity, "sizes_bytes": _sizes_bytes(made)}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            _publish(made, final, identity)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def is_complete(folder: Path, identity: Mapping[str, object]) -> bool:
    """Whether `folder` carries a manifest of this identity, and every file at the size it lists."""
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        sizes = manifest.pop("sizes_bytes")
        return bool(sizes) and manifest == dict(identity) and sizes == _sizes_bytes(folder)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def share(folder: Path) -> None:
    """Give all files the mode of config.json: safetensors writes for the owner alone, and a cache may be shared."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def _sizes_bytes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def _publish(made: Path, final: Path, identity: Mapping[str, object]) -> None:
    for attempt in range(3):
        try:
            made.rename(final)  # a rename never lands on a folder that has files in it
            return
        except OSError:
            if is_complete(final, identity):
                return  # another process was first
            if attempt == 2 or not final.exists():
                raise
        # an old version or a damaged folder goes away with the working folder, unless another process moved it first
        with suppress(FileNotFoundError):
            final.rename(made.parent / f"old-{attempt}")


def _remove_stale(cache: Path) -> None:
    for path in cache.glob(f"{_PARTIAL}*"):  # left by a process that was killed
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _PARTIAL_MAX_AGE_S:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _outside_errors(name: str, cache: Path, space_bytes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # pip and safetensors report a full disk as their own error, with the system's words in it
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise GriffinError(
                f"{name}: the disk of the cache folder {cache} is full, {space_bytes / 1e9:.1f} GB are needed; "
                "free some space or set GRIFFIN_CACHE to a folder on another disk"
            ) from error
        if isinstance(error, GriffinError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise GriffinError(
                f"{name}: the cache folder {cache} cannot be used: {error.strerror}; "
                "set GRIFFIN_CACHE to a folder that can be written"
            ) from error
        raise GriffinError(
            f"{name}: transformers {transformers.__version__} could not convert it: {one_line(error)}; "
            "please report this"
        ) from error


def one_line(error: BaseException) -> str:
    """The error's text on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
