"""One thread at a time: a lock that its holder may take again, and that another thread may give back.

A generator that is suspended inside a phase may be resumed, and so left, by another thread; `threading.RLock` does not
allow that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """Whose turn it is to use a handle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._thread == threading.get_ident()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait until no other thread has the turn, and have it."""
        if self.mine:
            yield
            return
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None
