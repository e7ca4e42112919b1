"""One thread owns the model: it takes requests from a bounded queue and generates their answers token by token.

Between two steps the thread drops cancelled requests and admits new ones. Prompts run in chunks, in turns, with a step
of the running answers after each chunk, so a long prompt stalls nobody. A prompt is admitted only when all of its
answers fit within `max_sequences` and the key/value memory, and each answer keeps its share until it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.analysis.flocking import recording
from griffin.attachment import Griffin, attach
from griffin.config import GriffinConfig
from griffin.engine.batch import Batch
from griffin.engine.prefix import PrefixCache
from griffin.generation.generate import end_tokens
from griffin.generation.text import context_length
from griffin.integrations.server.answers import RunningAnswer, answers_to
from griffin.integrations.server.pool import Pool
from griffin.integrations.server.scheduler import Prompt, Scheduler
from griffin.integrations.server.types import (
    Activations,
    Event,
    FormError,
    GenerationRequest,
    LateError,
    Limits,
    Piece,
    StoppedError,
    Summary,
    TokenInfo,
)

logger = logging.getLogger("griffin")

_STOPPING = "the server is stopping"


class Engine:
    """Runs one model in a dedicated thread.

    Args:
        model: the model, in eval mode. No other code may use it until `close`.
        tokenizer: its tokenizer.
        config: the config of requests that set nothing.
        limits: how much work to accept.

    Raises:
        ValueError: `attach` refuses the model, or a short trial prompt fails.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GriffinConfig,
        limits: Limits,
    ) -> None:
        self.model, self.tokenizer, self.config, self.limits = model, tokenizer, config, limits
        self.context = context_length(model)
        self.pool = Pool(threads=2, waiting=limits.queue)
        self.prefixes = PrefixCache(limits.prefix_bytes, limits.prompt_chunk) if limits.prefix_bytes else None
        self._ends = end_tokens(model, tokenizer)
        self._changed = threading.Condition()
        self._prompts = Scheduler(limits)
        self._running: list[RunningAnswer] = []
        self._refusing = self._stopping = False
        self.failure: BaseException | None = None
        self.handle: Griffin = attach(model, replace(config, batch="per_sequence"))
        try:
            self._batch = Batch(model, self.handle)
            self.bytes_per_token = self._trial_run()
        except BaseException:
            self.handle.detach()
            raise
        self._thread = threading.Thread(target=self._run, name="griffin-engine", daemon=True)
        self._thread.start()

    # -- called from other threads ------------------------------------------------------------------------------------

    @property
    def step_name(self) -> str:
        """The name of the decoder that computes a step."""
        return self._batch.step_name

    @property
    def vocabulary(self) -> int:
        """The number of token ids of the model."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]

    @property
    def running(self) -> int:
        """The number of answers in their generation phase and prompts in their prompt phase."""
        return len(self._running) + len(self._prompts.running)

    @property
    def waiting(self) -> int:
        """The number of prompts in the queue."""
        return len(self._prompts.waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are reserved."""
        reserved = sum(running.nbytes for running in list(self._running))
        return reserved + sum(prompt.nbytes for prompt in list(self._prompts.running))

    @property
    def alive(self) -> bool:
        """Whether requests are accepted: the thread is running, has not failed, and is not about to stop."""
        return self._thread.is_alive() and self.failure is None and not self._refusing

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that could never run.

        Raises:
            ValueError: the request needs more sequences or more key/value memory than the limits allow.
        """
        if request.n > self.limits.max_sequences:
            raise ValueError(
                f"n is {request.n}, but this server gives at most {self.limits.max_sequences} answers at a time"
            )
        needed = max(self._bytes_of(request, ids) for ids in request.prompts)
        if needed > self.limits.cache_bytes:
            raise ValueError(
                f"the prompt and its answers need {needed / 1e6:,.1f} MB of key/value memory, this server has "
                f"{self.limits.cache_bytes / 1e6:,.1f} MB; ask for fewer tokens or answers"
            )

    def submit(self, request: GenerationRequest) -> None:
        """Put a request's prompts into the queue.

        Raises:
            ValueError: `check` refuses the request.
            FullError: the queue has no room for them.
            StoppedError: the server is stopping.
        """
        self.check(request)
        with self._changed:
            if not self.alive:
                raise StoppedError(_STOPPING)
            request.open_answers = len(request.prompts) * request.n
            self._prompts.add(
                [Prompt(request, number, self._bytes_of(request, ids)) for number, ids in enumerate(request.prompts)]
            )
            self._changed.notify()

    def wake(self) -> None:
        """Make the thread check for cancelled requests now."""
        with self._changed:
            self._changed.notify()

    def refuse(self) -> None:
        """Take no more requests. Those that are there go on."""
        self._refusing = True

    def stop(self) -> None:
        """Stop after the current step, without waiting for it. Unfinished requests get a `StoppedError`."""
        with self._changed:
            self._refusing = self._stopping = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, wait for the thread, and restore the model."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.pool.close()
        self.handle.detach()

    # -- called in the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled_and_late()
                self._admit()
                start, tokens = time.monotonic(), self._run_chunk()
                if self._running:
                    self._step()
                if tokens == self.limits.prompt_chunk:
                    self._prompts.ran(tokens, time.monotonic() - start)
        except BaseException as error:  # a defect: every request gets the error instead of waiting for ever
            logger.exception("the engine has failed")
            self.failure = error
        finally:
            self._end_all(StoppedError(_STOPPING) if self.failure is None else self.failure)

    def _wait(self) -> bool:
        """Sleep until there is work; false when the engine is stopping."""
        with self._changed:
            while not (self._stopping or self._prompts.waiting or self._prompts.running or self._running):
                self._changed.wait()
            return not self._stopping

    def _drop_cancelled_and_late(self) -> None:
        now = time.monotonic()
        for request in self._requests():
            if request.cancelled:
                self._drop(request)
            elif now - request.arrived_s > self.limits.deadline_s:
                self._fail(
                    request, LateError(f"the request was not finished within {self.limits.deadline_s:g} seconds")
                )

    def _requests(self) -> list[GenerationRequest]:
        """All unfinished requests."""
        with self._changed:
            prompts = [*self._prompts.waiting, *self._prompts.running]
        requests = [prompt.request for prompt in prompts] + [running.request for running in self._running]
        return list({id(request): request for request in requests}.values())

    def _drop(self, request: GenerationRequest) -> None:
        with self._changed:
            self._prompts.remove(request)
        self._running = [running for running in self._running if running.request is not request]

    def _fail(self, request: GenerationRequest, error: Exception) -> None:
        self._drop(request)
        self._emit(request, error)

    def _end_all(self, error: BaseException) -> None:
        self.stop()
        for request in self._requests():
            self._fail(request, error if isinstance(error, Exception) else StoppedError(_STOPPING))

    def _admit(self) -> None:
        """Start the prompts whose answers there is room for."""
        while True:
            with self._changed:
                answers = len(self._running) + sum(prompt.request.n for prompt in self._prompts.running)
                free = self.limits.cache_bytes - self.cache_bytes
                prompt = self._prompts.admit(self.limits.max_sequences - answers, free)
            if prompt is None:
                return
            request = prompt.request
            request.started_s = request.started_s or time.monotonic()
            try:
                ids = request.prompts[prompt.number]
                prefixes = self.prefixes if request.activations_of is None else None  # all tokens are looked at
                room = len(ids) + request.sampling.max_tokens
                prompt.prefill = self._batch.prefill(ids, request.config, room, prefixes)
                prompt.tokens = prompt.prefill.left
                request.cached_tokens += prompt.prefill.reused
            except Exception as error:
                self._fail(request, error)

    def _run_chunk(self) -> int:
        """Run a chunk of the prompt whose turn it is. Returns its number of tokens."""
        with self._changed:
            prompt = self._prompts.turn()
        if prompt is None:
            return 0
        request, prefill = prompt.request, prompt.prefill
        assert prefill is not None
        tokens = min(prefill.left, self.limits.prompt_chunk)  # never another number: see `Limits`
        try:
            if request.activations_of is None:
                logits = prefill.run(tokens)
            else:
                with recording(self.handle.blocks[request.activations_of]) as calls:
                    logits = prefill.run(tokens)
                prompt.activations += calls
            if logits is not None:
                self._begin_answers(prompt, logits)
        except Exception as error:
            logger.exception("a prompt has failed")
            self._fail(request, error)
        return tokens

    def _begin_answers(self, prompt: Prompt, logits: Tensor) -> None:
        """The prompt has been run: draw the first token of each answer."""
        request = prompt.request
        if request.activations_of is not None:
            self._drop(request)
            self._emit(request, Activations(torch.cat(prompt.activations)))
            return
        assert prompt.prefill is not None
        sequence = prompt.prefill.running()
        plan = sequence.selection.plan
        request.used, request.ff_bytes = plan.config, plan.ff_bytes
        request.first_token_s = request.first_token_s or time.monotonic()
        answers = answers_to(prompt, sequence, self.tokenizer)
        with self._changed:
            self._prompts.running.remove(prompt)
            self._running += answers
        for running in answers:
            self._draw_token(running, logits)

    def _step(self) -> None:
        batch = list(self._running)
        for running, logits in zip(batch, self._batch.step([each.sequence for each in batch]), strict=True):
            if running not in self._running:  # another answer of its request has failed
                continue
            if isinstance(logits, Exception):
                logger.error("a step has failed", exc_info=logits)
                self._fail(running.request, logits)
            else:
                self._draw_token(running, logits)

    def _draw_token(self, running: RunningAnswer, logits: Tensor) -> None:
        """Draw the next token of an answer and emit its text."""
        request = running.request
        try:
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError("the model's logits are not finite")
            constraint = running.constraint
            token = int(running.draw((logits if constraint is None else constraint.masked(logits))[None])[0])
            if constraint is not None:
                constraint.accept(token)
            ended = token in self._ends
            text = "" if ended else running.text.add(token)
            info = None if request.logprobs is None else _info(token, logits, request.logprobs, running.text.offset)
        except FormError as error:  # of the request, not of the server
            self._fail(request, error)
            return
        except Exception as error:
            logger.exception("an answer has failed")
            self._fail(request, error)
            return
        running.sequence.token = token
        request.completion_tokens += not ended
        reason = None
        if ended or running.text.stopped:
            reason = "stop"
        elif len(running.text.tokens) >= request.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += running.text.finish()
            self._running = [other for other in self._running if other is not running]
            request.open_answers -= 1
            if (drafts := running.sequence.drafts) is not None:
                request.drafted_tokens += drafts.policy.drafted
                request.accepted_tokens += drafts.policy.accepted
        self._emit(request, Piece(running.index, text, None if ended else info, reason))
        if reason is not None and request.open_answers == 0:
            self._emit(request, self._summary(request))

    def _summary(self, request: GenerationRequest) -> Summary:
        config = request.used or request.config
        answers = len(request.prompts) * request.n
        seconds = time.monotonic() - request.first_token_s
        steps = request.completion_tokens / answers - 1
        return Summary(
            prompt_tokens=sum(map(len, request.prompts)),
            cached_tokens=request.cached_tokens,
            completion_tokens=request.completion_tokens,
            drafted_tokens=request.drafted_tokens,
            accepted_tokens=request.accepted_tokens,
            density=config.density,
            selection="full" if config.density == 1.0 else config.selection,
            ff_bytes_per_token=request.ff_bytes,
            waited_s=request.started_s - request.arrived_s,
            prompt_s=request.first_token_s - request.started_s,
            generation_tokens_per_s=steps / seconds if steps > 0 and seconds > 0 else 0.0,
        )

    def _emit(self, request: GenerationRequest, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # nobody can receive the event
            request.cancel()

    def _bytes_of(self, request: GenerationRequest, ids: Sequence[int]) -> int:
        return request.n * (len(ids) + request.sampling.max_tokens) * self.bytes_per_token

    def _trial_run(self) -> int:
        """Run a short prompt and one step, so that a model that cannot be served fails early.

        Returns:
            The key/value bytes of one token.
        """
        prefill = self._batch.prefill([0, 1, 2], self.config, 4)
        logits = prefill.run(3)
        assert logits is not None
        sequence = prefill.running()
        for outcome in self._batch.step([sequence]):
            if isinstance(outcome, Exception):
                raise ValueError(f"this model cannot be served: {outcome}") from outcome
        pairs = [sequence.cache.buffers(layer) for layer in range(len(sequence.cache.layers))]
        return sum(buffer.nbytes for pair in pairs for buffer in pair) // pairs[0][0].shape[2]


def _info(token: int, logits: Tensor, top: int, offset: int) -> TokenInfo:
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(top) if top else (logprobs[:0], logprobs[:0])
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    likeliest = tuple((int(other), float(value)) for other, value in pairs)
    return TokenInfo(token, float(logprobs[token]), likeliest, offset)
