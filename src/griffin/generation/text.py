"""Between text and tokens: prompts in, answers out piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.generation.stops import Stops

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[list[int]]:
    """Token ids of each prompt: a text as it is, a list of messages through the tokenizer's chat template.

    Args:
        tools: JSON schemas of functions that the template shows to the model.

    Raises:
        ValueError: a prompt is empty or longer than the model's context, or there are messages and no chat template.
    """
    ids = [_encode(tokenizer, prompt, tools) for prompt in prompts]
    limit = context_length(model)
    for tokens in ids:
        if limit is not None and len(tokens) >= limit:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, but the model's context is {limit}, answer included; "
                "shorten the prompt"
            )
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Sequence[Mapping[str, Any]]) -> list[int]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty; GRIFFIN selects experts from it, so it needs some text")
        encoded: Any = tokenizer(prompt)
    else:
        if not prompt:
            raise ValueError("there are no messages; expected at least one, such as {'role': 'user', 'content': '...'}")
        if tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template; give the prompt as plain text")
        messages = [dict(message) for message in prompt]
        begun = messages[-1].get("role") == "assistant"  # its beginning is given: it is continued, not answered
        way = "continue_final_message" if begun else "add_generation_prompt"
        settings: dict[str, Any] = {way: True, "tools": list(tools) or None}
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, **settings)
    tokens = [int(token) for token in encoded["input_ids"]]
    if not tokens:
        raise ValueError("the prompt has no tokens")
    return tokens


def context_length(model: PreTrainedModel) -> int | None:
    """Most tokens that the model was made for, prompt and answer together; `None` where the config names no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return limit if isinstance(limit, int) else None


def pad(ids: Sequence[Sequence[int]], pad_token: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Left-pad prompts into a batch.

    Shapes:
        Returns input_ids (B, S), int64, and the attention mask (B, S), int64, or `None` where there is no padding.
    """
    longest = max(map(len, ids))
    padded = [[pad_token] * (longest - len(tokens)) + list(tokens) for tokens in ids]
    input_ids = torch.tensor(padded, device=device)
    if all(len(tokens) == longest for tokens in ids):
        return input_ids, None
    lengths = torch.tensor([len(tokens) for tokens in ids], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return input_ids, mask.long()


class Answer:
    """One answer as it grows: pieces of text that never split a character and never show a stop text.

    Special tokens such as `<|im_start|>` are no part of the text, but a stop text may name them, alone or among others:
    it is looked for in the text as it is shown, and in the text with the special tokens written out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, Stops(stop) if stop else None
        self._settled = self._decoded = 0  # tokens: start of the window that is decoded again, and its known part
        self._pending = ""  # how the bytes of a character that is not whole yet decode
        self._held: deque[str] = deque()  # text that may be the start of a stop text
        self._held_length = 0
        self.tokens: list[int] = []
        self.text = ""
        self.offset = 0  # characters of the text before the last token's own
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self.tokens.append(token)
        known = self._decode(self.tokens[self._settled : self._decoded])
        window = self._decode(self.tokens[self._settled :])
        new, pending = window[len(known) :], self._pending
        self.offset = len(self.text) + self._held_length
        if len(new) > len(pending) and new.startswith(pending):  # it completes no character that has begun
            self.offset += len(pending)
        if window.endswith("�") or not new:  # in the middle of a character, or a special token
            self._pending = new
            return self._take(self._special(token), shown=False) if self._stops is not None else ""
        self._settled, self._decoded, self._pending = self._decoded, len(self.tokens), ""
        return self._take(new, shown=True)

    def finish(self) -> str:
        """No token follows: return the text that was held back."""
        if self.stopped:
            return ""
        known = self._decode(self.tokens[self._settled : self._decoded])
        rest = self._release(self._held_length) + self._decode(self.tokens[self._settled :])[len(known) :]
        self._settled, self._decoded = len(self.tokens), len(self.tokens)
        self.text += rest
        return rest

    def _take(self, new: str, *, shown: bool) -> str:
        """Hold a text, and release what can be part of no stop text."""
        before = len(self.text)
        if shown:
            self._held.append(new)
            self._held_length += len(new)
        keep = 0
        if self._stops is not None:
            start = self._stops.feed(new, shown=shown)
            self.stopped = start is not None
            keep = self._stops.held if start is None else before + self._held_length - start
        text = self._release(self._held_length - keep)
        if self.stopped:
            self._held, self._held_length = deque(), 0
        self.text += text
        return text

    def _release(self, length: int) -> str:
        """Take so many characters from what is held."""
        self._held_length -= length
        pieces = []
        while length:
            piece = self._held.popleft()
            if len(piece) > length:
                self._held.appendleft(piece[length:])
                piece = piece[:length]
            pieces.append(piece)
            length -= len(piece)
        return "".join(pieces)

    def _special(self, token: int) -> str:
        """What a special token is written as; nothing for a part of a character."""
        if self._decode([token]):
            return ""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text
