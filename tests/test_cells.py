"""The results folder of a sweep: whole cells or none, of one model and one version."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import tiny_llama
from griffin.analysis import folder as folders
from griffin.analysis.cells import CellResult, Key, Metric, Model, cell_id
from griffin.analysis.fingerprint import fingerprint
from griffin.analysis.folder import Folder, read, writing
from griffin.errors import GriffinError

MODEL = Model("tiny", "0123456789abcdef", "float32", "float32")
VERSIONS = {"griffin": "0.1.0", "torch": "2.13.0", "profile": "01234567", "python": "3.11.7"}
KEYS = [Key("task", "topk", density, task="boolq", phase="continuation") for density in (0.75, 0.5, 0.25)]
FOUND = CellResult(
    {"acc": Metric(0.5, 0.25, 0.75), "odd": Metric(math.inf)}, 4, samples={"values": {"acc": [0, 1, 1, 0]}}
)


def keep(folder: Folder, key: Key, measured: CellResult = FOUND) -> None:
    folder.append(key, MODEL, measured, 1.5, VERSIONS, {"cpu": "some"})


def filled(path: Path, keys: list[Key] = KEYS) -> bytes:
    with writing(path, MODEL, VERSIONS) as folder:
        for key in keys:
            keep(folder, key)
    return (path / "cells.jsonl").read_bytes()


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    lines = filled(tmp_path / "made" / "on the way")
    folder = read(tmp_path / "made" / "on the way")
    assert [cell.key for cell in folder.cells.values()] == KEYS
    assert not folder.warnings
    cell = folder.cells[cell_id(KEYS[1], MODEL)]
    assert cell.metrics["acc"] == Metric(0.5, 0.25, 0.75)
    assert math.isnan(cell.metrics["odd"].value)  # JSON has no infinity
    assert folder.samples_of(cell)["values"]["acc"] == [0, 1, 1, 0]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines.splitlines())


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_half_written_last_line_is_not_believed_and_the_next_one_is_whole(tmp_path: Path, left: int) -> None:
    lines = filled(tmp_path).splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_bytes(b"".join(lines[:2]) + lines[2].rstrip(b"\n")[:left])
    with writing(tmp_path, MODEL, VERSIONS) as folder:
        assert [cell.key for cell in folder.cells.values()] == KEYS[:2]
        assert len(folder.warnings) == 1
        assert "line 3 (cut off in the middle)" in folder.warnings[0]
        keep(folder, KEYS[2])
    again = read(tmp_path)
    assert [cell.key for cell in again.cells.values()] == KEYS
    assert (tmp_path / "cells.jsonl").read_bytes().startswith(b"".join(lines[:2]))


def test_a_whole_line_that_lacks_its_newline_counts(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes(filled(tmp_path, KEYS[:2]).rstrip(b"\n"))
    with writing(tmp_path, MODEL, VERSIONS) as folder:
        assert len(folder.cells) == 2
        keep(folder, KEYS[2])
    assert len(read(tmp_path).cells) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"[1, 2]",
        lambda line: b"\xff\xfe",
        lambda line: line.replace(b"0.75", b"0.7", 1),  # the key is not what the id says
        lambda line: line.replace(b'"n":4,', b""),
        lambda line: line.replace(b'"acc":{"value":0.5', b'"acc":{"value":"high"'),
        lambda line: line.replace(b"samples/", b"../samples/"),
    ],
)
def test_a_line_that_is_no_cell_is_left_out_and_said(tmp_path: Path, damage: object) -> None:
    lines = filled(tmp_path).splitlines(keepends=True)
    changed = damage(lines[0].rstrip(b"\n"))  # type: ignore[operator]
    assert changed != lines[0].rstrip(b"\n")
    (tmp_path / "cells.jsonl").write_bytes(changed + b"\n" + b"".join(lines[1:]))
    folder = read(tmp_path)
    assert [cell.key for cell in folder.cells.values()] == KEYS[1:]
    assert len(folder.warnings) == 1
    assert "line 1" in folder.warnings[0]


def test_a_cell_without_its_samples_is_not_believed(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "samples" / f"{cell_id(KEYS[0], MODEL)}.json").unlink()
    (tmp_path / "samples" / f"{cell_id(KEYS[1], MODEL)}.json").write_text('{"values": ')
    folder = read(tmp_path)
    assert [cell.key for cell in folder.cells.values()] == KEYS[2:]
    assert len(folder.warnings) == 2


def test_a_folder_of_another_model_or_version_is_refused_and_stays(tmp_path: Path) -> None:
    lines = filled(tmp_path)
    with (
        pytest.raises(ValueError, match=r"holds results of tiny .*, not of other"),
        writing(tmp_path, replace(MODEL, name="other", fingerprint="fedcba9876543210"), VERSIONS),
    ):
        pass
    for name in ("griffin", "torch", "profile"):
        other = {**VERSIONS, name: "9.9"}
        with pytest.raises(ValueError, match=rf"results of {name} .*, this is 9\.9"), writing(tmp_path, MODEL, other):
            pass
    with writing(tmp_path, MODEL, {**VERSIONS, "python": "3.99", "lm_eval": "1.0"}) as folder:  # of which it holds none
        assert len(folder.cells) == len(KEYS)
    assert (tmp_path / "cells.jsonl").read_bytes() == lines


def test_two_sweeps_do_not_write_one_folder(tmp_path: Path) -> None:
    raised = pytest.raises(GriffinError, match="another griffin sweep is writing")
    with writing(tmp_path, MODEL, VERSIONS), raised, writing(tmp_path, MODEL, VERSIONS):
        pass
    with writing(tmp_path, MODEL, VERSIONS):
        pass


def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = filled(tmp_path, KEYS[:1])
    with writing(tmp_path, MODEL, VERSIONS) as folder:
        real = folders.os.fsync

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(folders.os, "fsync", full)
        with pytest.raises(GriffinError, match="No space left on device"):
            keep(folder, KEYS[1], replace(FOUND, samples=None))
        monkeypatch.setattr(folders.os, "fsync", real)
    assert (tmp_path / "cells.jsonl").read_bytes() == lines


def test_a_folder_without_results_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"has no cells\.jsonl"):
        read(tmp_path)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_place(llama: LlamaForCausalLM) -> None:
    own = fingerprint(llama)
    assert own == fingerprint(tiny_llama())
    assert own != fingerprint(tiny_llama(torch.float32))
    assert own != fingerprint(tiny_llama(rms_norm_eps=1e-3))
    weight = llama.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.data = weight.t().contiguous().t()  # neuron-major: other strides, the same values
        assert fingerprint(llama) == own
        weight.mul_(1.001)
        assert fingerprint(llama) != own
