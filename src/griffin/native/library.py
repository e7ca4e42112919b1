"""The native library `libgriffin_native`: found, opened by ctypes on first use, and asked about itself.

The library (folder `native/`, C interface in `native/include/griffin_native.h`) knows nothing of torch. It is handed
the addresses of the OpenMP runtime that torch has loaded, so that both run on one pool of threads. Nothing is loaded
before the first use.

The interface is declared in `abi`. What the library computes on is in `operands`, what it computes in `kernel`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.native import abi

if TYPE_CHECKING:
    from torch import Tensor

_pointer = ctypes.c_void_p


def _find() -> Path | None:
    """GRIFFIN_NATIVE_LIBRARY if set, else the library in any folder of the package (an editable install has two)."""
    if named := os.environ.get("GRIFFIN_NATIVE_LIBRARY"):
        return Path(named)
    package = Path(__file__).parents[1]
    try:  # an editable install keeps what was built in site-packages, beside the redirected sources
        from importlib.metadata import files

        installed = [
            Path(str(f.locate())) for f in files("griffin-llm") or [] if f.name.startswith("libgriffin_native")
        ]
    except Exception:  # not installed at all: run from a source folder
        installed = []
    names = [f"libgriffin_native.{ending}" for ending in ("so", "dylib")]
    candidates = [package / name for name in names] + installed
    return next((path for path in candidates if path.is_file()), None)


def _torch_openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the GNU OpenMP runtime that torch uses.

    A second pool of threads, spinning for work beside torch's own, can halve the speed of both.
    """
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    # torch's own copy first, in case another package has brought one too
    for path in sorted(loaded, key=lambda path: ("torch" not in path, path)):
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            functions = [getattr(runtime, n) for n in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
        except (OSError, AttributeError):
            continue
        a, b, c = (ctypes.cast(function, _pointer).value or 0 for function in functions)
        return a, b, c
    return None


@cache
def _open() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return (
            "the native library was not built: install a C++17 compiler (g++ or clang++) and reinstall griffin-llm, "
            "or set GRIFFIN_NATIVE_LIBRARY to a libgriffin_native"
        )
    try:
        library = ctypes.CDLL(str(path))
        difference = abi.bind(library)
    except (OSError, AttributeError) as error:
        return f"the native library {path} cannot be loaded: {error}"
    if difference is not None:
        return f"the native library {path} {difference}: reinstall griffin-llm"
    forced = os.environ.get("GRIFFIN_NATIVE_ISA")
    if forced and library.griffin_set_isa(forced.encode()) != 0:
        return f"GRIFFIN_NATIVE_ISA={forced}: this machine has {library.griffin_isas().decode()}"
    return library


@cache
def _load() -> ctypes.CDLL | str:
    """The library, with torch's pool of threads, or why there is none."""
    import torch  # noqa: F401  # whose OpenMP runtime is to be there

    library = _open()
    if not isinstance(library, str) and (openmp := _torch_openmp()) is not None:
        library.griffin_use_openmp(*openmp)
    return library


def opened() -> ctypes.CDLL:
    """The library for functions that take no number of threads, without torch. Raises ValueError as `loaded`."""
    return _checked(_open())


def loaded() -> ctypes.CDLL:
    """The library, ready for use. Raises ValueError with what `why_not` says if there is none."""
    return _checked(_load())


def _checked(library: ctypes.CDLL | str) -> ctypes.CDLL:
    if isinstance(library, str):
        raise ValueError(library)
    return library


def why_not() -> str | None:
    """None if the library can be used, else the reason why not, with what to do."""
    library = _open()
    return library if isinstance(library, str) else None


def isa() -> str:
    """The instruction set in use, such as "avx512 vnni bf16"."""
    return str(loaded().griffin_isa().decode())


def isas() -> list[str]:
    """The instruction sets that `set_isa` accepts on this machine, best first."""
    return list(loaded().griffin_isas().decode().split())


def set_isa(name: str | None) -> None:
    """Force "avx512", "avx2" or "portable"; None for the best. Raises ValueError if it is not on this machine."""
    if loaded().griffin_set_isa(name.encode() if name else None) != 0:
        raise ValueError(f"instruction set {name!r}: expected one of {isas()}")


def threading() -> str:
    """ "openmp" (torch's own pool) or "own pool"."""
    return str(loaded().griffin_threading().decode())


def calls() -> int:
    """`ff` and `matvec` calls finished in this process: proves which path ran."""
    return int(loaded().griffin_calls())


def ff_bytes() -> int:
    """Bytes of weights and scales that FF blocks have read in this process: what a method costs, counted."""
    return int(loaded().griffin_ff_bytes())


def check(status: int) -> None:
    """Raises ValueError for a status that is not success."""
    if status != 0:
        raise ValueError(f"native library: {abi.STATUS.get(status, status)}")


def address(tensor: Tensor | None) -> int | None:
    """NULL for no tensor."""
    return None if tensor is None else tensor.data_ptr()
