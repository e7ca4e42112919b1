"""A model's profile: as a prior, as the price of densities, as a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from conftest import tiny_llama
from evaluation_data import save_bytes_model
from griffin import GriffinConfig
from griffin.analysis import perplexity, profiling
from griffin.cli import main
from griffin.errors import GriffinError
from griffin.layouts import find_ff_blocks
from griffin.method import profile as profiles
from griffin.method.profile import PSEUDO_TOKENS, Profile
from griffin.models.convert import convert
from griffin.native import library

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 22, 71, 13, 2], [7, 7, 12, 90, 4, 33, 18, 2, 61, 50, 11]])


def texts(n: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(97, (n, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Any, Profile, Path]:
    """A model, its profile, and the file of it."""
    model = tiny_llama(torch.float32)
    own = profiling.prior(model, texts(), {"model": "tiny", "text": "random"})
    own.save(tmp_path / "tiny.safetensors")
    return model, own, tmp_path / "tiny.safetensors"


def select(model: Any, **settings: Any) -> Any:
    with griffin.attach(model, backend="reference", **settings) as handle, torch.no_grad():
        with handle.prompt_phase():
            model(PROMPT)
        return handle


def test_the_prior_is_the_mean_over_all_tokens(made: tuple[Any, Profile, Path]) -> None:
    model, own, _ = made
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[1].mlp
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in texts():
            model(row[None])
    hook.remove()
    z = torch.cat(seen)
    expected = (z / z.norm(dim=1, keepdim=True)).square().mean(dim=0)
    torch.testing.assert_close(own.energies[1], expected)
    assert float(own.energies[1].sum()) == pytest.approx(1.0, abs=1e-4)
    assert own.about["tokens"] == str(8 * 24)


@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
def test_the_prior_counts_as_tokens_of_every_prompt(made: tuple[Any, Profile, Path], batch: str) -> None:
    model, _, path = made
    own = Profile.load(path)
    handle = select(model, selection="prior+topk", profile=str(path), batch=batch, density=0.3)
    plain = select(model, selection="topk", batch=batch, density=0.3)
    energies = plain.gathered.energies[0] + PSEUDO_TOKENS * own.energies[0]
    if batch == "shared":
        scores = (energies.sqrt() / (11 + PSEUDO_TOKENS) ** 0.5).sum(dim=0)
        found = handle.experts[0]
    else:
        scores, found = energies[1], handle.experts[0][1]
    assert found.tolist() == scores.topk(24).indices.sort().values.tolist()
    assert not torch.equal(found, plain.experts[0] if batch == "shared" else plain.experts[0][1])
    torch.testing.assert_close(handle.statistic[0], plain.statistic[0])  # the prompt's own


def test_the_prior_in_the_weights_of_dynamic_selection(made: tuple[Any, Profile, Path]) -> None:
    model, _, path = made
    own = Profile.load(path)
    handle = select(model, selection="prior+dynamic+topk", profile=str(path), batch="per_sequence")
    ups = handle.gathered.ups[2]
    rms = ((ups + PSEUDO_TOKENS * own.ups[2]) / (11 + PSEUDO_TOKENS)).sqrt()
    norms = model.model.layers[2].mlp.down_proj.weight.norm(dim=0)
    weights = torch.cat([selection.dynamic[2].weights for selection in handle.selections])
    torch.testing.assert_close(weights, rms * norms)


def test_a_file_is_read_back_and_knows_its_model(made: tuple[Any, Profile, Path], tmp_path: Path) -> None:
    model, own, path = made
    again = Profile.load(path)
    assert again.about == own.about
    assert list(again.energies) == [0, 1, 2]
    torch.testing.assert_close(again.energies[2], own.energies[2], rtol=0.01, atol=1e-6)  # stored in bfloat16
    for weights in ("bf16", "int8", "int4"):
        packed = tiny_llama(torch.float32)
        packed.load_state_dict(model.state_dict())
        convert(packed, weights)
        assert again.fits(packed, find_ff_blocks(packed))
    for other in (tiny_llama(torch.float32, intermediate_size=96), tiny_llama(torch.float32, num_hidden_layers=2)):
        assert not again.fits(other, find_ff_blocks(other))
    other = tiny_llama(torch.float32)
    other.model.embed_tokens.weight.data *= 1.1
    with pytest.raises(ValueError, match="profile of another model"):
        griffin.attach(other, selection="prior+topk", profile=str(path))


def test_profiles_are_found_in_the_cache(
    made: tuple[Any, Profile, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own, _ = made
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="none is known; make it: griffin profile"):
        griffin.attach(model, selection="prior+topk")
    assert select(model, selection="auto").config.selection == "dynamic+topk"
    folder = tmp_path / "cache" / "profiles"
    folder.mkdir(parents=True)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    own.save(folder / "mine.safetensors")
    assert select(model, selection="auto").config.selection == "prior+dynamic+topk"
    assert select(model, selection="prior+topk").config.selection == "prior+topk"


def test_auto_has_a_tier_only_where_it_saves_time(
    made: tuple[Any, Profile, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own, _ = made
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))

    def found(model: Any, backend: str = "auto") -> tuple[str, str]:
        with griffin.attach(model, selection="auto", backend=backend) as handle:
            return handle.config.selection, handle.backend.name

    assert found(model, "gather") == ("topk", "gather")
    if library.why_not() is None:
        assert found(model) == ("dynamic+topk", "native")
    own.save(tmp_path / "cache" / "profiles" / "mine.safetensors")
    assert found(model, "gather") == ("prior+topk", "gather")
    model.model.layers[1].mlp.act_fn = torch.nn.Hardtanh()  # known to neither
    assert found(model) == ("prior+topk", "gather")
    assert found(model, "reference") == ("prior+topk", "reference")


def test_a_file_that_is_none_is_refused(made: tuple[Any, Profile, Path], tmp_path: Path) -> None:
    model, _, path = made
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    for name, said in (("nowhere.safetensors", "is not there"), ("broken.safetensors", "damaged or no profile")):
        with pytest.raises(ValueError, match=said):
            griffin.attach(model, selection="prior+topk", profile=str(tmp_path / name))
    assert "forward" not in vars(model.model.layers[0].mlp.down_proj)
    with pytest.raises(GriffinError, match="cannot write"):
        Profile.load(path).save(path / "below.safetensors")


def test_a_target_loss_takes_the_cheapest_density(made: tuple[Any, Profile, Path]) -> None:
    model, own, path = made
    replace(own, losses={"f32": {0.9: 0.01, 0.5: 0.1, 0.7: 0.04, 0.3: 0.7}}).save(path)
    for loss, density in ((0.05, 0.7), (0.04, 0.7), (1.0, 0.3), (0.02, 0.9)):
        config = select(model, loss=loss, profile=str(path)).config
        assert (config.density, config.selection, config.loss) == (density, "prior+dynamic+topk", None)
    with pytest.raises(ValueError, match=r"at most 0\.001: the least is 0\.01, at density 0\.9"):
        griffin.attach(model, loss=0.001, profile=str(path))
    convert(model, "int8")
    with pytest.raises(ValueError, match=r"no losses for int8 weights \(it has f32\)"):
        griffin.attach(model, loss=0.05, profile=str(path))


def test_losses_are_what_is_measured(made: tuple[Any, Profile, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, own, path = made
    monkeypatch.setattr(profiling, "_PROMPT", 12)
    monkeypatch.setattr(profiling, "DENSITIES", (0.4, 0.8))
    found = profiling.with_losses(own, model, texts(), str(path)).losses
    configs = [GriffinConfig(density=d, selection="prior+dynamic+topk", profile=str(path)) for d in (0.4, 0.8)]
    measured = perplexity.measure(model, texts(), 12, configs)
    assert found == {"f32": {d: float(m.kl.double().mean()) for d, m in zip((0.4, 0.8), measured, strict=True)}}
    assert found["f32"][0.4] > found["f32"][0.8] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": 0.0}, "loss is 0.0"),
        ({"loss": "small"}, "loss is 'small'"),
        ({"loss": 0.1, "density": 0.3}, r"either loss \(0.1\) or density \(0.3\)"),
        ({"loss": 0.1, "selection": "random"}, "loss= uses prior"),
        ({"profile": 3}, "profile is 3"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GriffinConfig(**settings)


def test_the_shipped_profiles() -> None:
    found = sorted(path.name for path in profiles.SHIPPED.glob("*.safetensors"))
    assert found == ["gemma3-270m.safetensors", "smollm2-135m.safetensors"]
    for name in found:
        own = Profile.load(profiles.SHIPPED / name)
        assert set(own.losses) == {"bf16", "int8", "int4"}
        for losses in own.losses.values():
            assert losses[0.3] > losses[0.5] > losses[0.9]


@pytest.mark.model
def test_generate_on_the_command_line_takes_the_best_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", "smollm2-135m", "--max-tokens", "4", "--json", "The sea is"]
    assert main([*command, "--loss", "0.5"]) == 0
    assert '"selection": "auto"' in capsys.readouterr().out
    assert main([*command, "--loss", "0.0000001"]) == 2
    assert "no density of the profile keeps KL" in capsys.readouterr().err


def test_the_command_makes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = save_bytes_model(tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text("The lighthouse keeper counted the ships that passed, and wrote their names into his book. " * 150)
    command = ["profile", "-m", model, "--text", str(text), "--sequences", "4"]
    out = tmp_path / "own.safetensors"
    assert main([*command, "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    own = Profile.load(out)
    assert own.about == {"model": model, "text": "text.txt", "tokens": "1536"}
    loaded, _ = griffin.load(model)
    assert own.fits(loaded, find_ff_blocks(loaded))
    (losses,) = own.losses.values()
    assert 0 < losses[0.9] < losses[0.5] < losses[0.3]
    assert main(["profile", "-m", model, "--text", str(text), "--sequences", "400", "-o", str(out)]) == 2
    assert main(["profile", "-m", model, "--sequences", "2"]) == 2
    assert main([*command, "-o", str(tmp_path / "nowhere" / "x")]) == 1  # before the model writes for minutes
    assert Profile.load(out).about == own.about
