"""Renders pages of a PDF in a process of its own: a page of some kilobytes can take hours, or crash PDFium.

clips.py asks it. This file imports nothing of ours, because the process starts with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

#: Bytes of memory of the process; PDFium ends where it gets no more.
MEMORY = 4 << 30
_READ = 1 << 20  # bytes that are read at once
_LENGTH = 4  # bytes of the length of a header


class PageError(Exception):
    """Why there is no page, in words."""


class PageProcess:
    """The process, started when it is needed, and again after one that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, path: Path, number: int | None, side: int, most: float, seconds: float) -> dict[str, Any]:
        """Return the number of "pages" of a PDF, and of one of them the "points", "size" and "pixels".

        Args:
            path: The file.
            number: Number of a page, from 0; None for none.
            side: Pixels of the longer side.
            most: Largest side in points; a larger page has no pixels.
            seconds: Time for the answer.

        Raises:
            PageError: If PDFium refuses it, crashes or takes longer.
        """
        with self._lock:
            request = json.dumps({"path": str(path.absolute()), "number": number, "side": side, "most": most})
            try:
                return self._answer(request.encode() + b"\n", time.monotonic() + seconds)
            except PageError:  # an ordinary refusal; the process goes on
                raise
            except TimeoutError as error:
                self._end()
                raise PageError(f"it takes longer than {seconds:g} seconds") from error
            except (EOFError, BrokenPipeError) as error:
                self._end()
                raise PageError("PDFium has crashed, or needs more memory than it may have") from error
            except BaseException:  # Ctrl-C in the middle of an answer
                self._end()
                raise

    def _answer(self, request: bytes, until: float) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(request)
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            length = int.from_bytes(_read(selector, process.stdout, _LENGTH, until), "big")
            answer: dict[str, Any] = json.loads(_read(selector, process.stdout, length, until))
            if "bytes" in answer:
                answer["pixels"] = _read(selector, process.stdout, answer["bytes"], until)
        if "error" in answer:
            raise PageError(answer["error"])
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            package = str(Path(__file__).parents[1])
            paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _read(selector: selectors.BaseSelector, pipe: Any, count: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        if not selector.select(max(0.0, until - time.monotonic())):
            raise TimeoutError
        part = os.read(pipe.fileno(), min(_READ, count - len(data)))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


# -- in the process ------------------------------------------------------------------------------------


def _rendered(path: str, number: int | None, side: int, most: float) -> tuple[dict[str, Any], bytes]:
    import pypdfium2

    document = pypdfium2.PdfDocument(path)
    try:
        answer: dict[str, Any] = {"pages": len(document)}
        if number is None or not 0 <= number < len(document):
            return answer, b""
        page = document[number]
        answer["points"] = width, height = page.get_size()
        if not 0 < min(width, height) <= max(width, height) <= most:
            return answer, b""
        # the scale follows from the side, not from a resolution: a poster has no more pixels than a letter
        picture = page.render(scale=side / max(width, height), may_draw_forms=True).to_pil().convert("RGB")
        return {**answer, "size": picture.size}, picture.tobytes()
    finally:
        document.close()


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import pypdfium2

    for line in sys.stdin.buffer:
        try:
            answer, pixels = _rendered(**json.loads(line))
        except pypdfium2.PdfiumError as error:
            answer, pixels = {"error": str(error).rstrip(".")}, b""
        header = json.dumps({**answer, **({"bytes": len(pixels)} if pixels else {})}).encode()
        sys.stdout.buffer.write(len(header).to_bytes(_LENGTH, "big") + header + pixels)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
