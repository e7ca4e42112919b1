"""`griffin bench` on tiny models. What is tested is the arithmetic, the order and the refusals, never a speed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import griffin
from griffin.analysis import benchmark, files, machine, shapes, verification, workload
from griffin.analysis.benchmark import Run, SpeedRow, cases, ff_bytes_per_step
from griffin.analysis.ceiling import bytes_read_per_token, ceiling
from griffin.analysis.machine import Bandwidth
from griffin.attachment import attach
from griffin.backends import gather
from griffin.cli import main
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.layouts import find_ff_blocks
from griffin.native import library

D, D_FF, LAYERS, VOCABULARY = 32, 64, 3, 100
FF_BYTES = LAYERS * 3 * D * D_FF * 4
TINY = shapes.Shape("llama", shapes._llama(D, D_FF, LAYERS, 4, 4, 64, VOCABULARY))
TINY_OPT = shapes.Shape(
    "opt", dict(shapes.SHAPES["opt-6.7b"].settings) | {"hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": D_FF}
    | {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCABULARY}
)  # fmt: skip
QUICK = ["--prompt", "8", "--generate", "4", "--repeats", "2"]
FIGURES = set(SpeedRow.__dataclass_fields__)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.SHAPES, "tiny-opt", TINY_OPT)
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 2**20)
    monkeypatch.setattr(machine, "_LEAST_BUFFER_BYTES", 2**10)


def run(speed: float, ff_bytes: int = FF_BYTES, selection_s: float = 0.0) -> Run:
    return Run("gather", 100 * speed, speed, selection_s, ff_bytes, 1000, 0.0)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_ceiling() -> None:
    assert ceiling(0.65, 0.5) == pytest.approx(1.48, abs=0.005)  # Llama 2, as design.md has it
    assert ceiling(0.65, 1.0) == 1.0
    assert ceiling(1.0, 0.25) == pytest.approx(4.0)


def test_rows_of_equal_runs() -> None:
    model = shapes.build(TINY, torch.float32)
    read = bytes_read_per_token(model)
    configs = cases([1.0, 0.5], ["topk"], 1, "gather")
    runs = [[run(10.0), run(10.0)], [run(10.0, FF_BYTES // 2), run(10.0, FF_BYTES // 2)]]
    prompts = torch.zeros(1, 8, dtype=torch.int64)
    full, half = benchmark.rows("tiny", "f32", model, prompts, 4, configs, runs, [Bandwidth(1e9, "")] * 3)
    assert (full.density, full.speedup, full.ceiling, full.share_of_ceiling) == (1.0, 1.0, 1.0, 1.0)
    assert full.bytes_per_s == read * 10.0
    assert full.share_of_read_bandwidth == pytest.approx(read * 10.0 / 1e9)
    assert half.speedup == 1.0
    assert half.ceiling == pytest.approx(1 / (1 - FF_BYTES / read * 0.5))
    assert half.share_of_ceiling == pytest.approx(1 / half.ceiling)
    assert half.bytes_per_s == (read - FF_BYTES / 2) * 10.0
    assert (half.prompt_tokens, half.generated_tokens, half.peak_rss_bytes) == (8, 4, 1000)


def test_speedup_is_the_median_of_the_rounds_ratios() -> None:
    model = shapes.build(TINY, torch.float32)
    configs = cases([0.5], ["topk"], 2, "gather")
    runs = [[run(10.0), run(5.0), run(8.0)], [run(12.0), run(10.0), run(12.0)]]  # ratios 1.2, 2.0, 1.5
    prompts = torch.zeros(2, 8, dtype=torch.int64)
    bandwidths = [Bandwidth(own, "") for own in (1e9, 3e9, 1e9, 5e9)]  # means of the rounds: 2, 2 and 3 GB/s
    full, half = benchmark.rows("tiny", "f32", model, prompts, 4, configs, runs, bandwidths)
    assert half.speedup == 1.5
    assert half.generation_tokens_per_s == 2 * 12.0  # of both sequences
    read = bytes_read_per_token(model)
    assert half.ceiling == pytest.approx(1 / (1 - FF_BYTES / read * 0.5))  # though a whole FF was read, as a union
    assert half.bytes_per_s == read * 12.0
    assert full.share_of_read_bandwidth == pytest.approx(read * sorted([10 / 2e9, 5 / 2e9, 8 / 3e9])[1])
    assert benchmark.rows("t", "f32", model, prompts, 4, configs, runs, [])[0].share_of_read_bandwidth is None


def test_bytes_of_a_step() -> None:
    model = shapes.build(TINY, torch.float32)
    torch.manual_seed(0)
    prompts = torch.randint(VOCABULARY, (2, 8))
    for batch, sets in (("shared", 1), ("per_sequence", 2)):
        with attach(model, GriffinConfig(density=0.25, batch=batch, backend="gather", selection="topk")) as handle:
            with torch.no_grad(), handle.prompt_phase():
                model(prompts)
            assert ff_bytes_per_step(handle) == FF_BYTES * sets // 4
    with attach(model, GriffinConfig(density=1.0, batch="per_sequence", backend="gather", selection="topk")) as handle:
        with torch.no_grad(), handle.prompt_phase():
            model(prompts)
        assert ff_bytes_per_step(handle) == FF_BYTES


@pytest.mark.skipif(library.why_not() is not None, reason="the native library was not built")
def test_the_native_backend_counts_the_union_once() -> None:
    model = shapes.build(TINY, torch.float32)
    with attach(model, GriffinConfig(density=0.25, batch="per_sequence", backend="native", selection="topk")) as handle:
        with torch.no_grad(), handle.prompt_phase():
            model(torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0)))
        union = sum(len({*own[0].tolist(), *own[1].tolist()}) for own in handle.experts.values())
        before = library.ff_bytes()
        with torch.no_grad(), handle.generation_phase():
            model(torch.zeros(2, 1, dtype=torch.int64))
        assert library.ff_bytes() - before == union * 3 * D * 4


# -- cases and order --------------------------------------------------------------------------------------------------


def test_density_one_is_always_measured_once_and_first() -> None:
    found = [(own.density, own.selection) for own in cases([0.5, 1.0, 0.5, 0.25], ["magnitude", "topk"], 1, "auto")]
    assert found == [
        (1.0, "topk"),
        *[(0.5, "magnitude"), (0.25, "magnitude"), (0.5, "topk"), (0.25, "topk")],
    ]
    assert {own.batch for own in cases([0.5], ["topk"], 4, "auto")} == {"per_sequence"}


def test_densities_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def timed(model: object, prompts: torch.Tensor, config: GriffinConfig, generated: int) -> Run:
        seen.append(config.density)
        return run(1.0)

    def bandwidth() -> Bandwidth:
        seen.append("bandwidth")
        return Bandwidth(1.0, "")

    monkeypatch.setattr(benchmark, "_timed", timed)
    monkeypatch.setattr(machine, "read_bandwidth", bandwidth)
    model = shapes.build(TINY, torch.float32)
    configs = cases([0.5, 0.25], ["topk"], 1, "gather")
    runs, bandwidths = benchmark.measure(model, torch.zeros(1, 8, dtype=torch.int64), configs, 4, 2)
    around = [1.0, 0.5, 0.25]
    assert seen == [*around, "bandwidth", *around, "bandwidth", *around, "bandwidth"]  # the first three warm up
    assert (list(map(len, runs)), len(bandwidths)) == ([2, 2, 2], 3)


def test_a_backend_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather.GatherFF, "calls", property(lambda own: 0, lambda own, value: None), raising=False)
    model = shapes.build(TINY, torch.float32)
    with pytest.raises(GriffinError, match="did not run"):
        benchmark._timed(
            model, torch.zeros(1, 8, dtype=torch.int64), GriffinConfig(backend="gather", selection="topk"), 4
        )


# -- verification -----------------------------------------------------------------------------------------------------


BACKENDS = ["gather", *(["native"] if library.why_not() is None else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [TINY, TINY_OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
def test_backends_agree_with_the_reference(backend: str, shape: shapes.Shape, dtype: torch.dtype, batch: str) -> None:
    model = shapes.build(shape, dtype)
    prompts = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    for density in (1.0, 0.5, 0.25):
        for selection in ("topk", "magnitude"):
            config = GriffinConfig(density=density, selection=selection, batch=batch, backend=backend)
            assert 0 <= verification.verify(model, config, prompts) <= verification.TOLERANCES[dtype]


@pytest.mark.skipif(library.why_not() is not None, reason="the native library is not built")
def test_gates_of_a_copy_are_held_to_what_quantised_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = shapes.Shape("llama", shapes._llama(256, 512, LAYERS, 4, 4, 64, VOCABULARY))
    model = shapes.build(wide, torch.float32)
    prompts = torch.randint(VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    config = GriffinConfig(density=0.75, selection="dynamic+topk", backend="native")
    with griffin.attach(model, config) as handle:
        assert {split.gate for split in handle.splits.values()} <= {"int4", "int8"}
    assert verification.verify(model, config, prompts) <= verification.QUANTISED_TOLERANCE
    monkeypatch.setattr(verification, "QUANTISED_TOLERANCE", -1.0)
    monkeypatch.setattr(verification, "TOLERANCES", {torch.float32: -1.0})
    with pytest.raises(GriffinError, match=r"is wrong at density 0\.75"):
        verification.verify(model, config, prompts)


@pytest.mark.skipif(library.why_not() is not None, reason="the native library is not built")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_shape_quantised_by_layers_is_the_whole_model(name: str, weights: str) -> None:
    shape = shapes.Shape("llama", shapes._llama(512, 1024, LAYERS, 4, 4, 128, VOCABULARY))
    if name == "opt":
        wide = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 1024}
        shape = shapes.Shape("opt", dict(TINY_OPT.settings) | wide)
    made = workload.built(shape, weights)
    whole = benchmark.prepare(shapes.build(shape, torch.bfloat16), weights)
    found, expected = made.state_dict(), whole.state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert made.config.to_dict() == whole.config.to_dict()
    prompts = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    verification.verify(made, GriffinConfig(density=0.5, backend="native", selection="topk"), prompts)
    stored = sum({value.data_ptr(): value.nbytes for value in found.values()}.values())
    guessed = shapes.packed_bytes(shape, workload.PACKED_BYTES[weights]) - shapes.weight_bytes(shape, torch.bfloat16, 1)
    assert 0.9 * stored < guessed <= stored  # rows are padded to 64 bytes


def test_a_broken_backend_is_found_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = gather.GatherFF.write
    monkeypatch.setattr(gather.GatherFF, "write", lambda own, z: right(own, z) * -1.5 + 0.1)
    monkeypatch.setattr(benchmark, "_timed", lambda *args: pytest.fail("it was timed"))
    assert main(["bench", "--shape", "tiny", "--weights", "f32", "--backend", "gather", *QUICK]) == 1
    output = capsys.readouterr()
    assert "backend gather is wrong at density 0.75" in output.err
    assert "nothing was timed" in output.err
    assert output.out == ""


def test_logits_that_are_not_finite_are_refused() -> None:
    model = shapes.build(TINY, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(GriffinError, match="inf or nan"):
        verification.verify(
            model, GriffinConfig(density=1.0, backend="gather", selection="topk"), torch.zeros(1, 8, dtype=torch.int64)
        )


# -- shapes and prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "ff_share"),
    [
        ("llama2-7b", 6_738_415_616, 0.655),
        ("llama2-13b", 13_015_864_320, 0.661),
        ("mistral-7b", 7_241_732_096, 0.793),
        ("gemma-7b", 8_537_680_896, 0.743),
        ("opt-6.7b", 6_658_473_984, 0.645),
        ("tinyllama-1.1b", 1_100_048_384, 0.736),
    ],
)
def test_shapes_are_the_real_ones(name: str, parameters: int, ff_share: float) -> None:
    shape = shapes.SHAPES[name]
    assert shapes.weight_bytes(shape, torch.bfloat16) == 2 * parameters
    with torch.device("meta"):
        model = shapes._from_config(shape.config(), torch.bfloat16)
    ff = sum(block.parameters for block in find_ff_blocks(model))
    config: Any = model.config
    tied = config.tie_word_embeddings
    assert ff / (parameters - (0 if tied else config.vocab_size * config.hidden_size)) == pytest.approx(
        ff_share, abs=1e-3
    )


def test_abuilt_shape_has_weights_everywhere() -> None:
    for shape in (TINY, TINY_OPT):
        model = shapes.build(shape, torch.bfloat16)
        assert not model.training
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.bfloat16
            values = parameter.detach().float()
            norm = parameter.dim() == 1 and not name.endswith("bias")
            assert float(values.mean()) == pytest.approx(1.0 if norm else 0.0, abs=0.15), name
            assert 0.1 < float(values.std()) < 0.25, name
        assert bool(model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all())
    assert len(find_ff_blocks(shapes.build(TINY, torch.float32, layers=2))) == 2


def test_cache_bytes() -> None:
    assert shapes.cache_bytes(shapes.SHAPES["llama2-7b"], torch.bfloat16, 1) == 2 * 32 * 4096 * 2
    assert shapes.cache_bytes(shapes.SHAPES["mistral-7b"], torch.bfloat16, 10) == 10 * 2 * 32 * 8 * 128 * 2
    assert shapes.cache_bytes(shapes.SHAPES["opt-6.7b"], torch.float32, 1) == 2 * 32 * 4096 * 4


def test_prompts_of_a_passage_differ_and_keep_the_first_token() -> None:
    prompts = workload.passage_prompts([1, *range(10, 60)], 1, 3, 70)
    assert prompts.shape == (3, 70)
    assert prompts[:, 0].tolist() == [1, 1, 1]
    assert prompts[0, 1:6].tolist() == [10, 11, 12, 13, 14]
    assert len({tuple(own) for own in prompts.tolist()}) == 3
    assert workload.passage_prompts([5, 6, 7], None, 1, 7).tolist() == [[5, 6, 7, 5, 6, 7, 5]]


# -- the command ------------------------------------------------------------------------------------------------------


def test_json(capsys: Any) -> None:
    wanted = ["--shape", "tiny", "--density", "0.5,0.25", "--selection", "topk,magnitude", "--backend", "gather"]
    assert main(["bench", *wanted, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "versions", "rows"}
    assert found["versions"]["torch"] == torch.__version__
    assert {"cpu", "torch_threads", "load_average", "read_bandwidth_bytes_per_s", "native_library"} <= set(
        found["machine"]
    )
    assert len(found["machine"]["read_bandwidth_measured"]) == 3  # before and after each of two rounds
    assert [(row["density"], row["selection"]) for row in found["rows"]] == [
        (1.0, "topk"),
        *[(0.5, "topk"), (0.25, "topk"), (0.5, "magnitude"), (0.25, "magnitude")],
    ]
    for row in found["rows"]:
        assert set(row) == FIGURES
        assert (row["model"], row["weights"], row["backend"], row["batch"]) == ("tiny", "bf16", "gather", 1)
        assert (row["prompt_tokens"], row["generated_tokens"]) == (8, 4)
        assert all(value is not None for value in row.values())
    assert found["rows"][0]["speedup"] == 1.0


def test_a_batch_and_the_tables_and_the_files(tmp_path: Path, capsys: Any) -> None:
    table, json_file = tmp_path / "rows.csv", tmp_path / "rows.json"
    table.write_text("old")
    threads = torch.get_num_threads()
    arguments = ["bench", "--shape", "tiny-opt", "--density", "0.5", "--batch", "3", "--threads", "1"]
    assert main([*arguments, *QUICK, "--csv", str(table), "--json", str(json_file)]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr()
    assert "tiny-opt, bf16" in output.out
    assert "batch 3, 8 + 4 tokens" in output.out
    assert "load average" in output.err
    found = json.loads(json_file.read_text())
    lines = list(csv.DictReader(table.open()))
    assert [float(line["density"]) for line in lines] == [1.0, 0.5]
    for line, row in zip(lines, found["rows"], strict=True):
        assert float(line["generation_tokens_per_s"]) == row["generation_tokens_per_s"]
        assert (line["torch"], line["cpu"]) == (torch.__version__, found["machine"]["cpu"])
        assert line["torch_threads"] == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.json"]


@pytest.mark.skipif(library.why_not() is not None, reason="the native library was not built")
def test_a_density_one_on_another_path_is_told(capsys: Any) -> None:
    assert main(["bench", "--shape", "tiny-opt", "--density", "0.5", "--backend", "native", *QUICK, "--json"]) == 0
    output = capsys.readouterr()
    full, half = json.loads(output.out)["rows"]
    assert (full["native_calls_per_step"], half["native_calls_per_step"]) == (0, LAYERS)
    assert "tiny-opt at density 1.0 ran Transformers' own forward" in output.err


def test_a_loaded_model(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Words:
        bos_token_id = 1

        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, *(ord(letter) % VOCABULARY for letter in text)]}

    asked: dict[str, Any] = {}

    def load(name: str, dtype: torch.dtype | None, device: str) -> Any:
        asked.update(name=name, dtype=dtype, device=device)
        return shapes.build(TINY, dtype or torch.float32), Words()

    monkeypatch.setattr(workload, "load", load)
    assert main(["bench", "-m", "some", "--density", "0.5", *QUICK, "--json"]) == 0
    assert asked == {"name": "some", "dtype": None, "device": "cpu"}
    assert {row["weights"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"f32"}
    assert main(["bench", "-m", "some", "--weights", "bf16", "--density", "0.5", *QUICK, "--json"]) == 0
    assert {row["weights"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"bf16"}


REFUSED: dict[str, tuple[list[str], str]] = {
    "shape": (["--shape", "llama9"], "shape is 'llama9'; expected one of llama2-7b"),
    "both": (["--shape", "tiny", "-m", "x"], "do not go together"),
    "density list": (["--shape", "tiny", "--density", "0.5;1"], "found '0.5;1'"),
    "density": (["--shape", "tiny", "--density", "0.5,1.5"], "density is 1.5"),
    "density nan": (["--shape", "tiny", "--density", "nan"], "density is nan"),
    "selection": (["--shape", "tiny", "--selection", "topk,best"], "selection is 'best'"),
    "backend": (["--shape", "tiny", "--backend", "fast"], "backend is 'fast'"),
    "weights": (["--shape", "tiny", "--weights", "int3"], "weights is 'int3'"),
    "generate": (["--shape", "tiny", "--generate", "1"], "--generate is 1; expected a whole number from 2"),
    "repeats": (["--shape", "tiny", "--repeats", "0"], "--repeats is 0"),
    "prompt": (["--shape", "tiny", "--prompt", "0"], "--prompt is 0"),
    "context": (["--shape", "tiny", "--prompt", "60", "--generate", "5"], "context of 64"),
    "preset": (["--preset", "table"], "--preset is 'table'"),
    "preset density": (["--preset", "paper", "--density", "0.5"], "--density"),
    "preset shape": (["--preset", "paper", "--shape", "opt-6.7b"], "llama2-13b and gemma-7b"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments: list[str], words: str, capsys: Any) -> None:
    assert main(["bench", *arguments]) == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert output.out == ""


def test_files_that_cannot_be_written_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(workload, "carry_out", lambda *args: pytest.fail("it was run"))
    for flag in ("--csv", "--json"):
        for path in (tmp_path, tmp_path / "missing" / "rows"):
            assert main(["bench", "--shape", "tiny", flag, str(path)]) == 1
            assert f"cannot write to {path}" in capsys.readouterr().err


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
    files.check_writable(Path("/dev/null"))
    files.write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


def test_what_does_not_fit_is_refused_before_it_isbuilt(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 24 * 10**9)
    monkeypatch.setattr(shapes, "build", lambda *args: pytest.fail("it was built"))
    assert main(["bench", "--preset", "paper"]) == 1
    error = capsys.readouterr().err
    assert "llama2-13b in bf16 needs 29.4 GB of memory (26.0 GB of weights, 3.4 GB of key/value cache)" in error
    assert "24.0 GB are free" in error


def test_the_papers_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[workload.Plan] = []

    def carry_out(plan: workload.Plan, done: object) -> Any:
        plans.append(plan)
        raise GriffinError("enough")

    monkeypatch.setattr(workload, "carry_out", carry_out)
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**12)
    assert main(["bench", "--preset", "paper"]) == 1
    assert main(["bench", "--preset", "paper", "--shape", "gemma-7b"]) == 1
    assert [plan.names for plan in plans] == [("llama2-13b", "gemma-7b"), ("gemma-7b",)]
    assert plans[0].lengths == ((2048, 128), (2048, 2048))
    assert [(own.density, own.selection) for own in plans[0].configs] == [
        (1.0, "topk"),
        *[(0.5, "magnitude"), (0.25, "magnitude"), (0.5, "topk"), (0.25, "topk")],
    ]


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(workload, "carry_out", lambda *args: (_ for _ in ()).throw(GriffinError("enough")))
    for load, busy in ((0.0, False), (0.6 * (os.cpu_count() or 1), True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert main(["bench", "--shape", "tiny"]) == 1
        assert ("warning: this machine is busy" in capsys.readouterr().err) == busy


# -- machine ----------------------------------------------------------------------------------------------------------


def test_without_the_native_library_torch_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "library", SimpleNamespace(why_not=lambda: "not built"))
    found = machine.read_bandwidth()
    assert found is not None
    assert found.bytes_per_s > 0
    assert "torch sum" in found.how
    monkeypatch.setattr(machine, "available_bytes", lambda: 100)
    assert machine.read_bandwidth() is None


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_bytes() == 700000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_bytes() is None


def test_the_peak_of_memory_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STATUS", Path("/nowhere"))
    assert machine.peak_rss_bytes()  # from getrusage
    monkeypatch.setattr(machine, "_CLEAR", Path("/nowhere/clear_refs"))
    assert not machine.reset_peak_rss()
