"""The engine's events as the chunks of the OpenAI API, and whole answers folded from the same chunks."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from griffin.integrations.server.types import Piece, Summary, TokenInfo

Chunk = dict[str, Any]


class Chunks:
    """The chunks of one answer to a request.

    Args:
        chat: whether it is the chat endpoint's.
        model: the model's name.
        bytes_of: the bytes of a token id.
        usage_apart: whether usage comes in a chunk of its own, without choices; else with the last choice.
        answers: how many choices there are.
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
    ) -> None:
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

    def first(self) -> list[Chunk]:
        """What comes before any token: the role of each choice, in a chat."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._with(self._choice(index, delta, None, None)) for index in range(self._open)]

    def of(self, event: Piece | Summary) -> list[Chunk]:
        """The chunks that an event makes."""
        if isinstance(event, Summary):
            about = {"usage": usage(event), "griffin": {**asdict(event), **self._about}}
            if self._usage_apart:
                return [{**self._base, "choices": [], **about}]
            assert self._last is not None
            return [{**self._last, **about}]
        if not event.text and event.token is None and event.finish_reason is None:
            return []
        content: Any = {"content": event.text} if event.text or event.token else {}
        if not self._chat:
            content = event.text
        logprobs = None if event.token is None else self._logprobs(event.token)
        chunk = self._with(self._choice(event.index, content, logprobs, event.finish_reason))
        self._open -= event.finish_reason is not None
        if self._open == 0 and not self._usage_apart:  # usage goes with it
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
        own = self._bytes_of(token)
        return {"token": shown(own), "logprob": max(logprob, -9999.0), "bytes": list(own)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token stands for, which may be a part of a character."""
    text = str(tokenizer.decode([token]))
    if "\ufffd" not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # SentencePiece's byte tokens
        return bytes([int(found[1], 16)])
    alphabet = _alphabet()
    return bytes(map(alphabet.__getitem__, piece)) if all(own in alphabet for own in piece) else text.encode()


@cache
def _alphabet() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


def shown(own: bytes) -> str:
    """A token's bytes as text, or in the OpenAI API's form for what is no text by itself."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def usage(summary: Summary) -> Chunk:
    """Token counts, as the OpenAI API names them."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "total_tokens": summary.prompt_tokens + summary.completion_tokens,
    }


def fold(chunks: Iterable[Chunk]) -> Chunk:
    """The whole answer of a stream's chunks."""
    whole: Chunk = {}
    choices: dict[int, Chunk] = {}
    for chunk in chunks:
        whole |= {name: value for name, value in chunk.items() if name != "choices"}
        for part in chunk["choices"]:
            own = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            delta = part.get("delta")
            own["text"] += part["text"] if delta is None else delta.get("content", "")
            own["logprobs"] = _joined(own["logprobs"], part["logprobs"])
            own["finish_reason"] = part["finish_reason"]
    chat = whole["object"] == "chat.completion.chunk"
    if chat:
        whole["object"] = "chat.completion"
        for own in choices.values():
            own["message"] = {"role": "assistant", "content": own.pop("text"), "refusal": None}
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return whole


def _joined(first: Any, second: Any) -> Any:
    """Logprobs of two pieces of one answer."""
    if first is None or second is None:
        return second if first is None else first
    return {name: _appended(first[name], second[name]) for name in first}


def _appended(first: Sequence[Any] | None, second: Sequence[Any] | None) -> list[Any] | None:
    return None if first is None and second is None else [*(first or ()), *(second or ())]
