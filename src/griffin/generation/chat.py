"""One conversation: its messages, and the key/value cache that holds their tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.attachment import Statistics, attach
from griffin.config import GriffinConfig
from griffin.engine.decoders import Decoders, new_cache
from griffin.engine.step import Sampling
from griffin.generation.generate import Result, fold, refuse_sparse, stream_generate
from griffin.generation.text import encode


class Session:
    """A conversation with a model that has GRIFFIN attached; a context manager that detaches at its end.

    A turn runs only the tokens that the cache does not hold yet. The cache carries the flocking statistic of its prompt
    tokens, so experts are selected from the whole conversation, also after a change of density.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer, with a chat template.
        config: what to keep.
        sampling: how tokens are drawn.
        system: system message.
        lossless: draft tokens from the conversation so far and verify them; see `griffin.stream_generate`.

    Raises:
        ValueError: `lossless` with a density below 1.0; or as `griffin.attach`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GriffinConfig,
        sampling: Sampling,
        system: str | None = None,
        lossless: bool = False,
    ) -> None:
        self._lossless = lossless
        self._check(config)
        self.config = config
        self.messages: list[dict[str, str]] = []
        self.cached: list[int] = []  # the tokens in the cache
        self.last: Result | None = None  # the last answer, whole
        self.reused = 0  # tokens of the cache that the last turn did not have to run
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._handle = attach(model, config)  # at density 1 too: it gathers the statistic for later densities
        self.reset()

    @property
    def gathered(self) -> Statistics:
        """What the prompt tokens so far add up to."""
        return self._handle.gathered

    @property
    def step_name(self) -> str:
        """What computes a step, with the reason where it is the slow one."""
        return Decoders(self._model, self._handle).name

    def reset(self) -> str:
        """Forget the conversation."""
        self.messages = list(self._system)
        self.last, self.reused = None, 0
        self._forget_cache()
        return "the conversation is forgotten"

    def configure(self, config: GriffinConfig) -> None:
        """Go on with another config.

        Raises:
            ValueError: as the constructor; the old config stays.
        """
        self._check(config)
        self._handle.detach()
        self._handle = attach(self._model, config)
        self.config = config

    def ask(self, text: str) -> Generator[Result, None, None]:
        """Stream the answer to a message. An answer that is broken off stays in the conversation as far as it came.

        Raises:
            ValueError: the conversation is longer than the model's context; the message is then not kept.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode(self._model, self._tokenizer, [messages])[0]
        self._reuse(ids)
        self.last = None
        pieces: list[Result] = []
        stream = stream_generate(
            self._model,
            self._tokenizer,
            messages,
            griffin=self._handle,
            sampling=self._sampling,
            cache=self._cache,
            lossless=self._lossless,
        )
        try:
            with closing(stream):
                for piece in stream:
                    pieces.append(piece)
                    yield piece
        finally:
            self._settle(messages, ids, pieces)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.detach()

    def _check(self, config: GriffinConfig) -> None:
        if self._lossless:
            refuse_sparse(config)

    def _reuse(self, ids: Sequence[int]) -> None:
        """Leave in the cache what `ids` begins with, but never all of `ids`: the last token has to be run."""
        shared = 0
        for ours, new in zip(self.cached, ids[:-1], strict=False):
            if ours != new:
                break
            shared += 1
        # The statistic of a prompt token cannot be taken back, so only generated tokens are cut off.
        if shared < len(self.cached) and (shared < self._prompt_tokens or not self._crop(shared)):
            self._forget_cache()
        self.reused = len(self.cached)

    def _settle(self, messages: list[dict[str, str]], ids: Sequence[int], pieces: Sequence[Result]) -> None:
        """Take the answer into the conversation, and learn what the cache holds now."""
        if not pieces:  # broken off in the prompt phase: some layers' cache may be ahead of others
            self._forget_cache()
            return
        self.last = fold(pieces)
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
        self._prompt_tokens = len(ids)
        run = len(ids) + len(pieces) - 1  # a token that was drawn last is not run
        self.cached = [*ids, *self.last.tokens][:run]
        if self.last.finish_reason is None and not self._crop(run):  # the token after may have been run by half
            self._forget_cache()

    def _crop(self, length: int) -> bool:
        """Cut the cache to its first tokens; returns whether that was possible (a full sliding window has lost some).

        Layer by layer, as an interrupted forward leaves some of them a token ahead. The older meaning of a positive
        argument is not used: a negative one removes so many tokens in every version of transformers.
        """
        try:
            layers: list[Any] = self._cache.layers
            for layer in layers:
                if not layer.is_initialized:  # it shares another layer's
                    continue
                if surplus := layer.get_seq_length() - length:
                    layer.crop(-surplus)
                if not layer.keys.shape[-2] == layer.values.shape[-2] == length:
                    return False
        except (ValueError, NotImplementedError, RuntimeError, AttributeError):
            return False
        self.cached = self.cached[:length]
        return True

    def _forget_cache(self) -> None:
        self._cache = new_cache(self._model)
        self.cached = []
        self._prompt_tokens = 0
