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


def check_seed_and_threads(seed: int, threads: int | None) -> None:
    """Raise a RimeError for a seed that NumPy does not take, or a number of threads below 1."""
    if not 0 <= seed < 2**32:
        raise RimeError(f"seed_everything must be from 0 to {2**32 - 1}, but is {seed}.")
    if threads is not None and threads < 1:
        raise RimeError(f"num_threads must be 1 or more, or null for torch's choice, but is {threads}.")
