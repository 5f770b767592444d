"""Asks an endpoint: several requests at a time, within its rate, again after a fault, and never without end.

jobs.py hands in requests and takes answers and failures. The official client `openai` sends them; it is
imported here and nowhere else, when a request is due.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from rime_pl.errors import DataError, RimeError, StoppedError
from rime_pl.teacher.cache import Answer
from rime_pl.teacher.request import Request
from rime_pl.teacher.responses import Garbled, read_response
from rime_pl.teacher.settings import Teacher

if TYPE_CHECKING:
    import openai

#: Seconds before the first repetition; each further one waits twice as long, up to the longest wait.
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
#: A rate is counted by the minute, so after a 429 each wait is so many times as long.
_RATE = 4
#: Bytes of a response; an answer has some thousand.
LARGEST = 16 << 20
#: An endpoint that asks for more seconds than this is left alone: the command stops.
LONGEST_PAUSE = 600.0
_AGAIN = frozenset({408, 409, 425, 429})  # and all from 500
#: What a status means for every further request, too.
_HOPELESS = {
    401: "The API key is missing or wrong. Name its variable with --teacher.key_variable.",
    402: "The account has no credit.",
    403: "The API key may not use this model.",
    404: "Check --teacher.base_url, which mostly ends in /v1, and --teacher.model.",
}
_MISSING = (
    "`rime rewrite` needs the package openai to ask a teacher. Install it: pip install 'rime_pl[rewrite]'"
)


class Failure(NamedTuple):
    """A request that has failed for good."""

    kind: str  # what is counted, such as "time-out"
    says: str


class _Fault(NamedTuple):
    kind: str
    says: str
    again: bool  # whether a repetition may help
    wait: float | None = None  # seconds that the endpoint asks for


class Client:
    """One endpoint.

    Args:
        teacher: Its settings.

    Raises:
        RimeError: If the package openai or the API key is missing.
    """

    def __init__(self, teacher: Teacher) -> None:
        try:
            import openai
        except ImportError as error:
            raise RimeError(_MISSING) from error
        self.openai, self.teacher = openai, teacher
        self.key = _api_key(teacher)
        self.faults: Counter[str] = Counter()  # of single tries
        self._pause = 0.0  # until when no request may start, on the monotonic clock
        self._slot = 0.0  # when the next one may start, so that a minute holds no more than it may
        self._client: openai.AsyncOpenAI

    def ask(
        self,
        requests: Iterator[Request],
        answered: Callable[[Request, Answer], None],
        failed: Callable[[Request, Failure], None],
    ) -> None:
        """Ask all requests, and hand each answer or failure on as it comes.

        Ctrl-C and SIGTERM end it between two of these calls, so that none is cut in half.

        Raises:
            RimeError: If no further request can succeed, or what ``answered`` and ``failed`` raise.
            StoppedError: If somebody stopped it.
        """
        asyncio.run(_stoppable(self._ask(requests, answered, failed)))

    async def _ask(
        self,
        requests: Iterator[Request],
        answered: Callable[[Request, Answer], None],
        failed: Callable[[Request, Failure], None],
    ) -> None:
        async def work() -> None:
            for request in requests:  # one iterator for all: each takes the next
                result = await self._answer(request)
                if isinstance(result, Answer):
                    answered(request, result)
                else:
                    failed(request, result)

        async with self.openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.teacher.base_url,
            timeout=self.teacher.timeout,
            max_retries=0,
            # a redirect would send pictures and texts to an address that the user has not named
            http_client=self.openai.DefaultAsyncHttpxClient(follow_redirects=False),
        ) as self._client:
            workers = [asyncio.create_task(work()) for _ in range(self.teacher.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, request: Request) -> Answer | Failure:
        try:
            messages = await asyncio.to_thread(request.messages, self.teacher.max_pixels)
        except DataError as error:
            return Failure("unusable picture", str(error))
        wait = FIRST_WAIT
        for tried in range(self.teacher.retries + 1):
            await self._turn()
            try:
                async with asyncio.timeout(self.teacher.timeout):
                    return await self._send(messages)
            except Exception as error:
                fault = self._fault(error)
            self.faults[fault.kind] += 1
            if not fault.again or tried == self.teacher.retries:
                break
            if fault.wait:  # the endpoint means all requests
                self._pause = max(self._pause, time.monotonic() + fault.wait)
            else:
                await asyncio.sleep(wait * random.uniform(0.75, 1.25) * (_RATE if "429" in fault.kind else 1))
                wait = min(2 * wait, LONGEST_WAIT)
        return Failure(fault.kind, self._without_key(fault.says))

    async def _send(self, messages: Any) -> Answer:
        teacher = self.teacher
        fields: dict[str, Any] = {teacher.token_field: teacher.max_tokens}
        if teacher.temperature is not None:
            fields["temperature"] = teacher.temperature
        # the raw response, because the client takes what is no answer for one
        async with self._client.chat.completions.with_streaming_response.create(
            model=teacher.model, messages=messages, extra_body=teacher.more_fields() or None, **fields
        ) as raw:
            return read_response(await self._body(raw))

    async def _body(self, raw: Any) -> bytes:
        """Return the bytes of a response; some kilobytes could be unpacked to gigabytes."""
        content = bytearray()
        try:
            async for part in raw.iter_bytes():
                content += part
                if len(content) > LARGEST:
                    break
        except Exception as error:  # of the package below openai, whose name depends on the version
            if "Timeout" in type(error).__name__:
                raise TimeoutError from error
            raise self.openai.APIConnectionError(request=raw.http_request) from error
        if len(content) > LARGEST:
            raise Garbled(f"it has more than {LARGEST:,} bytes")
        return bytes(content)

    async def _turn(self) -> None:
        """Wait until a request may start: none does in a pause, and the others start evenly in a minute."""
        while True:
            await asyncio.sleep(self._pause - time.monotonic())
            if self.teacher.requests_per_minute:
                start = max(time.monotonic(), self._slot)
                self._slot = start + 60 / self.teacher.requests_per_minute
                await asyncio.sleep(start - time.monotonic())
            if self._pause <= time.monotonic():
                return

    def _fault(self, error: Exception) -> _Fault:
        """Return what has gone wrong with a try.

        Raises:
            RimeError: If it would go wrong with every other request, too.
            Exception: If it is no fault of the endpoint.
        """
        known = self.openai
        if isinstance(error, Garbled):
            return _Fault("garbled response", f"the response holds no answer: {error}", True)
        if isinstance(error, TimeoutError | known.APITimeoutError):
            says = f"no answer in {self.teacher.timeout:g} s (--teacher.timeout)"
            return _Fault("time-out", says, True)
        if isinstance(error, known.APIConnectionError):
            cause = error.__cause__
            half = type(cause).__name__ in ("RemoteProtocolError", "ReadError", "DecodingError")
            kind = "half a response" if half else "no connection"
            return _Fault(kind, f"{kind}: {cause or error}", True)
        if isinstance(error, known.APIStatusError):
            return self._status(error)
        raise error

    def _status(self, error: openai.APIStatusError) -> _Fault:
        status, said = error.status_code, self._without_key(" ".join(str(error.message).split())[:300])
        if 300 <= status < 400:
            to = self._without_key(error.response.headers.get("location", "an address that it does not name"))
            raise RimeError(
                f"The endpoint sends requests on to {to:.200} ({status}), which is not followed. If you "
                "trust that address, give it as --teacher.base_url."
            )
        if status in _HOPELESS:
            raise RimeError(f"The endpoint refuses every request ({status}): {said}. {_HOPELESS[status]}")
        if error.code == "insufficient_quota":
            raise RimeError(f"The account at the endpoint has no credit left: {said}.")
        if status not in _AGAIN and status < 500:
            return _Fault(f"refused ({status})", f"the endpoint refuses it ({status}): {said}", False)
        wait = _retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_PAUSE:
            raise RimeError(
                f"The endpoint asks for a pause of {wait:.0f} s ({status}). Give the same command again then."
            )
        kind = "rate limit (429)" if status == 429 else f"server error ({status})"
        return _Fault(kind, f"{kind}: {said}", True, wait)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


async def _stoppable(asking: Any) -> None:
    """Run it so that a signal cancels it, where Python would raise in the middle of anything."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(asking)
    stopped: list[int] = []
    before: dict[int, Any] = {}

    def stop(signum: int) -> None:
        stopped.append(signum)
        task.cancel()

    for signum in (int(signal.SIGINT), int(signal.SIGTERM)):
        if signal.getsignal(signum) in (signal.SIG_IGN, None):  # as in a background job
            continue
        try:
            kept = signal.getsignal(signum)
            loop.add_signal_handler(signum, stop, signum)
            before[signum] = kept
        except (ValueError, RuntimeError, NotImplementedError):  # not the main thread
            pass
    try:
        await task
    except asyncio.CancelledError:
        if not stopped:
            raise
        raise StoppedError("stopped.", stopped[0]) from None
    finally:
        for signum, handler in before.items():
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)


def _api_key(teacher: Teacher) -> str:
    name = teacher.key_variable or ("" if teacher.base_url else "OPENAI_API_KEY")
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise RimeError(
            f"The variable {name} of the environment must hold the API key, but is empty or not set. Set it, "
            "or give --teacher.base_url for an endpoint that needs no key."
        )
    if not (key.isascii() and key.isprintable()):
        raise RimeError(
            f"The variable {name} of the environment must hold an API key in ASCII, but does not."
        )
    return key


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that an endpoint asks to wait; None if it does not say, or not in a way to read."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after") or "")
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())
