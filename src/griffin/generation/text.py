"""Between text and tokens: prompts in, answers out piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: a text as it is, a list of messages through the tokenizer's chat template.

    Raises:
        ValueError: a prompt is empty or longer than the model's context, or there are messages and no chat template.
    """
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    limit = context_length(model)
    for own in ids:
        if limit is not None and len(own) >= limit:
            raise ValueError(
                f"the prompt has {len(own)} tokens, but the model's context is {limit}, answer included; "
                "shorten the prompt"
            )
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
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
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    own = [int(token) for token in encoded["input_ids"]]
    if not own:
        raise ValueError("the prompt has no tokens")
    return own


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
    padded = [[pad_token] * (longest - len(own)) + list(own) for own in ids]
    input_ids = torch.tensor(padded, device=device)
    if all(len(own) == longest for own in ids):
        return input_ids, None
    lengths = torch.tensor([len(own) for own in ids], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return input_ids, mask.long()


class Answer:
    """One answer as it grows: pieces of text that never split a character and never show a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._settled = self._decoded = 0  # tokens: start of the window that is decoded again, and its known part
        self._held = ""  # text that may be the start of a stop text
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self.tokens.append(token)
        known = self._decode(self.tokens[self._settled : self._decoded])
        window = self._decode(self.tokens[self._settled :])
        if window.endswith("�") or len(window) <= len(known):
            return ""  # in the middle of a character
        self._settled, self._decoded = self._decoded, len(self.tokens)
        return self._release(window[len(known) :])

    def finish(self) -> str:
        """No token follows: return the text that was held back."""
        if self.stopped:
            return ""
        known = self._decode(self.tokens[self._settled : self._decoded])
        rest = self._held + self._decode(self.tokens[self._settled :])[len(known) :]
        self._held, self._settled, self._decoded = "", len(self.tokens), len(self.tokens)
        self.text += rest
        return rest

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, text[: min(found)], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return max((n for n in range(1, min(len(text) + 1, len(stop))) if text.endswith(stop[:n])), default=0)
