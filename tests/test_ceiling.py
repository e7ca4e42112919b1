"""The ceiling by batch: unions against all batches there are, bytes against a model, and `griffin info --ceiling`."""

from __future__ import annotations

import csv
import json
import re
import shlex
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, PreTrainedModel
from transformers.models.gemma3 import Gemma3ForCausalLM

from griffin.analysis import benchmark, ceiling, flocking, shapes
from griffin.analysis.ceiling import Machine, Part, StepCost, bytes_read_per_token, independent_union, step_cost
from griffin.analysis.workload import PACKED_BYTES
from griffin.cli import main
from griffin.layouts import find_ff_blocks
from griffin.native import library
from test_bench import D_FF, LAYERS, TINY, TINY_OPT, D
from test_cli import CONTEXT, ROOT, TEMPLATE, save_tiny

STEP = StepCost(ff=Part(600, 1200), other=Part(400, 800), cache_bytes=100)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), TEMPLATE, CONTEXT)


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


# -- unions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.3, 0.75, 1.0])
def test_the_union_is_the_mean_over_all_batches(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    energies = {layer: torch.rand(6, 40, generator=generator) ** (1 + layer) for layer in (0, 1)}
    for batch in range(1, 7):
        found = flocking.union_share(energies, density, batch)
        for layer, own in energies.items():
            sets = [set(row.topk(round(density * 40)).indices.tolist()) for row in own]
            unions = [len(set().union(*chosen)) / 40 for chosen in combinations(sets, batch)]
            assert float(found[layer]) == pytest.approx(sum(unions) / len(unions), rel=1e-12)


def test_unions_lie_between_the_bounds_and_reach_them() -> None:
    generator = torch.Generator().manual_seed(0)
    alone = torch.rand(400, 1000, generator=generator)
    alike = alone[:1].expand(400, -1)
    for batch in (1, 2, 3, 8):
        by_chance = float(flocking.union_share({0: alone}, 0.25, batch))
        assert by_chance == pytest.approx(independent_union(0.25, batch), abs=0.003)  # 400 random sets: sampling noise
        assert float(flocking.union_share({0: alike}, 0.25, batch)) == pytest.approx(0.25, abs=1e-12)
        mixed = float(flocking.union_share({0: alone + alone[0]}, 0.25, batch))
        assert 0.25 <= mixed <= independent_union(0.25, batch) + 1e-12


# -- bytes and time ---------------------------------------------------------------------------------------------------


def test_a_batch_of_one_without_cache_is_the_old_ceiling() -> None:
    step = StepCost(STEP.ff, STEP.other, 0)
    for density in (0.25, 0.5, 1.0):
        assert step.speedup(1, independent_union(density, 1)) == pytest.approx(ceiling.ceiling(0.6, density))
        assert step.speedup(64, density) == pytest.approx(ceiling.ceiling(0.6, density))  # the same experts


def test_bytes_of_a_step() -> None:
    assert STEP.nbytes(3) == 1200 + 800 + 300
    assert STEP.speedup(3, 0.75) == 2300 / (900 + 800 + 300)
    assert STEP.flops_per_ff_byte(3) == 2 * 3 * 600 / 1200
    assert STEP.flops_per_ff_byte(3, 0.5, 0.875) == pytest.approx(3 * 0.5 / 0.875)


def test_time_is_bytes_or_arithmetic() -> None:
    slow_memory = Machine(bytes_per_s=1.0, flops_per_s=1e9)
    assert STEP.seconds(slow_memory, 3, 0.5, 0.75) == STEP.nbytes(3, 0.75)
    assert STEP.speedup_in_time(slow_memory, 3, 0.5, 0.75) == STEP.speedup(3, 0.75)
    slow_arithmetic = Machine(bytes_per_s=1e9, flops_per_s=1.0)
    time = STEP.seconds(slow_arithmetic, 3, 0.5, 1.0)
    assert time == pytest.approx(2 * 3 * (300 + 400))
    assert STEP.speedup_in_time(slow_arithmetic, 3, 0.5, 1.0) == pytest.approx(ceiling.ceiling(0.6, 0.5))
    assert STEP.ff_bound_by(slow_memory, 3) == "bytes"
    assert STEP.ff_bound_by(slow_arithmetic, 3) == "arithmetic"
    between = Machine(bytes_per_s=1.0, flops_per_s=2.0)  # the full FF asks for 3 operations a byte, half of it for 1.5
    assert (STEP.ff_bound_by(between, 3), STEP.ff_bound_by(between, 3, 0.5, 1.0)) == ("arithmetic", "bytes")
    assert STEP.seconds(between, 3, 0.5, 1.0) == 1200 + 2 * 3 * 400 / 2 + 300


@pytest.mark.parametrize("shape", [TINY, TINY_OPT], ids=["llama", "opt"])
def test_a_step_on_meta_is_that_of_the_model(shape: shapes.Shape) -> None:
    model = shapes.build(shape, torch.float32)
    step = step_cost(model, 20)
    assert step == step_cost(shapes.on_meta(shape, torch.float32), 20)
    assert step.ff.nbytes + step.other.nbytes == bytes_read_per_token(model)
    assert step.ff.nbytes == sum(block.nbytes for block in find_ff_blocks(model))
    assert (step.ff.weights, step.other.weights) == (step.ff.nbytes // 4, step.other.nbytes // 4)
    assert step.cache_bytes == shapes.cache_bytes(shape, torch.float32, 20)


@pytest.mark.skipif(library.why_not() is not None, reason="the native library is not built")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_packed_shape_is_nearly_the_packed_model(weights: str, family: str) -> None:
    wide = shapes.Shape("llama", shapes._llama(512, 1024, LAYERS, 4, 4, 128, 1000))
    if family == "opt":
        settings = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 1024, "vocab_size": 1000}
        wide = shapes.Shape("opt", dict(TINY_OPT.settings) | settings)
    stored = step_cost(benchmark.prepare(shapes.build(wide, torch.bfloat16), weights), 20)
    counted = step_cost(shapes.on_meta(wide, torch.bfloat16), 20, PACKED_BYTES[weights])
    for own, told in ((stored.ff, counted.ff), (stored.other, counted.other)):
        assert own.weights == told.weights
        assert 0.9 * own.nbytes < told.nbytes <= own.nbytes  # rows are padded to 64 bytes
    assert stored.cache_bytes == counted.cache_bytes


def test_a_sliding_window_bounds_the_cache() -> None:
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=16, max_position_embeddings=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model: PreTrainedModel = Gemma3ForCausalLM(config)
    token = 2 * 8 * 4
    assert step_cost(model, 10).cache_bytes == 3 * 10 * token
    assert step_cost(model, 40).cache_bytes == (16 + 16 + 40) * token


# -- the command ------------------------------------------------------------------------------------------------------


def asked(capsys: Any, *words: str) -> dict[str, Any]:
    assert main(["info", "--ceiling", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["ceiling"]
    return found


def union_file(path: Path, rows: str = "tiny,all,0.5,2,0.6\ntiny,news,0.5,2,0.55\n") -> str:
    path.write_text("model,texts,density,batch,union\n" + rows)
    return str(path)


def test_json_of_a_shape(capsys: Any, tmp_path: Path) -> None:
    union = union_file(tmp_path / "union.csv")
    found = asked(
        capsys, "--shape", "tiny", "--density", "0.5,0.25", "--batch", "2,4", "--context", "9", "--union", union
    )
    assert (found["name"], found["weights"], found["context"], found["union"]) == ("tiny", "bf16", 9, "tiny")
    assert found["machine"] is None
    assert found["ff"] == {"weights": LAYERS * 3 * D * D_FF, "nbytes": 2 * LAYERS * 3 * D * D_FF}
    assert found["cache_bytes"] == 2 * LAYERS * D * 9 * 2
    rows = {(row["density"], row["batch"]): row for row in found["rows"]}
    assert list(rows) == [(0.5, 2), (0.5, 4), (0.25, 2), (0.25, 4)]
    step = StepCost(Part(**found["ff"]), Part(**found["other"]), found["cache_bytes"])
    row = rows[0.5, 2]
    for name, share in (("same", 0.5), ("measured", 0.6), ("chance", 0.75)):
        assert row[name]["ff_read"] == share
        assert row[name]["speedup"] == step.speedup(2, share)
        assert set(row[name]) == {"ff_read", "speedup", "flops_per_ff_byte"}
    assert rows[0.5, 4]["measured"] is rows[0.25, 2]["measured"] is None


def test_json_of_a_model_is_that_of_its_weights(capsys: Any, tiny: str) -> None:
    found = asked(capsys, "-m", tiny, "--bandwidth-gb-s", "20", "--tflops", "0.05")
    assert found["machine"] == {"bytes_per_s": 2e10, "flops_per_s": 5e10}
    assert found["ff"]["nbytes"] == 4 * 3 * 3 * 32 * 64
    assert (found["weights"], found["context"], len(found["rows"])) == ("f32", 512, 14)
    for row in found["rows"]:
        assert row["chance"]["speedup_in_time"] >= row["chance"]["speedup"] - 1e-12  # f32: arithmetic sooner
        assert row["ff_bound_by"] == ("arithmetic" if row["batch"] / 2 > 2.5 else "bytes")


def test_tables(capsys: Any, tmp_path: Path) -> None:
    union = union_file(tmp_path / "union.csv")
    words = [
        "info",
        "--ceiling",
        "--shape",
        "tiny",
        "--context",
        "9",
        "--density",
        "0.5",
        "--batch",
        "2,4",
        "--union",
        union,
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "unions of real prompts on tiny" in out
    assert [line.split("│")[4].strip() for line in out.splitlines() if line.startswith("│     0.5")] == ["60.0%", "-"]
    assert main([*words, "--bandwidth-gb-s", "20", "--tflops", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "20 GB/s and 0.05 Tflop/s, as given: 2.5 flop/byte" in out
    assert "bytes, bytes" in out
    assert "arithmetic, bytes" in out


BAD = {
    "density 7": (["--density", "7"], "density is 7.0"),
    "batch 0": (["--batch", "0"], "found '0'; expected numbers of sequences from 1"),
    "batch word": (["--batch", "1,x"], "found '1,x'"),
    "batch half": (["--batch", "1.5"], "found '1.5'"),
    "context": (["--context", "0"], "--context is 0"),
    "too long": (["--context", "65"], "the context of tiny is 64 tokens"),
    "bandwidth alone": (["--bandwidth-gb-s", "20"], "go together"),
    "no arithmetic": (["--bandwidth-gb-s", "20", "--tflops", "0"], "--tflops is 0"),
    "nan": (["--bandwidth-gb-s", "nan", "--tflops", "1"], "--bandwidth-gb-s is nan"),
    "weights": (["--weights", "int3"], "weights is 'int3'"),
    "model and shape": (["-m", "x"], "--model and --shape tiny do not go together"),
    "dtype and shape": (["--dtype", "f32"], "--dtype and --shape tiny"),
    "no model": (["--no-model"], "give one of the two"),
    "no file": (["--union", "missing.csv"], "missing.csv cannot be read"),
    "other file": (["--union", "other.csv"], "other.csv has no column 'batch'"),
    "file of words": (["--union", "words.csv"], "is no number"),
    "impossible": (["--union", "small.csv"], "outside of its density to 1"),
    "other densities": (["--union", "good.csv", "--density", "0.3"], "was measured at density 0.5, not 0.3"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_wrong_usage_is_one_line(words: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("density,kl\n0.5,1\n")
    union_file(Path("words.csv"), "tiny,all,0.5,two,0.6\n")
    union_file(Path("small.csv"), "tiny,all,0.5,2,0.4\n")
    union_file(Path("good.csv"))
    context = [] if "--context" in words else ["--context", "9"]
    assert main(["info", "--ceiling", "--shape", "tiny", *context, *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("griffin: error: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("words", [["--batch", "2"], ["--shape", "tiny"], ["--tflops", "3"], ["--context", "5"]])
def test_what_goes_with_the_ceiling_is_refused_without(words: list[str], capsys: Any) -> None:
    assert main(["info", *words]) == 2
    assert f"{words[0]} goes with --ceiling" in capsys.readouterr().err
    assert main(["info", "--ceiling", "--shape", "tinny"]) == 2
    assert "expected one of llama2-7b" in capsys.readouterr().err


# -- docs/scaling.md --------------------------------------------------------------------------------------------------


PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_page_says_what_was_measured() -> None:
    unions: dict[tuple[str, str, float, int], str] = {}
    for path in sorted((ROOT / "results" / "union").glob("*.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            where = path.stem, row["texts"], float(row["density"]), int(row["batch"])
            unions[where] = f"{float(row['union']):.1%}"
    told = re.findall(r"^\| (smollm2-135m|gemma3-270m), ([\d.]+) \| (\w+) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert len(told) == 12
    for model, density, texts, cells in told:
        expected = [unions.get((model, texts, float(density), batch), "-") for batch in (2, 4, 8, 16, 64)]
        assert cells.split(" | ") == expected, (model, density, texts)


def test_the_page_tells_the_ceilings_that_its_command_gives(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = next(line for line in PAGE.splitlines() if line.startswith("griffin info --ceiling --shape llama2-7b"))
    words = [*shlex.split(command, comments=True)[3:], "--union", "results/union/smollm2-135m.csv"]
    rows = {(row["density"], row["batch"]): row for row in asked(capsys, *words)["rows"]}
    told = re.findall(r"^\| (\d+) \| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+)x \|$", PAGE, flags=re.MULTILINE)
    assert len(told) == 6
    for batch, *cells in told:
        row = rows[0.5, int(batch)]
        assert cells == [f"{row[name]['speedup']:.2f}" for name in ("same", "measured", "chance")]
