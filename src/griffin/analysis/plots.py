"""Pictures. The only module that imports matplotlib."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from griffin.errors import GriffinError


def flocking_heat_map(activations: Tensor, title: str, path: Path) -> None:
    """Draw relative activation magnitudes as a heat map, neurons by tokens, and save it as PNG.

    Vertical streaks are flocking: neurons on which the tokens agree. The scale ends at the 99th percentile, since a few
    entries are far larger than all others.

    Shapes:
        activations: (S, D_ff), not negative.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GriffinError("drawing needs matplotlib; install it with: pip install 'griffin-llm[plot]'") from error
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        activations.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=0.0,
        vmax=max(float(activations.quantile(0.99)) if activations.numel() < 2**24 else float(activations.max()), 1e-12),
    )
    axes.set(title=title, xlabel="FF neuron", ylabel="token")
    figure.colorbar(image, label="relative activation |Z̄|")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        raise GriffinError(f"cannot write the picture to {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
