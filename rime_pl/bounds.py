"""Refuses numbers outside their bounds, with the name of the setting. Called where settings are made."""

from __future__ import annotations

from rime_pl.errors import RimeError


def greater_than_0(group: str, settings: object, *names: str) -> None:
    """Raise a RimeError unless each of these settings is a number above 0, or null."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:  # also refuses NaN
            raise RimeError(f"{group}.{name} must be greater than 0, but is {value}.")


def at_least(least: int, group: str, settings: object, *names: str) -> None:
    """Raise a RimeError unless each of these settings is a number of ``least`` or more, or null."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise RimeError(f"{group}.{name} must be {least} or more, but is {value}.")
