"""One thread owns the model: it takes requests from a bounded queue and answers them token by token.

Between two steps it looks who has come and who has gone. A prompt runs in chunks, a step of the running answers after
each, so a long prompt does not hold them up. Each answer has a place among `places` and its share of the key/value
memory from the start, so a batch that does not fit is never begun.
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
_ALONE = 512  # prompt tokens in one pass while no answer is running


class _Waiting:
    """A prompt in the queue, or on its way through the full model."""

    def __init__(self, request: GenerationRequest, number: int, nbytes: int) -> None:
        self.request, self.number, self.nbytes = request, number, nbytes
        self.prompt: Prefill | None = None


class _Running:
    """One answer in its generation phase."""

    def __init__(
        self, request: GenerationRequest, index: int, row: Running, draw: Draw, answer: Answer, nbytes: int
    ) -> None:
        self.request, self.index, self.row = request, index, row
        self.draw, self.answer, self.nbytes = draw, answer, nbytes


class Engine:
    """The model, and the thread that runs it.

    Args:
        model: the model, in eval mode. Nobody else may use it until `close`.
        tokenizer: its tokenizer.
        config: what a request that says nothing gets.
        limits: what to take on.

    Raises:
        ValueError: as `attach`, or the model cannot be run in this way, which a first short prompt shows.
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
        self._prompt: _Waiting | None = None  # that is being run
        self._running: list[_Running] = []
        self._stopping = False
        self.failure: BaseException | None = None
        self.handle: Griffin = attach(model, replace(config, batch="per_sequence"))
        try:
            self._batch = Batch(model, self.handle)
            self.bytes_per_token = self._try()
        except BaseException:
            self.handle.detach()
            raise
        self._thread = threading.Thread(target=self._run, name="griffin-engine", daemon=True)
        self._thread.start()

    # -- from other threads -----------------------------------------------------------------------------------------

    @property
    def step_name(self) -> str:
        """What computes a step."""
        return self._batch.step_name

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    @property
    def running(self) -> int:
        """Answers in their generation phase, and prompts being run."""
        return len(self._running) + (self._prompt is not None)

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are spoken for."""
        prompt = self._prompt
        return sum(own.nbytes for own in list(self._running)) + (prompt.nbytes if prompt is not None else 0)

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and self.failure is None

    def check(self, request: GenerationRequest) -> None:
        """Refuse what could never be run.

        Raises:
            ValueError: more answers than places, or more key/value memory than there is.
        """
        if request.n > self.limits.places:
            raise ValueError(f"n is {request.n}, but this server gives at most {self.limits.places} answers at a time")
        needed = max(self._bytes_of(request, ids) for ids in request.prompts)
        if needed > self.limits.cache_bytes:
            raise ValueError(
                f"the prompt and its answers need {needed / 1e6:,.1f} MB of key/value memory, this server has "
                f"{self.limits.cache_bytes / 1e6:,.1f} MB; ask for fewer tokens or answers"
            )

    def submit(self, request: GenerationRequest) -> None:
        """Put a request's prompts into the queue.

        Raises:
            ValueError: as `check`.
            FullError: the queue has not room for them.
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
        """Run something else with the model between two steps; blocks until it is done.

        Raises:
            StoppedError: the server is stopping.
            Exception: what the job raises.
        """
        done = threading.Event()
        found: list[Any] = []

        def run() -> None:
            try:
                found.extend((job(), None))
            except Exception as error:
                found.extend((None, error))
            done.set()

        with self._changed:
            if self._stopping or not self.alive:
                raise StoppedError("the server is stopping")
            self._jobs.append(run)
            self._changed.notify()
        while not done.wait(0.5):
            if not self._thread.is_alive():
                raise StoppedError("the server is stopping")
        result, error = found
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def wake(self) -> None:
        """Look at once who has gone."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Stop after the present step; what is not finished gets a `StoppedError`. Leaves the model as it was."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.handle.detach()

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_the_gone()
                for job in self._taken_jobs():
                    job()
                self._admit()
                if self._prompt is not None:
                    self._run_prompt(self._prompt)
                if self._running:
                    self._step()
        except BaseException as error:  # a defect of this program: say so everywhere instead of hanging
            logger.exception("the engine has failed")
            self.failure = error
        finally:
            self._end_all(StoppedError("the server is stopping") if self.failure is None else self.failure)

    def _wait(self) -> bool:
        """Sleep until there is something to do; false when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._jobs or self._waiting or self._prompt or self._running):
                self._changed.wait()
            return not self._stopping

    def _taken_jobs(self) -> list[Callable[[], None]]:
        with self._changed:
            jobs = list(self._jobs)
            self._jobs.clear()
        return jobs

    def _drop_the_gone(self) -> None:
        now = time.monotonic()
        for request in self._requests():
            if request.cancelled:
                self._drop(request)
            elif now - request.arrived_s > self.limits.seconds:
                self._fail(request, LateError(f"the request was not finished within {self.limits.seconds:g} seconds"))

    def _requests(self) -> list[GenerationRequest]:
        """All that are not finished."""
        with self._changed:
            found: list[_Waiting | _Running] = [*self._waiting, *self._running]
        if self._prompt is not None:
            found.append(self._prompt)
        return list({id(own.request): own.request for own in found}.values())

    def _drop(self, request: GenerationRequest) -> None:
        with self._changed:
            self._waiting = deque(own for own in self._waiting if own.request is not request)
        self._running = [own for own in self._running if own.request is not request]
        if self._prompt is not None and self._prompt.request is request:
            self._prompt = None

    def _fail(self, request: GenerationRequest, error: Exception) -> None:
        self._drop(request)
        self._emit(request, error)

    def _end_all(self, error: BaseException) -> None:
        left = self._requests()
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            jobs = list(self._jobs)
        self._prompt, self._running = None, []
        for request in left:
            self._emit(request, error if isinstance(error, Exception) else StoppedError("the server is stopping"))
        for job in jobs:
            job()

    def _admit(self) -> None:
        """Begin the next prompt, if its answers find places and memory."""
        with self._changed:
            if self._prompt is not None or not self._waiting:
                return
            first = self._waiting[0]
            free = self.limits.cache_bytes - self.cache_bytes
            if len(self._running) + first.request.n > self.limits.places or first.nbytes > free:
                return
            self._waiting.popleft()
            self._prompt = first
        request = first.request
        if not request.started_s:
            request.started_s = time.monotonic()
        try:
            ids = request.prompts[first.number]
            first.prompt = self._batch.prefill(ids, request.config, len(ids) + request.sampling.max_tokens)
        except Exception as error:
            self._fail(request, error)

    def _run_prompt(self, own: _Waiting) -> None:
        request = own.request
        assert own.prompt is not None
        try:
            logits = own.prompt.run(self.limits.prompt_chunk if self._running else _ALONE)
            if logits is None:
                return
            row = own.prompt.running()
            request.used, request.ff_bytes = row.selection.plan.config, row.selection.plan.ff_bytes
            request.first_s = request.first_s or time.monotonic()
            self._prompt = None
            answers = []
            for number, each in enumerate(row.copies(request.n)):
                index = own.number * request.n + number
                seed = None if request.sampling.seed is None else request.sampling.seed + number
                draw = Draw(
                    replace(request.sampling, seed=seed),
                    torch.tensor([list(request.prompts[own.number])], device=logits.device),
                )
                answer = Answer(self.tokenizer, request.sampling.stop)
                answers.append(_Running(request, index, each, draw, answer, own.nbytes // request.n))
        except Exception as error:
            logger.exception("a prompt has failed")
            self._fail(request, error)
            return
        self._running += answers
        for answer_ in answers:
            self._take(answer_, logits)

    def _step(self) -> None:
        running = list(self._running)
        for own, logits in zip(running, self._batch.step([own.row for own in running]), strict=True):
            if own not in self._running:  # another answer of its request has failed
                continue
            if isinstance(logits, Exception):
                logger.error("a step has failed", exc_info=logits)
                self._fail(own.request, logits)
            else:
                self._take(own, logits)

    def _take(self, own: _Running, logits: Tensor) -> None:
        """Draw an answer's next token."""
        request = own.request
        try:
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError("the model's logits are not finite")
            token = int(own.draw(logits[None])[0])
            ended = token in self._ends
            text = "" if ended else own.answer.add(token)
            info = None if request.logprobs is None else _info(token, logits, request.logprobs, own.answer.offset)
        except Exception as error:
            logger.exception("an answer has failed")
            self._fail(request, error)
            return
        own.row.token = token
        request.completion_tokens += not ended
        reason = None
        if ended or own.answer.stopped:
            reason = "stop"
        elif len(own.answer.tokens) >= request.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            text += own.answer.finish()
            self._running = [other for other in self._running if other is not own]
            request.open_answers -= 1
        self._emit(request, Piece(own.index, text, None if ended else info, reason))
        if reason is not None and request.open_answers == 0:
            self._emit(request, self._summary(request))

    def _summary(self, request: GenerationRequest) -> Summary:
        config = request.used or request.config
        answers = len(request.prompts) * request.n
        seconds = time.monotonic() - request.first_s
        steps = request.completion_tokens / answers - 1
        return Summary(
            prompt_tokens=sum(map(len, request.prompts)),
            completion_tokens=request.completion_tokens,
            density=config.density,
            selection="full" if config.density == 1.0 else config.selection,
            ff_bytes_per_token=request.ff_bytes,
            waited_s=request.started_s - request.arrived_s,
            prompt_s=request.first_s - request.started_s,
            generation_tokens_per_s=steps / seconds if steps > 0 and seconds > 0 else 0.0,
        )

    def _emit(self, request: GenerationRequest, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # whoever waited has gone
            request.cancel()

    def _bytes_of(self, request: GenerationRequest, ids: Sequence[int]) -> int:
        return request.n * (len(ids) + request.sampling.max_tokens) * self.bytes_per_token

    def _try(self) -> int:
        """Run a prompt and a step, so that what cannot work is known at the start; returns cache bytes a token."""
        prompt = self._batch.prefill([0, 1, 2], self.config, 4)
        logits = prompt.run(3)
        assert logits is not None
        row = prompt.running()
        for own in self._batch.step([row]):
            if isinstance(own, Exception):
                raise ValueError(f"this model cannot be served: {own}") from own
        pairs = [row.cache.buffers(layer) for layer in range(len(row.cache.layers))]
        return sum(own.nbytes for pair in pairs for own in pair) // pairs[0][0].shape[2]


def _info(token: int, logits: Tensor, top: int, offset: int) -> TokenInfo:
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(top) if top else (logprobs[:0], logprobs[:0])
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    likeliest = tuple((int(which), float(value)) for which, value in pairs)
    return TokenInfo(token, float(logprobs[token]), likeliest, offset)
