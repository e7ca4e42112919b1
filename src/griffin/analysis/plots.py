"""Pictures of measurements. No other module imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from griffin.errors import GriffinError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from griffin.analysis.perplexity import PerplexityRow


def flocking_heat_map(activations: Tensor, title: str, path: Path) -> None:
    """Draw relative activation magnitudes as a heat map, neurons by tokens, and save it as PNG.

    Vertical streaks are flocking: neurons on which the tokens agree. The scale ends at the 99th percentile, since a few
    entries are far larger than all others.

    Shapes:
        activations: (S, D_ff), not negative.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    flocking_heat_maps({title: activations}, "", path)


def flocking_heat_maps(activations: Mapping[str, Tensor], title: str, path: Path) -> None:
    """Draw several heat maps as `flocking_heat_map` does, one above the other, on the scale of the first.

    Args:
        activations: activations by the title of their heat map.
        title: title of the whole picture.
        path: the file to write.

    Shapes:
        activations: each (S, D_ff), not negative.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    reference = next(iter(activations.values()))
    most = max(float(reference.quantile(0.99)) if reference.numel() < 2**24 else float(reference.max()), 1e-12)
    figure = _figure(10, 1.2 + 3.0 * len(activations))
    figure.suptitle(title)
    panels = figure.subplots(len(activations), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, values) in zip(panels, activations.items(), strict=True):
        image = axes.imshow(
            values.numpy(), aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=most, rasterized=True
        )
        axes.set(title=name, ylabel="token")
    panels[-1].set_xlabel("FF neuron")
    figure.colorbar(image, ax=panels, label="relative activation |Z̄|")
    _save(figure, path)


def lines_against_layer(lines: Mapping[str, Tensor], label: str, title: str, path: Path) -> None:
    """Draw values of every layer, such as overlaps or shares of energy, as lines, and save them as PNG.

    Args:
        lines: values by the name of their line.
        label: label of the values' axis.
        title: title of the picture.
        path: the file to write.

    Shapes:
        lines: each (layers,), from 0 to 1.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure(7, 4.2)
    axes = figure.add_subplot()
    for name, values in lines.items():
        axes.plot(range(len(values)), values.tolist(), marker="o", markersize=3, label=name)
    axes.set(title=title, xlabel="layer", ylabel=label, ylim=(0.0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def overlap_matrix(overlap: Tensor, title: str, path: Path) -> None:
    """Draw the pairwise overlap of the sequences' experts as a matrix with its numbers, and save it as PNG.

    Shapes:
        overlap: (N, N), from 0 to 1.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    n = overlap.shape[0]
    figure = _figure(2.5 + 0.45 * n, 1.8 + 0.45 * n)
    axes = figure.add_subplot()
    image = axes.imshow(overlap.numpy(), cmap="viridis", vmin=0.0, vmax=1.0)
    for row in range(n):
        for column in range(n):
            value = float(overlap[row, column])
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set(title=title, xlabel="sequence", ylabel="sequence", xticks=range(n), yticks=range(n))
    figure.colorbar(image, label="Jaccard overlap of the experts")
    _save(figure, path)


def perplexity_against_length(rows: Sequence[PerplexityRow], title: str, path: Path) -> None:
    """Draw perplexity against the lengths of prompt and continuation, with its intervals, and save it as PNG.

    Each of the two lengths that has several values gets a panel, with the other length at its maximum. The perplexity
    axis is logarithmic, as some selections are far worse than others.

    Args:
        rows: rows of any densities, selections and lengths.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    longest = max(row.prompt_tokens for row in rows), max(row.generated_tokens for row in rows)
    panels = [("prompt_tokens", "tokens of the prompt", [row for row in rows if row.generated_tokens == longest[1]])]
    by_generated = [row for row in rows if row.prompt_tokens == longest[0]]
    if len({row.generated_tokens for row in rows}) > 1:
        if len({row.prompt_tokens for row in rows}) == 1:
            panels = []
        panels.append(("generated_tokens", "tokens generated", by_generated))
    figure = _figure(5.5 * len(panels) + 1.5, 4.4)
    figure.suptitle(title)
    for axes, (length, label, panel_rows) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        _perplexity_lines(axes, panel_rows, length)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({getattr(row, length) for row in panel_rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        other = f"{longest[1]} generated" if length == "prompt_tokens" else f"prompts of {longest[0]}"
        axes.set(title=other, xlabel=label, ylabel="perplexity")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


def frontier(lines: Mapping[str, Sequence[tuple[float, float, str]]], across: str, loss: str, path: Path) -> None:
    """Draw losses against bytes or speed, on a logarithmic scale, and save them as PNG.

    Args:
        lines: points by the name of their line: place, loss above 0, and a word beside it or "". The first line is
            what the others are compared with.
        across: label of the places' axis.
        loss: label of the losses' axis.
        path: the file to write.

    Raises:
        GriffinError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure(9, 6)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        ordered = sorted(points)
        style: dict[str, Any] = (
            {"color": "black", "linewidth": 2.0} if number == 0 else {"color": f"C{number - 1}", "alpha": 0.8}
        )
        axes.plot([x for x, _, _ in ordered], [y for _, y, _ in ordered], marker="o", markersize=4, label=name, **style)
        for x, y, word in ordered:
            axes.annotate(word, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=across, ylabel=loss, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _save(figure, path)


def _perplexity_lines(axes: Axes, rows: Sequence[PerplexityRow], length: str) -> None:
    lines = {(row.density, row.selection): row for row in rows if row.density < 1.0}
    full = sorted({getattr(row, length): row.full_perplexity for row in rows}.items())
    curves = [("full model", [at for at, _ in full], [interval for _, interval in full])]
    for density, selection in lines:
        line_rows = sorted(
            (row for row in rows if (row.density, row.selection) == (density, selection)),
            key=lambda row: int(getattr(row, length)),
        )
        name = f"{selection}, density {density:g}"
        curves.append((name, [getattr(row, length) for row in line_rows], [row.perplexity for row in line_rows]))
    for number, (name, lengths, intervals) in enumerate(curves):
        color = "black" if number == 0 else f"C{number - 1}"
        axes.plot(lengths, [one.value for one in intervals], marker="o", color=color, label=name)
        axes.fill_between(
            lengths, [one.low for one in intervals], [one.high for one in intervals], color=color, alpha=0.12
        )


def _figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that uses no window and no global state of matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GriffinError("drawing needs matplotlib; install it with: pip install 'griffin-llm[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        raise GriffinError(f"cannot write the picture to {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
