"""The report's plots as data for plotly.js. The page sets the colours of background and text, by its theme."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import cycle, groupby
from typing import Any

from griffin.analysis.cells import FULL, Cell
from griffin.analysis.report.comparisons import PERPLEXITY, Comparisons, Score, Setting

Plot = dict[str, Any]

# Okabe and Ito's colours for colour-blind readers, bright enough for a light and a dark background.
_COLOURS = {
    "topk": "#1f8fd6",
    "dynamic+topk": "#2fb344",
    "prior+dynamic+topk": "#0b7d3e",
    "topk_sample": "#12a383",
    "sample": "#7a6ff0",
    "magnitude": "#e08a00",
    "wanda": "#cc5fa5",
    "random": "#d9513c",
}
_OTHERS = ("#8c8c3a", "#4f9da6", "#a0643c")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_MAGMA = ("#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf")
PICTURE_SCALE = [[at / (len(_MAGMA) - 1), colour] for at, colour in enumerate(_MAGMA)]


def quality(comparisons: Comparisons, cells: Sequence[Cell], metric: str) -> Plot:
    """A task's figure against density: a line for each method, and a horizontal line for the full model."""
    scores = [score for cell in cells if (score := comparisons.score(cell, metric)) is not None]
    full = [score for score in scores if score.cell.key.method == FULL]
    lines = [
        _line(
            name,
            [score.cell.key.density for score in points],
            [score.metric.value for score in points],
            colour=_colour(method),
            mode="lines+markers",
            error_y=_error_bars(points),
            hovertemplate="density %{x}: %{y:.4g}",
        )
        for (name, method), pruned in _by_setting(score for score in scores if score.cell.key.method != FULL)
        for points in [[*full[:1], *pruned]]  # every method is the full model at density 1
    ]
    if full:
        lines.insert(0, _level(full[0].metric.value, [score.cell.key.density for score in scores]))
    return _plot(lines, "density", metric.replace("_", " "))


def perplexity_against_prompt(cells: Sequence[Cell]) -> Plot:
    """Perplexity against the length of the prompt, a line for each method and density."""
    lines = []
    for (name, method, dash), line_cells in _by_method_and_density(cells):
        lines.append(
            _line(
                name,
                [cell.key.prompt for cell in line_cells],
                [cell.metrics[PERPLEXITY].value for cell in line_cells],
                colour=_colour(method),
                dash=dash,
                mode="lines+markers",
                hovertemplate="prompt of %{x} tokens: %{y:.4g}",
            )
        )
    lengths = sorted({cell.key.prompt for cell in cells if cell.key.prompt})
    axis = {"type": "log", "tickvals": lengths, "ticktext": [f"{length:,}" for length in lengths]}
    return _plot(lines, "tokens of the prompt", PERPLEXITY, xaxis=axis, yaxis={"type": "log"})


def perplexity_against_generated(cells: Sequence[Cell]) -> Plot:
    """Perplexity against the distance from the prompt, a line for each method and density."""
    lines = []
    for (name, method, dash), line_cells in _by_method_and_density(cells):
        data = line_cells[-1].data
        lines.append(
            _line(
                name,
                data["position"],
                data[PERPLEXITY],
                colour=_colour(method),
                dash=dash,
                mode="lines+markers" if len(data["position"]) < 20 else "lines",
                hovertemplate="around generated token %{x}: %{y:.4g}",
            )
        )
    return _plot(lines, "tokens generated", PERPLEXITY, yaxis={"type": "log"})


def speed(cells: Sequence[Cell]) -> Plot:
    """Speed-up of the generation phase against density, beside the ceiling."""
    lines = []
    pairs = sorted({(cell.key.density, cell.data["ceiling"]) for cell in cells})
    lines.append(
        _line(
            "ceiling",
            *zip(*pairs, strict=True),
            colour=None,
            dash="dot",
            hovertemplate="density %{x}: at most %{y:.2f}x",
        )
    )
    full = [cell for cell in cells if cell.key.method == FULL]
    for method, group in groupby((cell for cell in cells if cell.key.method != FULL), key=lambda cell: cell.key.method):
        line_cells = sorted([*full, *group], key=lambda cell: cell.key.density)
        lines.append(
            _line(
                method,
                [cell.key.density for cell in line_cells],
                [cell.metrics["speedup"].value for cell in line_cells],
                colour=_colour(method),
                mode="lines+markers",
                customdata=[cell.metrics["generation_tokens_per_s"].value for cell in line_cells],
                hovertemplate="density %{x}: %{y:.2f}x, %{customdata:.4g} tokens/s",
            )
        )
    return _plot(lines, "density", "times the full model's speed")


def per_layer(series: dict[str, Sequence[float]], title: str, levels: dict[str, float] | None = None) -> Plot:
    """Lines over the layers, from 0 to 1; a name in `levels` also gets a dotted horizontal line of the same colour."""
    lines = []
    for (name, values), colour in zip(series.items(), cycle(_COLOURS.values()), strict=False):
        layers = list(range(len(values)))
        settings = {"colour": colour, "mode": "lines+markers", "hovertemplate": "layer %{x}: %{y:.3f}"}
        lines.append(_line(name, layers, values, **settings))
        if levels is not None and name in levels:
            level = [levels[name]] * len(values)
            hover = f"{html.escape(name)}, by chance: %{{y:.3f}}<extra></extra>"
            lines.append(_line(name, layers, level, colour=colour, dash="dot", showlegend=False, hovertemplate=hover))
    return _plot(lines, "layer", title, yaxis={"range": [0, 1.02]})


def heat_map(picture: dict[str, Any]) -> Plot:
    """A flocking picture, neurons by tokens, with one byte per value."""
    rows, columns = picture["shape"]
    trace = {
        "type": "heatmap",
        "z": {"dtype": "u1", "bdata": picture["bytes"], "shape": f"{int(rows)}, {int(columns)}"},
        "zmin": 0,
        "zmax": 255,
        "colorscale": PICTURE_SCALE,
        "showscale": False,
        "hovertemplate": "token %{y}, neuron %{x}<extra></extra>",
    }
    plot = _plot(
        [trace], "FF neuron", "token", xaxis={"showgrid": False}, yaxis={"showgrid": False, "autorange": "reversed"}
    )
    plot["layout"]["showlegend"] = False
    return plot


def _by_setting(scores: Iterable[Score]) -> Iterable[tuple[tuple[str, str], list[Score]]]:
    settled = sorted(((Setting.of(score.cell.key), score) for score in scores), key=lambda pair: pair[0].order)
    for (name, method), group in groupby(settled, key=lambda pair: (pair[0].name, pair[0].method)):
        yield (name, method), [score for _, score in group]


def _by_method_and_density(cells: Sequence[Cell]) -> Iterable[tuple[tuple[str, str, str], list[Cell]]]:
    densities = sorted({cell.key.density for cell in cells if cell.key.method != FULL}, reverse=True)
    for setting, group in groupby(cells, key=lambda cell: Setting.of(cell.key)):
        full = setting.method == FULL
        name = setting.name if full else f"{setting.name} {setting.density:g}"
        dash = "solid" if full else _DASHES[densities.index(setting.density) % len(_DASHES)]
        yield (name, setting.method, dash), list(group)


def _error_bars(scores: Sequence[Score]) -> Plot:
    def length(end: float, value: float) -> float | None:
        return None if math.isnan(end) else abs(end - value)

    return {
        "type": "data",
        "symmetric": False,
        "array": [length(score.metric.high, score.metric.value) for score in scores],
        "arrayminus": [length(score.metric.low, score.metric.value) for score in scores],
        "thickness": 1,
        "width": 3,
    }


def _level(value: float, densities: Sequence[float]) -> Plot:
    ends = [min(densities, default=0.0), 1.0]
    return _line("full model", ends, [value, value], colour=None, dash="dash", hovertemplate="full model: %{y:.4g}")


def _line(name: str, x: Any, y: Any, *, colour: str | None, dash: str = "solid", **settings: Any) -> Plot:
    """A line; without a colour it takes the text's colour."""
    ink: Plot = {"dash": dash, "width": 2} | ({} if colour is None else {"color": colour})
    trace: Plot = {
        "type": "scatter",
        "mode": "lines",
        "name": html.escape(name),
        "x": list(x),
        "y": _finite(y),
        "line": ink,
    }
    return trace | settings


def _finite(values: Iterable[float | None]) -> list[float | None]:
    return [value if value is not None and math.isfinite(value) else None for value in values]


def _colour(method: str) -> str | None:
    if method == FULL:
        return None
    return _COLOURS.get(method) or _OTHERS[sum(map(ord, method)) % len(_OTHERS)]


def _plot(traces: Sequence[Plot], x: str, y: str, *, xaxis: Plot | None = None, yaxis: Plot | None = None) -> Plot:
    layout = {
        "xaxis": {"title": {"text": html.escape(x)}, **(xaxis or {})},
        "yaxis": {"title": {"text": html.escape(y)}, **(yaxis or {})},
    }
    return {"data": list(traces), "layout": layout}
