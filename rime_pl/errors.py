"""The errors that a user can cause. Any file may raise them; the command line prints the message only."""

from __future__ import annotations


class RimeError(Exception):
    """Bad input. The message names the setting, or shard, key and field, and says what to type."""


class DivergedError(RimeError):
    """Training diverged. The callback that saves checkpoints adds the path of the last good one."""


class DataError(RimeError):
    """A sample or shard that cannot be used."""
