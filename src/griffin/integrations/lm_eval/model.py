"""GRIFFIN as the model `griffin` of lm-evaluation-harness."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from griffin.analysis.wanda import attach_any
from griffin.attachment import Griffin
from griffin.config import GriffinConfig
from griffin.integrations.lm_eval import PHASES
from griffin.integrations.lm_eval.generating import PromptBatch, Shared, answer, sampling_of
from griffin.integrations.lm_eval.scoring import Continuation, Scorer
from griffin.models.builtin import BUILTIN
from griffin.models.load import load, loading_error

logger = logging.getLogger("griffin")

_CONFIG = tuple(field.name for field in fields(GriffinConfig))
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
# Settings of a model's generation config that change what is generated, and their values that change nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "num_beams": (1,),
}
# What HFLM passes on to from_pretrained, of which it takes anything.
_PASSED_ON = ("attn_implementation", "device_map")

_NOTHING = (0.0, True)  # the score of no tokens: a sum and a conjunction over none


@register_model("griffin")
class GriffinLM(HFLM):  # type: ignore[misc]
    """The harness's own Transformers model (`hf`), with the experts in the generation phase.

    - `generate_until`: the prompt is the prompt phase, and griffin's own loop generates; the native step where there is
      one. Settings that it does not know (beam search) go to the model's `generate`, with GRIFFIN attached.
    - `loglikelihood`: see `griffin.integrations.lm_eval.scoring` for the two phases.
      A choice without tokens of its own scores 0, at every density; `hf` does so too, but only beside other choices.
    - `loglikelihood_rolling`: windows as `hf` cuts them. Every window's context part is its prompt phase: one token
      (where the text begins: the prefix token), more only in the last window. So experts are selected from nearly
      nothing, which is the hardest test; `griffin perplexity` gives them a prompt.

    At density 1.0 nothing is attached and every method is HFLM's, so results are those of `hf` to the last digit.
    Contexts beyond the window are cut from the left, as `hf` does; they are counted in `truncated` and told in the log.

    Args:
        pretrained: what `griffin.load` takes. Folders and Hub ids are loaded by HFLM, so that they equal `hf`; built-in
            names and `.gguf` files by `griffin.load`. Or a model.
        phase: `continuation` or `last_token`.
        weights: `int8`, `int4`, `bf16` or `f32`, as `griffin.load` stores them.
        disable_tqdm: show no progress bars.
        shared: answers that are generated for several configs together, of which this model's is one; then at density
            1.0, too, they come from griffin's loop.
        **arguments: the fields of `GriffinConfig`, and HFLM's own arguments (`backend` is GriffinConfig's).

    Raises:
        ValueError: an unknown argument or value, `batch_size=auto` below density 1.0, or a model that `attach` refuses.
        GriffinError: the model cannot be fetched or read.
    """

    def __init__(
        self,
        pretrained: Any,
        phase: str = "continuation",
        weights: str | None = None,
        disable_tqdm: bool = False,
        shared: Shared | None = None,
        **arguments: Any,
    ) -> None:
        known = (*_CONFIG, "phase", "weights", *inspect.signature(HFLM.__init__).parameters, *_PASSED_ON)
        for name in arguments:
            if name not in known or name in ("self", "kwargs"):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"unknown model argument {name!r}{hint}; known are phase, weights, {', '.join(_CONFIG)} and hf's"
                )
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; expected one of {', '.join(PHASES)}")
        self.griffin = GriffinConfig.from_mapping({name: arguments.pop(name) for name in _CONFIG if name in arguments})
        self.phase = phase
        self.truncated = self.contexts = 0  # contexts cut from the left, of all
        self._full = self.griffin.density == 1.0
        self._quiet, self._shared = disable_tqdm, shared
        self._handle: Griffin | None = None
        if not self._full and str(arguments.get("batch_size", 1)).startswith("auto"):
            raise ValueError(
                "batch_size is 'auto', but a batch shares its experts, so results would depend on it; give a number"
            )
        name = pretrained
        if isinstance(name, str) and (name in BUILTIN or name.lower().endswith(".gguf") or weights is not None):
            loaded = _griffin_load(name, weights, arguments)
            pretrained, arguments["tokenizer"] = loaded
        try:
            super().__init__(pretrained, **arguments)
        except (OSError, ValueError) as error:
            if not isinstance(pretrained, str):
                raise
            raise loading_error(pretrained, arguments.get("revision"), error) from error
        if not self._full:
            attach_any(self.model, self.griffin).detach()  # refuse a model that it cannot prune before a long run

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See the harness's `LM.loglikelihood`."""
        nothing = [not any(request.args) for request in requests]  # neither context nor choice: hf cannot encode it
        with self._attached():
            scored = super().loglikelihood(
                [request for request, empty in zip(requests, nothing, strict=True) if not empty],
                disable_tqdm or self._quiet,
            )
        left = iter(scored)
        return [_NOTHING if empty else next(left) for empty in nothing]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See the harness's `LM.loglikelihood_rolling`."""
        with self._attached():
            results: list[float] = super().loglikelihood_rolling(requests, disable_tqdm or self._quiet)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See the harness's `LM.generate_until`."""
        if self._shared is not None:
            self._shared.prompts = len(requests)
        with self._attached(self._shared is None):
            results: list[str] = super().generate_until(requests, disable_tqdm or self._quiet)
        return results

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: HFLM's, and the method's."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"griffin": {**asdict(self.griffin), "phase": self.phase}, "truncated": self.truncated}

    @contextmanager
    def _attached(self, wanted: bool = True) -> Iterator[None]:
        """Attach GRIFFIN where there is something to prune, and tell at the end how many contexts were cut."""
        cut, seen = self.truncated, self.contexts
        if self._full or not wanted:
            yield
        else:
            with attach_any(self.model, self.griffin) as self._handle:
                yield
            self._handle = None
        if self.truncated > cut:
            logger.warning(
                "%d of %d contexts are longer than the window of %d tokens and were cut from the left",
                self.truncated - cut,
                self.contexts - seen,
                self.max_length,
            )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self.contexts += len({tuple(own) for _, own, _ in requests})  # the choices of one context count once
        self.truncated += len(
            {tuple(own) for _, own, scored in requests if len(own) + len(scored) > self.max_length + 1}
        )
        results = [_NOTHING] * len(requests)
        scored: list[int] = []  # a choice may have no tokens: it is empty, or they merge with the context's
        for index, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                self._told(texts, _NOTHING)
            elif not context:
                raise ValueError(f"a context has no tokens ({str(texts)[:60]!r}); expected some text before a choice")
            elif len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens ({str(texts)[-60:]!r}); expected at most "
                    f"{self.max_length}, the model's window"
                )
            else:
                scored.append(index)
        for index, score in self._scores(requests, scored, disable_tqdm or self._quiet, override_bs):
            results[index] = score
        return results

    def _scores(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        scored: Sequence[int],
        quiet: bool,
        override_bs: int | None,
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The scores of those requests that have some tokens to score: HFLM's where nothing is attached."""
        wanted = [requests[index] for index in scored]
        if self._full or self._handle is None:
            full = super()._loglikelihood_tokens(wanted, disable_tqdm=quiet, override_bs=override_bs)
            yield from zip(scored, full, strict=True)
            return
        scorer = Scorer(
            self.model,
            self._handle,
            phase=self.phase,
            batch_size=override_bs or int(self.batch_size),
            pad_token=self.tokenizer.pad_token_id,
            log_softmax=lambda logits: F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype),
        )
        windows = [Continuation(tuple(own), tuple(tokens)).within(self.max_length) for _, own, tokens in wanted]
        with tqdm(total=len(wanted), disable=quiet, desc="Running loglikelihood requests") as bar, self._autocast():
            for score in scorer(windows):
                found = score.loglikelihood, score.greedy
                self._told(wanted[score.index][0], found)
                yield scored[score.index], found
                bar.update()

    def _told(self, texts: Any, score: tuple[float, bool]) -> None:
        """Let the harness keep a score; windows of a longer text have no key."""
        if texts is not None:
            self.cache_hook.add_partial("loglikelihood", texts, score)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """HFLM's, which counts what is cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        self.contexts += len(strings)
        if left_truncate_len:
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Generate until every row has stopped.

        Shapes: context (B, S), left-padded. Returns (B, S + new), padded on the right.
        """
        mask = settings.get("attention_mask")
        drawn = {name: value for name, value in settings.items() if name not in ("attention_mask", "do_sample")}
        drawn = _rules(self.model.generation_config) | drawn
        temperature = float(drawn.pop("temperature", 0.0) or 0.0)
        sampled = bool(settings.get("do_sample", temperature > 0))
        ours = set(drawn) <= set(_SAMPLING)
        if not ours or (self._handle is None and self._shared is None):
            with self._attached(self._shared is not None):  # where answers are shared, nothing is attached yet
                generated: Tensor = super()._model_generate(context, max_length, stop, **settings)
            return generated
        batch = PromptBatch(
            prompts=context,
            mask=None if mask is None or bool(mask.all()) else mask,
            new_tokens=max_length - context.shape[1],
            stop=tuple(stop),
            sampling=sampling_of(temperature, sampled, **drawn),
        )
        with self._autocast():
            if self._shared is not None:
                new = self._shared.of(self.model, self.tokenizer, batch, self.griffin)
            else:
                assert self._handle is not None
                new = answer(self.model, self.tokenizer, batch, self._handle)
        return torch.cat([context, new], dim=1)

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)


def _rules(config: Any) -> dict[str, Any]:
    """Settings of a model's own generation config, without sampling, which the harness decides."""
    found = {name: getattr(config, name, None) for name in _OFF}
    return {name: value for name, value in found.items() if value is not None and value not in _OFF[name]}


def _griffin_load(name: str, weights: str | None, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The model and tokenizer by `griffin.load`, which takes these of HFLM's arguments."""
    dtype, device = arguments.pop("dtype", None), arguments.pop("device", None)
    revision = arguments.pop("revision", None)
    if isinstance(device, str) and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness's default
    return load(
        name,
        dtype=None if dtype == "auto" else dtype,
        device=device,
        weights=weights,
        revision=None if revision == "main" else revision,
    )
