"""Where a folder lies that another one needs, also after both were moved.

Used for the base model of an adapter (backbone/base_path.py) and for the corpus of a run (run_folder.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def places_of(needed: str | Path, folder: Path) -> list[str]:
    """Return where ``needed`` lies, absolute and as seen from ``folder``; [] if it is no folder."""
    path = Path(needed).expanduser().resolve()
    return [str(path), os.path.relpath(path, folder.resolve())] if path.is_dir() else []


def tried(places: Sequence[str], folder: str | Path, name: str) -> list[Path]:
    """Return where to look for what ``folder`` needs: its places, and its name in the working folder.

    Seen from ``folder``, a place is right if both moved together.
    """
    paths = (*(Path(folder).resolve() / place for place in places), Path.cwd() / name)
    return [Path(os.path.normpath(path)) for path in paths]
