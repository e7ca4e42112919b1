"""The report's tables and texts for the page's template, as strings that are not escaped yet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from griffin.analysis.cells import FULL, Cell
from griffin.analysis.report.comparisons import PERPLEXITY, Comparisons, Score, Setting
from griffin.text_files import read_text

# The metric that papers report for a task, if it is not the first one of the harness.
_USUAL = {"arc_challenge": "acc_norm", "coqa": "f1", "hellaswag": "acc_norm", "piqa": "acc_norm"}


@dataclass(frozen=True)
class Entry:
    """One figure in a table: its value, its difference to the full model's, and the verdict on the difference."""

    value: str
    interval: str = ""
    difference: str = ""
    verdict: str = ""


@dataclass
class TableRow:
    """One setting in a table, with its figures by column."""

    name: str
    density: str
    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table: rows, and the columns' headings, each with a line that explains it."""

    columns: dict[str, str]
    rows: list[TableRow]


@dataclass(frozen=True)
class ComparedAnswer:
    """An answer compared with the full model's: the shared text, the first token that differs, and the rest."""

    name: str
    tokens: int
    differs_at: int | None  # number of the first token that differs, from 1; `None` if no token differs
    shared: str
    differing: str
    rest: str


def at_equal_bytes(folder: Path) -> list[tuple[str, Table]]:
    """Tables of the files `equal_bytes/*.csv` of a folder, as benchmarks/ablation.py and benchmarks/loss.py write them.

    Raises:
        ValueError: a file is not such a table.
    """
    tables = []
    columns = {"KL": "nats a token", "ratio": "to plain GRIFFIN at the same bytes", "agreement": "top-1"}
    for path in sorted((folder / "equal_bytes").glob("*.csv")):
        rows = []
        try:
            lines = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
            for line in lines:
                spans = {
                    name: f"{float(line[f'{name}_low']):.3f} to {float(line[f'{name}_high']):.3f}"
                    for name in ("kl", "ratio")
                }
                entries = {
                    "KL": Entry(f"{float(line['kl']):.4f}", spans["kl"]),
                    "ratio": Entry(f"{float(line['ratio']):.3f}x", spans["ratio"], spans["ratio"]),
                    "agreement": Entry(f"{float(line['agreement']):.1%}"),
                }
                rows.append(TableRow(line["method"], line.get("bytes") or line["density"], entries))
            about = lines[0]
            title = f"{about['prompt_tokens']} + {about['generated_tokens']} tokens, {about['weights']} weights"
            tables.append((f"{title}, {about['sequences']} sequences", Table(columns, rows)))
        except (KeyError, ValueError, IndexError, OSError) as error:
            raise ValueError(
                f"{path} is no table of benchmarks/ablation.py or benchmarks/loss.py: {error!r}"
            ) from error
    return tables


def main_metric(cells: Sequence[Cell]) -> str:
    """The metric that the summary shows for a task: the usual one, else the first one."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.metrics))
    usual = _USUAL.get(cells[0].key.task or "")
    return usual if usual in names else next(iter(names), "")


def summary(comparisons: Comparisons) -> Table:
    """A row for each setting; columns: speed-up, perplexity after the longest prompt, each task's main metric."""
    columns: dict[str, str] = {}
    rows: dict[Setting, TableRow] = {}
    cells = comparisons.cells("speed")
    if cells:
        _add(columns, rows, "speed-up", "of the generation phase", _scores(comparisons, cells, "speedup"))
    for text, measured in comparisons.sets("perplexity").items():
        cells = _longest(measured)
        key = cells[0].key
        what = f"perplexity, {key.prompt} + {key.generate} tokens, n = {_numbers(cell.n for cell in cells)}"
        _add(columns, rows, text, what, _scores(comparisons, cells, PERPLEXITY))
    for task, cells in comparisons.sets("task").items():
        metric = main_metric(cells)
        what = f"{metric}, n = {_numbers(cell.n for cell in cells)}"
        _add(columns, rows, task, what, _scores(comparisons, cells, metric))
    return Table(columns, [rows[setting] for setting in sorted(rows, key=lambda setting: setting.order)])


def every_metric(comparisons: Comparisons, cells: Sequence[Cell]) -> Table:
    """All figures of a task."""
    columns: dict[str, str] = {}
    rows: dict[Setting, TableRow] = {}
    for metric in dict.fromkeys(name for cell in cells for name in cell.metrics):
        better = next(cell.metrics[metric].higher_is_better for cell in cells if metric in cell.metrics)
        _add(
            columns,
            rows,
            metric,
            "higher is better" if better else "lower is better",
            _scores(comparisons, cells, metric),
        )
    return Table(columns, list(rows.values()))


def perplexities(comparisons: Comparisons, cells: Sequence[Cell]) -> Table:
    """All lengths of one text: perplexity, KL divergence and top-1 agreement."""
    columns: dict[str, str] = {}
    rows: dict[Setting, TableRow] = {}
    for prompt, generate in sorted({(cell.key.prompt or 0, cell.key.generate or 0) for cell in cells}):
        cells_at_length = [cell for cell in cells if (cell.key.prompt, cell.key.generate) == (prompt, generate)]
        _add(columns, rows, f"{prompt} + {generate}", PERPLEXITY, _scores(comparisons, cells_at_length, PERPLEXITY))
    longest = _longest(cells)
    for metric, what in (("kl", "KL divergence from the full model, nats"), ("agreement", "same likeliest token")):
        scores = _scores(comparisons, [cell for cell in longest if cell.key.method != FULL], metric)
        _add(columns, rows, metric, what, scores)
    return Table(columns, list(rows.values()))


def speeds(cells: Sequence[Cell]) -> Table:
    """Tokens per second, bytes per second, and the ceiling."""
    columns = {
        "generation": "tokens/s",
        "prompt": "tokens/s",
        "speed-up": "of the generation",
        "ceiling": "1 / (1 - f (1 - density))",
        "read": "GB/s of weights",
        "bandwidth": "share of the memory's",
        "selection": "ms, once a prompt",
    }
    rows = []
    for cell in cells:
        data, share = cell.data, cell.data["share_of_read_bandwidth"]
        texts = (
            f"{data['generation_tokens_per_s']:.1f}",
            f"{data['prompt_tokens_per_s']:.0f}",
            f"{data['speedup']:.2f}x",
            f"{data['ceiling']:.2f}x",
            f"{data['bytes_per_s'] / 1e9:.1f}",
            "?" if share is None else f"{share:.0%}",
            f"{data['selection_ms']:.1f}",
        )
        row = _row(Setting.of(cell.key))
        row.entries = {name: Entry(text) for name, text in zip(columns, texts, strict=True)}
        rows.append(row)
    return Table(columns, rows)


def answers(comparisons: Comparisons) -> list[tuple[str, list[ComparedAnswer]]]:
    """Each example's prompt with the answers to it, the full model's first."""
    cells = [cell for cell in comparisons.cells("examples") if comparisons.texts(cell)]
    full = next((cell for cell in cells if cell.key.method == FULL), None)
    if full is None:
        return []
    theirs = comparisons.samples(full)["tokens"]
    compared = [(cell, comparisons.texts(cell)["pieces"]) for cell in cells if comparisons.full(cell) == full]
    examples = []
    for at, prompt in enumerate(comparisons.texts(full)["prompts"]):
        shown = [
            _answer(cell, comparisons.samples(cell)["tokens"][at], pieces[at], theirs[at]) for cell, pieces in compared
        ]
        examples.append((str(prompt), shown))
    return examples


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ or the shorter one ends; `None` if they are equal."""
    for at, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return at
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def number(value: float) -> str:
    """Format a figure with about four significant digits."""
    if math.isnan(value):
        return "?"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _answer(cell: Cell, ours: Sequence[int], pieces: Sequence[str], theirs: Sequence[int]) -> ComparedAnswer:
    index = first_difference(ours, theirs)
    cut = len(pieces) if index is None else index
    # A character of several tokens comes with the last of them, so a token's own text may be empty.
    end = next((place + 1 for place in range(cut, len(pieces)) if pieces[place]), cut)
    name = Setting.of(cell.key).name
    return ComparedAnswer(
        name=name if cell.key.method == FULL else f"{name}, density {cell.key.density:g}",
        tokens=len(ours),
        differs_at=None if index is None else index + 1,
        shared="".join(pieces[:cut]),
        differing="".join(pieces[cut:end]),
        rest="".join(pieces[end:]),
    )


def _longest(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the longest prompt and generation."""
    most = max((cell.key.prompt or 0, cell.key.generate or 0) for cell in cells)
    return [cell for cell in cells if (cell.key.prompt or 0, cell.key.generate or 0) == most]


def _scores(comparisons: Comparisons, cells: Sequence[Cell], metric: str) -> list[Score]:
    scores = [comparisons.score(cell, metric) for cell in cells]
    return [score for score in scores if score is not None]


def _add(
    columns: dict[str, str], rows: dict[Setting, TableRow], column: str, what: str, scores: Sequence[Score]
) -> None:
    while column in columns:
        column += "'"
    columns[column] = what
    for score in scores:
        setting = Setting.of(score.cell.key)
        rows.setdefault(setting, _row(setting)).entries[column] = _entry(score)


def _row(setting: Setting) -> TableRow:
    return TableRow(setting.name, f"{setting.density:g}")


def _entry(score: Score) -> Entry:
    metric, difference = score.metric, score.difference
    interval = "" if math.isnan(metric.low) else f"{number(metric.low)} to {number(metric.high)}"
    text = ""
    if difference is not None:
        unit = "" if not score.relative else "%" if difference.value < 1 else "x"
        text = _signed(difference.value, unit)
        if not math.isnan(difference.low):
            text += f" ({_signed(difference.low, unit)} to {_signed(difference.high, unit)})"
    return Entry(number(metric.value), interval, text, score.verdict)


def _signed(value: float, unit: str) -> str:
    """Format a difference: as it is, as a share in %, or, above 100%, as a multiple of the full model's figure."""
    if math.isnan(value):
        return "?"
    if unit == "x":
        return f"{1 + value:,.1f}x" if value < 99 else f"{1 + value:,.0f}x"
    text = f"{value:+.1%}" if unit == "%" else f"{value:+.3f}"
    return text.replace("-", "\u2212")


def _numbers(values: Any) -> str:
    ordered = sorted(set(values))
    return " to ".join(str(value) for value in dict.fromkeys((ordered[0], ordered[-1])))
