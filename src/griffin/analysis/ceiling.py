"""The ceiling of a density: generation is bound by the bytes of weights it reads, and GRIFFIN reads fewer of them."""

from __future__ import annotations

from torch import nn

from griffin.layouts import is_quantised


def bytes_read_per_token(model: nn.Module) -> int:
    """Bytes of all weights that the full model reads to generate one token.

    An embedding is looked up, which reads one row of it; one that is tied to the output projection is read there.
    """
    read: dict[int, int] = {}
    for module in model.modules():
        if is_quantised(module):
            read[id(module)] = int(module.nbytes)  # type: ignore[arg-type]
        if not isinstance(module, nn.Embedding):
            read |= {parameter.data_ptr(): parameter.nbytes for parameter in module.parameters(recurse=False)}
    return sum(read.values())


def ceiling(ff_share: float, density: float) -> float:
    """Speed-up at most: `1 / (1 - f (1 - density))` with the share f of the FF in all bytes of weights read."""
    return 1 / (1 - ff_share * (1 - density))
