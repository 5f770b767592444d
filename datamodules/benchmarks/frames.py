"""Clips of a benchmark as their frames lie on disk: which files are taken, and in which order.

Called by the readers of MMEB-V2 and UVRB. Both keep a folder of pictures for each video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rime_pl.clips import in_natural_order
from rime_pl.datamodules.benchmarks.rows import folder_in, told
from rime_pl.datamodules.builders.public.frames import frames_of_list
from rime_pl.errors import DataError
from rime_pl.types import Clip

#: Frames of a clip that the protocols show to a model.
FRAMES = 8
_SUFFIXES = (".jpg", ".jpeg", ".png")


def clip_in(root: Path, folder: str, pad: bool = False, every: bool = False) -> Clip:
    """Return the frames of a clip as paths, not opened.

    Of 8 files or more the truncated integers of 8 equally spaced points are taken, the first and the last
    file among them; of fewer, all. Files have no times: the file with the number k is taken to stand at
    (k - 1) / 2 seconds, as in training.

    Args:
        root: Folder that no frame may lie outside of.
        folder: Folder of the clip, below ``root``.
        pad: Whether the last frame is repeated until there are 8.
        every: Whether all files are taken, however many there are.

    Raises:
        DataError: If the folder is missing, has no pictures, or leads outside ``root``.
    """
    place = folder_in(root, folder)
    files = [one.name for one in place.iterdir() if one.suffix.lower() in _SUFFIXES]
    names = in_natural_order([name for name in files if not name.startswith("._")])  # macOS: not pictures
    if not names:
        raise DataError(f"{place} must hold the frames of a clip ({', '.join(_SUFFIXES)}), but holds none.")
    with told(folder):
        taken = frames_of_list(root, [f"{folder}/{name}" for name in names], len(names) if every else FRAMES)
    paths, times = list(taken.paths), list(taken.times)
    while pad and not every and len(paths) < FRAMES:
        paths.append(paths[-1])
        times.append(times[-1] + 0.5)
    frames: Any = tuple(paths)  # opened when their batch is due
    return Clip(frames, tuple(times))
