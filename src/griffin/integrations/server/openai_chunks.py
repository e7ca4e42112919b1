"""Convert the engine's events into chunks of the OpenAI API, and join chunks into a whole response."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from griffin.integrations.server.tools import numbered
from griffin.integrations.server.types import Piece, Summary, TokenInfo

Chunk = dict[str, Any]


class Chunks:
    """Makes the chunks of one response.

    Args:
        chat: whether the chat endpoint was called.
        model: the model's name.
        bytes_of: a function from a token id to the token's bytes.
        usage_apart: whether usage comes in a separate chunk without choices; otherwise it comes with the last choice.
        answers: the number of choices.
        about: further fields of the `griffin` object that comes with usage.
        echo: the texts that the choices begin with.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        bytes_of: Callable[[int], bytes],
        usage_apart: bool,
        answers: int,
        about: Mapping[str, Any],
        echo: Sequence[str] = (),
    ) -> None:
        self._echo, self._calls = echo, [0] * answers
        self._chat, self._bytes_of, self._usage_apart = chat, bytes_of, usage_apart
        self._about = about
        self._last: Chunk | None = None
        self._open = answers
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self) -> list[Chunk]:
        """The chunks before any token: in a chat, one with the role for each choice; else the echoes of the prompts."""
        if not self._chat:
            return [self._with(self._choice(index, text, None, None)) for index, text in enumerate(self._echo)]
        delta = {"role": "assistant", "content": ""}
        return [self._with(self._choice(index, delta, None, None)) for index in range(self._open)]

    def of(self, event: Piece | Summary) -> list[Chunk]:
        """The chunks for an event."""
        if isinstance(event, Summary):
            about = {"usage": usage(event), "griffin": {**asdict(event), **self._about}}
            if self._usage_apart:
                return [{**self._base, "choices": [], **about}]
            assert self._last is not None
            return [{**self._last, **about}]
        if not event.text and event.token is None and event.finish_reason is None and not event.calls:
            return []
        content: Any = {"content": event.text} if event.text or event.token else {}
        if event.calls:
            content["tool_calls"] = numbered(event.calls, self._calls[event.index])
            self._calls[event.index] += len(event.calls)
        if not self._chat:
            content = event.text
        logprobs = None if event.token is None else self._logprobs(event.token)
        chunk = self._with(self._choice(event.index, content, logprobs, event.finish_reason))
        self._open -= event.finish_reason is not None
        if self._open == 0 and not self._usage_apart:  # `Summary` follows and adds usage to this chunk
            self._last = chunk
            return []
        return [chunk]

    def _with(self, choice: Chunk) -> Chunk:
        return {**self._base, "choices": [choice], "usage": None}

    def _choice(self, index: int, content: Any, logprobs: Any, reason: str | None) -> Chunk:
        return {
            "index": index,
            "delta" if self._chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _logprobs(self, info: TokenInfo) -> Chunk:
        if self._chat:
            top = [self._scored(token, logprob) for token, logprob in info.top]
            return {"content": [{**self._scored(info.token, info.logprob), "top_logprobs": top}], "refusal": None}
        return {
            "tokens": [shown(self._bytes_of(info.token))],
            "token_logprobs": [info.logprob],
            "top_logprobs": [{shown(self._bytes_of(token)): logprob for token, logprob in info.top}]
            if info.top
            else None,
            "text_offset": [info.offset],
        }

    def _scored(self, token: int, logprob: float) -> Chunk:
        raw = self._bytes_of(token)
        return {"token": shown(raw), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes of a token, which may be only part of a character."""
    text = str(tokenizer.decode([token]))
    if "\ufffd" not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # SentencePiece's byte tokens
        return bytes([int(match[1], 16)])
    alphabet = _alphabet()
    return bytes(map(alphabet.__getitem__, piece)) if all(letter in alphabet for letter in piece) else text.encode()


@cache
def _alphabet() -> dict[str, int]:
    """The byte for each letter of byte-level BPE: printable bytes are their own letters, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


def shown(raw: bytes) -> str:
    """A token's bytes as text; bytes that are not valid UTF-8 are escaped as in the OpenAI API."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(summary: Summary) -> Chunk:
    """Token counts under the names of the OpenAI API."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "total_tokens": summary.prompt_tokens + summary.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens},
    }


def whole_response(chunks: Iterable[Chunk]) -> Chunk:
    """Join the chunks of a stream into one response."""
    whole: Chunk = {}
    choices: dict[int, Chunk] = {}
    for chunk in chunks:
        whole |= {name: value for name, value in chunk.items() if name != "choices"}
        for part in chunk["choices"]:
            start = {"index": part["index"], "text": "", "logprobs": None, "calls": []}
            choice = choices.setdefault(part["index"], start)
            delta = part.get("delta")
            for call in (delta or {}).get("tool_calls", ()):
                choice["calls"].append({name: value for name, value in call.items() if name != "index"})
            choice["text"] += part["text"] if delta is None else delta.get("content", "")
            choice["logprobs"] = _joined(choice["logprobs"], part["logprobs"])
            choice["finish_reason"] = part["finish_reason"]
    chat = whole["object"] == "chat.completion.chunk"
    for choice in choices.values():
        calls = choice.pop("calls")
        if chat:
            text = choice.pop("text")
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                choice["message"] |= {"content": text or None, "tool_calls": calls}
    if chat:
        whole["object"] = "chat.completion"
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return whole


def _joined(left: Any, right: Any) -> Any:
    """Join the logprobs of two consecutive pieces of an answer."""
    if left is None or right is None:
        return right if left is None else left
    return {name: _appended(left[name], right[name]) for name in left}


def _appended(left: Sequence[Any] | None, right: Sequence[Any] | None) -> list[Any] | None:
    return None if left is None and right is None else [*(left or ()), *(right or ())]
