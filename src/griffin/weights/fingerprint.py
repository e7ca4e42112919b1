"""Has a weight changed since something was derived from it? A cheap fingerprint, for copies that must not go stale."""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = 64  # sampled at even distances

Fingerprint = tuple[int, torch.dtype, int, bytes]


@torch.no_grad()
def fingerprint(weight: Tensor) -> Fingerprint:
    """Address, dtype, version and a sample of the values of a weight.

    The version counter misses writes through `weight.data`, as a merged LoRA adapter makes them; those change nearly
    all values, so the sample shows them. A change of single values outside of the sample is not seen.
    """
    version = 0 if weight.is_inference() else weight._version
    count = weight.numel()
    if count == 0 or weight.device.type == "meta":
        return weight.data_ptr(), weight.dtype, version, b""
    at = torch.linspace(0, count - 1, min(_VALUES, count), dtype=torch.float64).long().to(weight.device)
    width = weight.shape[-1]
    sample = weight.detach().reshape(-1)[at] if weight.dim() != 2 else weight.detach()[at // width, at % width]
    return weight.data_ptr(), weight.dtype, version, sample.cpu().contiguous().view(torch.uint8).numpy().tobytes()
