"""Numbers that no setting can have. Called by the parser of all commands, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.options.words import Given

#: Settings that no class of ours checks -> least and most. Lightning takes a negative clipping value as none.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed_everything": (0, 2**32 - 1),
    "num_threads": (1, 1024),
    "trainer.gradient_clip_val": (0, math.inf),
    "trainer.accumulate_grad_batches": (1, math.inf),
}


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
                limit = "" if math.isinf(most) else f" and at most {most}"
                raise RimeError(f"{place} must be at least {least}{limit}, but is {value}.")
