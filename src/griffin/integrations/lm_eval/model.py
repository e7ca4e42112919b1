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
# Settings of a model's generation config that change the generated text, each with its values that have no effect.
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
# Arguments that HFLM passes on to from_pretrained; its own signature does not name them.
_PASSED_ON = ("attn_implementation", "device_map")

_EMPTY_SCORE = (0.0, True)  # the score of no tokens: an empty sum and an empty conjunction


@register_model("griffin")
class GriffinLM(HFLM):  # type: ignore[misc]
    """The harness's Transformers model (`hf`) with GRIFFIN's experts in the generation phase.

    - `generate_until`: the prompt runs in the prompt phase and griffin's loop generates, with the native step if
      the model has one. Settings that it lacks, such as beam search, use the model's `generate` with GRIFFIN attached.
    - `loglikelihood`: `griffin.integrations.lm_eval.scoring` describes the two phases. A choice without tokens scores 0
      at every density; `hf` does the same, but only if the context has other choices.
    - `loglikelihood_rolling`: the windows are those of `hf`. Each window's context is its prompt phase: one token (the
      prefix token at the start of the text), and more only in the last window. This is the hardest test of GRIFFIN, as
      experts are selected from almost no text; `griffin perplexity` selects them from a prompt.

    At density 1.0 nothing is attached and HFLM's methods run unchanged, so the results equal those of `hf` exactly.
    Contexts longer than the window are cut from the left, as in `hf`; `truncated` counts them and the log reports them.

    Args:
        pretrained: a model, or a name that `griffin.load` accepts. HFLM loads folders and Hub ids, so that they equal
            `hf`; `griffin.load` loads built-in names and `.gguf` files.
        phase: `continuation` or `last_token`.
        weights: the format in which `griffin.load` stores the weights: `int8`, `int4`, `bf16` or `f32`.
        disable_tqdm: show no progress bars.
        shared: answers generated for several configs together, including this model's config; griffin's loop then
            generates at density 1.0 too.
        **arguments: the fields of `GriffinConfig`, and HFLM's own arguments (`backend` is GriffinConfig's).

    Raises:
        ValueError: an argument or value is unknown, `batch_size` is `auto` below density 1.0, or `attach` refuses the
            model.
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
        accepted = (*_CONFIG, "phase", "weights", *inspect.signature(HFLM.__init__).parameters, *_PASSED_ON)
        for name in arguments:
            if name not in accepted or name in ("self", "kwargs"):
                near = difflib.get_close_matches(name, accepted, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"unknown model argument {name!r}{hint}; known are phase, weights, {', '.join(_CONFIG)} and hf's"
                )
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; expected one of {', '.join(PHASES)}")
        self.griffin = GriffinConfig.from_mapping({name: arguments.pop(name) for name in _CONFIG if name in arguments})
        self.phase = phase
        self.truncated = self.contexts = 0  # the number of contexts cut from the left, and of all contexts
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
            attach_any(self.model, self.griffin).detach()  # refuse an unsupported model before a long run

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See the harness's `LM.loglikelihood`."""
        empty_requests = [not any(request.args) for request in requests]  # hf cannot encode an empty context and choice
        with self._attached():
            scored = super().loglikelihood(
                [request for request, empty in zip(requests, empty_requests, strict=True) if not empty],
                disable_tqdm or self._quiet,
            )
        scores = iter(scored)
        return [_EMPTY_SCORE if empty else next(scores) for empty in empty_requests]

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
        """HFLM's information for the results file, with the GRIFFIN config and the number of truncated contexts."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"griffin": {**asdict(self.griffin), "phase": self.phase}, "truncated": self.truncated}

    @contextmanager
    def _attached(self, wanted: bool = True) -> Iterator[None]:
        """Attach GRIFFIN below density 1.0 if `wanted`, and log the number of truncated contexts at the end."""
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
        self.contexts += len({tuple(context) for _, context, _ in requests})  # the choices of one context count once
        self.truncated += len(
            {
                tuple(context)
                for _, context, continuation in requests
                if len(context) + len(continuation) > self.max_length + 1
            }
        )
        results = [_EMPTY_SCORE] * len(requests)
        scored: list[
            int
        ] = []  # a choice has no tokens if it is empty or all of it merges with the context's last token
        for index, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                self._cache_score(texts, _EMPTY_SCORE)
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
        """Yield index and score of the requests in `scored`; HFLM computes them if nothing is attached."""
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
        windows = [Continuation(tuple(context), tuple(tokens)).within(self.max_length) for _, context, tokens in wanted]
        with tqdm(total=len(wanted), disable=quiet, desc="Running loglikelihood requests") as bar, self._autocast():
            for score in scorer(windows):
                result = score.loglikelihood, score.greedy
                self._cache_score(wanted[score.index][0], result)
                yield scored[score.index], result
                bar.update()

    def _cache_score(self, texts: Any, score: tuple[float, bool]) -> None:
        """Add a score to the harness's cache. Windows of a longer text have no key and are not cached."""
        if texts is not None:
            self.cache_hook.add_partial("loglikelihood", texts, score)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode as HFLM does, and count the contexts that are cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        self.contexts += len(strings)
        if left_truncate_len:
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Generate until every answer has stopped.

        Shapes: context (B, S), left-padded. Returns (B, S + new), padded on the right.
        """
        mask = settings.get("attention_mask")
        drawn = {name: value for name, value in settings.items() if name not in ("attention_mask", "do_sample")}
        drawn = _rules(self.model.generation_config) | drawn
        temperature = float(drawn.pop("temperature", 0.0) or 0.0)
        sampled = bool(settings.get("do_sample", temperature > 0))
        ours = set(drawn) <= set(_SAMPLING)
        if not ours or (self._handle is None and self._shared is None):
            with self._attached(self._shared is not None):  # with shared answers, nothing is attached yet
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
    rules = {name: getattr(config, name, None) for name in _OFF}
    return {name: value for name, value in rules.items() if value is not None and value not in _OFF[name]}


def _griffin_load(name: str, weights: str | None, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Load model and tokenizer by `griffin.load`. Removes the arguments that it takes from `arguments`."""
    dtype, device = arguments.pop("dtype", None), arguments.pop("device", None)
    revision = arguments.pop("revision", None)
    if isinstance(device, str) and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness passes cuda by default
    return load(
        name,
        dtype=None if dtype == "auto" else dtype,
        device=device,
        weights=weights,
        revision=None if revision == "main" else revision,
    )
