"""Checks one row of a table of pairs and tells every fault in it; its media are not opened.

Called by table.py, which reads the table.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from rime_pl.clips import PAGE_SIDE, count_pages
from rime_pl.datamodules.builders.sources.drafts import (
    Draft,
    MediumFile,
    PdfPage,
    PictureFile,
    Refused,
    VideoFile,
)
from rime_pl.datamodules.builders.sources.paths import file_below, seen_from
from rime_pl.datamodules.faults import Fault
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair

#: The media that a table can name.
TableFile: TypeAlias = PictureFile | VideoFile | PdfPage
SIDES = ("query", "target")
SPLITS = ("train", "val", "test", "distractors")
MEDIA = ("image", "video", "page")
_SIDE_COLUMNS = ("text", *MEDIA, "instruction", "rewrite", "cot", "content_id")
COLUMNS = (
    *(f"query_{name}" for name in _SIDE_COLUMNS),
    *(f"target_{name}" for name in _SIDE_COLUMNS),
    "task",
    "gallery",
    "split",
)
#: Columns of a table of captions: each row is a pair in both directions.
CAPTION_COLUMNS = ("caption", *MEDIA, "content_id", "split")
#: Names, not texts: spaces around them mean nothing.
_NAMES = ("query_content_id", "target_content_id", "task", "gallery", "split")
_FILES = tuple(column for column in COLUMNS if column.endswith(tuple(f"_{kind}" for kind in MEDIA)))
#: A side with more pages would not fit into a prompt.
_MOST_PAGES = 256
#: "manual.pdf#3" or "manual.pdf#3-5"; pages count from 1.
_PAGES = re.compile(r"(.*\.pdf)(?:#(\d{1,9})(?:-(\d{1,9}))?)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class MediaSettings:
    """How media of a table are taken.

    Args:
        frames: Number of frames of a video.
        frame_side: Pixels of the longer side of a frame; larger ones are made smaller.
        page_side: Pixels of the longer side of a page of a PDF.
    """

    frames: int = 8
    frame_side: int = 448
    page_side: int = PAGE_SIDE

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("frame_side", 16), ("page_side", 16)):
            if getattr(self, name) < least:
                raise DataError(f"--{name} must be at least {least}, but is {getattr(self, name)}.")


@dataclass(frozen=True)
class Row:
    """One good row. Its media are only known to be there; nobody has opened them."""

    where: str  # "pairs.csv line 7"
    pair: Pair  # without its media
    files: dict[str, tuple[TableFile, ...]]  # "query" and "target" -> media
    split: str  # "" if the table does not say
    captioned: bool = False  # one of the two pairs of a row of a table of captions
    values: dict[str, Any] = field(default_factory=dict)  # column -> value, as the table holds it

    def draft(self) -> TableDraft:
        """Return the pair and its files, which can be opened."""
        pair, files = self.pair, self.files
        sides = pair.query, pair.target, files["query"], files["target"]
        return TableDraft(pair.dataset, pair.gallery, *sides, captioned=self.captioned)


@dataclass(frozen=True)
class TableDraft(Draft):
    """A draft that tells all media that cannot be used, each with its column."""

    captioned: bool = False

    def check(self) -> None:
        """Do nothing: rows were checked, and a special token belongs to a model."""

    def pair(self, key: str, source: str) -> Pair:
        """Return the pair with its media.

        Raises:
            Refused: If some cannot be used; it holds one refusal for each.
        """
        refused: list[Refused] = []
        media: dict[str, list[Any]] = {"query": [], "target": []}
        for side, files in (("query", self.query_files), ("target", self.target_files)):
            for file in files:
                try:
                    media[side].append(file.open())
                except (DataError, FileNotFoundError, PermissionError) as error:
                    column = _column(file) if self.captioned else f"{side}_{_column(file)}"
                    refused.append(Refused(file.kind, f"field '{column}': {error}"))
        if refused:
            raise Refused(refused[0].kind, refused[0].says, refused[1:])
        query = None if self.query is None else replace(self.query, media=tuple(media["query"]))
        target = replace(self.target, media=tuple(media["target"]))
        return Pair(key, self.task, self.gallery, query, target, source=source)


def _column(file: MediumFile) -> str:
    if isinstance(file, VideoFile):
        return "video"
    return "page" if isinstance(file, PdfPage) or (isinstance(file, PictureFile) and file.page) else "image"


class Line:
    """Checks one row and tells every fault in it.

    Args:
        where: What a fault calls the row.
        values: Column -> value.
        media: Folder of the media.
        faults: Where faults are added.
        settings: How media are taken.
    """

    def __init__(
        self,
        where: str,
        values: dict[str, Any],
        media: Path,
        faults: list[Fault],
        settings: MediaSettings,
    ) -> None:
        self.where, self.values, self.media, self.faults = where, values, media, faults
        self.settings = settings

    def row(self, key: str, content_of: str = "target") -> Row:
        """Return the row; if it has faults, what can be read of it.

        Args:
            key: Key of the sample.
            content_of: Side whose media give the target its content id, if the row gives none.
        """
        before = len(self.faults)
        texts = {column: self._text(column) for column in COLUMNS if column not in _FILES}
        files = {
            side: tuple(file for kind in MEDIA for file in self._files(f"{side}_{kind}", kind))
            for side in SIDES
        }
        split = texts["split"]
        if split and split not in SPLITS:
            self._tell("unknown split", f"field 'split' must be one of {list(SPLITS)}, but is {split!r}.")
        shared = _content("", files["query"]) if content_of == "query" and files["query"] else ""
        target = self._item("target", texts, files, shared)
        content = "" if target is None else target.content_id
        query = None if split == "distractors" else self._item("query", texts, files, content)
        if len(self.faults) == before and not any(texts.values()) and not any(files.values()):
            self._tell("empty row", "the row is empty. Delete it.")
        else:
            if target is None:
                self._tell("no target", f"{_one_of('target')} Add one, or a video or a page.")
            if query is None and split != "distractors":
                hint = "or set 'split' to 'distractors' if this is a gallery item without a query."
                self._tell("no query", f"{_one_of('query')} Add one, {hint}")
        gallery = texts["gallery"] or ("pictures" if files["target"] else "texts")
        pair = Pair(key, texts["task"] or "pairs", gallery, query, target or Item(""))
        return Row(self.where, pair, files if query else {**files, "query": ()}, split, values=self.values)

    def _is_empty(self, side: str) -> bool:
        """Return whether a side is given neither text nor media; a wrong value is told elsewhere."""
        given: list[Any] = [self.values.get(f"{side}_text")]
        for kind in MEDIA:
            value = self.values.get(f"{side}_{kind}")
            names = value.split(";") if isinstance(value, str) else value
            given += names if isinstance(names, list) else [names]
        return not any(value.strip() if isinstance(value, str) else value for value in given)

    def _item(
        self, side: str, texts: dict[str, str], files: dict[str, tuple[TableFile, ...]], content_id: str
    ) -> Item | None:
        """Return one side without its media, or None if it has neither text nor media."""
        given = {name: texts[f"{side}_{name}"] for name in _SIDE_COLUMNS if name not in MEDIA}
        if self._is_empty(side):
            return None
        content = given["content_id"] or content_id
        try:
            content = content or _content(given["text"], files[side])
        except PermissionError as error:
            self._tell("unreadable picture", f"field '{side}_image': {error.filename} may not be read.")
        rewrite, cot = given["rewrite"] or None, given["cot"] or None
        return Item(given["text"], (), content, given["instruction"], rewrite, cot)

    def _text(self, column: str) -> str:
        value = self.values.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            self._tell("not a string", f"field '{column}' must be a string, but is {value!r:.90}.")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start : error.end]
            self._tell(
                "not a string", f"field '{column}' must be text, but holds half a character ({half!a})."
            )
            return ""
        if not value.strip():
            return ""
        return value.strip() if column in _NAMES else value

    def _files(self, column: str, kind: str) -> tuple[TableFile, ...]:
        names = self.values.get(column) or []
        if isinstance(names, str):
            names = names.split(";")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._tell(
                "not a string", f"field '{column}' must name files, but is {self.values[column]!r:.90}."
            )
            return ()
        given = [name.strip() for name in names if name.strip()]
        return tuple(file for name in given for file in self._media(column, kind, name))

    def _media(self, column: str, kind: str, name: str) -> list[TableFile]:
        """Return the media that a name stands for: one, or pages of a PDF."""
        pages = _PAGES.fullmatch(name) if kind == "page" else None
        if pages is not None:
            return self._pages(column, pages)
        path = self._file(column, name)
        if path is None:
            return []
        if kind == "video":
            return [VideoFile(path, name, self.settings.frames, self.settings.frame_side)]
        return [PictureFile(path, name, page=kind == "page")]

    def _pages(self, column: str, found: re.Match[str]) -> list[TableFile]:
        path = self._file(column, found[1])
        if path is None:
            return []
        first = int(found[2]) if found[2] else 1
        try:
            last = int(found[3] or found[2]) if found[2] else _page_count(path, path.stat().st_mtime_ns)
        except DataError as error:
            self._tell("unusable page", f"field '{column}': {error}")
            return []
        if not 1 <= first <= last or last - first >= _MOST_PAGES:
            said = (
                f"field '{column}': {found.group()!r:.90} must name 1 to {_MOST_PAGES} pages, counted from 1."
            )
            self._tell("unusable page", said)
            return []
        side = self.settings.page_side
        return [PdfPage(path, f"{found[1]}#{n}", n - 1, side) for n in range(first, last + 1)]

    def _file(self, column: str, name: str) -> Path | None:
        try:
            return file_below(self.media, seen_from(self.media, name))
        except (Refused, OSError, ValueError) as refused:
            path = self.media / name
            if (
                isinstance(refused, Refused)
                and refused.kind == "path outside the folder"
                and "://" not in name
            ):
                said = f"field '{column}': {refused.says} Give the folder that holds all files as --media."
                self._tell(refused.kind, said)
            else:
                self._tell("missing file", f"field '{column}': file {path!s:.300} {_why_not(path, name)}")
        return None

    def _tell(self, kind: str, says: str) -> None:
        self.faults.append(Fault(kind, self.where, says))


@lru_cache(maxsize=16)
def _names(folder: Path, changed: int) -> dict[str, str]:
    """Return the names in a folder by their small letters; it is read once, however many rows are wrong."""
    return {each.name.lower(): each.name for each in folder.iterdir()}


def _why_not(path: Path, name: str) -> str:
    """Return why a name leads to no file, and what to do."""
    try:
        same = _names(path.parent, path.parent.stat().st_mtime_ns).get(path.name.lower())
        folder = path.is_dir()
    except (OSError, ValueError):
        same, folder = None, False
    if "://" in name:
        return "does not exist, because it is an address. Download the picture."
    if folder:
        return "is a folder. Name a picture in it."
    if same:
        return f"does not exist, but {same!r} does. Write small and capital letters as in the name."
    return "does not exist." + (" Write '/' in the place of '\\'." if "\\" in name else " Check --media.")


def _one_of(side: str) -> str:
    return f"field '{side}_text' or '{side}_image' must have a value, but both are empty."


@lru_cache(maxsize=256)
def _page_count(path: Path, changed: int) -> int:
    """Return the number of pages of a PDF; it is opened once, however many rows name it."""
    return count_pages(path)


@lru_cache(maxsize=4096)
def _digest(path: Path, changed: int) -> bytes:
    """Return the hash of a file; it is read once, however many rows name it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content(text: str, files: tuple[TableFile, ...]) -> str:
    """Return a content id by hash: equal for the same text and the same files and pages."""
    digest = hashlib.sha256(text.encode())
    for file in files:
        if isinstance(file, PictureFile):
            digest.update(b"\0" + file.path.read_bytes())
        else:
            digest.update(b"\0" + _digest(file.path, file.path.stat().st_mtime_ns))
            digest.update(f"#{file.number}".encode() if isinstance(file, PdfPage) else b"")
    return digest.hexdigest()[:16]


def captioned(values: dict[str, Any], rewrites: bool = False) -> list[dict[str, Any]]:
    """Return the two pairs that a row of a table of captions stands for: each side finds the other.

    Args:
        values: Column -> value.
        rewrites: Whether the caption is also the rewrite of both sides.

    >>> [sorted(row) for row in captioned({"image": "a.png", "caption": "A cup."})]
    [['gallery', 'query_text', 'target_image', 'task'], ['gallery', 'query_image', 'target_text', 'task']]
    """
    kinds = [kind for kind in MEDIA if values.get(kind)] or ["image"]
    shown = "picture" if kinds[0] == "image" else kinds[0]
    both = {name: values[name] for name in ("split",) if name in values}
    if values.get("content_id"):
        both |= {f"{side}_content_id": values["content_id"] for side in SIDES}
    caption = values.get("caption")
    if rewrites and caption and any(values.get(kind) for kind in MEDIA):  # else the row is refused
        both |= {f"{side}_rewrite": caption for side in SIDES}
    find = {f"target_{kind}": values.get(kind) for kind in kinds} | {"query_text": caption}
    tell = {f"query_{kind}": values.get(kind) for kind in kinds} | {"target_text": caption}
    return [
        {**both, **find, "task": f"caption_to_{shown}", "gallery": f"{shown}s"},
        {**both, **tell, "task": f"{shown}_to_caption", "gallery": "captions"},
    ]


def in_words_of_captions(fault: Fault) -> Fault:
    """Return a fault of a row of captions with the names of its columns, which has no query and target."""
    says = re.sub(r"'(?:query|target)_(image|video|page|content_id)'", r"'\1'", fault.says)
    return replace(fault, says=re.sub(r"'(?:query|target)_text'", "'caption'", says))
