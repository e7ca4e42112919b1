"""Lossless drafts: the tokens and logits of generation without them, and no time lost where they do not help."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import griffin
from conftest import tiny_llama
from evaluation_data import bytes_tokenizer
from griffin import GriffinConfig, Sampling, generate, generate_step, stream_generate
from griffin.engine import lossless as module
from griffin.engine.batch import Batch, Running
from griffin.engine.lookup import Candidate, Lookup
from griffin.engine.lossless import Acceptance, Costs, Drafts, Lossless
from griffin.generation.chat import Session
from griffin.generation.generate import fold
from griffin.models.convert import convert
from griffin.native import library

needs_native = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


# -- lookup ----------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 2), max_size=30), count=st.integers(1, 9))
def test_lookup_equals_a_plain_search(ids: list[int], count: int) -> None:
    lookup = Lookup(ids)
    found = lookup.candidate()
    places = [(_match(ids, at), at) for at in range(2, len(ids)) if _match(ids, at) >= 2]
    assert found == (Candidate(*max(places)) if places else None)
    if found is not None:
        text = list(ids)
        for at in range(found.next, found.next + count):
            text.append(text[at])
        assert lookup.draft(found, count) == text[len(ids) :]


def _match(ids: Sequence[int], at: int) -> int:
    """How many tokens before place `at` are the last of all."""
    n = 0
    while n < at and ids[at - n - 1] == ids[-n - 1]:
        n += 1
    return n


# -- when to draft ---------------------------------------------------------------------------------------------------


class Simulated:
    """A step that takes as long as it is told, and a cache that only counts."""

    def __init__(self, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slope, self.now, self.length, self.replaced = slope, 0.0, 0, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def rows(self, tokens: Tensor) -> Tensor:
        self.now += 1 + self.slope * (len(tokens) - 1)
        self.length += len(tokens)
        return tokens[:, None].float()

    def cut(self, length: int) -> None:
        self.length = length

    def advance(self) -> None:
        self.length += 1


def simulate(prompt: list[int], answer: list[int], slope: float, monkeypatch: Any) -> tuple[float, Lossless]:
    """The speed-up that drafts give for an answer, and the policy after it."""
    step, policy = Simulated(slope, monkeypatch), Lossless()
    ahead = module._Ahead(policy, step, step, prompt, len(answer))  # type: ignore[arg-type]
    for place, token in enumerate(answer):
        logits = ahead(torch.tensor([token]))
        assert float(logits) == token  # of the row that this token's own step has
        assert step.length == place + 1
    return len(answer) / step.now, policy


@pytest.mark.parametrize("slope", [0.1, 0.4, 1.0])
def test_text_that_does_not_repeat_loses_no_time(slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    prompt, answer = ([draw.randrange(6) for _ in range(300)] for _ in range(2))  # every pair of tokens occurred before
    gain, policy = simulate(prompt, answer, slope, monkeypatch)
    assert gain > 0.97
    assert policy.drafted < 300


@pytest.mark.parametrize(("slope", "least"), [(0.1, 3.0), (0.4, 1.5), (1.0, 0.97)])
def test_copied_text_gains(slope: float, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    prompt = [draw.randrange(1000) for _ in range(400)]
    gain, policy = simulate(prompt, [*prompt[100:300], 7, *prompt[300:]], slope, monkeypatch)
    assert gain > least
    if slope < 1:
        assert policy.off is None
        assert policy.acceptance is not None
        assert policy.acceptance > 0.9
    else:
        assert policy.drafted == 0 or policy.off is not None or policy._saved > -module._MOST_LOST


def test_drafts_that_lose_are_switched_off_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    prompt = [draw.randrange(1000) for _ in range(300)]
    # Copies that break off after every fifth token: each draft is right at first, and wrong in the end.
    broken = [token if place % 5 else 1000 + place for place, token in enumerate(prompt)]
    _, policy = simulate(prompt, broken, 0.6, monkeypatch)
    assert policy.drafted
    monkeypatch.setattr(module, "_LEAST_GAIN", 0.0)  # a policy that drafts whatever it expects
    gain, policy = simulate(
        prompt, [token + 2000 * (place % 3 == 2) for place, token in enumerate(prompt)], 0.9, monkeypatch
    )
    assert policy.off is not None
    assert "drafts cost more than they saved" in policy.off
    assert gain > 0.9
    again = Lossless()
    again._saved = -module._MOST_LOST - 1
    again.judge()
    for _ in range(module._PAUSE):
        assert again.off is not None
        again.see(None, 0)
    assert again.off is None


def test_times_between_measured_ones_are_on_a_line_and_old_ones_are_forgotten() -> None:
    costs = Costs()
    assert costs.plain is None
    for seconds in (9.0, 1.0, 1.0):  # the first step is no measure
        costs.add(1, seconds)
    costs.add(3, 1.5)
    costs.add(9, 3.0)
    assert [costs.of(m) for m in (1, 2, 3, 6, 9)] == [1.0, 1.25, 1.5, 2.25, 3.0]
    assert costs.of(13) == 3.0 + 4 * 0.25
    assert costs.add(2, 1e9) == 4.0  # another process's time
    for _ in range(module._REMEMBERED + 32):
        costs.pass_token()
    assert costs.of(3) == pytest.approx(1 + 2 * module._SLOPE)


def test_acceptance_follows_what_comes() -> None:
    acceptance = Acceptance()
    before = [acceptance.of(match) for match in range(2, 33)]
    assert before == sorted(before)
    for _ in range(40):
        acceptance.add(2, True)
        acceptance.add(8, False)
    assert acceptance.of(2) > 0.9
    assert acceptance.of(7) < 0.1
    assert acceptance.of(30) == before[-1]


# -- the same tokens and logits --------------------------------------------------------------------------------------


class Often(Lossless):
    """Drafts as many tokens as a die says, wherever there is a candidate."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._die = random.Random(seed)

    def length(self, candidate: Candidate | None, most: int) -> int:
        return 0 if candidate is None else self._die.randint(0, max(0, min(most, 15)))


@pytest.fixture(scope="module")
def int8() -> PreTrainedModel:
    model = tiny_llama(torch.float32)
    convert(model, "int8")
    return model


def steps(model: PreTrainedModel, ids: list[int], sampling: Sampling, lossless: Lossless | None) -> Any:
    with griffin.attach(model, density=1.0) as handle:
        stream = generate_step(model, torch.tensor([ids]), handle=handle, sampling=sampling, lossless=lossless)
        found = [step for _, step in zip(range(sampling.max_tokens), stream, strict=False)]
    return torch.cat([step.tokens for step in found]), torch.cat([step.logits for step in found])


@needs_native
@hypothesis_settings(max_examples=8, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(2, 6), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    settings=st.sampled_from(
        [{}, {"temperature": 0.2}, {"temperature": 0.3, "top_p": 0.9, "top_k": 9}, {"repetition_penalty": 1.1}]
    ),
)
def test_tokens_and_logits_are_those_without_drafts(
    int8: PreTrainedModel, ids: list[int], seed: int, settings: Any
) -> None:
    """With every seed, so the distribution is the same, too."""
    sampling, drafts = Sampling(max_tokens=60, seed=seed, **settings), Often(seed)
    plain, with_drafts = steps(int8, ids, sampling, None), steps(int8, ids, sampling, drafts)
    assert torch.equal(plain[0], with_drafts[0])
    assert torch.equal(plain[1], with_drafts[1])


@needs_native
@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_of_a_batch_is_drafted_while_it_is_alone(int8: PreTrainedModel, seed: int) -> None:
    """Another sequence runs beside it at some steps; its tokens and logits are those without drafts at all."""
    die = random.Random(seed)
    ids = [die.randint(2, 6) for _ in range(3 + 7 * seed)]
    answer = [die.randint(2, 3 + seed) for _ in range(40)]
    beside = [die.random() < 0.3 for _ in answer]
    most = len(beside) + 1
    with griffin.attach(int8, density=0.5, selection="topk") as handle:
        batch = Batch(int8, handle)

        def begun(config: GriffinConfig) -> Running:
            prompt = batch.prefill(ids, config, len(ids) + most)
            prompt.run(len(ids))
            return prompt.running()

        found = []
        for drafts in (None, Drafts(ids, most)):
            sequence, other = begun(GriffinConfig(density=1.0)), begun(GriffinConfig(density=0.5, selection="topk"))
            sequence.drafts = drafts
            if drafts is not None:
                drafts.policy = Often(seed)
            logits = []
            for number, (sequence.token, together) in enumerate(zip(answer, beside, strict=True)):
                (own, *_) = batch.step([sequence, other] if together else [sequence])
                assert isinstance(own, Tensor)
                logits.append(own)
                assert sequence.cache.length == len(ids) + number + 1
            found.append(torch.stack(logits))
            assert sequence.cache.buffers(0)[0].shape[2] == len(ids) + most  # drafts need no more room
    assert torch.equal(*found)
    assert drafts is not None
    assert drafts.policy.drafted >= drafts.policy.accepted > 0


@needs_native
@pytest.mark.model
def test_smollm2(quantised_smollm2: Loaded) -> None:
    model, tokenizer = quantised_smollm2
    code = "def area(width, height):\n    result = width * height\n    return result\n"
    prompts = [
        f"Repeat this code:\n{code}\nThe code again:\n{code[:20]}",
        "Once upon a time there was a lighthouse keeper who",
        [{"role": "user", "content": f"Rename result to product:\n{code}"}],
        "1, 2, 3, 4, 1, 2, 3, 4, 1, 2,",
    ]
    drafted = 0
    for number, prompt in enumerate(prompts):
        for settings in ({}, {"temperature": 0.7, "seed": 3})[: 1 + number % 2]:
            plain = generate(model, tokenizer, prompt, density=1.0, max_tokens=20, **settings)
            pieces = list(stream_generate(model, tokenizer, prompt, lossless=True, max_tokens=20, **settings))
            result = fold(pieces)
            assert isinstance(plain, griffin.Result)
            assert (result.text, result.tokens, result.finish_reason) == (plain.text, plain.tokens, plain.finish_reason)
            assert (result.density, result.selection) == (1.0, "full")
            assert len(pieces) >= len(result.tokens)  # one by one, as ever
            drafted += result.drafted
            assert result.accepted <= result.drafted
            if result.drafted:
                assert result.acceptance == result.accepted / result.drafted
                assert result.tokens_per_verify is not None
                assert result.tokens_per_verify >= 1
            assert (plain.drafted, plain.acceptance, plain.lossless_off) == (0, None, None)
    assert drafted
    stopped = generate(model, tokenizer, prompts[3], lossless=True, max_tokens=40, stop=["3, 4, 1, 2, 3"])
    plain = generate(model, tokenizer, prompts[3], density=1.0, max_tokens=40, stop=["3, 4, 1, 2, 3"])
    assert isinstance(stopped, griffin.Result)
    assert isinstance(plain, griffin.Result)
    assert (stopped.text, stopped.finish_reason) == (plain.text, plain.finish_reason)
    assert stopped.finish_reason == "stop"


@needs_native
@pytest.mark.model
def test_a_chat(quantised_smollm2: Loaded) -> None:
    answers: dict[bool, list[Any]] = {}
    for lossless in (True, False):
        config, sampling = GriffinConfig(density=1.0), Sampling(max_tokens=16)
        with Session(*quantised_smollm2, config, sampling, lossless=lossless) as session:
            answers[lossless] = []
            for text in ("Say the days of the week.", "Say the days of the week again."):
                list(session.ask(text))
                assert session.last is not None
                answers[lossless].append((session.last.tokens, session.cached))
            if lossless:
                with pytest.raises(ValueError, match=r"density is 0\.5"):
                    session.configure(GriffinConfig(density=0.5))
                assert session.config.density == 1.0
    assert answers[True] == answers[False]


@pytest.fixture(scope="module")
def quantised_smollm2() -> Loaded:
    return griffin.load("smollm2-135m")


# -- what it refuses, and where it has nothing to do -----------------------------------------------------------------


def test_what_is_not_the_full_model_or_not_one_prompt_is_refused() -> None:
    model, tokenizer = tiny_llama(vocab_size=300), bytes_tokenizer()
    for settings, says in (
        ({"density": 0.5}, "density is 0.5; use density=1.0"),
        ({"griffin": GriffinConfig(density=0.75)}, "density is 0.75"),
        ({"loss": 0.1}, "loss is 0.1"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(model, tokenizer, "abc", lossless=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one prompt at a time, found 2"):
        generate(model, tokenizer, ["abc", "abd"], lossless=True)
    with (
        griffin.attach(model, density=0.5, selection="topk") as handle,
        pytest.raises(ValueError, match=r"handle's density is 0\.5"),
    ):
        next(generate_step(model, torch.tensor([[1, 2]]), handle=handle, lossless=Lossless()))
    with pytest.raises(ValueError, match="most is 16"):
        Lossless(16)


def test_a_step_that_is_not_native_says_so_and_gives_the_same() -> None:
    model, tokenizer = tiny_llama(vocab_size=300), bytes_tokenizer()  # float64
    plain = generate(model, tokenizer, "abcabcabc", density=1.0, max_tokens=12)
    result = generate(model, tokenizer, "abcabcabc", lossless=True, max_tokens=12)
    assert isinstance(result, griffin.Result)
    assert isinstance(plain, griffin.Result)
    assert result.tokens == plain.tokens
    assert result.drafted == 0
    assert result.lossless_off is not None
    assert "the model's own forward" in result.lossless_off
