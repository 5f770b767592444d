"""What can go wrong by a user's hand; everybody may raise these, and the command line prints them plainly."""

from __future__ import annotations


class RimeError(Exception):
    """Bad input, told to the user in one message that names the setting, or shard, key and field."""


class DivergedError(RimeError):
    """Training left its bounds; the callback that saves checkpoints adds the last good one."""


class DataError(RimeError):
    """A sample or shard that cannot be used."""
