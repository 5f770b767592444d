"""One thread that works through a queue of bounded length; who comes when it is full is told to wait.

Called by the server beside it. A model answers one query at a time: more threads would only take memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The queue is full."""


class Worker:
    """A thread with a queue.

    Args:
        limit: Number of places, that of the running task included.
        name: Of the thread.
    """

    def __init__(self, limit: int, name: str) -> None:
        self.limit, self.waiting = limit, 0  # counted on the event loop alone
        self._pool = ThreadPoolExecutor(1, name)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue, from before there is a task until it is done.

        Raises:
            Busy: If ``limit`` places are held.
        """
        if self.waiting >= self.limit:
            raise Busy
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def run(self, task: Callable[[], T]) -> T:
        """Return what the task returns; who calls it holds a place."""
        return await asyncio.wrap_future(self._pool.submit(task))

    def close(self) -> None:
        """Wait for the running task, and drop those that wait."""
        self._pool.shutdown(cancel_futures=True)
