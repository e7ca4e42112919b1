"""Generation in three layers, on the real default model in float32 and on tiny ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import griffin
from conftest import tiny_llama
from evaluation_data import bytes_tokenizer, special_model
from griffin import GriffinConfig, Sampling, generate, generate_step, stream_generate
from griffin.generation.generate import fold
from griffin.generation.text import Answer, encode, pad

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TEXT = "The lighthouse keeper climbed the stairs every evening, and every evening he counted them aloud, because"
HALF = GriffinConfig(density=0.5, selection="topk")


def one(*args: Any, **settings: Any) -> griffin.Result:
    result = generate(*args, **settings)
    assert isinstance(result, griffin.Result)
    return result


# -- the innermost layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("config", [None, HALF, GriffinConfig(density=0.5, batch="per_sequence", selection="topk")])
def test_steps_equal_transformers_generate(config: GriffinConfig | None, chunk: int | None) -> None:
    model = tiny_llama()
    ids, mask = pad([[5, 17, 3, 88, 41, 9], [33, 44], [7, 8, 9]], 0, torch.device("cpu"))
    handle = None if config is None else griffin.attach(model, config)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=9)[:, 6:]
    steps = generate_step(model, ids, attention_mask=mask, handle=handle, prompt_chunk=chunk)
    found = torch.stack([step.tokens for _, step in zip(range(9), steps, strict=False)], dim=1)
    assert torch.equal(found, expected)
    assert handle is None or handle.sparse_calls == 2 * 3 * 8


def test_a_kept_cache_equals_the_whole_conversation_at_density_one() -> None:
    model, cache = tiny_llama(), DynamicCache()
    ids = torch.tensor([[5, 17, 3, 88]])
    first = [step.tokens for _, step in zip(range(5), generate_step(model, ids, cache=cache), strict=False)]
    longer = torch.cat([ids, torch.stack(first, dim=1), torch.tensor([[1, 2, 3]])], dim=1)
    kept = next(iter(generate_step(model, longer, cache=cache)))
    fresh = next(iter(generate_step(model, longer)))
    torch.testing.assert_close(kept.logits, fresh.logits, rtol=0, atol=1e-5)  # logits are cast to float32
    with pytest.raises(ValueError, match="none to run"):
        next(iter(generate_step(model, ids, cache=cache)))


def test_a_seed_repeats_and_another_differs() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 17, 3, 88]])

    def draw(seed: int | None) -> list[int]:
        steps = generate_step(model, ids, sampling=Sampling(temperature=1.5, seed=seed))
        return [int(step.tokens) for _, step in zip(range(12), steps, strict=False)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_processors_do_what_they_say() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 17, 3, 88]])
    best = next(iter(generate_step(model, ids))).logits[0].topk(3).indices.tolist()
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        for seed in range(5):
            sampling = Sampling(temperature=5.0, seed=seed, **settings)  # type: ignore[arg-type]
            assert int(next(iter(generate_step(model, ids, sampling=sampling))).tokens) == best[0]
    three = {
        int(next(iter(generate_step(model, ids, sampling=Sampling(temperature=9.0, top_k=3, seed=s)))).tokens)
        for s in range(40)
    }
    assert three == set(best)
    steps = generate_step(model, ids, sampling=Sampling(repetition_penalty=1e9))
    tokens = [int(step.tokens) for _, step in zip(range(30), steps, strict=False)]
    positive = [t for t in tokens if tokens.count(t) > 1]
    assert not positive


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("text", ["naïve café — ☕️ 東京 🤷🏽‍♀️ end", "a\n\n  b\tc", "x" * 50])
def test_pieces_of_text_join_to_the_whole_and_never_split_a_character(smollm2: Loaded, text: str) -> None:
    tokenizer = smollm2[1]
    answer, pieces = Answer(tokenizer, ()), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(answer.add(token))
        if "�" not in (own := tokenizer.decode([token])):
            assert text[answer.offset :].startswith(own)
        assert len(answer.text) - len(pieces[-1]) <= answer.offset <= len(answer.text)
    pieces.append(answer.finish())
    assert "".join(pieces) == answer.text == text
    assert not any("�" in piece for piece in pieces)


@pytest.mark.model
def test_a_stop_text_is_never_shown(smollm2: Loaded) -> None:
    tokenizer = smollm2[1]
    answer, shown = Answer(tokenizer, ("###", "END OF")), ""
    for token in tokenizer("one two # three ## four END ### five END OF")["input_ids"]:
        shown += answer.add(token)
        if answer.stopped:
            break
    assert answer.stopped
    assert shown + answer.finish() == "one two # three ## four END "


@pytest.mark.model
@pytest.mark.parametrize("stop", ["\nQ:", "Q: w", "a, b", "\n\n", ",\n\nQ: what did he"])
def test_a_stop_text_of_several_tokens_ends_the_answer_wherever_they_begin(smollm2: Loaded, stop: str) -> None:
    tokenizer, text = smollm2[1], "no, a, b,\n\nQ: what did he do?"
    answer, shown = Answer(tokenizer, (stop,)), ""
    for token in tokenizer(text)["input_ids"]:
        shown += answer.add(token)
        if answer.stopped:
            break
    assert answer.stopped
    assert shown + answer.finish() == text[: text.index(stop)]


@pytest.mark.model
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("<|im_start|>", "one two"),
        ("two<|im_start|>", "one "),
        ("<|im_start|>user\n", "one two"),
        ("<|im_end|>", "one twouser\nthree"),
        ("three<|im_end|>\n<|im_start|>", "one twouser\n"),
        ("twouser", "one "),  # as it is shown
        ("<|im_end|>four", "one twouser\nthree\nfour"),  # there is a line break between
        ("|>", "one twouser\nthree\nfour"),  # of the name, which is no text
    ],
)
def test_a_stop_text_may_name_special_tokens(smollm2: Loaded, stop: str, shown: str) -> None:
    tokenizer = smollm2[1]
    text = "one two<|im_start|>user\nthree<|im_end|>\n<|im_start|>four"
    answer, found = Answer(tokenizer, ("@@@", stop)), ""
    for token in tokenizer(text)["input_ids"]:
        found += answer.add(token)
        assert shown.startswith(found)
        if answer.stopped:
            break
    assert found + answer.finish() == answer.text == shown
    assert answer.stopped == (stop not in ("<|im_end|>four", "|>"))


@pytest.mark.parametrize("density", [1.0, 0.999])
def test_a_special_token_ends_an_answer(density: float) -> None:
    model, before, special, after = special_model()
    for stop in (special, special + after):
        settings: dict[str, Any] = {"density": density, "selection": "topk", "max_tokens": 30}
        result = one(model, bytes_tokenizer(), "The river", stop=["@@@", stop], **settings)
        assert (result.text, result.finish_reason) == (before, "stop")
    assert one(model, bytes_tokenizer(), "The river", density=density, selection="topk", max_tokens=30).text.startswith(
        before + after
    )


@pytest.mark.model
def test_text_that_only_looked_like_a_stop_is_given_at_the_end(smollm2: Loaded) -> None:
    tokenizer = smollm2[1]
    answer = Answer(tokenizer, ("###",))
    shown = "".join(answer.add(token) for token in tokenizer("almost ##")["input_ids"])
    assert shown == "almost "
    assert shown + answer.finish() == "almost ##"


# -- the outer layers, on the real model -----------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_generate_equals_transformers(smollm2: Loaded, density: float) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer(TEXT, return_tensors="pt")
    with griffin.attach(model, density=density, selection="topk"):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=2)[
            0, inputs.input_ids.shape[1] :
        ]
    result = one(model, tokenizer, TEXT, griffin=GriffinConfig(density=density, selection="topk"), max_tokens=24)
    assert list(result.tokens) == [token for token in expected.tolist() if token != 2]
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.model
def test_a_result_says_what_was_measured(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    result = one(model, tokenizer, TEXT, griffin=HALF, max_tokens=5)
    assert result.finish_reason == "length"
    assert result.generated_tokens == len(result.tokens) == 5
    assert result.prompt_tokens == len(tokenizer(TEXT)["input_ids"])
    assert result.density == 0.5
    assert result.ff_bytes_per_token == 30 * 3 * 768 * 576 * 4
    assert result.selection_ms > 0
    assert result.prompt_tokens_per_s > 0
    assert result.generation_tokens_per_s > 0
    full = one(model, tokenizer, TEXT, density=1.0, max_tokens=5)
    assert (full.density, full.selection, full.ff_bytes_per_token) == (1.0, "full", 30 * 3 * 1536 * 576 * 4)


@pytest.mark.model
def test_a_batch_with_per_sequence_experts_equals_each_alone(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    config = GriffinConfig(density=0.5, batch="per_sequence", selection="topk")
    prompts = [TEXT, "Once upon a time", "Water boils at one hundred degrees, and"]
    together = generate(model, tokenizer, prompts, griffin=config, max_tokens=12)
    assert isinstance(together, list)
    for prompt, result in zip(prompts, together, strict=True):
        assert one(model, tokenizer, prompt, griffin=config, max_tokens=12).tokens == result.tokens


@pytest.mark.model
def test_the_stream_folds_to_the_result(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "Say hello."}]
    pieces = list(stream_generate(model, tokenizer, messages, max_tokens=40))
    result = one(model, tokenizer, messages, max_tokens=40)
    assert fold(pieces).text == result.text
    assert fold(pieces).tokens == result.tokens
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert result.finish_reason == "stop"
    json.dumps(vars(result))


@pytest.mark.model
def test_an_abandoned_stream_leaves_the_model_whole(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    stream = stream_generate(model, tokenizer, TEXT, griffin=HALF, max_tokens=20)
    next(stream)
    assert "forward" in vars(model.model.layers[0].mlp.down_proj)
    stream.close()
    assert "forward" not in vars(model.model.layers[0].mlp.down_proj)


@pytest.mark.model
def test_bad_prompts_say_what_to_do(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    for prompt, says in (
        ("", "prompt is empty"),
        ("  \n", "prompt is empty"),
        ([], "no messages"),
        (TEXT * 600, "context is 8192"),
        ([TEXT, ""], "prompt is empty"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(model, tokenizer, prompt, max_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown setting 'max_token'"):
        generate(model, tokenizer, TEXT, max_token=2)
    with pytest.raises(ValueError, match="one prompt"):
        cache = DynamicCache()
        generate(model, tokenizer, "Hello", cache=cache, max_tokens=2)
        generate(model, tokenizer, ["Hello", "you"], cache=cache, max_tokens=2)


def test_an_answer_ends_with_the_context() -> None:
    model = tiny_llama(max_position_embeddings=8)
    with pytest.raises(ValueError, match="has 8 tokens, but the model's context is 8"):
        encode(model, _Letters(), ["abcdefgh"])  # type: ignore[arg-type]
    result = one(model, _Letters(), "abcde", max_tokens=100)
    assert (result.generated_tokens, result.finish_reason) == (3, "length")


class _Letters:
    """A tokenizer of letters."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 60 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(token + 60) for token in tokens)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"stop": [""]}, "not empty"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_sampling_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**settings)


@pytest.mark.model
def test_messages_that_end_with_the_assistants_are_continued(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "My favourite is"}]
    (ids,) = encode(model, tokenizer, [messages])
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>assistant\nMy favourite is")
    assert text.count("<|im_start|>assistant") == 1
    (answered,) = encode(model, tokenizer, [messages[:1]])
    assert tokenizer.decode(answered).endswith("<|im_start|>assistant\n")
