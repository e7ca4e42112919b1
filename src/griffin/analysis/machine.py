"""The machine of a measurement: versions, processor, memory, load, read bandwidth."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from griffin.native import library, memory
from griffin.version import __version__

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "asimd", "sve")
_BUFFER_BYTES = 2**30  # larger than any cache
_LEAST_BUFFER_BYTES = 2**26
_PASSES = 5
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def versions() -> dict[str, str]:
    """Versions of the software that computes."""
    return {
        "griffin": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """System, processor and native library."""
    name, flags = _cpu()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": [flag for flag in _FEATURES if flag in flags],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native_library": library.why_not() or f"{library.isa()}, threads: {library.threading()}",
    }


def load_average() -> float | None:
    """The load average of the last minute; `None` where the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def available_bytes(device: torch.device | None = None) -> int | None:
    """Bytes of memory available without swapping, also in a container; `None` where the system does not report them.

    Args:
        device: the device with the memory; `None` is the CPU.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device is not None and device.type != "cpu":
        return None
    limits = [limit for limit in (_meminfo_bytes(), _cgroup_bytes()) if limit is not None]
    return min(limits, default=None)


def _meminfo_bytes() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(values[0]) * 1024 if values else None


def _cgroup_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    files = int(stat.get("inactive_file", 0))  # page cache that can be reclaimed
    return None if limit == "max" else max(0, int(limit) - used + files)


@dataclass(frozen=True)
class Bandwidth:
    """Memory read bandwidth in bytes per second, and how it was measured."""

    bytes_per_s: float
    how: str


def read_bandwidth() -> Bandwidth | None:
    """Median bandwidth of reading a gigabyte with all threads; `None` if there is no memory for the buffer."""
    free = available_bytes()
    size = _BUFFER_BYTES if free is None else min(_BUFFER_BYTES, free // 4)
    if size < _LEAST_BUFFER_BYTES:
        return None
    buffer = torch.empty(size // 4)
    if library.why_not() is None:
        how = f"native library, {_size(buffer)}"
        memory.advise_huge(buffer)  # with small pages the same machine reads a tenth less
        buffer.fill_(1.0)
        speeds = [memory.read_bandwidth(buffer) for _ in range(_PASSES)]
    else:
        how = f"torch sum, {_size(buffer)}, as the native library is missing"
        buffer.fill_(1.0)
        speeds = [_summed(buffer) for _ in range(_PASSES)]
    return Bandwidth(statistics.median(speeds), how)


def _summed(buffer: torch.Tensor) -> float:
    start = time.perf_counter()
    buffer.sum()
    return buffer.nbytes / (time.perf_counter() - start)


def _size(buffer: torch.Tensor) -> str:
    return f"{buffer.nbytes / 2**30:.2f} GiB buffer"


def reset_peak_rss() -> bool:
    """Reset the peak of the memory in use; returns whether the system supports it (only Linux does)."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int | None:
    """Peak memory of the process since `reset_peak_rss`, or since its start where a reset is not possible."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _cpu() -> tuple[str, frozenset[str]]:
    """Name and feature flags of the CPU, as far as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or platform.machine(), frozenset(flags.split())
