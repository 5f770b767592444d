"""Chooses frames of clips that lie as folders or lists of pictures, as LLaVA-Hound keeps them.

Called by the builders of LLaVA-Hound, UME-R1 and RIME.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from rime_pl.datamodules.builders.sources.drafts import FrameFiles, Refused
from rime_pl.datamodules.builders.sources.paths import file_below

#: Frames are taken so often, in seconds.
_STEP = 0.5


def frames_of_list(folder: Path, names: Sequence[object], count: int) -> FrameFiles:
    """Return at most ``count`` frames, evenly spaced, the first and the last among them.

    Args:
        folder: Folder that the names begin in.
        names: Frames in order. The one with the number k stands at (k - 1) / 2 seconds.
        count: Number of frames; a clip with fewer keeps what it has.

    Raises:
        Refused: If there is none, or one is missing or lies outside the folder.
    """
    if not names:
        raise Refused("missing frames", "a clip must have frames, but has none.")
    last = len(names) - 1
    chosen = [int(last * n / max(1, count - 1)) for n in range(count)]
    if last < count:
        chosen = [*range(len(names))]
    times = _times(names)
    paths = tuple(file_below(folder, names[n]) for n in chosen)
    return FrameFiles(paths, f"{names[0]} .. {names[-1]}", tuple(times[n] for n in chosen))


def _times(names: Sequence[object]) -> list[float]:
    """Return the time of each frame in seconds, by the last number in its name if these rise.

    >>> _times(["v/c01_0001.jpeg", "v/c01_0002.jpeg", "v/c01_0004.jpeg"]), _times(["a.jpg", "b.jpg"])
    ([0.0, 0.5, 1.5], [0.0, 0.5])
    """
    found = [re.findall(r"\d+", str(name).rpartition("/")[2].rpartition(".")[0])[-1:] for name in names]
    numbers = [int(number) for one in found for number in one]
    rising = len(numbers) == len(names) and all(a < b for a, b in itertools.pairwise(numbers))
    if not rising or numbers[0] < 1 or numbers[-1] > 1_000_000:
        return [n * _STEP for n in range(len(names))]
    return [(number - 1) * _STEP for number in numbers]
