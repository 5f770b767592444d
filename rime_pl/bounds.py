"""Refuses numbers outside their bounds, with the name of the setting. Called where settings are made."""

from __future__ import annotations

from typing import Any

from rime_pl.errors import RimeError


def greater_than_0(group: str, settings: object, *names: str) -> None:
    """Raise a RimeError unless each setting is a number above 0, or null where its type allows it."""
    for name in names:
        value = _value(group, settings, name)
        if value is not None and not value > 0:  # also refuses NaN
            raise RimeError(f"{group}.{name} must be greater than 0, but is {value}.")


def at_least(least: int, group: str, settings: object, *names: str) -> None:
    """Raise a RimeError unless each is a number of ``least`` or more, or null where its type allows it."""
    for name in names:
        value = _value(group, settings, name)
        if value is not None and not value >= least:
            raise RimeError(f"{group}.{name} must be {least} or more, but is {value}.")


def _value(group: str, settings: object, name: str) -> Any:
    """Return a setting; raise if it is null where its type does not say so, which the parser lets pass."""
    value = getattr(settings, name)
    annotation = str(type(settings).__init__.__annotations__.get(name, None))
    if value is None and "None" not in annotation:
        raise RimeError(f"{group}.{name} must be a number, but is null. Leave it out for its default.")
    return value
