"""Answers of a given form, by llguidance: it says for every step which tokens may come next.

Only this module imports llguidance.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from griffin.integrations.server.types import Constraint, FormError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger("griffin")

MAX_SCHEMA = 65_536  # characters
_MOST_JOINED = 12  # patterns of one text
_BESIDE_REFERENCES = frozenset(
    (
        "pattern",
        "format",
        "allOf",
        "anyOf",
        "items",
        "prefixItems",
        "properties",
        "patternProperties",
        "additionalProperties",
    )
)  # keywords that are joined with what a $ref beside them says
# Whitespace between the parts of JSON: a line break with its indentation, or a space. Small models write it for ever.
_OPTIONS = {"whitespace_pattern": r"\n?[ ]{0,16}"}


class Grammars:
    """The forms that answers of one model may be held to. They are compiled without the model's thread.

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: the number of tokens that the model has logits for.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None

    def prepare(self) -> None:
        """Do now what the first form would wait for: it holds the interpreter's lock, and nobody else is answered."""
        if find_spec("llguidance") is not None:
            try:
                self._llguidance()
            except Exception as error:  # requests for free text need none of it
                logger.warning("no answer can be held to a form: llguidance cannot read the tokenizer: %s", error)

    def json(self, schema: dict[str, Any]) -> Callable[[], Constraint]:
        """Constraints for JSON that a schema describes.

        Raises:
            ValueError: the schema is wrong or too large, or has a keyword that llguidance does not know.
        """
        return self._compiled(f"%llguidance {{}}\nstart: %json {_schema(schema)}")

    def calls(
        self,
        tools: Mapping[str, dict[str, Any] | None],
        marks: tuple[str, str],
        *,
        free: bool,
        many: bool,
        instead: dict[str, Any] | None = None,
    ) -> Callable[[], Constraint]:
        """Constraints for calls of tools: JSON objects with a name and arguments, each between two marks.

        Args:
            tools: the names of the tools, with the JSON schemas of their arguments.
            marks: what begins and what ends a call.
            free: whether text may come before calls or instead of them.
            many: whether there may be several calls.
            instead: the JSON schema of what there may be instead of calls.

        Raises:
            ValueError: as `json`.
        """
        begin, end = map(self._mark, marks)
        start = 'call ("\\n" call)*' if many else "call"
        if free:
            start = f"(TEXT call){'*' if many else '?'} TEXT"
        if instead is not None:
            start = f"({start}) | instead"
        beginnings = [_quoted(f'{{"name": {json.dumps(name)}, "arguments": ') for name in tools]
        objects = [f'{beginning} arguments_{number} "}}"' for number, beginning in enumerate(beginnings)]
        rules = [
            "%llguidance {}",
            f"start: {start}",
            f'call: {begin} "\\n" object "\\n" {end}',
            f"object: {' | '.join(objects)}",
            *(
                f"arguments_{number}: %json {_schema({'type': 'object', **(schema or {})})}"
                for number, schema in enumerate(tools.values())
            ),
            *(["TEXT: /(.|\\n)*/"] if free else []),
            *([] if instead is None else [f"instead: %json {_schema(instead)}"]),
        ]
        return self._compiled("\n".join(rules))

    def _mark(self, text: str) -> str:
        """A mark in llguidance's grammar: a token of its own where the tokenizer has it, else a text."""
        token: Any = self._tokenizer.convert_tokens_to_ids(text)
        added = isinstance(token, int) and str(self._tokenizer.decode([token])) == text
        return text if added and self._llguidance().is_special_token(token) else _quoted(text)

    def _compiled(self, lark: str) -> Callable[[], Constraint]:
        tokenizer = self._llguidance()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # to write the grammar into an error may take half a second
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        return lambda: _Matched(matcher.deep_copy())

    def _llguidance(self) -> LLTokenizer:
        """llguidance's form of the tokenizer. The first call takes up to seconds."""
        if find_spec("llguidance") is None:
            raise ValueError("this server lacks the package llguidance; install it: pip install 'griffin-llm[serve]'")
        with self._lock:
            if self._known is None:
                from llguidance import LLTokenizer

                ends = [token for token in self._ends if token < self._vocabulary]
                self._known = LLTokenizer(_as_json(self._tokenizer), n_vocab=self._vocabulary, eos_token=ends)
        return self._known


class _Matched:
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def masked(self, logits: Tensor) -> Tensor:
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        allowed = bits.flatten()[: logits.shape[0]].bool().to(logits.device)
        return logits.masked_fill(~allowed, float("-inf"))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormError(f"the answer cannot be held to its form: {_reason(self._matcher)}")


def _as_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer without padding and truncation. llguidance's own function copies it first, which takes seconds."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            "the model's tokenizer is not one of the tokenizers library, so no answer can be held to a form"
        )
    if backend.padding is not None or backend.truncation is not None:
        backend = copy.copy(backend)
        backend.no_padding()
        backend.no_truncation()
    return str(backend.to_str())


def _reason(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0][:500]


def _quoted(text: str) -> str:
    """A text in llguidance's grammar, whose quoting is JSON's."""
    return json.dumps(text)


def _check_joined(schema: Any) -> None:
    """Refuse a schema that may join many patterns for one text. llguidance takes twice as long for each more, and
    cannot be interrupted: a thread and its memory would be lost.

    Raises:
        ValueError: it has more patterns, and more places that join them, than `_MOST_JOINED`.
    """
    patterns = joined = 0
    unseen = [schema]
    while unseen:
        part = unseen.pop()
        if isinstance(part, dict):
            patterns += len(part.keys() & {"pattern", "format"})
            together = part.get("allOf")
            joined += len(together) if isinstance(together, list) else 0
            joined += "$ref" in part and not part.keys().isdisjoint(_BESIDE_REFERENCES)
        if isinstance(part, dict | list):
            unseen += part.values() if isinstance(part, dict) else part
    if min(patterns, joined) > _MOST_JOINED:
        raise ValueError(
            f"the JSON schema joins {joined} parts by allOf or $ref and has {patterns} patterns and formats, and this "
            f"server takes at most {_MOST_JOINED} of one of them"
        )


def _schema(schema: dict[str, Any]) -> str:
    _check_joined(schema)
    text = json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False)
    if len(text) > MAX_SCHEMA:
        raise ValueError(f"the JSON schema has {len(text)} characters, this server takes at most {MAX_SCHEMA}")
    return text
