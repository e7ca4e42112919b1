"""The numbers behind a block of the native library, for checks before anything is timed."""

from __future__ import annotations

from torch import Tensor

from griffin.native import operands
from griffin.native.grouped import Packed


def numbers(matrix: operands.Matrix) -> Tensor:
    """A matrix's rows as they are stored, float32. Shapes: (out, in), neuron-major (in, out)."""
    stored = matrix.kept[0]
    rows: Tensor = stored.unpack() if isinstance(stored, Packed) else stored.float()
    return rows
