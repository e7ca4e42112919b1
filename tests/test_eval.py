"""The harness's integration: equal to `hf` at density 1.0, equal to plain loops below, and honest about bad data."""

from __future__ import annotations

import gzip
import json
import math
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from conftest import tiny_llama
from evaluation_data import bytes_model, bytes_tokenizer, special_model, write_data

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from griffin.attachment import attach
from griffin.cli import main
from griffin.config import GriffinConfig
from griffin.engine.step import Sampling
from griffin.integrations.lm_eval import SUITES, TASKS, GriffinLM, evaluate, generating
from griffin.integrations.lm_eval import data as data_files
from griffin.integrations.lm_eval.generating import Shared
from griffin.integrations.lm_eval.metrics import coqa_results, f1, normalised, qasper_results, rouge_results
from griffin.integrations.lm_eval.sweep import measured, task_jobs
from griffin.integrations.lm_eval.tasks import manager

# Different batches and shapes of one float64 computation: the last digits differ, and 100 tokens add up.
EXACT = 1e-9
TEXTS = [
    ("The river was wide, and", [" so was the bridge.", " it was cold", " x"]),
    ("A shorter one:", [" yes", " no"]),
    ("", ["nothing came before this"]),
    ("The river was wide, and the boat was very small", [" indeed."]),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors are faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _no_survey() -> Iterator[None]:
    """With every result the harness writes down what pip lists and the hardware, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return bytes_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, saved."""
    path = tmp_path_factory.mktemp("bytes")
    bytes_model(torch.float32).save_pretrained(path)
    bytes_tokenizer().save_pretrained(path)
    return str(path)


def requests(texts: Sequence[tuple[str, Sequence[str]]] = TEXTS) -> list[Instance]:
    pairs = [(context, continuation) for context, continuations in texts for continuation in continuations]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def griffin_lm(model: Any, tokenizer: Any, **arguments: Any) -> GriffinLM:
    return GriffinLM(
        model, tokenizer=tokenizer, disable_tqdm=True, **{"density": 0.5, "selection": "topk", **arguments}
    )


@pytest.mark.model
def test_a_built_in_model_in_packed_weights_with_dynamic_selection(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    texts = [("The capital of France is", [" Paris", " a potato"]), ("Water is", [" wet"])]
    scores = {}
    for dtype in ("bfloat16", None):  # None: as the file has them
        lm = GriffinLM("smollm2-135m", dtype=dtype, density=0.6, selection="dynamic+topk", disable_tqdm=True)
        scores[dtype] = [score for score, _ in lm.loglikelihood(requests(texts))]
    (paris, potato, wet), packed = scores["bfloat16"], scores[None]
    assert paris > potato
    assert packed[0] > packed[1]
    assert packed[2] == pytest.approx(wet, abs=1.0)  # other neurons at the edge


# -- equal to hf at density 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_density_1_equals_hf_on_every_task(
    task: str, data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    task_manager = manager({"data": str(data)})
    hf = HFLM(model, tokenizer=tokenizer)
    expected: Any = lm_eval.simple_evaluate(
        hf, tasks=[task], task_manager=task_manager, limit=2, bootstrap_iters=0, **seeds
    )
    result = evaluate(model, tokenizer, GriffinConfig(density=1.0, selection="topk"), tasks=[task], data=data, limit=2)[
        task
    ]
    values = {key.split(",")[0]: value for key, value in expected["results"][task].items() if "," in key}
    values = {key: value for key, value in values.items() if not key.endswith("_stderr")}
    assert values
    for metric, value in values.items():
        if f"{metric} (flexible-extract)" in result.metrics:  # the last filter of two
            metric = f"{metric} (flexible-extract)"
        assert result.metrics[metric] == value  # the same digits
    theirs = [sample["filtered_resps"] for sample in expected["samples"][task]][: result.n]
    ours = [sample["response"] for sample in result.samples]
    assert ours == [one[0] if len(one) == 1 else [list(choice) for choice in one] for one in theirs]


def test_no_program_is_run_for_a_task(
    data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness describes the machine after each task, by `pip list` and others."""
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: pytest.fail(f"{words} is run"))
    evaluate(model, tokenizer, GriffinConfig(density=1.0), tasks=TASKS[:1], data=data, limit=1)


def test_below_density_1_results_differ(
    data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    both = [
        evaluate(
            model,
            tokenizer,
            GriffinConfig(density=density, selection="topk"),
            tasks=["hellaswag", "xsum"],
            data=data,
            limit=2,
        )
        for density in (1.0, 0.25)
    ]
    for task in ("hellaswag", "xsum"):
        assert both[0][task].samples[0]["response"] != both[1][task].samples[0]["response"]
        assert both[0][task].samples[0]["target"] == both[1][task].samples[0]["target"]
        assert both[0][task].n == 2
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


# -- equal to plain loops below -------------------------------------------------------------------------------------


def encoded(lm: GriffinLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if not context:
        return [lm.prefix_token_id], lm.tok_encode(continuation)
    pair: tuple[list[int], list[int]] = lm._encode_pair(context, continuation)
    return pair


@torch.no_grad()
def continuation_by_hand(
    model: PreTrainedModel, config: GriffinConfig, prompts: Sequence[list[int]], row: int, continuation: list[int]
) -> tuple[float, bool]:
    """Token by token, one sequence, the context's keys and values from the full model. `prompts` choose the experts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    context = prompts[row]
    with attach(model, config) as handle:
        with handle.prompt_phase():
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        cache = DynamicCache()
        if len(context) > 1:
            model(torch.tensor([context[:-1]]), past_key_values=cache)
        total, greedy, token = 0.0, True, context[-1]
        for wanted in continuation:
            with handle.generation_phase(rows=[row]):
                logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            total += float(logits.log_softmax(-1)[wanted])
            greedy &= int(logits.argmax()) == wanted
            token = wanted
    return total, greedy


@torch.no_grad()
def last_token_by_hand(
    model: PreTrainedModel, config: GriffinConfig, whole: list[int], scored: int
) -> tuple[float, bool]:
    """The input but its last token in full, that one with the experts."""
    cache = DynamicCache()
    with attach(model, config) as handle:
        with handle.prompt_phase():
            prompt_logits = model(torch.tensor([whole[:-2]]), past_key_values=cache, use_cache=True).logits
        with handle.generation_phase():
            last_logits = model(torch.tensor([whole[-2:-1]]), past_key_values=cache, use_cache=True).logits
    logits = torch.cat([prompt_logits, last_logits], dim=1)[0, -scored:].log_softmax(-1)
    wanted = torch.tensor(whole[-scored:])
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize(("batch", "batch_size"), [("shared", 1), ("per_sequence", 1), ("per_sequence", 3)])
def test_continuation_equals_a_loop(
    backend: str, batch: str, batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = griffin_lm(model, tokenizer, backend=backend, batch=batch, batch_size=batch_size)
    scores = lm.loglikelihood(requests())
    for request, (loglikelihood, greedy) in zip(requests(), scores, strict=True):
        context, continuation = encoded(lm, *request.args)
        expected = continuation_by_hand(model, GriffinConfig(density=0.5, selection="topk"), [context], 0, continuation)
        assert loglikelihood == pytest.approx(expected[0], abs=EXACT)
        assert greedy == expected[1]


def test_a_batch_that_shares_its_experts_equals_a_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = griffin_lm(model, tokenizer, batch_size=2, selection="topk")
    texts = TEXTS[:2]
    scores = lm.loglikelihood(requests(texts))
    prompts = [encoded(lm, context, "x")[0] for context, _ in texts]
    alone = griffin_lm(model, tokenizer).loglikelihood(requests(texts))
    assert [one for one, _ in scores] != pytest.approx([one for one, _ in alone], abs=1e-3)  # the batch does matter
    rows = [row for row, (_, continuations) in enumerate(texts) for _ in continuations]
    for row, request, (loglikelihood, _) in zip(rows, requests(texts), scores, strict=True):
        continuation = encoded(lm, *request.args)[1]
        config = GriffinConfig(density=0.5, batch="shared", selection="topk")
        # one set of experts: row 0 is all there is
        expected = shared_by_hand(model, config, prompts, row, continuation)
        assert loglikelihood == pytest.approx(expected, abs=EXACT)


def shared_by_hand(
    model: PreTrainedModel, config: GriffinConfig, prompts: Sequence[list[int]], row: int, continuation: list[int]
) -> float:
    return continuation_by_hand(model, config, prompts, row, continuation)[0]


@pytest.mark.parametrize(("batch", "batch_size"), [("shared", 1), ("per_sequence", 3)])
def test_last_token_equals_a_loop(
    batch: str, batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = griffin_lm(model, tokenizer, phase="last_token", batch=batch, batch_size=batch_size)
    scores = lm.loglikelihood(requests())
    full = griffin_lm(model, tokenizer, density=1.0).loglikelihood(requests())
    for request, (loglikelihood, greedy), (whole, _) in zip(requests(), scores, full, strict=True):
        context, continuation = encoded(lm, *request.args)
        expected = last_token_by_hand(
            model, GriffinConfig(density=0.5, selection="topk"), context + continuation, len(continuation)
        )
        assert loglikelihood == pytest.approx(expected[0], abs=EXACT)
        assert greedy == expected[1]
        assert loglikelihood != pytest.approx(whole, abs=1e-6)  # the experts did compute something


def test_one_token_after_one_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing comes before the token that is computed with experts: it is its own prompt, in both phases."""
    texts = [("", ["a", "b"]), ("c", ["d"])]
    for batch_size in (1, 3):
        both = [
            griffin_lm(model, tokenizer, phase=phase, batch_size=batch_size, batch="per_sequence").loglikelihood(
                requests(texts)
            )
            for phase in ("continuation", "last_token")
        ]
        assert [one for one, _ in both[0]] == pytest.approx([one for one, _ in both[1]], abs=EXACT)


def test_long_continuations_run_in_parts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = griffin_lm(model, tokenizer).loglikelihood(requests())
    monkeypatch.setattr("griffin.integrations.lm_eval.scoring._TOKENS", 5)
    monkeypatch.setattr("griffin.integrations.lm_eval.scoring._MIN_CONTINUATIONS", 2)
    parts = griffin_lm(model, tokenizer).loglikelihood(requests())
    assert [one for one, _ in parts] == pytest.approx([one for one, _ in whole], abs=EXACT)


def test_the_native_backend_scores_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    from griffin.native import library

    if (reason := library.why_not()) is not None:
        pytest.skip(reason)
    model = bytes_model(torch.float32)
    both = [
        griffin_lm(model, tokenizer, backend=backend, batch="per_sequence", batch_size=3).loglikelihood(requests())
        for backend in ("native", "reference")
    ]
    # float32 sums of 30 tokens in another order
    assert [one for one, _ in both[0]] == pytest.approx([one for one, _ in both[1]], abs=1e-3)


def test_rolling_windows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "A text that is longer than the window of forty tokens, so that there are three windows of it."
    lm = griffin_lm(model, tokenizer, max_length=40)
    totals = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    total, at = 0.0, 1
    while at < len(ids):
        end = min(at + 40, len(ids))
        start = max(0, end - 41)  # the last window has more context
        total += continuation_by_hand(
            model,
            GriffinConfig(density=0.5, selection="topk"),
            [ids[start if end == len(ids) else at - 1 : at]],
            0,
            ids[at:end],
        )[0]
        at = end
    assert totals == [pytest.approx(total, abs=EXACT)]


def test_contexts_beyond_the_window_are_cut_and_counted(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [("This context is longer than twenty tokens.", [" yes", " no!"]), ("This is not.", [" yes"])]
    lm = griffin_lm(model, tokenizer, max_length=20)
    scores = lm.loglikelihood(requests(texts))
    assert (lm.truncated, lm.contexts) == (1, 2)  # contexts, not choices
    assert "1 of 2 contexts are longer than the window of 20 tokens" in caplog.text
    for request, (loglikelihood, _) in zip(requests(texts), scores, strict=True):
        context, continuation = encoded(lm, *request.args)
        kept = context[-(21 - len(continuation)) :]
        expected = continuation_by_hand(model, GriffinConfig(density=0.5, selection="topk"), [kept], 0, continuation)[0]
        assert loglikelihood == pytest.approx(expected, abs=EXACT)
    full = griffin_lm(model, tokenizer, density=1.0, max_length=20)
    assert full.loglikelihood(requests(texts)) == HFLM(model, tokenizer=tokenizer, max_length=20).loglikelihood(
        requests(texts)
    )
    assert full.truncated == 1


# -- generation -----------------------------------------------------------------------------------------------------


def generated(lm: Any, texts: Sequence[str], **settings: Any) -> list[str]:
    wanted = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, **settings}
    result: list[str] = lm.generate_until([Instance("generate_until", {}, (text, wanted), 0) for text in texts], True)
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the gather backend, and the native step
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_is_that_of_the_attached_model(
    dtype: torch.dtype, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = bytes_model(dtype)
    texts = [context for context, _ in TEXTS if context]
    lm = griffin_lm(model, tokenizer, batch="per_sequence", batch_size=batch_size)
    answers = generated(lm, texts)
    beams = generated(lm, texts, num_beams=1, length_penalty=1.0)  # settings of generate's own: it runs attached
    assert answers == beams
    full = generated(HFLM(model, tokenizer=tokenizer), texts)
    assert answers != full
    assert generated(griffin_lm(model, tokenizer, density=1.0), texts) == full


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the gather backend, and the native step
def test_configs_that_share_a_prompt_phase_answer_as_if_each_were_alone(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = bytes_model(dtype)
    texts = [context for context, _ in TEXTS if context]
    settings: list[dict[str, Any]] = [
        {"density": 1.0},
        {"density": 0.5},
        {"density": 0.25, "batch": "per_sequence"},
        {"density": 0.5, "selection": "magnitude"},
        {"density": 0.5, "selection": "random", "seed": 3},
    ]
    alone = [generated(griffin_lm(model, tokenizer, batch_size=2, **setting), texts) for setting in settings]
    assert len(set(map(tuple, alone))) == len(settings)
    whole_prompts = []  # forward passes over more than one token

    def see(module: Any, args: Any, kwargs: Any) -> None:
        whole_prompts.append((args[0] if args else kwargs["input_ids"]).shape[1] > 1)

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    shared = Shared([GriffinConfig(**{"selection": "topk", **setting}) for setting in settings])
    together = [
        generated(griffin_lm(model, tokenizer, batch_size=2, shared=shared, **setting), texts) for setting in settings
    ]
    hook.remove()
    assert together == alone
    assert sum(whole_prompts) == 2  # a batch of two and one of one


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1.7), ("no_repeat_ngram_size", 2)])
def test_a_models_own_rules_hold_at_every_density(
    name: str, value: float, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [context for context, _ in TEXTS if context]
    setattr(model.generation_config, name, value)
    hf = generated(HFLM(model, tokenizer=tokenizer), texts)
    configs = [
        GriffinConfig(density=1.0, selection="topk"),
        GriffinConfig(density=0.5, batch="per_sequence", selection="topk"),
    ]
    shared = Shared(configs)
    together = [
        generated(griffin_lm(model, tokenizer, density=config.density, batch=config.batch, shared=shared), texts)
        for config in configs
    ]
    alone = generated(griffin_lm(model, tokenizer, density=0.5, batch="per_sequence"), texts)
    assert together == [hf, alone]
    assert alone != hf
    setattr(model.generation_config, name, None)
    assert generated(griffin_lm(model, tokenizer, density=0.5, batch="per_sequence"), texts) != alone


def test_answers_of_another_model_are_not_taken(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "texts" / "xsum.partial.jsonl"
    texts = [context for context, _ in TEXTS if context]
    for number, other in enumerate((bytes_model(torch.float32), bytes_model(torch.float64)), 1):
        shared = Shared([GriffinConfig(density=0.5, selection="topk")], path, model=str(other.dtype))
        generated(griffin_lm(other, tokenizer, density=0.5, shared=shared), texts)
        assert len(path.read_text().splitlines()) == number * len(texts)


def test_answers_of_a_killed_run_are_not_generated_again(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts" / "xsum.partial.jsonl"
    texts = [context for context, _ in TEXTS if context]
    configs = [GriffinConfig(density=1.0, selection="topk"), GriffinConfig(density=0.5, selection="topk")]
    shares: list[float] = []

    def run() -> list[list[str]]:
        shared = Shared(configs, path, shares.append)
        return [
            generated(griffin_lm(model, tokenizer, density=config.density, shared=shared), texts) for config in configs
        ]

    answers = run()
    assert sum(shares) == pytest.approx(1.0)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(texts) * len(configs)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    made = []
    real = generating.answer
    monkeypatch.setattr(generating, "answer", lambda *args: made.append(args) or real(*args))
    assert run() == answers
    assert len(made) == len(lines) - 3
    assert run() == answers
    assert len(made) == len(lines) - 3


def test_a_sweep_runs_the_prompts_of_free_answers_once(
    data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [GriffinConfig(density=density, selection="topk") for density in (1.0, 0.5, 0.25)]
    jobs = task_jobs(
        model, tokenizer, ["xsum", "boolq"], configs, data=data, limit=2, phase="continuation", batch_size=1
    )
    assert [[key.density for key in job.keys] for job in jobs] == [[1.0, 0.5, 0.25], [1.0], [0.5], [0.25]]
    calls = []
    real = generating.answers
    monkeypatch.setattr(generating, "answers", lambda *args: calls.append(args) or real(*args))
    cells = list(jobs[0].measure(jobs[0].keys, lambda share: None))
    assert len(calls) == 2  # of two examples, for three configs
    alone = [evaluate(model, tokenizer, config, tasks=["xsum"], data=data, limit=2)["xsum"] for config in configs]
    assert [cell.samples["values"] for cell in cells if cell.samples] == [result.per_sample for result in alone]


def test_stop_texts_end_an_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = griffin_lm(model, tokenizer)
    whole = generated(lm, ["The river"])[0]
    stop = whole[5:7]
    assert generated(lm, ["The river"], until=[stop]) == [whole[: whole.index(stop)]]


def test_a_byte_order_mark_is_no_part_of_a_data_file(data: Path, tmp_path: Path) -> None:
    for path in filter(Path.is_file, data.rglob("*")):
        marked = tmp_path / path.relative_to(data)
        marked.parent.mkdir(parents=True, exist_ok=True)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = "\ufeff".encode() + content
        marked.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    for task in TASKS:
        assert data_files.load(task, tmp_path) == data_files.load(task, data)


def test_special_tokens_end_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    model, before, special, after = special_model()
    for density in (1.0, 0.999):
        lm = griffin_lm(model, tokenizer, density=density)
        assert generated(lm, ["The river"], until=[special]) == [before]
        # the harness takes special tokens out before it looks for the stop texts itself
        assert generated(lm, ["The river"], until=[special + after])[0].startswith(before)
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    ends = tokenizer(special + after)["input_ids"]
    with attach(model, GriffinConfig(density=0.999, selection="topk")) as handle:
        for stop, count in ((special, 1), (special + after, 2)):
            batch = generating.PromptBatch(ids, None, 30, (stop,), Sampling(max_tokens=30))
            row = generating.answer(model, tokenizer, batch, handle)[0].tolist()
            assert row[row.index(ends[0]) :] == ends[:count]


def test_long_prompts_are_cut_and_counted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for density in (1.0, 0.5):
        lm = griffin_lm(model, tokenizer, density=density, max_length=30)
        long, short = generated(lm, ["The end of this is all that is left of it", "Short"])
        assert (lm.truncated, lm.contexts) == (1, 2)
        assert [long, short] == generated(lm, ["that is left of it"[-18:], "Short"])


def test_sampling_follows_the_seed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn += generated(griffin_lm(model, tokenizer), ["The"], do_sample=True, temperature=5.0)
    assert drawn[0] == drawn[1] != drawn[2]


# -- arguments ------------------------------------------------------------------------------------------------------


def test_the_entry_point_names_the_model() -> None:
    from importlib.metadata import entry_points

    (point,) = (point for point in entry_points(group="lm_eval.models") if point.name == "griffin")
    assert point.load() is GriffinLM is get_model("griffin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"densty": 0.5}, "unknown model argument 'densty'; did you mean 'density'"),
        ({"density": 2.0}, "density is 2.0"),
        ({"phase": "both"}, "phase is 'both'"),
        ({"selection": "best"}, "selection is 'best'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
    ],
)
def test_wrong_model_arguments(
    arguments: dict[str, Any], message: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        griffin_lm(model, tokenizer, **arguments)


@pytest.mark.parametrize("phase", ["continuation", "last_token"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_hf_scores_is_scored_at_every_density(phase: str, batch_size: int) -> None:
    tokenizer = bytes_tokenizer(merge="ab")
    texts = [
        ("The river was", ["", "x", " wide", "y"]),
        ("a", ["b", "bc", "c", ""]),  # one token with the context's last; another one more; apart; nothing
        ("xa", ["bab", "b", "d"]),
        ("So ", ["", "n"]),  # the space goes to the choice
        ("", ["ab", "<s>ab"]),
    ]
    model = bytes_model(merges=1)
    hf = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    expected = hf.loglikelihood(requests(texts), True)
    empty = [number for number, score in enumerate(expected) if score == (0.0, True)]
    assert empty == [0, 4, 7, 9]
    arguments = {"phase": phase, "batch_size": batch_size}
    assert griffin_lm(model, tokenizer, density=1.0, **arguments).loglikelihood(requests(texts)) == expected
    scores = griffin_lm(model, tokenizer, density=0.5, **arguments).loglikelihood(requests(texts))
    assert [number for number, score in enumerate(scores) if score == (0.0, True)] == empty
    assert all(math.isfinite(score) for score, _ in scores)
    if phase == "continuation" and batch_size == 1:
        for request, score in zip(requests(texts), scores, strict=True):
            context, continuation = hf._encode_pair(*request.args) if request.args[0] else ([1], [2 + 256 + 1])
            by_hand = continuation_by_hand(
                model, GriffinConfig(density=0.5, selection="topk"), [context], 0, continuation
            )
            assert score == (pytest.approx(by_hand[0], abs=EXACT), by_hand[1])


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_choice_without_tokens_scores_nothing_alone(density: float) -> None:
    model, tokenizer = bytes_model(merges=1), bytes_tokenizer(merge="ab")
    lm = griffin_lm(model, tokenizer, density=density)
    for context, choice in (("The river was", ""), ("xa", "b"), ("", ""), ("", "<s>")):
        assert lm.loglikelihood(requests([(context, [choice])])) == [(0.0, True)]
    with pytest.raises(ValueError, match="a context has no tokens"):
        lm.loglikelihood(requests([(" ", ["x"])]))
    rolling = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(("", "abc", ""))]
    expected = HFLM(model, tokenizer=tokenizer).loglikelihood_rolling(rolling, True)
    scores = lm.loglikelihood_rolling(rolling)
    assert scores[0] == scores[2] == expected[0] == 0.0
    assert (scores == expected) == (density == 1.0)
    assert math.isfinite(scores[1])


def test_a_continuation_longer_than_the_window_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="a continuation has 11 tokens"):
        griffin_lm(model, tokenizer, max_length=10).loglikelihood(requests([("a", ["bcdefghijkl"])]))


def test_rows_name_prompts_that_there_were(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    ids = torch.randint(3, 97, (2, 9))
    with attach(model, density=0.5, batch="per_sequence", selection="topk") as handle, torch.no_grad():
        with handle.prompt_phase():
            model(ids)
        with handle.generation_phase():
            both = model(ids[:, :3]).logits
        with handle.generation_phase(rows=[1, 0, 1]):
            chosen = model(ids[[1, 0, 1], :3]).logits
        with handle.generation_phase(rows=[1]):
            single = model(ids[1:, :3]).logits
        with handle.generation_phase():
            again = model(ids[:, :3]).logits
        with pytest.raises(ValueError, match="expected numbers of the 2 prompts"), handle.generation_phase(rows=[2]):
            pass
    torch.testing.assert_close(chosen, both[[1, 0, 1]])
    torch.testing.assert_close(single, both[1:])
    assert torch.equal(both, again)


# -- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    assert normalised("The  Cat's (an) hat!") == "cats hat"
    assert f1("the red house", "A red, red barn") == pytest.approx(2 / 5)  # 1 of 2 words, of 3 given
    assert (f1("the", "a"), f1("the", "cat"), f1("dog", "cat")) == (1, 0, 0)
    assert qasper_results({"answers": ["two cats", "a dog"]}, [" Dog\n"]) == {"qa_f1_score": 1}
    doc = {
        "questions": {"input_text": ["Which?"]},
        "answers": {"input_text": ["red"]},
        "additional_answers": {"0": {"input_text": ["Red"]}, "1": {"input_text": ["dark red"]}},
    }
    # golds are red and dark red; against the one left: exact with red only, F1 1 and 2/3
    assert coqa_results(doc, [" red \nQ"]) == {"em": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}
    assert coqa_results(doc, [""]) == {"em": 0, "f1": 0}
    scores = rouge_results({"summary": "the cat sat"}, [" the cats ran "])
    assert scores == {"rouge1": pytest.approx(2 / 3), "rouge2": pytest.approx(1 / 2), "rougeL": pytest.approx(2 / 3)}


def test_prompts_are_the_harnesss(data: Path) -> None:
    loaded = manager({"data": str(data)}).load(list(TASKS))["tasks"]
    text = {name: task.doc_to_text(task.task_docs[0]) for name, task in loaded.items()}
    assert text["arc_easy"] == "Question: What is a river in the easy test?\nAnswer:"
    assert text["boolq"] == "This river is 0 years old.\nQuestion: is the river old?\nAnswer:"
    assert text["copa"] == "The river was wet because"
    assert text["hellaswag"] == "About a river: A person looks at the river. They"
    assert text["coqa"] == ("Tom has a river. It is red.\n\nQ: What has Tom?\n\nA: a river\n\nQ: Which colour?\n\nA:")
    assert loaded["coqa"].doc_to_target(loaded["coqa"].task_docs[0]) == ["red", "it is red", "dark red"]
    assert loaded["qasper"].task_docs[0]["answers"] == ["the river", "one river"]
    assert "We study the river." in text["qasper"]
    assert len(loaded["gsm8k"].task_docs) == 2
    assert "= = Use = =" in loaded["wikitext2"].task_docs[0]["page"]
    shot = loaded["cnn_dailymail"].fewshot_context(loaded["cnn_dailymail"].task_docs[0], 1)
    assert shot.count("###\nArticle:") == 2
    assert shot.endswith("Summarize the above article in 3 sentences.")
    assert "the river, " in shot  # the shortest article is the shot
    assert all("the river, " not in doc["article"] for doc in loaded["cnn_dailymail"].task_docs)


@pytest.mark.parametrize("task", ["copa", "piqa", "boolq", "hellaswag", "coqa"])
def test_a_row_is_not_among_its_own_shots(task: str, data: Path) -> None:
    (loaded,) = manager({"data": str(data)}).load([task])["tasks"].values()
    loaded.set_fewshot_seed(0)
    count = len(loaded.task_docs) - 1
    for doc in loaded.task_docs:
        text = loaded.fewshot_context(doc, count)
        assert text.count(loaded.doc_to_text(doc)) == 1
        assert text.endswith(loaded.doc_to_text(doc))


# -- bad data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "file", "line", "message"),
    [
        ("copa", "copa/superglue_copa_val.jsonl", "{broken", "line 5: no JSON"),
        ("copa", "copa/superglue_copa_val.jsonl", '{"premise": 3}', "line 5: premise is a int; expected a str"),
        ("boolq", "boolq/dev.jsonl", '{"question": "?", "passage": "x"}', "line 5: there is no answer"),
        ("arc_easy", "arc/arc_easy.jsonl", '{"query": "q", "choices": ["a"], "gold": 1}', "line 5: gold is 1"),
        ("arc_challenge", "arc/arc_challenge.jsonl", '{"query": "q", "choices": [], "gold": 1}', "line 5: choices is"),
        ("piqa", "piqa/valid-labels.lst", "1", "4 rows and .* 5 labels"),
        ("gsm8k", "gsm8k/test_first660.jsonl", '{"question": "q", "answer": "4"}', "line 8: the answer has no"),
        ("xsum", "xsum/xsum_1shot_first500.jsonl", "[]", "line 3: found a list"),
        (
            "qasper",
            "qasper/leval_scientific_qa.jsonl",
            '{"input": "x", "instructions": ["a"], "outputs": []}',
            "line 3",
        ),
        ("cnn_dailymail", "cnn_dailymail/cnn_dailymail_test.csv", "only one", "line 11: expected 3 columns"),
        ("cnn_dailymail", "cnn_dailymail/cnn_dailymail_test.csv", "a\udc80,b,c", "line 11: not UTF-8"),
        (
            "arc_easy",
            "arc/ARC-Easy_validation.jsonl.gz",
            '{"question": "q", "choices": {"text": ["a"], "label": null}, "answerKey": "A"}',
            "line 1: label is a NoneType",
        ),
    ],
)
def test_malformed_rows_are_named(task: str, file: str, line: str, message: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    if file.endswith(".gz"):
        (folder / file).write_bytes(gzip.compress(f"{line}\n".encode()))
    else:
        with (folder / file).open("a", errors="surrogateescape") as opened:
            opened.write(f"{line}\n")
    with pytest.raises(ValueError, match=message):
        data_files.load(task, folder)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    path = folder / "coqa" / "requests.jsonl.gz"
    whole = path.read_bytes()
    for at in range(10, 60):  # one byte of the packed text: not every one is noticed by the unpacking itself
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"requests\.jsonl\.gz"):
            data_files.load("coqa", folder)
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        data_files.load("coqa", folder)
    path.write_bytes(
        gzip.compress(b'{"doc": {"id": "story", "story": "", "question": "", "answers": [], "previous_qa": []}}')
    )
    with pytest.raises(ValueError, match="line 1: id is 'story'"):
        data_files.load("coqa", folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"requests\.jsonl\.gz is missing"):
        data_files.load("coqa", folder)
    (folder / "wikitext2" / "wiki.valid.raw").write_text("no heading\n")
    with pytest.raises(ValueError, match="line 1: text before the first heading"):
        data_files.load("wikitext2", folder)
    (folder / "boolq" / "dev.jsonl").write_text("")
    with pytest.raises(ValueError, match="hold no rows"):
        data_files.load("boolq", folder)
    with pytest.raises(ValueError, match="is no folder"):
        data_files.load("boolq", folder / "nowhere")


# -- the command ----------------------------------------------------------------------------------------------------


def test_figures_by_hand_from_the_logged_samples(
    folder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval",
        "-m",
        folder,
        "--tasks",
        "hellaswag,copa,xsum",
        "--density",
        "0.5",
        "--data",
        str(data),
        "--seed",
        "3",
    ]
    assert main([*command, "--output-path", str(tmp_path), "--log_samples", "--limit", "3"]) == 0
    out = capsys.readouterr().out
    (results_file,) = tmp_path.glob("*/results_*.json")
    (samples_file,) = tmp_path.glob("*/samples_hellaswag_*.jsonl")
    results = json.loads(results_file.read_text())
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    assert results["config"]["griffin"]["density"] == 0.5
    assert results["config"]["griffin"]["seed"] == 3
    assert len(samples) == 3
    right, right_by_length = [], []
    for sample in samples:
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        choices = sample["doc"]["choices"]
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right.append(float(scores.index(max(scores)) == int(sample["doc"]["label"])))
        right_by_length.append(float(by_length.index(max(by_length)) == int(sample["doc"]["label"])))
    metrics = results["results"]["hellaswag"]
    assert metrics["acc,none"] == pytest.approx(statistics.mean(right))
    assert metrics["acc_norm,none"] == pytest.approx(statistics.mean(right_by_length))
    assert metrics["acc_stderr,none"] == pytest.approx(statistics.stdev(right) / math.sqrt(3))
    assert f"{metrics['acc,none']:.4f}" in out
    assert "|copa" in out
    assert "rougeL" in out
    (model, tokenizer) = bytes_model(torch.float32), bytes_tokenizer()
    again = evaluate(model, tokenizer, GriffinConfig(seed=3), tasks=["hellaswag"], data=data, limit=3)["hellaswag"]
    assert again.metrics["acc"] == metrics["acc,none"]
    assert again.per_sample["acc"] == right
    responses = [[float(one[0]) for one in sample["response"]] for sample in again.samples]
    logged = [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]
    assert responses == logged


def test_the_perplexity_of_documents_has_an_interval(
    data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate(model, tokenizer, GriffinConfig(selection="topk"), tasks=["wikitext2"], data=data)["wikitext2"]
    assert result.groups is None
    words, perplexities = result.weights["word_perplexity"], result.per_sample["word_perplexity"]
    total = sum(count * math.log(value) for count, value in zip(words, perplexities, strict=True))
    assert result.metrics["word_perplexity"] == pytest.approx(math.exp(total / sum(words)))
    assert len(perplexities) > 1
    for name, metric in measured(result, seed=0).metrics.items():
        assert metric.low is not None, name
        assert metric.high is not None
        assert metric.low < metric.value < metric.high


def test_a_task_with_one_example(
    folder: str, data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for task in ("copa", "wikitext2"):
        result = evaluate(model, tokenizer, GriffinConfig(selection="topk"), tasks=[task], data=data, limit=1)[task]
        assert result.n == 1
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert all(len(values) == 1 for values in result.per_sample.values())
        for name, values in result.per_sample.items():
            if name != "bits_per_byte":
                assert values == [pytest.approx(result.metrics[name])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there are no tasks"),
        (["--suite", "all"], "--suite is 'all'"),
        (["--suite", "paper", "--tasks", "copa"], "give one of them"),
        (["--tasks", "copa", "--phase", "none"], "--phase is 'none'"),
        (["--tasks", "copa", "--density", "7"], "density is 7.0"),
        (["--tasks", "copa", "--seed", "x"], "--seed is 'x'"),
        (["--tasks", "copa", "--dtype", "int3"], "--dtype is 'int3'"),
        (["--tasks", "hellswag", "--data", "."], "did you mean 'hellaswag'"),
        (["--tasks", "copa", "--data", "nowhere"], "nowhere is no folder"),
        (["--tasks", "copa", "--data", "."], "superglue_copa_val.jsonl is missing"),
        (["--tasks", "copa", "--model_args", "density=0.25"], "--model_args has density, which is a flag here"),
        (["--tasks", "copa", "--model_args", "pretrained=a/b"], "give -m instead"),
        (["--tasks", "copa", "--no-such-flag", "3"], "unrecognized arguments: --no_such_flag 3"),
        (["--tasks", "copa", "--limit", "many"], "invalid float value: 'many'"),
    ],
)
def test_wrong_commands(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("griffin: error: ")


def test_other_commands_take_no_other_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--limit", "3"]) == 2
    assert "unrecognized arguments: --limit 3" in capsys.readouterr().err


def test_the_paper_suite() -> None:
    assert len(SUITES["paper"]) == 10
    assert set(TASKS) - set(SUITES["paper"]) == {"gsm8k", "wikitext2"}


@pytest.mark.model
def test_a_real_model(data: Path, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    full, half = (
        evaluate(*smollm2, GriffinConfig(density=density, selection="topk"), tasks=["coqa"], data=data, limit=2)["coqa"]
        for density in (1.0, 0.25)
    )
    assert full.metrics["f1"] > 0.5  # a question that a real model answers
    assert half.samples != full.samples
