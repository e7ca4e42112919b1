"""`griffin report`: the page of a small sweep, in a real browser where there is one."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from griffin.analysis import machine
from griffin.analysis.bootstrap import geometric_interval, paired_interval
from griffin.analysis.cells import FULL, CellResult, Key, Metric, Model
from griffin.analysis.folder import read, writing
from griffin.analysis.report import report, tables
from griffin.analysis.report.comparisons import Comparisons
from griffin.analysis.report.tables import first_difference
from griffin.cli import main
from test_cli import CONTEXT, TEMPLATE, save_tiny

HOSTILE = "</script><b>&\"'"
FULL_VALUES = [1.0, 1, 1, 0, 1, 1, 1, 0, 1, 1]
VALUES = {0.75: [1.0, 1, 1, 0, 1, 1, 1, 0, 0, 1], 0.5: [0.0, 0, 1, 0, 0, 0, 1, 0, 0, 0]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of every kind: of a tiny model, and a task whose values are known."""
    folder = tmp_path_factory.mktemp("results")
    model = save_tiny(tmp_path_factory.mktemp("tiny"), TEMPLATE, 2 * CONTEXT)
    text = folder / f"{HOSTILE.replace('/', '')}.txt"
    text.write_text(" ".join(f"w{(7 * number + number // 5) % 95}" for number in range(4000)))
    wanted = ["--flocking", "--examples", "--speed", "--perplexity", str(text), "--prompt", "16,64", "--generate", "32"]
    arguments = ["sweep", "-m", model, *wanted, "--sequences", "4", "--methods", "topk,random", "-o", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_BUFFER_BYTES", 2**20)  # as in tests/test_bench.py: no speed is tested
        patch.setattr(machine, "_LEAST_BUFFER_BYTES", 2**10)
        assert main(arguments) == 0
    own = next(iter(read(folder).cells.values())).model
    with writing(folder, own, machine.versions()) as opened:
        for density, values in {1.0: FULL_VALUES, **VALUES}.items():
            method, phase = (FULL, None) if density == 1.0 else ("topk", "continuation")
            key = Key("task", method, density, task="boolq", source="files", phase=phase, limit=10)
            metrics = {"acc": Metric(sum(values) / 10, 0.1, 0.9)}
            texts = {"samples": [{"response": "TASKTEXT"}]}
            found = CellResult(metrics, 10, 1, samples={"values": {"acc": values}}, texts=texts)
            opened.append(key, own, found, 1.0, machine.versions(), {})
    return folder


@pytest.fixture(scope="module")
def page(results: Path) -> Path:
    assert main(["report", str(results)]) == 0
    return results / "report.html"


def test_differences_are_the_paired_ones(results: Path) -> None:
    comparisons = Comparisons(read(results))
    cells = [cell for cell in comparisons.cells("task") if cell.key.method == "topk"]
    close, far = comparisons.scores(cells)
    assert close.difference == paired_interval(VALUES[0.75], FULL_VALUES)
    assert (close.verdict, far.verdict) == ("unclear", "worse")
    full = comparisons.full(cells[0])
    assert full is not None
    score = comparisons.score(full, "acc")
    assert score is not None
    assert score.difference is None
    texts = [cell for cell in comparisons.cells("perplexity") if cell.key.method == "topk"]
    for score in comparisons.scores(texts):
        if score.name == "perplexity":
            full = comparisons.full(score.cell)
            assert full is not None
            assert score.difference is not None
            expected = score.metric.value / full.metrics["perplexity"].value - 1
            assert score.difference.value == pytest.approx(expected, rel=1e-4)  # float32 sums in another order


def test_the_difference_of_two_perplexities_of_documents(tmp_path: Path) -> None:
    values = {1.0: [10.0, 20.0, 30.0], 0.5: [11.0, 24.0, 30.0]}
    words = [100.0, 300.0, 50.0]
    model = Model("m", "0", "float32", "float32")
    with writing(tmp_path, model, machine.versions()) as opened:
        for density, own in values.items():
            key = Key("task", FULL if density == 1.0 else "topk", density, task="wikitext2", source="files")
            found = geometric_interval(own, weights=words)
            metrics = {"word_perplexity": Metric(found.value, found.low, found.high, higher_is_better=False)}
            samples = {"values": {"word_perplexity": own}, "weights": {"word_perplexity": words}}
            opened.append(key, model, CellResult(metrics, 3, 0, samples=samples), 1.0, machine.versions(), {})
    comparisons = Comparisons(read(tmp_path))
    score = comparisons.score(comparisons.cells("task")[1], "word_perplexity")
    assert score is not None
    assert score.difference is not None
    share = math.exp((100 * math.log(1.1) + 300 * math.log(1.2)) / 450) - 1
    assert score.difference.value == pytest.approx(share)
    assert 0.0 <= score.difference.low < share < score.difference.high <= 0.2 + 1e-9
    assert score.verdict == "unclear"  # of three documents


def test_figures_of_other_examples_stand_apart(tmp_path: Path) -> None:
    model = Model("m", "0", "float32", "float32")
    with writing(tmp_path, model, machine.versions()) as opened:
        for limit, density in ((50, 1.0), (50, 0.75), (200, 1.0), (200, 0.5)):
            method = FULL if density == 1.0 else "topk"
            key = Key("task", method, density, task="boolq", source="files", limit=limit)
            values = [float(limit == 50 or number % 3 > 0) for number in range(limit)]
            samples = {"values": {"acc": values}, "doc_ids": list(range(limit))}
            metrics = {"acc": Metric(sum(values) / limit, 0.0, 1.0)}
            opened.append(key, model, CellResult(metrics, limit, 0, samples=samples), 1.0, machine.versions(), {})
    comparisons = Comparisons(read(tmp_path))
    assert {name: [cell.key.density for cell in own] for name, own in comparisons.sets("task").items()} == {
        "boolq (50 examples)": [1.0, 0.75],
        "boolq (200 examples)": [1.0, 0.5],
    }
    table = tables.summary(comparisons)
    entries = {(row.density, name): entry.value for row in table.rows for name, entry in row.entries.items()}
    assert entries == {
        ("1", "boolq (50 examples)"): "1.000",
        ("0.75", "boolq (50 examples)"): "1.000",
        ("1", "boolq (200 examples)"): "0.665",
        ("0.5", "boolq (200 examples)"): "0.665",
    }


def test_rows_of_the_summary(tmp_path: Path) -> None:
    """Experts of each sequence are a method's usual ones, shared ones are not; a task is shown by its usual metric."""
    model = Model("m", "0", "float32", "float32")
    full = {"method": FULL, "density": 1.0}
    half = {"method": "topk", "density": 0.5}
    with writing(tmp_path, model, machine.versions()) as opened:
        for key in (
            Key("task", **full, task="piqa", batch_size=8),
            Key("task", **half, task="piqa", batch_size=8, batch="per_sequence", phase="continuation"),
            Key("task", **half, task="piqa", batch_size=8, batch="shared", phase="continuation"),
            Key("task", **half, task="piqa", batch_size=8, batch="per_sequence", phase="last_token"),
            *(Key("perplexity", **own, task="text", source=f"ab, windows of {window} + 8", prompt=window, generate=8)
              for own in (full, half) for window in (16, 64)),
        ):  # fmt: skip
            names = ("acc", "acc_norm") if key.kind == "task" else ("perplexity",)
            found = CellResult({name: Metric(0.5) for name in names}, 20, 0)
            opened.append(key, model, found, 1.0, machine.versions(), {})
    table = tables.summary(Comparisons(read(tmp_path)))
    texts = ["text (windows of 16 + 8)", "text (windows of 64 + 8)"]
    assert list(table.columns) == [*texts, "piqa"]
    assert table.columns["piqa"].startswith("acc_norm")
    assert {f"{row.name} {row.density}": list(row.entries) for row in table.rows} == {
        "full model 1": [*texts, "piqa"],
        "topk 0.5": [*texts, "piqa"],
        "topk, last token 0.5": ["piqa"],
        "topk, shared by a batch of 8 0.5": ["piqa"],
    }


def test_other_examples_are_not_paired(tmp_path: Path) -> None:
    model = Model("m", "0", "float32", "float32")
    with writing(tmp_path, model, machine.versions()) as opened:
        for density, ids in ((1.0, range(20)), (0.5, range(1, 21))):
            key = Key("task", FULL if density == 1.0 else "topk", density, task="boolq", source="files")
            samples = {"values": {"acc": [density, 0.0] * 10}, "doc_ids": list(ids)}
            found = CellResult({"acc": Metric(density / 2, 0.0, 1.0)}, 20, 0, samples=samples)
            opened.append(key, model, found, 1.0, machine.versions(), {})
    comparisons = Comparisons(read(tmp_path))
    score = comparisons.score(comparisons.cells("task")[1], "acc")
    assert score is not None
    assert score.difference is not None
    assert score.difference.value == -0.25
    assert math.isnan(score.difference.low)


def test_the_first_token_that_differs() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


def test_the_page_is_whole_and_escaped(page: Path) -> None:
    text = page.read_text()
    assert HOSTILE.replace("/", "") not in text
    assert text.count("<script") == text.count("</script>") == 3 + text.count("<script>\\")
    assert "TASKTEXT" not in text  # texts of tasks are never shown
    own = text.split("<script>")[0]
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", own)
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert len(plots) == 1 + 2 + 1 + 9 + 2  # task, perplexity twice, speed, pictures, overlap and energy


def test_without_text_no_prompt_and_no_answer_is_in_it(results: Path, page: Path, tmp_path: Path) -> None:
    assert "<mark>" in page.read_text()
    bare = tmp_path / "bare.html"
    assert main(["report", str(results), "-o", str(bare), "--without-text"]) == 0
    assert "fisherman" in page.read_text()
    assert "fisherman" not in bare.read_text()
    assert 'class="answer"' not in bare.read_text()


def test_a_folder_whose_texts_were_taken_away_is_still_whole(results: Path, tmp_path: Path) -> None:
    assert "TASKTEXT" in "".join(path.read_text() for path in (results / "texts").iterdir())
    copy = tmp_path / "copy"
    shutil.copytree(results, copy, ignore=shutil.ignore_patterns("texts", "*.html"))
    assert not any("TASKTEXT" in path.read_text() for path in copy.rglob("*.json*"))
    assert read(copy).cells == read(results).cells
    assert main(["report", str(copy)]) == 0
    assert "</html>" in (copy / "report.html").read_text()


def test_a_broken_line_is_said_on_the_page(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(results, copied)
    with (copied / "cells.jsonl").open("a") as file:
        file.write('{"id": "<i>')
    assert main(["report", str(copied)]) == 0
    assert "not a whole cell" in capsys.readouterr().err
    assert "not a whole cell" in (copied / "report.html").read_text()


def test_tables_at_equal_bytes_are_on_the_page(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "own")
    (tmp_path / "own" / "equal_bytes").mkdir()
    table = tmp_path / "own" / "equal_bytes" / "a.csv"
    table.write_text(
        "weights,bytes,method,prompt_tokens,generated_tokens,sequences,kl,kl_low,kl_high,ratio,ratio_low,ratio_high,agreement\n"
        "bf16,0.5,sketch-int4,384,128,8,0.1234,0.1,0.2,0.102,0.085,0.118,0.808\n"
    )
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "own"), "-o", str(out)]) == 0
    text = out.read_text()
    for shown in ("384 + 128 tokens, bf16 weights, 8 sequences", "sketch-int4", "0.102x", "0.085 to 0.118", "80.8%"):
        assert shown in text
    table.write_text("a,b\n1,2\n")
    assert main(["report", str(tmp_path / "own"), "-o", str(tmp_path / "other.html")]) == 2
    assert not (tmp_path / "other.html").exists()


def test_a_folder_without_cells_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "missing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "cells.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "no finished cell" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("without_text", [False, True])
def test_any_part_of_the_cells_makes_a_page(results: Path, without_text: bool) -> None:
    for kind in ("task", "perplexity", "speed", "flocking", "examples"):
        folder = read(results)
        folder.cells = {name: cell for name, cell in folder.cells.items() if cell.key.kind == kind}
        assert "</html>" in report(folder, without_text=without_text)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_the_page_in_a_browser(browser: Any, page: Path, scheme: str, width: int) -> None:
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, is_mobile=width < 600, offline=True
    )
    opened = context.new_page()
    told: list[str] = []
    opened.on("console", lambda message: told.append(message.text))
    opened.on("pageerror", lambda error: told.append(str(error)))
    opened.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or told.append(request.url)
    )
    opened.goto(page.as_uri())
    plots = opened.locator(".plot")
    assert plots.count() == 15
    opened.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 15", timeout=60_000)
    assert opened.locator(".plot .scatterlayer .trace").count() > 10
    assert opened.locator(".plot .heatmaplayer image").count() == 9
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.evaluate(overflow) == 0
    for details in opened.locator("details").all():
        details.evaluate("element => { element.open = true }")
    assert opened.evaluate(overflow) == 0
    # A wide table is scrolled beside its first column; a telephone shows a card a row.
    opened.evaluate("""() => {
        for (const row of document.querySelectorAll('#summary tr'))
            for (let more = 0; more < 20; more++) row.append(row.lastElementChild.cloneNode(true));
        document.querySelector('#summary .scroll').scrollLeft = 500;
    }""")
    assert opened.evaluate(overflow) == 0
    left, right = (
        opened.locator(f"#summary tbody tr:first-child > :{place}-child").bounding_box()["x"]
        for place in ("first", "last")
    )
    if width < 600:
        assert right - left < width / 2
        assert not opened.locator("#summary thead").is_visible()
    else:
        assert 0 <= left < 100
        assert right > width
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = opened.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 3 * 128 for colour in (ground, ink)]
    assert light == ([False, True] if scheme == "dark" else [True, False])
    assert told == []
    context.close()
