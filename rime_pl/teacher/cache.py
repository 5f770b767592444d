"""The answers of a teacher in a file that only grows: what was answered is paid for, and must not be lost.

A line is a JSON object with the key of the request. A line that a kill cut off is skipped and counted. Called
by the command through jobs.py, and by client.py for each answer.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rime_pl.errors import RimeError

#: What each line begins with.
_BEGIN = b'{"key": '


@dataclass(frozen=True)
class Answer:
    """What a teacher has answered."""

    text: str
    finish: str = "stop"  # why it ended: "stop", "length", "content_filter", "refusal" ...
    prompt_tokens: int | None = None  # None: the endpoint does not say
    completion_tokens: int | None = None


class Answers:
    """Answers by the key of their request, and the file that keeps them.

    Args:
        path: The file. It need not exist; the first answer makes it.
        read_only: Whether the file is only read, without a lock.

    Raises:
        RimeError: If it is no file of answers, or if another process writes it.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        self.known: dict[str, Answer] = {}
        self.damaged = 0  # lines that hold no answer
        self._file: int | None = None
        if path.exists() and not path.is_file():
            raise RimeError(f"--answers must be a file, but {path} is none.")
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._lock()
        if path.exists():
            self._read()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; one that holds nothing is taken away."""
        if self._file is not None:
            if not os.fstat(self._file).st_size:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def add(self, key: str, model: str, answer: Answer) -> None:
        """Keep an answer; the system has the line at once, so that a killed process loses nothing."""
        assert self._file is not None, "opened to read only"
        self.known[key] = answer
        line = (json.dumps({"key": key, "model": model, **asdict(answer)}) + "\n").encode()
        while line:
            line = line[os.write(self._file, line) :]

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            self._file = None
            raise RimeError(
                f"Another process writes {self.path} just now. Wait for it, or give another --answers."
            ) from error
        except OSError:  # some network file systems cannot lock
            pass

    def _read(self) -> None:
        cut_off, foreign = False, 0
        with self.path.open("rb") as file:
            for line in file:
                cut_off = not line.endswith(b"\n")
                try:
                    key, answer = _answer(json.loads(line))
                except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
                    self.damaged += bool(line.strip())
                    foreign += bool(line.strip()) and line[: len(_BEGIN)] != _BEGIN[: len(line)]
                else:
                    self.known[key] = answer
        if foreign and not self.known:
            self.close()
            raise RimeError(
                f"--answers must be a file that `rime rewrite` has written, but no line of {self.path} holds "
                "an answer. Give another file."
            )
        if cut_off and self._file is not None:
            os.write(self._file, b"\n")


def _answer(record: Any) -> tuple[str, Answer]:
    """Return key and answer of a line; raise a ValueError if it holds none."""
    if not isinstance(record, dict):
        raise ValueError("no object")
    texts = [record.get(name) for name in ("key", "text", "finish")]
    counts = [record.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no answer")
    if not all(count is None or type(count) is int for count in counts):
        raise ValueError("no count")
    key, text, finish = (str(each) for each in texts)
    return key, Answer(text, finish, *counts)
