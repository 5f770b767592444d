"""One thread that works through a queue of bounded length; who comes when it is full is told to wait.

Called by the server beside it. A model answers one query at a time: more threads would only take memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The queue is full."""


class Worker:
    """A thread with a queue.

    Args:
        limit: Number of tasks that may be there at a time, the running one included.
        name: Of the thread.
    """

    def __init__(self, limit: int, name: str) -> None:
        self.limit, self.waiting = limit, 0  # counted on the event loop alone
        self._pool = ThreadPoolExecutor(1, name)

    async def run(self, task: Callable[[], T]) -> T:
        """Return what the task returns.

        Raises:
            Busy: If ``limit`` tasks are there.
        """
        if self.waiting >= self.limit:
            raise Busy
        self.waiting += 1
        loop = asyncio.get_running_loop()
        done = self._pool.submit(task)
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._left))
        return await asyncio.wrap_future(done)

    def _left(self) -> None:
        self.waiting -= 1

    def close(self) -> None:
        """Wait for the running task, and drop those that wait."""
        self._pool.shutdown(cancel_futures=True)
