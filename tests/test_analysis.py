"""Flocking pictures, agreement, and the demo that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import griffin
from conftest import tiny_llama
from evaluation_data import save_bytes_model
from griffin.analysis.agreement import teacher_forced_logits, top1_agreement
from griffin.analysis.flocking import relative_activations
from griffin.analysis.plots import flocking_heat_map
from griffin.cli import main

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2]])


def test_relative_activations_are_those_of_the_statistic() -> None:
    model = tiny_llama()
    found = relative_activations(model, IDS, [0, 2])
    assert sorted(found) == [0, 2]
    with griffin.attach(model, selection="topk") as handle, handle.prompt_phase():
        model(IDS)
    for layer, zbar in found.items():
        assert zbar.shape == (11, 80)
        torch.testing.assert_close(zbar.norm(dim=1), torch.ones(11))
        torch.testing.assert_close(zbar.norm(dim=0), handle.statistic[layer])
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks
    with pytest.raises(ValueError, match="layers 0 to 2"):
        relative_activations(model, IDS, [3])


def test_one_teacher_forced_pass_equals_generating_step_by_step() -> None:
    model, steps = tiny_llama(), 9
    with griffin.attach(model, density=0.5, selection="topk") as handle:
        stepped = [
            step for _, step in zip(range(steps), griffin.generate_step(model, IDS, handle=handle), strict=False)
        ]
        tokens = torch.stack([step.tokens for step in stepped], dim=1)
        logits = torch.stack([step.logits for step in stepped], dim=1)
        forced = teacher_forced_logits(model, IDS, tokens, handle)
        full = teacher_forced_logits(model, IDS, tokens)
    torch.testing.assert_close(forced, logits, rtol=0, atol=1e-5)  # logits are cast to float32
    assert top1_agreement(forced, logits) == 1.0
    assert top1_agreement(forced, full) < 1.0


def test_a_heat_map_is_a_picture_of_what_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    activations = torch.zeros(40, 60)
    activations[:, 30] = 1.0
    flocking_heat_map(activations, "one neuron", path)
    with Image.open(path) as image:
        width, height = image.size
        grey = torch.tensor(list(image.convert("L").get_flattened_data())).view(height, width)
    assert height > 300
    middle = grey[height // 2]
    assert int(middle[100 : width - 250].max()) > 200  # a bright streak on a dark ground
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


def test_a_picture_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(griffin.GriffinError, match="cannot write the picture"):
        flocking_heat_map(torch.rand(4, 4), "", tmp_path / "missing" / "picture.png")


def test_the_demo_shows_its_texts_and_measures_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passage = tmp_path / "passage.txt"
    passage.write_text("The lighthouse keeper climbed the stairs every evening and counted them aloud. " * 4)
    picture = tmp_path / "flocking.png"
    folder = save_bytes_model(tmp_path / "tiny", "{% for message in messages %}{{ message.content }}{% endfor %}")
    assert main(["demo", "-m", folder, "--file", str(passage), "--max-tokens", "6", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    for shown in (
        "summarizes a",
        "full model",
        "half of the neurons",
        "three quarters",
        "Cost of the statistic",
        "agrees",
    ):
        assert shown in out.replace("\n", " "), shown
    assert str(picture) in out
    assert picture.stat().st_size > 10_000


@pytest.mark.model
def test_griffin_agrees_more_the_denser_and_always_at_one(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = smollm2
    text = (Path(griffin.__file__).parent / "analysis" / "passage.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids
    prompt, continuation = ids[:, :400], ids[:, 400:500]
    full = teacher_forced_logits(model, prompt, continuation)
    agreement = {}
    for density in (0.25, 0.75, 1.0):
        with griffin.attach(model, density=density, selection="topk") as handle:
            agreement[density] = top1_agreement(teacher_forced_logits(model, prompt, continuation, handle), full)
    assert agreement[0.25] < agreement[0.75] < agreement[1.0] == 1.0
