"""Builds corpora from the JSON files of UME-R1 and RIME, for SFT and for reinforcement learning.

Unverified: we have read their trainers, but seen no record. Called by ``rime shards ume-r1`` and
``rime shards rime-json``; see docs/reference/training-sets.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.building import build_corpus
from rime_pl.datamodules.builders.planning import ALL_ROWS, Expected, Settings, Source
from rime_pl.datamodules.builders.public.frames import frames_of_list
from rime_pl.datamodules.builders.public.instructions import split_instruction
from rime_pl.datamodules.builders.public.placeholders import without_placeholders
from rime_pl.datamodules.builders.public.responses import read_response
from rime_pl.datamodules.builders.sources.drafts import (
    Draft,
    MediumFile,
    Refused,
    text_identity,
    text_of,
)
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.parquet_files import files_in
from rime_pl.datamodules.builders.sources.paths import picture_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.errors import DataError
from rime_pl.types import Item

#: What may name the data set of a record.
_NAMES = ("dataset_name", "dataset", "subset", "source", "task_name")
#: The picture that UME-R1 puts on texts, because its trainer needs one.
_BLANK = "blank.jpg"
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_Side = tuple[Item, tuple[MediumFile, ...], tuple[str, ...]]


def build_ume_r1(
    output: Path,
    common: Settings = Settings(),
    *,
    source: Path,
    media: Path,
    frames: int = 8,
) -> None:
    """Build UME-R1's training set, with its reasoning and answers as rewrites (unverified).

    Download zhibinlan/UME-sft-train (1.46 million pairs) or UME-rl-train.json (about 11,000), and the media
    of MMEB-train. The format is as their trainer reads it; we have not seen a record.

    For example: rime shards ume-r1 --source UME-sft-train.json --media MMEB-train --output data/ume-r1

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: JSON file, or folder of JSON files: one list of records, or one record a line.
        media: Folder with images/, llavahound/, vidore/ and visrag/.
        frames: Number of frames of a clip.

    Raises:
        RimeError: If too many records are refused, or a split gets no pairs.
    """
    corpus = UMEJson("ume-r1", "UME-R1 data: see its card. Media keep their terms.", source, media, frames)
    rows = Expected(11_000, 1_000) if corpus.for_rl else Expected(1_460_000, 5_000)
    corpus.expected = {ALL_ROWS: rows}
    build_corpus(output, corpus, common)


def build_rime_json(
    output: Path,
    common: Settings = Settings(),
    *,
    source: Path,
    media: Path,
    frames: int = 8,
) -> None:
    """Build RIME's training set, with its rewrites (unverified).

    Download leafyseay/RIME-Train: the folder RIME-SFT/ with a file for each data set, or
    RIME-RL/RIME-rl.json, and the media of MMEB-train. The format is as their trainer reads it; we have
    not seen a record.

    For example: rime shards rime-json --source RIME-SFT --media MMEB-train --output data/rime

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: JSON file, or folder of JSON files: one list of records, or one record a line.
        media: Folder with images/, llavahound/, vidore/ and visrag/.
        frames: Number of frames of a clip.

    Raises:
        RimeError: If too many records are refused, or a split gets no pairs.
    """
    corpus = UMEJson("rime-json", "RIME-Train: see its card. Media keep their terms.", source, media, frames)
    build_corpus(output, corpus, common)


class UMEJson(Source):
    """Records of UME-R1's and RIME's trainers, for SFT (two conversations) or RL (texts and media)."""

    def __init__(self, name: str, licence: str, path: Path, media: Path, frames: int) -> None:
        if frames < 1:
            raise DataError(f"--frames must be at least 1, but is {frames}.")
        self.name, self.licence, self.media, self.frames = name, licence, media, frames
        paths = [*files_in(path, "*.json"), *files_in(path, "*.jsonl")] if path.is_dir() else [path]
        if not paths:
            raise DataError(f"--source must be a JSON file or a folder of JSON files, but {path} has none.")
        self.files = [JsonFile(one, one.name) for one in paths]
        first = next((r.values for r in self.files[0].records() if not isinstance(r.values, Refused)), {})
        self.for_rl = "qry_text" in first
        self.expected = {}
        self.arguments = {"frames": frames}

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the data set that a record names, or else the name of the file."""
        names = (values.get(name) for name in _NAMES)
        return next(
            (name for name in names if isinstance(name, str) and name.strip()), file.path.stem
        ).strip()

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft]:
        """Yield the pair of a record."""
        subset = self.subset(file, values)
        read = self._flat_side if "qry_text" in values or "pos_text" in values else self._side
        query, query_files, query_notes = read(values, "qry")
        target, target_files, target_notes = read(values, "pos")
        if target_files:  # media are the content; a text is equal if its words are
            target = replace(target, content_id=_shown(target_files))
        notes = (*query_notes, *target_notes)
        yield Draft(subset, subset, query, target, query_files, target_files, notes=notes)

    def _side(self, values: dict[str, Any], name: str) -> _Side:
        """Return a side of an SFT record."""
        side = values.get(name)
        if not isinstance(side, dict):
            raise Refused(
                "unknown form of a record", f"field {name!r} must be an object, but is {side!r:.90}."
            )
        said = _conversation(side, name)
        files, notes = self._files(side.get("image"), side.get("video"))
        item = self._item(said["human"].partition("<disc_emb>")[0], files, notes)
        if said.get("gpt", "").strip():
            rewrite, cot = read_response(said["gpt"])
            item = replace(item, rewrite=rewrite, cot=cot)
        else:
            notes.append("side without a response")
        return item, files, tuple(notes)

    def _flat_side(self, values: dict[str, Any], name: str) -> _Side:
        """Return a side of an RL record, which has no response."""
        files, notes = self._files(values.get(f"{name}_image"), values.get(f"{name}_video"))
        text = text_of(values, f"{name}_text").partition("<disc_emb>")[0]
        return self._item(text, files, notes), files, tuple(notes)

    def _item(self, text: str, files: tuple[MediumFile, ...], notes: list[str]) -> Item:
        """Return a side without its media; more is added to ``notes``."""
        blank = "blank picture of a text, dropped" in notes
        words, repaired = without_placeholders(text, len(files))
        notes += [note for note in repaired if not (blank and note.startswith("placeholder without"))]
        instruction, words = split_instruction(words, bool(files))
        return Item(words, (), text_identity(words, *(file.name for file in files)), instruction)

    def _files(self, image: object, video: object) -> tuple[tuple[MediumFile, ...], list[str]]:
        """Return the media of a side; "", [""] and null stand for none."""
        pictures = [one for one in _listed(image, "image") if one != ""]
        shown = [one for one in pictures if not (isinstance(one, str) and Path(one).name == _BLANK)]
        notes = ["blank picture of a text, dropped"] if len(shown) < len(pictures) else []
        files: list[MediumFile] = [picture_below(self.media, one) for one in shown]
        listed = [one for one in _listed(video, "video") if one != ""]
        clips = (
            listed if listed and all(isinstance(one, list) for one in listed) else [listed] if listed else []
        )
        files += [frames_of_list(self.media, clip, self.frames) for clip in clips]
        return tuple(files), notes


def _listed(value: object, field: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise Refused("unknown form of a record", f"{field!r} must name files, but is {value!r:.90}.")


def _conversation(side: dict[str, Any], name: str) -> dict[str, str]:
    """Return what human and model say; each once."""
    turns = side.get("conversations", side.get("messages"))
    said: dict[str, str] = {}
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            break
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if speaker == "system":
            continue
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None or role in said or not isinstance(text, str):
            break
        said[role] = text
    else:
        if "human" in said:
            return said
    raise Refused(
        "unknown form of a record",
        f"'conversations' of {name!r} must hold a turn of the human and one of the model, but is "
        f"{turns!r:.120}.",
    )


def _shown(files: tuple[MediumFile, ...]) -> str:
    return "\n".join(file.name for file in files)
