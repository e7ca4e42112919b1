"""From a request to the pieces of its answers: what the endpoints of all APIs have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from griffin.config import GriffinConfig
from griffin.engine.step import Sampling
from griffin.generation.generate import end_tokens
from griffin.integrations.server.constraints import Grammars
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.errors import ApiError, refusal
from griffin.integrations.server.metrics import Metrics
from griffin.integrations.server.schema import GriffinSettings
from griffin.integrations.server.tools import MARKS, Calls, why_no_calls
from griffin.integrations.server.types import (
    Activations,
    Constraint,
    Event,
    FullError,
    GenerationRequest,
    Piece,
    StoppedError,
    Summary,
)
from griffin.integrations.server.validation import Settings, config_of, lossless_of

_T = TypeVar("_T")

CLIENT_GONE = Response(status_code=499)  # the client has disconnected and does not receive it


@dataclass(frozen=True)
class Tools:
    """The tools of a request, whichever API it came by.

    Args:
        shown: the tools in the form that chat templates expect; none where they may not be called.
        choice: `auto`, `required`, or the name of the function that has to be called.
        strict: whether arguments are held to their schemas.
        many: whether an answer may have several calls.
    """

    shown: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    strict: bool = False
    many: bool = True


def tools_of(
    given: Sequence[Mapping[str, Any]],
    choice: str | None,
    name: str | None,
    *,
    strict: bool,
    many: bool | None,
) -> Tools:
    """Check which tools may be called.

    Args:
        given: the tools in the form that chat templates expect.
        choice: `none`, `auto` or `required`.
        name: the function that has to be called.
        strict: whether arguments are held to their schemas.
        many: whether an answer may have several calls.

    Raises:
        ApiError: a choice without tools, or of a function that is not among them.
    """
    names = [tool["function"]["name"] for tool in given]
    if not given and (name is not None or choice == "required"):
        raise ApiError(422, "tool_choice asks for a call, but there are no tools", "tool_choice")
    if name is not None and name not in names:
        raise ApiError(422, f"tool_choice names {name!r}; the tools are {', '.join(names)}", "tool_choice")
    if doubled := next((one for one in names if names.count(one) > 1), None):
        raise ApiError(422, f"two tools have the name {doubled!r}", "tools")
    shown = () if choice == "none" else given
    return Tools(shown, name or choice or "auto", strict, many is not False)


class Answering:
    """Puts requests to the engine.

    Args:
        engine: the engine.
        settings: the server's settings.
        metrics: what counts the answers.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.about = {"backend": engine.handle.backend.name, "step": engine.step_name}
        ends = sorted(end_tokens(engine.model, engine.tokenizer))
        self.grammars = Grammars(engine.tokenizer, engine.vocabulary, ends)

    def check_model(self, model: str, *aliases: str) -> None:
        """Refuse any model but the one that is served.

        Raises:
            ApiError: another name.
        """
        if model not in (self.settings.model, *aliases):
            message = f"there is no model {model[:80]!r} here; this server has {self.settings.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_tools(self, tools: Tools, messages: Sequence[Mapping[str, Any]], param: str = "messages") -> None:
        """Refuse tools and their calls where the model's chat template has none.

        Raises:
            ApiError: it has none.
        """
        if tools.shown and (reason := why_no_calls(self.engine.tokenizer)):
            raise ApiError(422, f"{reason}; leave tools out", "tools", "unsupported_parameter")
        for number, message in enumerate(messages):
            called = message["role"] == "tool" or message.get("tool_calls")
            if called and (reason := why_no_calls(self.engine.tokenizer)):
                raise ApiError(422, f"{param}.{number}: {reason}", param, "unsupported_parameter")

    async def constraint(
        self, tools: Tools, schema: Mapping[str, Any] | None, param: str
    ) -> Callable[[], Constraint] | None:
        """What holds answers to a form; `None` if they are free.

        Args:
            tools: the tools that may be called.
            schema: the JSON schema of answers.
            param: the field that names the form.

        Raises:
            ApiError: the form cannot be compiled.
        """
        instead = None if schema is None else dict(schema)
        functions = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools.shown}
        if not functions or (instead is None and tools.choice == "auto" and tools.many and not tools.strict):
            if instead is None:
                return None
            made = partial(self.grammars.json, instead)
        else:
            if tools.choice in functions:
                functions = {tools.choice: functions[tools.choice]}
            auto = tools.choice == "auto"
            form: dict[str, Any] = {
                "free": auto and instead is None,
                "many": auto and tools.many,
                "instead": instead if auto else None,
            }
            made = partial(self.grammars.calls, functions, MARKS, **form)
            param = param if instead is not None else "tools"
        try:
            return await self.engine.pool.run(made)
        except FullError as error:
            raise refusal(error) from error
        except ValueError as error:
            raise ApiError(422, f"{param}: {error}", param) from error

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        given: GriffinSettings | None,
        sampling: Sampling,
        *,
        n: int = 1,
        logprobs: int | None = None,
        constraint: Callable[[], Constraint] | None = None,
        calls: bool = False,
    ) -> AsyncIterator[Piece | Summary]:
        """Put a request into the engine's queue; the events of its answers, of which the last is the summary.

        Closing the iterator cancels the request.

        Args:
            given: the request's own settings of GRIFFIN.
            calls: whether to take calls of tools out of the text.

        Raises:
            ApiError: the settings are wrong, or the engine refuses the request, now or while the iterator runs.
        """
        config = config_of(self.engine, given)
        lossless = lossless_of(self.settings, given, config)
        request, events = self._submitted(
            prompts, config, sampling, n=n, lossless=lossless, logprobs=logprobs, constraint=constraint
        )
        return self._events(request, events, Calls() if calls else None)

    async def activations(self, ids: Sequence[int], config: GriffinConfig, layer: int) -> Activations:
        """Relative activations of a prompt's tokens in one layer. Cancelling it cancels the request.

        Raises:
            ApiError: as `start`.
        """
        request, events = self._submitted([ids], config, Sampling(max_tokens=1), activations_of=layer)
        try:
            event = await events.get()
        finally:
            request.cancel()  # has no effect on a finished request
            self.engine.wake()
        if isinstance(event, Exception):
            raise refusal(event)
        assert isinstance(event, Activations)
        return event

    def _submitted(
        self, prompts: Sequence[Sequence[int]], config: GriffinConfig, sampling: Sampling, **more: Any
    ) -> tuple[GenerationRequest, asyncio.Queue[Event]]:
        """A request in the engine's queue, and where its events will come.

        Raises:
            ApiError: the request could never run, the queue is full, or the server is stopping.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        request = GenerationRequest(prompts=prompts, config=config, sampling=sampling, emit=emit, **more)
        try:
            self.engine.submit(request)
        except ValueError as error:
            raise ApiError(422, str(error), "max_tokens") from error
        except (FullError, StoppedError) as error:
            raise refusal(error) from error
        return request, events

    async def _events(
        self, request: GenerationRequest, events: asyncio.Queue[Event], calls: Calls | None
    ) -> AsyncIterator[Piece | Summary]:
        try:
            while not isinstance(event := await events.get(), Summary):
                if isinstance(event, Exception):
                    raise refusal(event)
                assert isinstance(event, Piece)
                yield event if calls is None else calls.read(event)
            self.metrics.finished(event)
            yield event
        finally:
            request.cancel()  # has no effect on a finished request
            self.engine.wake()


async def unless_gone(http: Request, work: Awaitable[_T]) -> _T | None:
    """The result of `work`, or `None` if the client disconnects first; `work` is then cancelled."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
