"""The machine's memory as the native library sees it: huge pages, and how fast it can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.native import library


def advise_huge(tensor: Tensor) -> bool:
    """Ask for huge pages under a tensor's storage, best before its first write. True if the system took the advice."""
    storage = tensor.untyped_storage()
    return int(library.loaded().griffin_advise_huge(storage.data_ptr(), storage.nbytes())) == 0


def read_bandwidth(buffer: Tensor, *, threads: int | None = None) -> float:
    """Bytes per second of one plain multi-threaded float sum over a contiguous buffer (use 1 GB or more)."""
    size = buffer.numel() * buffer.element_size()
    return float(library.loaded().griffin_read_bandwidth(buffer.data_ptr(), size, threads or torch.get_num_threads()))
