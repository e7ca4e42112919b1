"""Perplexity of the generation phase: one teacher-forced pass, equal to generating token by token."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, PreTrainedTokenizerBase

import griffin
from conftest import tiny_llama
from griffin.analysis import perplexity
from griffin.analysis.perplexity import measure, summary, windows
from griffin.cli import main
from griffin.config import GriffinConfig
from test_cli import CONTEXT, WORDS, save_tiny

PROMPT, GENERATE = 12, 20
SELECTIONS = ("topk", "magnitude", "random")
CONFIGS = [GriffinConfig(density=0.5, selection=selection, seed=3) for selection in SELECTIONS]


def random_ids(sequences: int = 3, vocabulary: int = 97) -> Tensor:
    return torch.randint(vocabulary, (sequences, PROMPT + GENERATE), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def step_by_step(model: PreTrainedModel, ids: Tensor, prompt: int, config: GriffinConfig | None) -> Tensor:
    """Logits of the tokens after the prompt, each step one token: (N, G, V)."""
    found = []
    for row in ids:
        cache = DynamicCache(config=model.config)

        def last(tokens: Tensor, cache: DynamicCache = cache) -> Tensor:
            return model(tokens[None], past_key_values=cache, use_cache=True).logits[:, -1]

        if config is None:
            logits = [last(row[:prompt]), *(last(token[None]) for token in row[prompt:-1])]
        else:
            with griffin.attach(model, config) as handle:
                with handle.prompt_phase():
                    logits = [last(row[:prompt])]
                with handle.generation_phase():
                    logits += [last(token[None]) for token in row[prompt:-1]]
                assert handle.sparse_calls == len(handle.pruned) * (ids.shape[1] - prompt - 1) > 0
        found.append(torch.cat(logits))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [
        # The losses are float32 numbers of a size of about 10: a unit in the last place is 1e-6.
        (torch.float64, "reference", 5e-6),
        (torch.float32, "reference", 2e-4),  # matrices of one and of twenty rows sum in another order
        (torch.float32, "auto", 2e-4),
    ],
)
def test_nll_is_the_loss_of_generating_step_by_step(dtype: torch.dtype, backend: str, tolerance: float) -> None:
    model, ids = tiny_llama(dtype), random_ids()
    configs = [GriffinConfig(density=0.5, selection=own, backend=backend, seed=3) for own in SELECTIONS]
    full = step_by_step(model, ids, PROMPT, None)
    targets = ids[:, PROMPT:]
    for measured in measure(model, ids, PROMPT, configs):
        logits = step_by_step(model, ids, PROMPT, measured.config)
        for found, expected in ((measured.nll, logits), (measured.full_nll, full)):
            assert found.dtype == torch.float32
            loss = F.cross_entropy(expected.transpose(1, 2), targets, reduction="none").float()
            torch.testing.assert_close(found, loss, rtol=0, atol=tolerance)
        p, q = full.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        torch.testing.assert_close(measured.kl, (p.exp() * (p - q)).sum(dim=-1).float(), rtol=0, atol=10 * tolerance)
        assert torch.equal(measured.agreement, full.argmax(dim=-1) == logits.argmax(dim=-1))
        assert float(measured.kl[:, 1:].min()) > 0.0  # the experts alone predict otherwise
        assert not measured.agreement.all()


def test_a_sliding_window_slides_in_one_pass_too() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=97,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).double().eval()
    (measured,) = measure(model, random_ids(), PROMPT, CONFIGS[:1])
    logits = step_by_step(model, random_ids(), PROMPT, CONFIGS[0])
    loss = F.cross_entropy(logits.transpose(1, 2), random_ids()[:, PROMPT:], reduction="none").float()
    torch.testing.assert_close(measured.nll, loss, rtol=0, atol=5e-6)  # float32 losses of about 10


def test_density_one_is_the_full_model_bit_for_bit() -> None:
    (measured,) = measure(
        tiny_llama(torch.float32), random_ids(), PROMPT, [GriffinConfig(density=1.0, selection="topk")]
    )
    assert torch.equal(measured.nll, measured.full_nll)
    assert torch.equal(measured.kl, torch.zeros(3, GENERATE))
    assert measured.agreement.all()
    row = summary(measured, PROMPT, GENERATE)
    assert (row.log_ratio.value, row.log_ratio.low, row.log_ratio.high) == (0.0, 0.0, 0.0)
    assert row.perplexity == row.full_perplexity


def test_the_first_token_is_the_prompt_phases_and_a_sequence_does_not_see_the_others() -> None:
    model, ids = tiny_llama(), random_ids()
    (measured,) = measure(model, ids, PROMPT, CONFIGS[:1])
    assert torch.equal(measured.nll[:, 0], measured.full_nll[:, 0])
    (alone,) = measure(model, ids[1:2], PROMPT, CONFIGS[:1])
    assert torch.equal(alone.nll[0], measured.nll[1])


def test_a_shorter_continuation_is_a_prefix_of_a_longer_one() -> None:
    model, ids = tiny_llama(), random_ids()
    (longer,) = measure(model, ids, PROMPT, CONFIGS[:1])
    (shorter,) = measure(model, ids[:, : PROMPT + 6], PROMPT, CONFIGS[:1])
    torch.testing.assert_close(longer.nll[:, :6], shorter.nll, rtol=0, atol=5e-6)  # float32 losses of about 10
    assert summary(longer, PROMPT, 6).perplexity.value == pytest.approx(math.exp(float(shorter.nll.mean())), rel=1e-5)
    (one,) = measure(model, ids[:, : PROMPT + 1], PROMPT, CONFIGS[:1])
    torch.testing.assert_close(one.nll, longer.full_nll[:, :1], rtol=0, atol=5e-6)  # likewise


def test_many_logits_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids()
    (whole,) = measure(model, ids, PROMPT, CONFIGS[:1])
    monkeypatch.setattr(perplexity, "_VALUES_AT_A_TIME", 3 * 97)
    (parts,) = measure(model, ids, PROMPT, CONFIGS[:1])
    assert torch.equal(whole.nll, parts.nll)
    assert torch.equal(whole.kl, parts.kl)


def test_the_summary_says_what_the_tokens_say() -> None:
    (measured,) = measure(tiny_llama(), random_ids(), PROMPT, CONFIGS[:1])
    row = summary(measured, PROMPT, GENERATE)
    nll, full = measured.nll.double().mean(), measured.full_nll.double().mean()
    assert row.perplexity.value == pytest.approx(float(nll.exp()), rel=1e-12)
    assert row.log_ratio.value == pytest.approx(float(nll - full), abs=1e-12)
    assert row.agreement.value == pytest.approx(float(measured.agreement.double().mean()), abs=1e-12)
    for interval in (row.perplexity, row.full_perplexity, row.log_ratio, row.kl, row.agreement):
        assert interval.low <= interval.value <= interval.high
    flat = row.flat()
    assert (flat["kl"], flat["kl_low"], flat["prompt_tokens"], flat["sequences"]) == (row.kl.value, row.kl.low, 12, 3)
    with pytest.raises(ValueError, match="20 tokens were measured"):
        summary(measured, PROMPT, GENERATE + 1)


def test_the_model_is_as_before_and_progress_is_told() -> None:
    model, ids, told = tiny_llama(torch.float32), random_ids(), []
    before, strides = model(ids).logits, model.model.layers[0].mlp.down_proj.weight.stride()
    measure(model, ids, PROMPT, CONFIGS, progress=lambda: told.append(1))
    assert len(told) == 9
    assert torch.equal(model(ids).logits, before)
    assert model.model.layers[0].mlp.down_proj.weight.stride() == strides


def test_windows_do_not_overlap_and_all_prompts_have_the_same_continuation() -> None:
    ids = list(range(100, 200))
    short, long = windows(ids, 7, [3, 10], generate=5, sequences=4)
    assert long.shape == (4, 15)
    assert short.shape == (4, 8)
    assert long[:, 0].tolist() == short[:, 0].tolist() == [7] * 4
    assert torch.equal(long[:, -5:], short[:, -5:])
    assert torch.equal(long[:, -7:], short[:, 1:])
    tokens = long[:, 1:].flatten().tolist()
    assert len(set(tokens)) == len(tokens) == 56
    assert tokens[:14] == ids[:14]
    assert tokens[-1] > 180  # spread over the text
    (plain,) = windows(ids, None, [10], generate=5, sequences=6)
    assert plain[0].tolist() == ids[:15]
    (bare,) = windows(ids, 7, [1], generate=5, sequences=20)
    assert bare[3].tolist() == [7, *range(115, 120)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1] * 50, None, [10], 5, 4), "has 50 tokens, .* need 60; it is enough for 3"),
        (([], None, [10], 5, 4), "has 0 tokens"),
        (([1] * 50, None, [0], 5, 4), "prompt is 0"),
        (([1] * 50, None, [4], 0, 4), "generate is 0"),
        (([1] * 50, None, [4], 1, 0), "sequences is 0"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        windows(*arguments)


def test_sequences_that_cannot_be_measured_are_refused() -> None:
    model = tiny_llama(max_position_embeddings=24)
    with pytest.raises(ValueError, match="context of 24"):
        measure(model, random_ids(), PROMPT, CONFIGS)
    for prompt in (0, PROMPT + GENERATE):
        with pytest.raises(ValueError, match="expected"):
            measure(model, random_ids(), prompt, CONFIGS)


@pytest.mark.model
def test_one_pass_equals_generating_on_a_real_model(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    text = (Path(griffin.__file__).parent / "analysis" / "passage.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"][:160]).view(2, 80)
    for measured in measure(model, ids, 68, CONFIGS[:2]):
        logits = step_by_step(model, ids, 68, measured.config)
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 68:], reduction="none")
        torch.testing.assert_close(measured.nll, loss, rtol=0, atol=2e-3)  # float32 in 30 layers, summed otherwise
        row = summary(measured, 68, 12)
        assert row.full_perplexity.value < row.perplexity.value


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), None, CONTEXT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(WORDS[at] for at in torch.randint(len(WORDS), (400,), generator=generator)))
    return path


def command(model: str, *words: object) -> list[str]:
    return ["perplexity", "--model", model, *map(str, words)]


def test_the_command_sweeps_and_writes_what_it_measured(
    tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {name: tmp_path / f"found.{name}" for name in ("csv", "json", "png")}
    words = [
        "--text",
        text,
        "--densities",
        "1.0,0.5",
        "--selection",
        "topk,random",
        "--prompt",
        "32,8",
        "--sequences",
        5,
    ]
    files = ["--generate", "4,16", "--csv", out["csv"], "--json", out["json"], "--plot", out["png"]]
    assert main(command(tiny, *words, *files)) == 0
    shown = capsys.readouterr()
    assert "8 + 4 tokens, 5 sequences" in shown.out
    assert "top-1" in shown.out
    found = json.loads(out["json"].read_text())
    rows = found["rows"]
    assert [(row["prompt_tokens"], row["generated_tokens"]) for row in rows[::3]] == [
        (8, 4),
        (8, 16),
        (32, 4),
        (32, 16),
    ]
    assert [(row["density"], row["selection"]) for row in rows[:3]] == [(1.0, "topk"), (0.5, "topk"), (0.5, "random")]
    assert (found["about"]["text"], found["about"]["seed"], found["about"]["model"]) == ("words.txt", 0, tiny)
    for row in rows:
        assert row["perplexity_low"] <= row["perplexity"] <= row["perplexity_high"]
        assert (row["log_ratio"] == 0.0 and row["kl"] == 0.0) == (row["density"] == 1.0)
    same = {row["full_perplexity"] for row in rows if row["prompt_tokens"] == 32 and row["generated_tokens"] == 16}
    assert len(same) == 1
    table = list(csv.DictReader(out["csv"].read_text().splitlines()))
    assert [float(row["kl"]) for row in table] == [row["kl"] for row in rows]
    assert {row["torch"] for row in table} == {torch.__version__}
    with Image.open(out["png"]) as image:
        assert image.size[0] > 1000  # two panels
    model, tokenizer = griffin.load(tiny)
    ids = tokenizer(text.read_text())["input_ids"]
    (sequences,) = windows(ids, None, [32], 16, 5)
    (expected,) = measure(model, sequences, 32, [GriffinConfig(density=0.5, selection="topk")])
    assert rows[-2]["perplexity"] == pytest.approx(math.exp(float(expected.nll.double().mean())), rel=1e-9)


def test_one_sequence_has_no_interval_and_json_says_so(
    tiny: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--text", text, "--densities", "0.5", "--prompt", 8, "--generate", 4, "--sequences", 1]
    assert main(command(tiny, *words, "--json")) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["perplexity_low"] is None
    assert row["perplexity"] > 1.0
    assert main(command(tiny, *words)) == 0
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--text FILE is missing: give a UTF-8 text"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--text", "TEXT", "--prompt", 300, "--generate", 8], "the text has 400 tokens"),
        (["--text", "TEXT", "--prompt", 511, "--generate", 8, "--sequences", 1], "text has 400 tokens"),
        (["--text", "LONG", "--prompt", 511, "--generate", 8, "--sequences", 1], "fit the model's context of 512"),
        (["--text", "EMPTY"], "is empty"),
        (["--text", "TEXT", "--prompt", "0"], "expected numbers of tokens from 1"),
        (["--text", "TEXT", "--prompt", "8,x"], "expected numbers of tokens such as"),
        (["--text", "TEXT", "--densities", "0.5,2"], "density is 2.0"),
        (["--text", "TEXT", "--selection", "topk,nothing"], "selection is 'nothing'"),
        (["--text", "TEXT", "--prompt", 8, "--sequences", 0], "sequences is 0"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_nothing_is_written(
    words: list[object], message: str, tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"TEXT": text, "LONG": tmp_path / "long.txt", "EMPTY": tmp_path / "empty.txt"}
    files["LONG"].write_text(text.read_text() + " " + text.read_text())
    files["EMPTY"].write_text(" \n")
    csv_file = tmp_path / "found.csv"
    assert main(command(tiny, *(files.get(word, word) for word in words), "--csv", csv_file)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not csv_file.exists()


def test_a_tokenizer_says_whether_a_sequence_begins_with_a_token(tiny: str) -> None:
    _, tokenizer = griffin.load(tiny)
    assert perplexity.encode_text(tokenizer, "w1 w2") == ([6, 7], None)
    tokenizer.bos_token = "<|user|>"
    assert perplexity.encode_text(tokenizer, "w1 w2") == ([6, 7], None)  # there is one, but it is not put there
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", 3)]
    )
    assert perplexity.encode_text(tokenizer, "w1 w2") == ([6, 7], 3)
    with pytest.raises(ValueError, match="empty"):
        perplexity.encode_text(tokenizer, "  ")
