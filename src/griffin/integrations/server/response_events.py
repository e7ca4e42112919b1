"""Convert the engine's events into the events of /v1/responses, the last of which has the whole response."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from griffin.integrations.server.openai_chunks import shown
from griffin.integrations.server.types import Piece, Summary, TokenInfo, ToolCall

Event = dict[str, Any]


class ResponseEvents:
    """Makes the events of one response.

    Args:
        response: the response before there is an answer.
        bytes_of: a function from a token id to the token's bytes.
        about: further fields of the `griffin` object of the whole response.
    """

    def __init__(self, response: dict[str, Any], bytes_of: Callable[[int], bytes], about: Mapping[str, Any]) -> None:
        self.response = response
        self.output: list[dict[str, Any]] = []
        self._bytes_of, self._about = bytes_of, about
        self._number = 0
        self._message: dict[str, Any] | None = None  # that is being written
        self._reason: str | None = None

    def opening(self) -> list[Event]:
        """The events before any token."""
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def of(self, event: Piece | Summary) -> list[Event]:
        """The events for an event of the engine."""
        if isinstance(event, Summary):
            return self._end(event)
        self._reason = event.finish_reason
        events = self._text(event.text, event.token) if event.text or event.token is not None else []
        for call in event.calls:
            events += [*self._close("completed"), *self._call(call)]
        return events

    def failed(self, message: str) -> Event:
        """The last event of a response that has failed."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self._whole("response.failed")

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response={**self.response, "output": [dict(item) for item in self.output]})

    def _at(self, kind: str, **fields: Any) -> Event:
        """An event of the text of the message that is being written."""
        assert self._message is not None
        where = {"item_id": self._message["id"], "output_index": len(self.output) - 1, "content_index": 0}
        return self._event(kind, **where, **fields)

    def _item(self, kind: str) -> Event:
        return self._event(kind, output_index=len(self.output) - 1, item=dict(self.output[-1]))

    def _text(self, text: str, token: TokenInfo | None) -> list[Event]:
        events: list[Event] = []
        if self._message is None:
            self._message = {
                **{"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress", "role": "assistant"},
                "content": [],
            }
            self.output.append(self._message)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events += [self._item("response.output_item.added"), self._at("response.content_part.added", part=part)]
            self._message["content"] = [{**part, "logprobs": []}]
        part = self._message["content"][0]
        part["text"] += text
        logprobs = [] if token is None else [self._logprob(token)]
        part["logprobs"] += logprobs
        return [*events, self._at("response.output_text.delta", delta=text, logprobs=[_brief(one) for one in logprobs])]

    def _close(self, status: str) -> list[Event]:
        """End the message that is being written, if there is one."""
        if self._message is None:
            return []
        self._message["status"] = status
        part = self._message["content"][0]
        brief = [_brief(one) for one in part["logprobs"]]
        events = [
            self._at("response.output_text.done", text=part["text"], logprobs=brief),
            self._at("response.content_part.done", part=part),
            self._item("response.output_item.done"),
        ]
        self._message = None
        return events

    def _call(self, call: ToolCall) -> list[Event]:
        item = {
            **{"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"},
            **{"call_id": call.id, "name": call.name, "arguments": ""},
        }
        self.output.append(item)
        where = {"item_id": item["id"], "output_index": len(self.output) - 1}
        added = self._item("response.output_item.added")
        item |= {"status": "completed", "arguments": call.arguments}
        return [
            added,
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self._event("response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments),
            self._item("response.output_item.done"),
        ]

    def _end(self, summary: Summary) -> list[Event]:
        cut = self._reason == "length"
        events = self._text("", None) if not self.output else []  # an answer without text is a message without text
        events += self._close("incomplete" if cut else "completed")
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self.output,
            "usage": {
                "input_tokens": summary.prompt_tokens,
                "input_tokens_details": {"cached_tokens": summary.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": summary.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": summary.prompt_tokens + summary.completion_tokens,
            },
            "griffin": {**asdict(summary), **self._about},
        }
        return [*events, self._whole(f"response.{self.response['status']}")]

    def _logprob(self, info: TokenInfo) -> dict[str, Any]:
        top = [self._scored(token, logprob) for token, logprob in info.top]
        return {**self._scored(info.token, info.logprob), "top_logprobs": top}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._bytes_of(token)
        return {"token": shown(raw), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def _brief(scored: dict[str, Any]) -> dict[str, Any]:
    """A token's log-probabilities as events have them: without bytes."""
    top = [{"token": one["token"], "logprob": one["logprob"]} for one in scored["top_logprobs"]]
    return {"token": scored["token"], "logprob": scored["logprob"], "top_logprobs": top}
