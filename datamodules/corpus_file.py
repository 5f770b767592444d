"""Reads ``corpus.json``, which says what a corpus folder holds.

Called by all that opens a corpus. The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rime_pl.datamodules.remote import CacheSettings, is_remote, open_remote
from rime_pl.datamodules.split_index import FORMAT_VERSION, INDEX_AGAIN
from rime_pl.errors import DataError

CORPUS_FILE = "corpus.json"
_LONGEST_NAME = 200  # bytes; systems take 255, and a process adds a suffix
AGAIN = "Build the corpus again."


def read_corpus(path: str | Path, cache: CacheSettings = CacheSettings()) -> dict[str, Any]:
    """Return ``corpus.json`` of a corpus folder, or of a remote corpus.

    Raises:
        DataError: If the folder or the file is missing, unreadable or of another format version.
    """
    if is_remote(path):
        _, content = open_remote(str(path), cache)
        return checked_corpus(read_object(content, f"{path}/{CORPUS_FILE}"), f"{path}/{CORPUS_FILE}")
    file = Path(path) / CORPUS_FILE
    build = "Build one with `rime shards openmoji --output FOLDER` and set data.path to FOLDER."
    if not Path(path).is_dir():
        near = _near(Path(path))
        raise DataError(f"data.path must be a corpus folder, but {str(path)!r} does not exist. {near}{build}")
    if not file.is_file():
        raise DataError(
            f"data.path must be a finished corpus, but folder {str(path)!r} has no {CORPUS_FILE}. {build} "
            f"For plain tars, make it with `rime shards index --path {path}`."
        )
    return checked_corpus(read_object(file.read_bytes(), str(file)), str(file))


def checked_corpus(corpus: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the content of ``corpus.json``.

    Raises:
        DataError: If it is of another format version or names a file outside its folder.
    """
    if corpus.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{file}: field 'format' must be {FORMAT_VERSION}, but is {corpus.get('format')!r}. {INDEX_AGAIN}"
        )
    splits = corpus.get("splits")
    if not isinstance(splits, dict) or not all(_names_shards(*split) for split in splits.items()):
        raise DataError(f"{file}: field 'splits' must name the tars of each split, but does not. {AGAIN}")
    if not isinstance(data_hash := corpus.get("data_hash"), str):
        raise DataError(f"{file}: field 'data_hash' must be text, but is {data_hash!r:.90}. {AGAIN}")
    return corpus


def read_object(data: bytes, name: str) -> dict[str, Any]:
    """Return a JSON object; raise a DataError if the bytes hold none; see ``strict_json``."""
    try:
        content = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: malformed JSON ({error}). {AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: must hold a JSON object, but holds {content!r:.90}. {AGAIN}")
    return content


def strict_json(data: bytes) -> Any:
    """Return the value of JSON in UTF-8.

    Raises:
        ValueError: If it is none, names a field of an object twice, or holds NaN or Infinity. Other readers
            take the first field or the last, and know no such numbers.
        RecursionError: If it is nested too deeply.
    """
    text = data.decode("utf-8-sig")
    return _STRICT.decode(text)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"field {twice!r} is there twice")
    return content


def refuse_constant(name: str) -> None:
    """Raise a ValueError: NaN and Infinity are no JSON, although Python reads them."""
    raise ValueError(f"{name} is no number of JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=refuse_constant)


def _near(path: Path) -> str:
    """Return a question about a corpus whose name is like that of a folder that does not exist."""
    folders = [
        file.parent for parent in (path.parent, Path("data")) for file in parent.glob(f"*/{CORPUS_FILE}")
    ]
    known = {folder.name: folder for folder in folders}
    return "".join(
        f"Did you mean {str(known[name])!r}? " for name in get_close_matches(path.name, known, n=1)
    )


def _names_shards(split: str, about: Any) -> bool:
    """Return whether a split of ``corpus.json`` lists plain file names, and so none outside its folder."""
    shards, samples = (about.get("shards"), about.get("samples")) if isinstance(about, dict) else (None, None)
    return (
        isinstance(shards, list)
        and isinstance(samples, int)
        and is_plain(split)
        and all(is_plain(name) and name.endswith(".tar") for name in shards)
    )


def is_plain(name: Any) -> bool:
    """Return whether a name leads to nothing outside its folder."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return False
    return Path(name).name == name not in ("", "..")
