"""Convert the fields of an HTTP request into engine arguments. A wrong field raises an `ApiError` that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from griffin.config import GriffinConfig
from griffin.engine.step import Sampling
from griffin.generation.generate import refuse_sparse
from griffin.generation.text import encode
from griffin.integrations.server import schema
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.errors import ApiError, refusal
from griffin.integrations.server.types import FullError

_DIGITS = 18  # of a token id; of far more Python makes no number
_CHARACTERS_PER_TOKEN = 32  # of a whole prompt, on average: English has 4 to 5, the most repetitive text hardly 20


@dataclass(frozen=True)
class Settings:
    """The server's settings for requests.

    Args:
        model: the model's name.
        max_tokens: the most tokens of a chat answer whose request sets no limit.
        prompt_tokens: the most tokens of a prompt; `None` allows the model's whole context.
        body_bytes: the most bytes of a request body.
        api_key: the key that requests must carry; `None` requires none.
        allowed_hosts: names beside the loopback ones that requests may be for; `None` allows all.
        lossless: whether requests for the full model are drafted if they do not say.
    """

    model: str
    max_tokens: int = 1024
    prompt_tokens: int | None = None
    body_bytes: int = 4_000_000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    lossless: bool = False


def prompt_limit(engine: Engine, settings: Settings) -> int | None:
    """The most tokens of a prompt; `None` if neither the server nor the model has a limit."""
    limits = (settings.prompt_tokens, None if engine.context is None else engine.context - 1)
    return min((limit for limit in limits if limit is not None), default=None)


async def encoded(
    engine: Engine, settings: Settings, prompts: Sequence[Any], param: str, tools: Sequence[Mapping[str, Any]] = ()
) -> list[list[int]]:
    """Token ids of texts, lists of messages with the tools that they may use, or lists of token ids.

    Raises:
        ApiError: a prompt is empty, too long, or has a token id that the model lacks; or too many wait to be tokenised.
    """
    limit = prompt_limit(engine, settings)
    encoded_prompts: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            size = engine.vocabulary
            if max(prompt) >= size:
                raise ApiError(422, f"there is no token {max(prompt)}; this model has {size}", param)
            ids = prompt
        else:
            _check_text(prompt, limit, param)
            try:
                ids = (await engine.pool.run(encode, engine.model, engine.tokenizer, [prompt], tools))[0]
            except FullError as error:
                raise refusal(error) from error
            except ValueError as error:
                code = "context_length_exceeded" if "context" in str(error) else None
                raise ApiError(400, str(error), param, code) from error
            except Exception as error:  # a chat template may raise any exception
                raise ApiError(400, f"the chat template refuses these messages: {error}", param) from error
        if limit is not None and len(ids) > limit:
            message = f"the prompt has {len(ids)} tokens, this server takes at most {limit}; shorten it"
            raise ApiError(400, message, param, "context_length_exceeded")
        encoded_prompts.append(ids)
    return encoded_prompts


def _check_text(prompt: str | list[dict[str, Any]], limit: int | None, param: str) -> None:
    """Refuse a text that is far too long before the time is spent to tokenise it.

    Raises:
        ApiError: it has more characters than as many tokens can have as a prompt may have.
    """
    texts = [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt]
    characters = sum(map(len, texts))
    if limit is not None and characters > limit * _CHARACTERS_PER_TOKEN:
        message = (
            f"the prompt has {characters:,} characters, which is more than the {limit:,} tokens that this server "
            "takes; shorten it"
        )
        raise ApiError(400, message, param, "context_length_exceeded")


def config_of(engine: Engine, given: schema.GriffinSettings | None) -> GriffinConfig:
    """The server's config, updated with the request's settings. `lossless` without a density means the full model.

    Raises:
        ApiError: `GriffinConfig` refuses a value, or the selection cannot be served.
    """
    base = engine.config
    overrides = {} if given is None else given.model_dump(exclude_none=True)
    lossless = overrides.pop("lossless", False)
    try:
        if lossless and not overrides.keys() & {"density", "loss"}:
            overrides["density"] = 1.0
        if "loss" in overrides:
            base = replace(base, density=GriffinConfig.density, selection=GriffinConfig.selection)
        elif "density" in overrides or "selection" in overrides:
            base = replace(base, loss=None)
        layers = len(engine.handle.blocks)
        if overrides.get("layers") and max(overrides["layers"]) >= layers:
            raise ValueError(f"layers names layer {max(overrides['layers'])}; this model has layers 0 to {layers - 1}")
        config = replace(base, **overrides)
        if config.method.select is None:
            raise ValueError(f"selection {config.method} masks the weights of all requests, so it cannot be served")
        return config
    except ValueError as error:
        field = next((name for name in overrides if str(error).startswith(name)), None)
        raise ApiError(422, str(error), "griffin" if field is None else f"griffin.{field}") from error


def lossless_of(settings: Settings, given: schema.GriffinSettings | None, config: GriffinConfig) -> bool:
    """Whether answers with this config are drafted: as the request says, or else as the server does.

    Raises:
        ApiError: the request says so, but is not for the full model.
    """
    asked = None if given is None else given.lossless
    try:
        refuse_sparse(config)
    except ValueError as error:
        if asked:
            raise ApiError(422, str(error), "griffin.lossless") from error
        return False
    return settings.lossless if asked is None else asked


def tokens_of(engine: Engine, settings: Settings, prompts: Sequence[Sequence[int]], tokens: int | None) -> int:
    """The most tokens of an answer: the requested number, or else the server's default within the context.

    Raises:
        ApiError: the request asks for more tokens than the context has room for.
    """
    longest = max(map(len, prompts))
    left = None if engine.context is None else engine.context - longest
    if tokens is None:
        tokens = settings.max_tokens if left is None else min(settings.max_tokens, left)
    elif left is not None and tokens > left:
        message = (
            f"the prompt has {longest} tokens and the answer may have {tokens}, but the model's context is "
            f"{engine.context}; ask for at most {left} tokens"
        )
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return tokens


def sampling_of(engine: Engine, body: schema.Generation, tokens: int) -> Sampling:
    """The sampling settings of a request, with the OpenAI API's defaults.

    Raises:
        ApiError: `logit_bias` names something that is not a token of this model.
    """
    stop = body.stop or ()
    names = ("top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    given = {name: getattr(body, name) for name in names}
    return Sampling(
        max_tokens=tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        top_k=max(body.top_k or 0, 0),
        seed=None if body.seed is None or body.seed < 0 else body.seed,
        logit_bias=_biases(body.logit_bias, engine.vocabulary),
        **{name: value for name, value in given.items() if value is not None},
    )


def _biases(given: dict[str, float] | None, vocabulary: int) -> dict[int, float] | None:
    for token in given or ():
        digits = token.isascii() and token.isdigit() and len(token) <= _DIGITS
        if not (digits and int(token) < vocabulary):
            message = f"logit_bias: {token[:40]!r} is no token; this model has the token ids 0 to {vocabulary - 1}"
            raise ApiError(422, message, "logit_bias")
    return {int(token): bias for token, bias in given.items()} if given else None


def prompts_of(given: Any) -> list[Any]:
    """A list of texts or of token id lists, from any of the four forms that the API allows."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)
