"""Answer a batch of prompts with griffin's generation loop, with one config or with several after one prompt phase."""

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
    """Prompts to answer, with the settings of their answers.

    Args:
        prompts: token ids, left-padded.
        mask: 1 where a token is real; `None` where there is no padding.
        new_tokens: the most tokens of an answer.
        stop: texts that end an answer.
        sampling: how tokens are drawn.

    Shapes:
        prompts, mask: (B, S).
    """

    prompts: Tensor
    mask: Tensor | None
    new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling

    def digest(self, config: GriffinConfig) -> str:
        """A digest of everything except the model that determines the answers."""
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
    """Generate until every answer has ended.

    Args:
        model: the model.
        tokenizer: its tokenizer, with a padding token.
        batch: the prompts.
        handle: GRIFFIN attached to the model.
        cache: keys and values of the prompts' first tokens, with their statistics; it is extended in place.

    Shapes:
        Returns (B, T), int64, T <= new_tokens, padded on the right.
    """
    ends = end_tokens(model, tokenizer)
    unfinished = {row: Answer(tokenizer, batch.stop) for row in range(len(batch.prompts))}
    generated: list[list[int]] = [[] for _ in unfinished]
    steps = generate_step(
        model, batch.prompts, attention_mask=batch.mask, handle=handle, sampling=batch.sampling, cache=cache
    )
    rows = list(unfinished)  # rows that are still in the batch
    kept: list[int] | None = None
    for _ in range(batch.new_tokens):
        step = steps.send(kept) if kept is not None else next(steps)
        for row, token in zip(rows, step.tokens.tolist(), strict=True):
            if row not in unfinished:
                continue
            generated[row].append(token)
            if token not in ends:
                unfinished[row].add(token)
            if token in ends or unfinished[row].stopped:
                del unfinished[row]
        if not unfinished:
            break
        kept = None
        if len(unfinished) <= len(rows) // 2:  # a smaller batch is faster, but cutting it takes time
            kept = [at for at, row in enumerate(rows) if row in unfinished]
            rows = list(unfinished)
    longest = max(map(len, generated))
    padded = [tokens + [tokenizer.pad_token_id] * (longest - len(tokens)) for tokens in generated]
    return torch.tensor(padded, device=batch.prompts.device)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, configs: Sequence[GriffinConfig]
) -> Iterator[tuple[GriffinConfig, Tensor]]:
    """Answer the same prompts with each config. The prompt phase runs once, as it is the full model for every config.

    Shapes:
        Each tensor has the shape that `answer` returns.
    """
    cache = None
    prefix, mask = batch.prompts[:, :-1], None if batch.mask is None else batch.mask[:, :-1]
    if prefix.shape[1] and (mask is None or bool(mask.any(dim=1).all())):
        cache = new_cache(model)
        needs = frozenset().union(*(config.needs for config in configs))
        with torch.no_grad(), attach(model, GATHER_ONLY) as handle, handle.gather(needs=needs) as statistics:
            Forward(model, cache, mask)(prefix)
        keep_with_cache(statistics, cache)
    for config in configs:
        with attach(model, config) as handle:
            yield config, answer(model, tokenizer, batch, handle, copy.deepcopy(cache))


class Shared:
    """Answers of several configs, generated together and returned config by config.

    Args:
        configs: the configs. Their methods must select neurons.
        path: a file to which every answer is appended at once, so that a killed run loses one batch at most; `None`
            writes no file.
        progress: called with the share of the prompts that were answered since the last call.
        model: identifies the model and what it runs on, since the file may hold answers of others; written as JSON.

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
        self.prompts = 1  # the number of prompts of the task, of which progress reports shares
        self._answers: dict[str, list[list[int]]] = {}
        if path is not None and path.exists():
            self._read(path)

    def of(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, config: GriffinConfig
    ) -> Tensor:
        """The answers of one config. If they are missing, those of all configs are generated.

        Shapes:
            Returns a tensor of the shape that `answer` returns.
        """
        if self._name(batch, config) not in self._answers:
            missing = [other for other in self.configs if self._name(batch, other) not in self._answers]
            for other, tokens in answers(model, tokenizer, batch, missing):
                self._keep(self._name(batch, other), tokens.tolist())
            if self.progress is not None:
                self.progress(len(batch.prompts) / self.prompts)
        return torch.tensor(self._answers[self._name(batch, config)], device=batch.prompts.device)

    def _name(self, batch: PromptBatch, config: GriffinConfig) -> str:
        return hashlib.sha256(f"{self._model}{batch.digest(config)}".encode()).hexdigest()[:32]

    def _keep(self, name: str, tokens: list[list[int]]) -> None:
        self._answers[name] = tokens
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
            except ValueError:  # a killed run has left an incomplete line
                continue
            self._answers[name] = tokens
        if text and not text.endswith("\n"):
            with path.open("a", encoding="ascii") as file:
                file.write("\n")


def sampling_of(temperature: float, sampled: bool, **others: Any) -> Sampling:
    """Build `Sampling` from the harness's settings, with a seed from torch's generator, which the harness seeds."""
    seed = int(torch.randint(2**31, ())) if sampled else 0
    return replace(Sampling(**others), temperature=(temperature or 1.0) if sampled else 0.0, seed=seed)
