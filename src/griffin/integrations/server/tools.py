"""Calls of tools: whether a chat template has them, what an answer with calls must look like, and reading them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from griffin.integrations.server.types import Piece, ToolCall

MARKS = ("<tool_call>", "</tool_call>")


def why_no_calls(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a model cannot be given tools; `None` if it can: its chat template shows them, and calls as JSON in marks."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template)
    if template is None or not re.search(r"\btools\b", text):
        return "this model's chat template has no tools"
    if MARKS[0] not in text or not re.search(r"\barguments\b", text) or "<function=" in text:
        return f"this model's chat template does not write calls as JSON in {MARKS[0]}, so they cannot be read"
    return None


class Calls:
    """Takes the calls out of the text of one request's answers, as it comes."""

    def __init__(self) -> None:
        self._answers: dict[int, _Reader] = {}

    def read(self, piece: Piece) -> Piece:
        """The piece without the text of calls, and with the calls that are complete."""
        reader = self._answers.setdefault(piece.index, _Reader())
        text, calls = reader.add(piece.text)
        reason = piece.finish_reason
        if reason is not None:
            rest, last = reader.finish()
            text, calls = text + rest, [*calls, *last]
            reason = "tool_calls" if reader.called and reason == "stop" else reason
        return Piece(piece.index, text, piece.token, reason, tuple(calls))


class _Reader:
    """Reads the calls of one answer. What is no call, and a call that is no JSON, stays text."""

    def __init__(self) -> None:
        self._held = ""  # whitespace, and what may be the start of a call
        self.called = False

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take more text; return what is certainly text, and the calls that are complete now."""
        self._held += text
        said: list[str] = []
        calls: list[ToolCall] = []
        begin, end = MARKS
        while (start := self._held.find(begin)) >= 0:
            stop = self._held.find(end, start)
            if stop < 0:
                said.append(self._held[:start].rstrip())
                self._held = self._held[start:]
                return "".join(said), calls
            inside, whole = self._held[start + len(begin) : stop], self._held[start : stop + len(end)]
            call = _call(inside)
            said.append(self._held[:start].rstrip() if call else self._held[:start] + whole)
            calls += [call] if call else []
            self.called = self.called or call is not None
            self._held = self._held[stop + len(end) :]
        kept = len(self._held.rstrip())
        for length in range(min(len(begin) - 1, len(self._held)), 0, -1):
            if self._held.endswith(begin[:length]):
                kept = len(self._held[:-length].rstrip())
                break
        said.append(self._held[:kept])
        self._held = self._held[kept:]
        return "".join(said), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """No text follows: what was held back, read as a call if only its end is missing."""
        held, self._held = self._held, ""
        call = _call(held.removeprefix(MARKS[0])) if held.startswith(MARKS[0]) else None
        if call is not None:
            self.called = True
            return "", [call]
        return ("" if self.called and not held.strip() else held), []


def _call(text: str) -> ToolCall | None:
    """The call that a JSON object describes; `None` if it describes none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", value["name"], written)


def numbered(calls: Sequence[ToolCall], start: int) -> list[dict[str, Any]]:
    """Calls in the OpenAI API's form, numbered from `start`."""
    return [
        {
            "index": start + number,
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(calls)
    ]
