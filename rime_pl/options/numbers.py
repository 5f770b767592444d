"""Numbers that no setting can have. Called by the parser of all commands, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.options.words import Given

#: Settings of the command line itself -> least and most. Other settings are checked by their own class.
BOUNDS = {"seed_everything": (0, 2**32 - 1), "num_threads": (1, 1024)}


def refuse_numbers(values: Mapping[str, Any], given: Sequence[Given] = ()) -> None:
    """Refuse NaN and infinity, with which comparisons say nothing, and what is outside of ``BOUNDS``.

    Args:
        values: Name of each setting -> its value.
        given: Where settings were given, in order.

    Raises:
        RimeError: If there is such a number.
    """
    places = {one.name: str(one) for one in given}
    for name, value in values.items():
        place = places.get(name, f"--{name}")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise RimeError(f"{place} must be a finite number, but is {one}.")
        if name in BOUNDS and value is not None:
            least, most = BOUNDS[name]
            if not least <= value <= most:
                raise RimeError(f"{place} must be at least {least} and at most {most}, but is {value}.")
