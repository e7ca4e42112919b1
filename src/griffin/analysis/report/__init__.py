"""One HTML page with the results of a sweep. It works offline, on small screens, and in light and dark mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from griffin.analysis.cells import Cell
from griffin.analysis.folder import Folder
from griffin.analysis.report import figures, tables
from griffin.analysis.report.comparisons import Comparisons
from griffin.analysis.report.page import render
from griffin.version import __version__


def report(folder: Folder, *, without_text: bool = False) -> str:
    """The page of a results folder.

    Args:
        folder: the folder that `griffin.analysis.folder.read` returned.
        without_text: leave out prompts and answers.

    Raises:
        ValueError: the folder has no finished cell, cells of several models, or a malformed file in `equal_bytes/`.
        GriffinError: jinja2 or plotly is not installed, or a file of samples cannot be read.
    """
    if not folder.cells:
        raise ValueError(f"{folder.path} holds no finished cell yet; run griffin sweep first")
    cells = list(folder.cells.values())
    models = {cell.model.fingerprint: cell.model for cell in cells}
    if len(models) > 1:
        names = ", ".join(f"{model.name} ({model.fingerprint})" for model in models.values())
        raise ValueError(f"{folder.path} holds results of several models: {names}; give each its own folder")
    comparisons = Comparisons(folder)
    plots: dict[str, Any] = {}

    def plot(figure: dict[str, Any], height: int = 340) -> dict[str, Any]:
        name = f"plot-{len(plots)}"
        plots[name] = figure
        return {"name": name, "height": height}

    return render(
        model=cells[0].model,
        version=__version__,
        about=_about(cells),
        warnings=folder.warnings,
        summary=tables.summary(comparisons),
        tasks=[_task(comparisons, name, cells, plot) for name, cells in comparisons.sets("task").items()],
        texts=_texts(comparisons, plot),
        equal_bytes=tables.at_equal_bytes(folder.path),
        speed=_speed(comparisons, plot),
        flocking=[_flocking(comparisons, cell, plot) for cell in comparisons.cells("flocking")],
        answers=[] if without_text else tables.answers(comparisons),
        plots=plots,
    )


def _task(comparisons: Comparisons, name: str, cells: Sequence[Cell], plot: Any) -> dict[str, Any]:
    metric = tables.main_metric(cells)
    return {
        "name": name,
        "metric": metric,
        "n": max(cell.n for cell in cells),
        "truncated": max(cell.truncated for cell in cells),
        "plot": plot(figures.quality(comparisons, cells, metric), 300),
        "table": tables.every_metric(comparisons, cells),
    }


def _texts(comparisons: Comparisons, plot: Any) -> list[dict[str, Any]]:
    texts = []
    for text, cells in comparisons.sets("perplexity").items():
        longest_prompt = max(cell.key.prompt or 0 for cell in cells)
        longest = max(cell.key.generate or 0 for cell in cells)
        against_prompt = [cell for cell in cells if cell.key.generate == longest]
        against_generated = [cell for cell in against_prompt if cell.key.prompt == longest_prompt]
        texts.append(
            {
                "name": text,
                "n": max(cell.n for cell in cells),
                "prompt": longest_prompt,
                "generate": longest,
                "against_prompt": plot(figures.perplexity_against_prompt(against_prompt), 400),
                "against_generated": plot(figures.perplexity_against_generated(against_generated), 400),
                "table": tables.perplexities(comparisons, cells),
            }
        )
    return texts


def _speed(comparisons: Comparisons, plot: Any) -> dict[str, Any] | None:
    cells = comparisons.cells("speed")
    if not cells:
        return None
    key, data = cells[0].key, cells[0].data
    return {
        "prompt": key.prompt,
        "generate": key.generate,
        "backend": data["backend"],
        "weights": data["weights"],
        "plot": plot(figures.speed(cells), 400),
        "table": tables.speeds(cells),
    }


def _flocking(comparisons: Comparisons, cell: Cell, plot: Any) -> dict[str, Any]:
    pictures = comparisons.samples(cell).get("pictures", [])
    return {
        "text": cell.key.task,
        "n": cell.n,
        "pictures": [
            {
                "layer": int(picture["layer"]),
                "neurons": int(picture["shape"][1]),
                "maps": [(name, plot(figures.heat_map(image), 260)) for name, image in picture["maps"].items()],
            }
            for picture in pictures
        ],
        "jaccard": plot(
            figures.per_layer(
                {f"density {density}": values for density, values in cell.data["jaccard"].items()},
                "Jaccard overlap of experts",
                {f"density {density}": chance for density, chance in cell.data["chance"].items()},
            ),
            400,
        ),
        "energy": plot(
            figures.per_layer(
                {f"density {density}": values for density, values in cell.data["energy"].items()},
                "share of the statistic's energy",
            ),
            400,
        ),
    }


def _about(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """What the figures were measured with: one value for all cells, or each value with its number of cells."""
    return [
        ("measured", _span(cell.date[:10] for cell in cells)),
        ("cells", f"{len(cells)}, {sum(cell.seconds for cell in cells) / 60:.1f} minutes in all"),
        (
            "versions",
            _counted(", ".join(f"{name} {version}" for name, version in cell.versions.items()) for cell in cells),
        ),
        ("processor", _counted(_machine(cell) for cell in cells)),
        ("seed", _counted(str(cell.key.seed) for cell in cells)),
    ]


def _machine(cell: Cell) -> str:
    about = cell.machine
    return (
        f"{about.get('cpu', 'unknown')}, {about.get('cpu_cores', '?')} cores, {about.get('torch_threads', '?')} threads"
    )


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{value} ({count} cells)" for value, count in counts.items())


def _span(dates: Iterable[str]) -> str:
    ordered = sorted(dates)
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1])))
