"""Between text and tokens: prompts in, answers out piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        self._tokenizer, self._stop = tokenizer, stop
        self._settled = self._decoded = 0  # tokens: start of the window that is decoded again, and its known part
        self._pending = ""  # how the bytes of a character that is not whole yet decode
        self._held: list[_Run] = []  # that may be the start of a stop text
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
        self.offset = len(self.text) + len(_shown(self._held))
        if len(new) > len(pending) and new.startswith(pending):  # it completes no character that has begun
            self.offset += len(pending)
        if window.endswith("�") or not new:  # in the middle of a character, or a special token
            self._pending = new
            return self._release(_Run(self._special(token), shown=False)) if self._stop else ""
        self._settled, self._decoded, self._pending = self._decoded, len(self.tokens), ""
        return self._release(_Run(new, shown=True))

    def finish(self) -> str:
        """No token follows: return the text that was held back."""
        if self.stopped:
            return ""
        known = self._decode(self.tokens[self._settled : self._decoded])
        rest = _shown(self._held) + self._decode(self.tokens[self._settled :])[len(known) :]
        self._held, self._settled, self._decoded = [], len(self.tokens), len(self.tokens)
        self.text += rest
        return rest

    def _release(self, new: _Run) -> str:
        runs = [*self._held, new]
        shown, written = _shown(runs), "".join(run.text for run in runs)
        positions = [at for stop in self._stop if (at := shown.find(stop)) >= 0]
        if shown != written:
            positions += [len(_shown(_cut(runs, at)[0])) for stop in self._stop if (at := _find(runs, stop)) >= 0]
        if positions:
            self.stopped, text, self._held = True, shown[: min(positions)], []
        else:
            keep = max((_overlap(shown, stop) for stop in self._stop), default=0)
            at = _place(runs, len(shown) - keep)
            if shown != written:
                at = min(at, len(written) - max((_overlap(written, stop) for stop in self._stop), default=0))
            released, self._held = _cut(runs, at)
            text = _shown(released)
        self.text += text
        return text

    def _special(self, token: int) -> str:
        """What a special token is written as; nothing for a part of a character."""
        if self._decode([token]):
            return ""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


@dataclass(frozen=True)
class _Run:
    """Some of an answer's text as the tokens are written, and whether it is shown: special tokens are not."""

    text: str
    shown: bool


def _shown(runs: Sequence[_Run]) -> str:
    return "".join(run.text for run in runs if run.shown)


def _place(runs: Sequence[_Run], count: int) -> int:
    """Where the shown character number `count` is in the written text; its end if there are not more of them."""
    at = 0
    for run in runs:
        if run.shown:
            if count < len(run.text):
                return at + count
            count -= len(run.text)
        at += len(run.text)
    return at


def _find(runs: Sequence[_Run], stop: str) -> int:
    """Where a stop text begins in the written text, with each special token of it as a whole; -1 if it is not there."""
    written, at = "".join(run.text for run in runs), 0
    inside: set[int] = set()
    for run in runs:
        inside.update(() if run.shown else range(at + 1, at + len(run.text)))
        at += len(run.text)
    at = written.find(stop)
    while at >= 0 and not inside.isdisjoint((at, at + len(stop))):
        at = written.find(stop, at + 1)
    return at


def _cut(runs: Sequence[_Run], at: int) -> tuple[list[_Run], list[_Run]]:
    """What is before place `at` of the written text, and what is from there on."""
    before, after = [], []
    for run in runs:
        first, second = _Run(run.text[: max(at, 0)], run.shown), _Run(run.text[max(at, 0) :], run.shown)
        before += [first] if first.text else []
        after += [second] if second.text else []
        at -= len(run.text)
    return before, after


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return max((n for n in range(1, min(len(text) + 1, len(stop))) if text.endswith(stop[:n])), default=0)
