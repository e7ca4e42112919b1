"""Bounds on the work that a request's body makes, checked before the work is done.

The bytes of a body say little about its work: 4 MB may be one text or two million values, and a schema that refuses
them one by one takes minutes. So the characters that make values are counted before the body is parsed, and the lengths
of its lists and objects are checked before they are validated. Each takes milliseconds, on the event loop.
"""

from __future__ import annotations

import json
from typing import Any

from griffin.integrations.server.errors import ApiError

MAX_FIELDS = 256  # of an object
MAX_ITEMS = 4096  # of a list whose items are not numbers
_MARKS = (b",", b"[", b"{", b'"', b"\\")  # a value, a key or an escape of a JSON text has one of them
_MARKS_BESIDE_TOKENS = 50_000
_MARKS_PER_TOKEN = 2  # token ids have one each, a text of code or JSON hardly more
_TOKENS = 131_072  # of a prompt, where the model's context has no limit


def most_marks(tokens: int | None) -> int:
    """The most commas, brackets, quotes and escapes of a body.

    Args:
        tokens: the most tokens of a prompt; `None` if there is no limit.
    """
    return _MARKS_BESIDE_TOKENS + _MARKS_PER_TOKEN * (_TOKENS if tokens is None else min(tokens, _TOKENS))


def check_marks(body: bytes, most: int) -> None:
    """Refuse a body with too many values.

    Args:
        body: what should be JSON.
        most: the most commas, brackets, quotes and escapes.

    Raises:
        ApiError: it has more.
    """
    marks = sum(map(body.count, _MARKS))
    if marks > most:
        raise ApiError(
            413,
            f"the body has {marks:,} commas, brackets, quotes and escapes, and this server takes at most {most:,}; "
            "shorten its lists, or send several requests",
            code="request_too_large",
        )


def check_values(body: bytes) -> None:
    """Refuse a body that has a list, an object or a number in it that is too long.

    Raises:
        ApiError: it has.
    """
    try:
        value = json.loads(body)
    except json.JSONDecodeError:  # FastAPI says where
        return
    except ValueError as error:  # not UTF-8, or a number with too many digits
        raise ApiError(400, f"the body cannot be read: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    check_sizes(value)


def check_sizes(value: Any) -> None:
    """Refuse long lists and objects anywhere in a body, with one error instead of one for each item.

    Raises:
        ApiError: a list of other things than numbers, or an object, is too long.
    """
    unchecked: list[tuple[str, Any]] = [("", value)] if isinstance(value, list | dict) else []
    while unchecked:
        path, container = unchecked.pop()
        if isinstance(container, dict):
            _check_length(path or "the body", container, MAX_FIELDS, "fields")
            unchecked += [
                (f"{path}.{name[:40]}" if path else name[:40], item)
                for name, item in container.items()
                if isinstance(item, list | dict)
            ]
        else:
            if not all(isinstance(item, int) for item in container):
                _check_length(path or "the body", container, MAX_ITEMS, "items")
            unchecked += [(path, item) for item in container if isinstance(item, list | dict)]


def _check_length(name: str, container: Any, most: int, what: str) -> None:
    if len(container) > most:
        message = f"{name} has {len(container):,} {what}, and this server takes at most {most:,}"
        raise ApiError(422, message, name, "too_many_items")
