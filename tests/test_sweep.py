"""`griffin sweep`: the matrix, and what is left of it when it is killed, interrupted, or fails in part."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forked import Griffin
from griffin.analysis import jobs
from griffin.analysis.cells import FULL, CellResult, Key, Metric, Model
from griffin.analysis.folder import read, writing
from griffin.analysis.sweep import Job, SweepObserver, carry_out, config_of, key_of, settings
from griffin.cli import main
from griffin.config import GriffinConfig
from test_cli import CONTEXT, TEMPLATE, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), TEMPLATE, CONTEXT)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{(7 * number + number // 5) % 95}" for number in range(4000)))
    return path


def command(tiny: str, text: Path, output: Path, *more: str) -> list[str]:
    lengths = ["--prompt", "8,16,24,32", "--generate", "4,8", "--sequences", "6"]
    return ["sweep", "-m", tiny, "--perplexity", str(text), *lengths, "-o", str(output), *more]


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (path / "cells.jsonl").read_text().splitlines()]


def test_the_matrix_has_the_full_model_once() -> None:
    configs = settings(["topk", "random"], [1.0, 0.5, 0.5, 0.25], ["shared", "per_sequence"], seed=3)
    assert len(configs) == len(set(configs)) == 1 + 2 * 2 * 2
    keys = [key_of(config, "task", task="boolq") for config in configs]
    assert [key.method for key in keys].count(FULL) == 1
    assert keys[0] == Key("task", FULL, 1.0, task="boolq", seed=3)
    assert [config_of(key) for key in keys] == configs
    with pytest.raises(ValueError, match="density"):
        settings(["topk"], [1.5])


def test_a_sweep_that_is_killed_goes_on_where_it_was(tiny: str, text: Path, tmp_path: Path) -> None:
    arguments = command(tiny, text, tmp_path / "out", "--methods", "topk,magnitude", "--densities", "1.0,0.75,0.5")
    lines = tmp_path / "out" / "cells.jsonl"
    with Griffin(arguments) as process:
        try:
            deadline = time.monotonic() + 120
            while not (lines.is_file() and lines.read_bytes().count(b"\n")):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.002)
        finally:
            process.kill()
    before = lines.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 1 <= kept.count(b"\n") < 40, "killed in the middle"
    lines.write_bytes(kept + b'{"id":"0123')  # as if it had been killed in the middle of a line
    assert main(arguments) == 0
    after = lines.read_bytes()
    assert after.startswith(kept)  # what was finished is as it was
    folder = read(tmp_path / "out")
    assert len(folder.cells) == 5 * 4 * 2  # full and two methods at two densities; prompts; lengths
    assert len(after.splitlines()) == 41  # each once, and the broken one
    assert main(arguments) == 0
    assert lines.read_bytes() == after  # there was nothing left to do


def test_the_figures_are_those_of_a_sweep_that_ran_through(tiny: str, text: Path, tmp_path: Path) -> None:
    assert main(command(tiny, text, tmp_path / "whole")) == 0
    assert main(command(tiny, text, tmp_path / "parts", "--densities", "0.5")) == 0
    assert main(command(tiny, text, tmp_path / "parts")) == 0
    whole, parts = (read(tmp_path / name).cells for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(parts[name].metrics == cell.metrics for name, cell in whole.items())


def test_one_failing_cell_does_not_stop_the_others(
    tiny: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = jobs.perplexity.measure

    def measure(model: object, own: object, prompt: int, *args: object, **settings: object) -> object:
        if prompt == 16:
            raise RuntimeError("this one\nfails")
        return real(model, own, prompt, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs.perplexity, "measure", measure)
    assert main(command(tiny, text, tmp_path, "--densities", "0.5")) == 1
    error = capsys.readouterr().err
    assert "words.txt 16 + 4 tokens topk 0.5: this one fails" in error
    assert "4 of 16 cells failed" in error
    assert {cell.key.prompt for cell in read(tmp_path).cells.values()} == {8, 24, 32}
    monkeypatch.undo()
    assert main(command(tiny, text, tmp_path, "--densities", "0.5")) == 0
    assert len(ids(tmp_path)) == len(set(ids(tmp_path))) == 16


def test_a_method_that_the_model_cannot_run_is_said_first(
    tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny, text, tmp_path / "out", "--methods", "topk,prior+topk")) == 2
    assert "method prior+topk cannot be measured: selection prior+topk needs a profile" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_failing_job_has_found_is_kept(tmp_path: Path) -> None:
    keys = tuple(key_of(own, "task", task="boolq") for own in settings(["topk"], [1.0, 0.5, 0.25]))

    def measure(todo: Sequence[Key], tick: object) -> Iterator[CellResult]:
        yield CellResult({"acc": Metric(0.5)}, 1)
        yield CellResult({"acc": Metric(0.25)}, 1)
        raise RuntimeError("no more")

    class Observed(SweepObserver):
        def failed(self, keys: Sequence[Key], error: Exception) -> None:
            failed.extend(keys)

    failed: list[Key] = []
    model = Model("tiny", "0", "float32", "float32")
    with writing(tmp_path, model, {}) as folder:
        assert carry_out(folder, model, [(Job(keys, measure), keys)], {}, {}, Observed()) == 1
    assert failed == [keys[2]]
    assert [(cell.key, cell.metrics["acc"].value) for cell in read(tmp_path).cells.values()] == [
        (keys[0], 0.5),
        (keys[1], 0.25),
    ]


def test_a_window_beyond_the_models_is_refused(
    tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny, text, tmp_path / "out", "--max-length", str(CONTEXT + 1))) == 2
    assert f"--max-length is {CONTEXT + 1}, the model's window is {CONTEXT} tokens" in capsys.readouterr().err


def test_ctrl_c_leaves_a_folder_to_go_on_with(
    tiny: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = jobs.perplexity.measure

    def measure(model: object, own: object, prompt: int, *args: object, **settings: object) -> object:
        if prompt == 24:
            os.kill(os.getpid(), signal.SIGINT)
        return real(model, own, prompt, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs.perplexity, "measure", measure)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a background job
    try:
        assert main(command(tiny, text, tmp_path, "--densities", "0.5")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted: 8 of 16 cells" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command(tiny, text, tmp_path, "--densities", "0.5")) == 0
    assert len(ids(tmp_path)) == len(set(ids(tmp_path))) == 16


def test_the_folder_of_another_model_is_refused(
    tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny, text, tmp_path, "--densities", "0.5")) == 0
    lines = (tmp_path / "cells.jsonl").read_bytes()
    assert main(command(tiny, text, tmp_path, "--densities", "0.5", "--dtype", "bf16")) == 2
    assert "holds results of" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "cells.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--speed", "--methods", "topq"], "did you mean 'topk'"),
        (["--speed", "--densities", "2"], "density is 2.0"),
        (["--tasks", "boolk"], "boolq"),
        (["--suite", "papers"], "expected one of paper"),
        (["--tasks", "boolq", "--limit", "0"], "--limit is 0"),
        (["--perplexity", "/nowhere.txt"], "cannot be read"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "-o", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_key_is_what_the_config_says() -> None:
    key = key_of(GriffinConfig(density=0.5, selection="random", seed=4), "examples", generate=8)
    assert (key.method, key.density, key.seed, key.generate) == ("random", 0.5, 4, 8)
