"""The outer layers of generation: text in, text out, with what was measured in the result."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from griffin.attachment import Griffin, attach, config_from
from griffin.config import GriffinConfig
from griffin.engine.lossless import Lossless
from griffin.engine.step import Sampling, generate_step
from griffin.generation.text import Answer, Prompt, context_length, encode, pad
from griffin.layouts import find_ff_blocks


@dataclass(frozen=True)
class Result:
    """An answer, or a piece of one, and what was measured up to then.

    Args:
        index: which prompt of the batch it answers.
        text: the text; from `stream_generate` only what is new.
        tokens: the token ids, without the end-of-text token; from `stream_generate` only the new ones.
        finish_reason: `stop` (end-of-text token or a stop text), `length`, or `None` while it goes on.
        prompt_tokens: number of prompt tokens that were run.
        generated_tokens: number of tokens generated so far.
        prompt_tokens_per_s: of the whole batch, statistic included, selection not.
        generation_tokens_per_s: of this answer, in the generation phase; 0 before its second token.
        selection_ms: what selecting and preparing the experts took, milliseconds.
        density: share of FF neurons kept; with dynamic neuron selection, of the FF bytes read.
        selection: how experts were selected; `full` at density 1.0.
        ff_bytes_per_token: bytes of FF weights read for one generated token; `None` where their layout is unknown,
            which is only allowed for the full model. Lossless drafts share them: divide by the tokens of a step.
        drafted, accepted: tokens that lossless drafts named, and those of them that were right.
        acceptance: accepted over drafted; `None` before the first draft.
        tokens_per_verify: tokens that a step with a draft gave, on average; `None` before the first draft.
        lossless_off: why drafts are switched off, now or in this model; `None` while they are on, or not wanted.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    selection_ms: float
    density: float
    selection: str
    ff_bytes_per_token: int | None
    drafted: int = 0
    accepted: int = 0
    acceptance: float | None = None
    tokens_per_verify: float | None = None
    lossless_off: str | None = None


@dataclass(frozen=True)
class _Call:
    """The arguments that `generate` and `stream_generate` share, checked."""

    config: GriffinConfig | Griffin
    sampling: Sampling
    cache: Cache | None
    prompt_chunk: int | None
    lossless: bool
    step: str


def stream_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[Prompt],
    *,
    griffin: GriffinConfig | Griffin | None = None,
    sampling: Sampling | None = None,
    cache: Cache | None = None,
    prompt_chunk: int | None = None,
    lossless: bool = False,
    step: str = "auto",
    **settings: Any,
) -> Generator[Result, None, None]:
    """Generate, yielding each piece of text as soon as it is certain.

        for piece in griffin.stream_generate(model, tokenizer, "Once upon a time", density=0.5, max_tokens=100):
            print(piece.text, end="", flush=True)

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        prompt: a text, a list of messages (for the chat template), or a list of either: a batch. Messages that end with
            the assistant's own are continued.
        griffin: a config (attached for the length of the call), or a handle of `griffin.attach`. `None`: the defaults
            of `GriffinConfig`, as everywhere. `density=1.0` is the full model.
        sampling: how tokens are drawn.
        cache: key/value cache of earlier turns of this conversation, made by `griffin.new_cache(model)`.
        prompt_chunk: most prompt tokens in one forward pass.
        lossless: the full model, faster where the answer repeats the prompt or itself: tokens are drafted from the text
            so far, and several are verified by one step. The answer is that of `density=1.0`, token for token; with a
            seed also a drawn one. For one prompt at a time. Without a density, 1.0 is the default then.
        step: what computes the generation steps: `auto`, or `native`, `compiled`, `captured` or `eager` by name.
        **settings: fields of `GriffinConfig`, over those of the config, and of `Sampling`, in place of `sampling`.

    Raises:
        ValueError: an empty prompt, one longer than the context, an unknown setting, a cache for a batch, `lossless`
            with a density below 1.0 or for a batch, or what `attach` refuses.
    """
    call = _call(griffin, sampling, cache, prompt_chunk, lossless, step, settings)
    ids = encode(model, tokenizer, _batch(prompt))
    with ExitStack() as stack:
        yield from _stream(model, tokenizer, ids, _handle(model, call.config, stack), call)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[Prompt],
    **arguments: Any,
) -> Result | list[Result]:
    """Generate whole answers: `stream_generate`, folded.

        griffin.generate(model, tokenizer, "Once upon a time", density=0.5, max_tokens=100).text

    Args:
        model, tokenizer, prompt, **arguments: those of `stream_generate`.

    Returns:
        A result; for a batch a list of them, in the prompts' order.

    Raises:
        ValueError: as `stream_generate`.
    """
    pieces: dict[int, list[Result]] = {}
    for piece in stream_generate(model, tokenizer, prompt, **arguments):
        pieces.setdefault(piece.index, []).append(piece)
    results = [fold(pieces[index]) for index in sorted(pieces)]
    return results if _is_batch(prompt) else results[0]


def fold(pieces: Sequence[Result]) -> Result:
    """Join the pieces of one answer: text and tokens added up, everything else as the last piece says."""
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Result(**{**vars(pieces[-1]), "text": text, "tokens": tokens})


def _handle(model: PreTrainedModel, config: GriffinConfig | Griffin, stack: ExitStack) -> Griffin | None:
    """The handle to generate with; `None` for the full model of a family that GRIFFIN cannot prune."""
    if isinstance(config, Griffin):
        return config
    if config.density == 1.0 and config.loss is None and full_ff_bytes(model) is None:
        return None
    return stack.enter_context(attach(model, config))


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    handle: Griffin | None,
    call: _Call,
) -> Iterator[Result]:
    sampling, cache = call.sampling, call.cache
    cached = 0 if cache is None else int(cache.get_seq_length())
    if cached and len(ids) > 1:
        raise ValueError("a kept cache continues one conversation; give one prompt")
    ends = end_tokens(model, tokenizer)
    limit = context_length(model)
    pad_token = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    input_ids, mask = pad(ids, pad_token, model.device)
    answers = [Answer(tokenizer, sampling.stop) for _ in ids]
    reasons: list[str | None] = [None] * len(ids)
    prompt_tokens = sum(map(len, ids)) - cached
    prompt_rate = selection_s = generation_s = 0.0
    density = 1.0 if handle is None else handle.config.density
    selection = "full" if handle is None or density == 1.0 else handle.config.selection
    bytes_per_token = full_ff_bytes(model) if handle is None else handle.ff_bytes_per_token
    lossless = Lossless() if call.lossless else None

    steps = generate_step(
        model,
        input_ids,
        attention_mask=mask,
        handle=handle,
        sampling=sampling,
        cache=cache,
        prompt_chunk=call.prompt_chunk,
        lossless=lossless,
        step=call.step,
    )
    for number, step in enumerate(steps):
        if number == 0:
            prompt_rate, selection_s = prompt_tokens / step.seconds, step.selection_s
        else:
            generation_s += step.seconds
        for index, token in enumerate(step.tokens.tolist()):
            if reasons[index] is not None:
                continue
            answer, text = answers[index], ""
            if token in ends:
                reasons[index] = "stop"
            else:
                text = answer.add(token)
                if answer.stopped:
                    reasons[index] = "stop"
                elif number + 1 >= sampling.max_tokens or (limit and len(ids[index]) + number + 1 >= limit):
                    reasons[index] = "length"
            if reasons[index] is not None:
                text += answer.finish()
            yield Result(
                index=index,
                text=text,
                tokens=() if token in ends else (token,),
                finish_reason=reasons[index],
                prompt_tokens=len(ids[index]) - cached,
                generated_tokens=len(answer.tokens),
                prompt_tokens_per_s=prompt_rate,
                generation_tokens_per_s=number / generation_s if number else 0.0,
                selection_ms=selection_s * 1e3,
                density=density,
                selection=selection,
                ff_bytes_per_token=bytes_per_token,
                **_measured(lossless),
            )
        if all(reasons):
            return


def _measured(lossless: Lossless | None) -> dict[str, Any]:
    """What a result says of lossless drafts."""
    if lossless is None:
        return {}
    return {
        "drafted": lossless.drafted,
        "accepted": lossless.accepted,
        "acceptance": lossless.acceptance,
        "tokens_per_verify": lossless.tokens_per_verify,
        "lossless_off": lossless.off,
    }


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer: the generation config's, and the tokenizer's."""
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = list(known) if isinstance(known, list | tuple) else [known]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if isinstance(token, int))


def full_ff_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of all FF weights of a model: what the full model reads for one token; `None` for an unknown layout."""
    try:
        return sum(block.nbytes for block in find_ff_blocks(model))
    except ValueError:
        return None


def _call(
    griffin: GriffinConfig | Griffin | None,
    sampling: Sampling | None,
    cache: Cache | None,
    prompt_chunk: int | None,
    lossless: bool,
    step: str,
    settings: Mapping[str, Any],
) -> _Call:
    """Sort the settings into those of the config and those of the sampling."""
    configs = {field.name for field in fields(GriffinConfig)}
    samplings = {field.name for field in fields(Sampling)}
    of_sampling = {name: value for name, value in settings.items() if name in samplings and name != "seed"}
    of_config = {name: value for name, value in settings.items() if name in configs and name != "seed"}
    if "seed" in settings:  # both have one: of the drawing of tokens, and of random selections
        of_sampling["seed"] = settings["seed"]
    if unknown := sorted(set(settings) - configs - samplings):
        near = difflib.get_close_matches(unknown[0], configs | samplings, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown setting {unknown[0]!r}{hint}; known: {', '.join(sorted(configs | samplings))}")
    if of_sampling and sampling is not None:
        raise ValueError(f"give sampling=... or {', '.join(of_sampling)} by keyword, not both")
    if isinstance(griffin, Griffin):
        if of_config:
            raise ValueError(f"griffin= is a handle, which has a config; {', '.join(of_config)} cannot change it")
        config: GriffinConfig | Griffin = griffin
    else:
        if lossless and griffin is None and not of_config.keys() & {"density", "loss"}:
            of_config["density"] = 1.0
        config = config_from(griffin, of_config)
    if lossless:
        refuse_sparse(config.config if isinstance(config, Griffin) else config)
    return _Call(config, Sampling(**of_sampling) if sampling is None else sampling, cache, prompt_chunk, lossless, step)


def refuse_sparse(config: GriffinConfig) -> None:
    """Raise `ValueError` for a config that is not the full model, whose tokens lossless drafts keep."""
    if config.loss is not None or config.density != 1.0:
        found = f"density is {config.density:g}" if config.loss is None else f"loss is {config.loss:g}"
        raise ValueError(f"lossless gives the tokens of the full model, and {found}; use density=1.0, or leave it out")


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], Mapping)


def _batch(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    return list(prompt) if _is_batch(prompt) else [prompt]  # type: ignore[list-item, arg-type]
