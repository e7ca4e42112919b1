"""Answers to a batch of prompts: griffin's own loop, for one config or for several after a single prompt phase."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from griffin.attachment import GATHER_ONLY, Griffin, attach
from griffin.config import GriffinConfig
from griffin.engine.decoders import new_cache
from griffin.engine.forward import Forward
from griffin.engine.step import Sampling, generate_step
from griffin.errors import GriffinError
from griffin.generation.generate import end_tokens
from griffin.generation.text import Answer
from griffin.method.statistics import keep_with_cache
from griffin.version import __version__


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to answer, and when an answer ends.

    Args:
        prompts: left-padded.
        mask: 1 where a token is real; `None` where there is no padding.
        new_tokens: most tokens of an answer.
        stop: texts before which an answer ends.
        sampling: how tokens are drawn.

    Shapes:
        prompts, mask: (B, S).
    """

    prompts: Tensor
    mask: Tensor | None
    new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling

    def name(self, config: GriffinConfig) -> str:
        """A digest of everything that an answer depends on but the model."""
        settings = json.dumps([__version__, asdict(config), self.new_tokens, self.stop, asdict(self.sampling)])
        rows = self.prompts.tolist(), None if self.mask is None else self.mask.tolist()
        return hashlib.sha256(f"{settings}{rows}".encode()).hexdigest()[:32]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    handle: Griffin,
    cache: Cache | None = None,
) -> Tensor:
    """Generate until every row has ended.

    Args:
        model: the model.
        tokenizer: its tokenizer, with a padding token.
        batch: the prompts.
        handle: GRIFFIN attached to the model.
        cache: keys and values of the prompts' first tokens, with their statistic; extended in place.

    Shapes:
        Returns (B, T), int64, T <= new_tokens, padded on the right.
    """
    ends = end_tokens(model, tokenizer)
    going = {row: Answer(tokenizer, batch.stop) for row in range(len(batch.prompts))}
    found: list[list[int]] = [[] for _ in going]
    steps = generate_step(
        model, batch.prompts, attention_mask=batch.mask, handle=handle, sampling=batch.sampling, cache=cache
    )
    rows = list(going)  # of the batch that is computed
    kept: list[int] | None = None
    for _ in range(batch.new_tokens):
        step = steps.send(kept) if kept is not None else next(steps)
        for row, token in zip(rows, step.tokens.tolist(), strict=True):
            if row not in going:
                continue
            found[row].append(token)
            if token not in ends:
                going[row].add(token)
            if token in ends or going[row].stopped:
                del going[row]
        if not going:
            break
        kept = None
        if len(going) <= len(rows) // 2:  # a smaller batch is faster, but making it takes a while, too
            kept = [at for at, row in enumerate(rows) if row in going]
            rows = list(going)
    longest = max(map(len, found))
    padded = [own + [tokenizer.pad_token_id] * (longest - len(own)) for own in found]
    return torch.tensor(padded, device=batch.prompts.device)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, configs: Sequence[GriffinConfig]
) -> Iterator[tuple[GriffinConfig, Tensor]]:
    """The same prompts answered with each config. The prompt phase is the full model for all: it is run once.

    Shapes:
        Each answer is what `answer` returns.
    """
    cache = None
    first, mask = batch.prompts[:, :-1], None if batch.mask is None else batch.mask[:, :-1]
    if first.shape[1] and (mask is None or bool(mask.any(dim=1).all())):
        cache = new_cache(model)
        needs = frozenset().union(*(config.needs for config in configs))
        with torch.no_grad(), attach(model, GATHER_ONLY) as handle, handle.gather(needs=needs) as statistics:
            Forward(model, cache, mask)(first)
        keep_with_cache(statistics, cache)
    for config in configs:
        with attach(model, config) as handle:
            yield config, answer(model, tokenizer, batch, handle, copy.deepcopy(cache))


class Shared:
    """Answers of several configs, generated together and handed out one config after another.

    Args:
        configs: the configs, of methods that select neurons.
        path: where answers are kept as they come, so that a killed run loses one batch; `None` keeps them nowhere.
        progress: called with the share of the prompts that were answered since.
        model: identifies the model and what it runs on, since the file may hold answers of others; JSON.

    Raises:
        GriffinError: the file cannot be read or written.
    """

    def __init__(
        self,
        configs: Sequence[GriffinConfig],
        path: Path | None = None,
        progress: Callable[[float], None] | None = None,
        model: Any = None,
    ) -> None:
        self.configs, self.progress, self._path = tuple(configs), progress, path
        self._model = json.dumps(model)
        self.prompts = 1  # of the task: what a share is of
        self._known: dict[str, list[list[int]]] = {}
        if path is not None and path.exists():
            self._read(path)

    def of(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, config: GriffinConfig
    ) -> Tensor:
        """Answers of one config, which generates those of all others if they are not known.

        Shapes:
            Returns what `answer` returns.
        """
        if self._name(batch, config) not in self._known:
            missing = [own for own in self.configs if self._name(batch, own) not in self._known]
            for own, tokens in answers(model, tokenizer, batch, missing):
                self._keep(self._name(batch, own), tokens.tolist())
            if self.progress is not None:
                self.progress(len(batch.prompts) / self.prompts)
        return torch.tensor(self._known[self._name(batch, config)], device=batch.prompts.device)

    def _name(self, batch: PromptBatch, config: GriffinConfig) -> str:
        return hashlib.sha256(f"{self._model}{batch.name(config)}".encode()).hexdigest()[:32]

    def _keep(self, name: str, tokens: list[list[int]]) -> None:
        self._known[name] = tokens
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(json.dumps([name, tokens], separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise GriffinError(f"cannot write to {self._path}: {error.strerror or error}") from error

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise GriffinError(f"cannot read {path}: {error.strerror or error}") from error
        for line in text.splitlines():
            try:
                name, tokens = json.loads(line)
            except ValueError:  # a killed run wrote half of it
                continue
            self._known[name] = tokens
        if text and not text.endswith("\n"):
            with path.open("a", encoding="ascii") as file:
                file.write("\n")


def sampling_of(temperature: float, sampled: bool, **others: Any) -> Sampling:
    """`Sampling` from the harness's settings; a seed is drawn from torch's generator, which the harness seeds."""
    seed = int(torch.randint(2**31, ())) if sampled else 0
    return replace(Sampling(**others), temperature=(temperature or 1.0) if sampled else 0.0, seed=seed)
