"""One thread owns the model: it takes requests from a bounded queue and generates their answers token by token.

Between two steps the thread drops cancelled requests and admits new ones. Prompts run in chunks, with a step of the
running answers after each chunk, so a long prompt does not stall them. A prompt is admitted only when all of its
answers fit within `max_sequences` and the key/value memory, and each answer keeps its share until it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.attachment import Griffin, attach
from griffin.config import GriffinConfig
from griffin.engine.batch import Batch, Prefill, Running
from griffin.engine.step import Draw
from griffin.generation.generate import end_tokens
from griffin.generation.text import Answer, context_length
from griffin.integrations.server.types import (
    Event,
    FullError,
    GenerationRequest,
    LateError,
    Limits,
    Piece,
    StoppedError,
    Summary,
    TokenInfo,
)

logger = logging.getLogger("griffin")

_T = TypeVar("_T")
_CHUNK_WHEN_IDLE = 512  # prompt tokens in one pass while no answer is running


class _Waiting:
    """A prompt in the queue or in its prompt phase."""

    def __init__(self, request: GenerationRequest, number: int, nbytes: int) -> None:
        self.request, self.number, self.nbytes = request, number, nbytes
        self.prefill: Prefill | None = None


class _Running:
    """One answer in its generation phase."""

    def __init__(
        self, request: GenerationRequest, index: int, sequence: Running, draw: Draw, answer: Answer, nbytes: int
    ) -> None:
        self.request, self.index, self.sequence = request, index, sequence
        self.draw, self.answer, self.nbytes = draw, answer, nbytes
        self.constraint = None if request.constraint is None else request.constraint()


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
        self._ends = end_tokens(model, tokenizer)
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._prefilling: _Waiting | None = None
        self._running: list[_Running] = []
        self._stopping = False
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
        return len(self._running) + (self._prefilling is not None)

    @property
    def waiting(self) -> int:
        """The number of prompts in the queue."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are reserved."""
        prefilling = self._prefilling
        reserved = sum(running.nbytes for running in list(self._running))
        return reserved + (prefilling.nbytes if prefilling is not None else 0)

    @property
    def alive(self) -> bool:
        """Whether the thread is running and has not failed."""
        return self._thread.is_alive() and self.failure is None

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
            if self._stopping or not self.alive:
                raise StoppedError("the server is stopping")
            if len(self._waiting) + len(request.prompts) > self.limits.queue:
                raise FullError(
                    f"{len(self._waiting)} prompts are waiting, and the queue has {self.limits.queue} places"
                )
            request.open_answers = len(request.prompts) * request.n
            for number, ids in enumerate(request.prompts):
                self._waiting.append(_Waiting(request, number, self._bytes_of(request, ids)))
            self._changed.notify()

    def call(self, job: Callable[[], _T]) -> _T:
        """Run a function in the engine's thread between two steps, and block until it has finished.

        Raises:
            StoppedError: the server is stopping.
            Exception: the job raised it.
        """
        done = threading.Event()
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.extend((job(), None))
            except Exception as error:
                outcome.extend((None, error))
            done.set()

        with self._changed:
            if self._stopping or not self.alive:
                raise StoppedError("the server is stopping")
            self._jobs.append(run)
            self._changed.notify()
        while not done.wait(0.5):
            if not self._thread.is_alive():
                raise StoppedError("the server is stopping")
        result, error = outcome
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def wake(self) -> None:
        """Make the thread check for cancelled requests now."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current step and restore the model. Unfinished requests get a `StoppedError`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.handle.detach()

    # -- called in the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled_and_late()
                for job in self._taken_jobs():
                    job()
                self._admit()
                if self._prefilling is not None:
                    self._run_prompt(self._prefilling)
                if self._running:
                    self._step()
        except BaseException as error:  # a defect: every request gets the error instead of waiting for ever
            logger.exception("the engine has failed")
            self.failure = error
        finally:
            self._end_all(StoppedError("the server is stopping") if self.failure is None else self.failure)

    def _wait(self) -> bool:
        """Sleep until there is work; false when the engine is stopping."""
        with self._changed:
            while not (self._stopping or self._jobs or self._waiting or self._prefilling or self._running):
                self._changed.wait()
            return not self._stopping

    def _taken_jobs(self) -> list[Callable[[], None]]:
        with self._changed:
            jobs = list(self._jobs)
            self._jobs.clear()
        return jobs

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
            unfinished: list[_Waiting | _Running] = [*self._waiting, *self._running]
        if self._prefilling is not None:
            unfinished.append(self._prefilling)
        return list({id(entry.request): entry.request for entry in unfinished}.values())

    def _drop(self, request: GenerationRequest) -> None:
        with self._changed:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.request is not request)
        self._running = [running for running in self._running if running.request is not request]
        if self._prefilling is not None and self._prefilling.request is request:
            self._prefilling = None

    def _fail(self, request: GenerationRequest, error: Exception) -> None:
        self._drop(request)
        self._emit(request, error)

    def _end_all(self, error: BaseException) -> None:
        unfinished = self._requests()
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            jobs = list(self._jobs)
        self._prefilling, self._running = None, []
        for request in unfinished:
            self._emit(request, error if isinstance(error, Exception) else StoppedError("the server is stopping"))
        for job in jobs:
            job()

    def _admit(self) -> None:
        """Start the next prompt if there is room for its answers."""
        with self._changed:
            if self._prefilling is not None or not self._waiting:
                return
            waiting = self._waiting[0]
            free = self.limits.cache_bytes - self.cache_bytes
            if len(self._running) + waiting.request.n > self.limits.max_sequences or waiting.nbytes > free:
                return
            self._waiting.popleft()
            self._prefilling = waiting
        request = waiting.request
        if not request.started_s:
            request.started_s = time.monotonic()
        try:
            ids = request.prompts[waiting.number]
            waiting.prefill = self._batch.prefill(ids, request.config, len(ids) + request.sampling.max_tokens)
        except Exception as error:
            self._fail(request, error)

    def _run_prompt(self, waiting: _Waiting) -> None:
        request = waiting.request
        assert waiting.prefill is not None
        try:
            logits = waiting.prefill.run(self.limits.prompt_chunk if self._running else _CHUNK_WHEN_IDLE)
            if logits is None:
                return
            sequence = waiting.prefill.running()
            plan = sequence.selection.plan
            request.used, request.ff_bytes = plan.config, plan.ff_bytes
            request.first_token_s = request.first_token_s or time.monotonic()
            self._prefilling = None
            answers = []
            for number, copied in enumerate(sequence.copies(request.n)):
                index = waiting.number * request.n + number
                seed = None if request.sampling.seed is None else request.sampling.seed + number
                draw = Draw(
                    replace(request.sampling, seed=seed),
                    torch.tensor([list(request.prompts[waiting.number])], device=logits.device),
                )
                answer = Answer(self.tokenizer, request.sampling.stop)
                answers.append(_Running(request, index, copied, draw, answer, waiting.nbytes // request.n))
        except Exception as error:
            logger.exception("a prompt has failed")
            self._fail(request, error)
            return
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

    def _draw_token(self, running: _Running, logits: Tensor) -> None:
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
            text = "" if ended else running.answer.add(token)
            info = None if request.logprobs is None else _info(token, logits, request.logprobs, running.answer.offset)
        except Exception as error:
            logger.exception("an answer has failed")
            self._fail(request, error)
            return
        running.sequence.token = token
        request.completion_tokens += not ended
        reason = None
        if ended or running.answer.stopped:
            reason = "stop"
        elif len(running.answer.tokens) >= request.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += running.answer.finish()
            self._running = [other for other in self._running if other is not running]
            request.open_answers -= 1
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
            completion_tokens=request.completion_tokens,
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
