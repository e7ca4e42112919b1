"""Threads for work beside the model and the event loop, such as tokenising."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from griffin.integrations.server.types import FullError

_T = TypeVar("_T")


class Pool:
    """A few threads with a bounded queue.

    Args:
        threads: how many jobs run at a time.
        waiting: the most jobs that wait for a thread.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="griffin-pool")
        self._most, self._jobs = threads + waiting, 0

    async def run(self, job: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in a thread. If the caller is cancelled, a job that has begun still keeps its thread.

        Raises:
            FullError: too many jobs wait.
            Exception: the job raised it.
        """
        if self._jobs >= self._most:
            raise FullError(f"{self._jobs} requests are being prepared, and this server takes no more of them", 1)
        self._jobs += 1
        future = self._executor.submit(job, *arguments)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop the jobs that wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self) -> None:
        self._jobs -= 1
