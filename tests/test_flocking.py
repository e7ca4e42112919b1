"""Flocking: overlaps and shares against plain loops, and the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import griffin
from conftest import tiny_llama
from griffin.analysis import flocking, plots
from griffin.cli import main
from test_cli import CONTEXT, TEMPLATE, save_tiny

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2]])


def test_energies_are_those_of_each_sequence_alone() -> None:
    model = tiny_llama()
    found = flocking.energies(model, [IDS, IDS[:, :5]])
    for at, ids in enumerate((IDS, IDS[:, :5])):
        with griffin.attach(model, selection="topk") as handle, handle.prompt_phase():
            model(ids)
        for layer, own in handle.gathered.energies.items():
            assert torch.equal(found[layer][at], own[0])
    with pytest.raises(ValueError, match="no sequence"):
        flocking.energies(model, [])


def test_overlap_and_share_are_what_a_loop_over_sets_counts() -> None:
    energies = {layer: torch.rand(4, 40) for layer in (0, 1)}
    overlap, share = flocking.jaccard(energies, 0.3), flocking.energy_share(energies, 0.3)
    for layer, own in energies.items():
        sets = [set(row.topk(12).indices.tolist()) for row in own]
        for a, first in enumerate(sets):
            assert float(share[layer, a]) == pytest.approx(float(own[a, list(first)].sum() / own[a].sum()), rel=1e-5)
            for b, second in enumerate(sets):
                assert float(overlap[layer, a, b]) == pytest.approx(len(first & second) / len(first | second), rel=1e-6)
    one = flocking.energy_share({0: torch.ones(1, 40)}, 0.3)
    assert float(one) == pytest.approx(0.3, rel=1e-6)  # without flocking: the density
    twice = flocking.turn_overlap({0: energies[0]}, {0: energies[0][1:]}, 0.3)
    assert torch.equal(twice, overlap[0, 0, 1:2])


def test_compared_texts_have_the_same_tokens_or_random_ones() -> None:
    ids = torch.arange(200)[None] % 90
    found = flocking.compared(ids, 97, seed=4)
    assert list(found) == ["original", "permuted", "random"]
    assert torch.equal(found["original"], ids)
    assert torch.equal(found["permuted"].sort().values, ids.sort().values)
    assert not torch.equal(found["permuted"], ids)
    assert all(int(own[0, 0]) == int(ids[0, 0]) for own in found.values())
    assert (found["random"] == ids).float().mean() < 0.1
    assert torch.equal(found["random"], flocking.compared(ids, 97, seed=4)["random"])
    assert not torch.equal(found["random"], flocking.compared(ids, 97, seed=5)["random"])


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plots.flocking_heat_maps({"a": torch.rand(9, 20), "b": torch.rand(9, 20)}, "two", tmp_path / "maps.png")
    plots.lines_against_layer({"density 0.5": torch.rand(6)}, "share", "lines", tmp_path / "lines.png")
    plots.overlap_matrix(torch.eye(3), "pairs", tmp_path / "pairs.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert len(set(image.convert("L").get_flattened_data())) > 20, path
    with pytest.raises(griffin.GriffinError, match="cannot write the picture"):
        plots.overlap_matrix(torch.eye(3), "", tmp_path / "missing" / "pairs.png")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), TEMPLATE, CONTEXT)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{number * number % 95}" for number in range(200)))
    return str(path)


def test_the_command_writes_numbers_and_pictures(
    tiny: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pictures = tmp_path / "found.json", tmp_path / "pictures"
    words = [
        "--text",
        text,
        "--tokens",
        "40",
        "--densities",
        "0.5,0.25",
        "--turn",
        "w1 w2",
        "--turn",
        "w3",
        "--layer",
        "1",
    ]
    assert main(["flocking", "-m", tiny, *words, "--json", str(out), "--pictures", str(pictures)]) == 0
    assert "5 sequences of 40 tokens" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["layers"], found["about"]["sequences"], found["about"]["turns"]) == ([0, 1, 2], 5, 2)
    for row, density in zip(found["densities"], (0.5, 0.25), strict=True):
        assert row["density"] == density
        pairs = torch.tensor(row["jaccard_pairs"])
        assert pairs.shape == (3, 5, 5)
        assert torch.equal(pairs.diagonal(dim1=1, dim2=2), torch.ones(3, 5))
        mean = (pairs.sum(dim=(1, 2)) - 5) / 20
        torch.testing.assert_close(torch.tensor(row["jaccard"]), mean)
        assert all(density < share < 1.0 for share in row["energy_share"])
        assert [len(own) for own in row["jaccard_between_turns"]] == [3]
        assert set(row["jaccard_with_original"]) == {"permuted", "random"}
    names = {"flocking.png", "energy-share.png", "jaccard.png", "turns.png", "pairs-0.5.png", "pairs-0.25.png"}
    assert {path.name for path in pictures.iterdir()} == names


def test_a_model_without_chat_template_has_no_conversation(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_tiny(tmp_path / "plain", None, CONTEXT)
    assert main(["flocking", "-m", plain, "--text", text, "--tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["densities"][0]["jaccard_between_turns"] == []
    assert main(["flocking", "-m", plain, "--text", text, "--tokens", "40", "--turn", "w1", "--turn", "w2"]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "300"], "it is enough for 0"),
        (["--tokens", "600"], "fit the model's context of 512"),
        (["--tokens", "1"], "--tokens from 2"),
        (["--sequences", "1"], "--sequences from 2"),
        (["--turn", "w1"], "at least twice"),
        (["--densities", "0"], "density is 0.0"),
        (["--tokens", "40", "--layer", "9", "--pictures", "DIR"], "layers 0 to 2"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    words: list[str], message: str, tiny: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "pictures") if word == "DIR" else word for word in words]
    assert main(["flocking", "-m", tiny, "--text", text, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "pictures").exists()
