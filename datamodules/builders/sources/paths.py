"""Finds the files that a data set names, and none outside the folder of its media.

All builders of public data sets call it. A data set comes from elsewhere, so its paths are not trusted.
"""

from __future__ import annotations

import os
import re
import stat
from functools import lru_cache
from pathlib import Path

from rime_pl.datamodules.builders.sources.drafts import PictureFile, Refused


def file_below(folder: Path, name: object) -> Path:
    """Return the file that ``name`` names below ``folder``.

    Raises:
        Refused: If the name is no text, absolute, leaves the folder (by ``..`` or a link), or leads to no
            ordinary file.
    """
    path = _below(folder, name)
    try:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            if not Path(os.path.realpath(path)).is_relative_to(_real(folder)):
                raise Refused("path outside the folder", f"{name!r:.300} is a link that leaves {folder}.")
            found = path.stat()
    except (OSError, ValueError) as error:
        raise Refused("missing file", f"{str(path)!r:.300} does not exist.") from error
    if not stat.S_ISREG(found.st_mode):  # to read a pipe or a device may never end
        raise Refused("missing file", f"{str(path)!r:.300} is no ordinary file.")
    return path


def seen_from(folder: Path, name: str) -> str:
    """Return an absolute path below a folder as the folder sees it; any other name as it is."""
    path = Path(name)
    for root in (folder.absolute(), folder.resolve()) if path.is_absolute() else ():
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return name


def picture_below(folder: Path, name: object, page: bool = False) -> PictureFile:
    """Return the picture that ``name`` names below ``folder``; raises as :func:`file_below`."""
    return PictureFile(file_below(folder, name), str(name), page)


def folder_below(folder: Path, name: object) -> Path:
    """Return the folder that ``name`` names below ``folder``; raises as :func:`file_below`."""
    path = _below(folder, name)
    real = _real(path)
    if not real.is_relative_to(_real(folder)):
        raise Refused("path outside the folder", f"{name!r:.300} is a link that leaves {folder}.")
    if not real.is_dir():
        raise Refused("missing folder", f"{str(path)!r:.300} does not exist.")
    return path


def _below(folder: Path, name: object) -> Path:
    if not isinstance(name, str):
        raise Refused("not a string", f"a file must be named by a text, but is {name!r:.90}.")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or "\0" in name or not _is_encodable(name):
        raise Refused("malformed path", f"{name!r:.90} must be the name of a file below {folder}.")
    if name[0] in "/\\" or re.match(r"[A-Za-z]:[/\\]", name) or "://" in name:
        said = f"{name!r:.300} must be a path below {folder.absolute()}."
        raise Refused("path outside the folder", said)
    if ".." in re.split(r"[/\\]", name):
        raise Refused("path outside the folder", f"{name!r:.300} must not contain '..'.")
    path = folder.joinpath(*parts)
    if not _real(path.parent).is_relative_to(_real(folder)):
        raise Refused("path outside the folder", f"{name!r:.300} passes a link that leaves {folder}.")
    return path


@lru_cache(maxsize=4096)
def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True
