"""The errors that a user can cause. Any file may raise them; the command line prints the message only."""

from __future__ import annotations


class RimeError(Exception):
    """Bad input. The message names the setting, or shard, key and field, and says what to type."""


class DivergedError(RimeError):
    """Training diverged. The callback that saves checkpoints adds the path of the last good one."""


class DataError(RimeError):
    """A sample or shard that cannot be used."""


class StoppedError(BaseException):
    """Somebody stopped the command, with Ctrl-C or a signal. The message says how to go on.

    Like KeyboardInterrupt it is no Exception, because a signal may come anywhere: whoever skips a picture
    that cannot be decoded, or a text that cannot be read, must not skip this.

    Args:
        message: What stopped where, and how to go on.
        signum: Number of the signal.
    """

    def __init__(self, message: str, signum: int = 2) -> None:
        super().__init__(message)
        self.signum = signum


class ToldElsewhereError(RimeError):
    """The first process of a distributed run tells this error; the others only end."""
