"""Builds a corpus from LLaVA-Hound: clips as folders of frames, with captions and questions.

Called by ``rime shards llava-hound``; see docs/reference/training-sets.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rime_pl.clips import in_natural_order
from rime_pl.datamodules.builders.building import build_corpus
from rime_pl.datamodules.builders.planning import Expected, Settings, Source
from rime_pl.datamodules.builders.public.frames import frames_of_list
from rime_pl.datamodules.builders.public.placeholders import without_placeholders
from rime_pl.datamodules.builders.sources.drafts import (
    Draft,
    FrameFiles,
    Refused,
    identity,
    text_identity,
    text_of,
)
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.paths import folder_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.errors import DataError
from rime_pl.types import Item

Task = Literal["caption", "video", "qa"]
_CAPTIONS = "video_caption_300k"
_QUESTIONS = "video_240k_caption_15k"
#: Lines of the file of questions that are questions; captions follow.
_NUM_QUESTIONS = 240_000
_FIND_VIDEO = "Find a video that contains the following visual content:"
_VIDEO = "Understand the content of the provided video."
_PICTURES = (".jpeg", ".jpg", ".png")


def build(
    output: Path,
    common: Settings = Settings(),
    *,
    source: Path,
    media: Path,
    tasks: list[Task] | None = None,
    frames: int = 8,
) -> None:
    """Build LLaVA-Hound: clips find captions, captions find clips, and clips with questions find answers.

    Download ShareGPTVideo/train_video_and_instruction (Apache-2.0; clips keep their terms): train_300k/
    unpacked, 138 GB of frames, and video_instruction/train/sft/. A clip is stored once for each of its pairs.

    For example: rime shards llava-hound --source sft --media train_300k --output data/llava-hound

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: Folder with video_caption_300k.jsonl and video_240k_caption_15k.jsonl.
        media: Folder with a folder of frames for each clip (train_300k, unpacked).
        tasks: Tasks among caption, video and qa; all three if not given.
        frames: Number of frames of a clip.

    Raises:
        RimeError: If too many rows are refused, or a split gets no rows.
    """
    build_corpus(output, LlavaHound(source, media, tasks or ["caption", "video", "qa"], frames), common)


class LlavaHound(Source):
    """Lines of LLaVA-Hound's two files."""

    name = "llava-hound"
    licence = "LLaVA-Hound: Apache-2.0. Clips of ActivityNet, VIDAL and WebVid keep their terms."

    def __init__(self, folder: Path, media: Path, tasks: list[Task], frames: int) -> None:
        if frames < 1:
            raise DataError(f"--frames must be at least 1, but is {frames}.")
        self.media, self.tasks, self.frames = media, tasks, frames
        names = [_CAPTIONS] * ("caption" in tasks or "video" in tasks) + [_QUESTIONS] * ("qa" in tasks)
        self.files = [JsonFile(folder / f"{name}.jsonl", f"{name}.jsonl") for name in names]
        rows = {_CAPTIONS: Expected(300_000, 5_000), _QUESTIONS: Expected(255_000, 5_000)}
        self.expected = {name: rows[name] for name in names}
        self.arguments = {"tasks": list(tasks), "frames": frames}

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the name of the file."""
        return file.path.stem

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft]:
        """Yield the pairs of a line: caption and video retrieval of a caption, or a question."""
        questions = file.path.stem == _QUESTIONS
        if questions and row > _NUM_QUESTIONS:
            return
        asked, told = _turns(values)
        video = text_of(values, "video")
        clip = (self._clip(video),)
        question, notes = without_placeholders(asked, 1)
        if questions:
            query = Item(question, (), identity(video, question))
            yield Draft(
                "video_qa",
                "answers",
                query,
                Item(told, (), text_identity(told)),
                clip,
                group=video,
                notes=notes,
            )
            return
        if "caption" in self.tasks:
            query = Item(question, (), video)
            yield Draft(
                "video_to_caption", "captions", query, Item(told, (), video), clip, group=video, notes=notes
            )
        if "video" in self.tasks:
            query, target = Item(told, (), video, _FIND_VIDEO), Item("", (), video, _VIDEO)
            yield Draft("caption_to_video", "videos", query, target, (), clip, group=video)

    def _clip(self, video: str) -> FrameFiles:
        folder = folder_below(self.media, video)
        return frames_of_list(self.media, [f"{video}/{name}" for name in _frames_in(folder)], self.frames)


@lru_cache(maxsize=1024)
def _frames_in(folder: Path) -> tuple[str, ...]:
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in _PICTURES]
    return tuple(in_natural_order(names))


def _turns(values: dict[str, Any]) -> tuple[str, str]:
    """Return what the human asks and the model answers."""
    turns = values.get("conversations")
    if isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, dict) for turn in turns):
        first, second = turns
        if first.get("from") == "human" and second.get("from") == "gpt":
            return text_of(first, "value"), text_of(second, "value").strip()
    raise Refused(
        "unknown form of a record",
        f"'conversations' must hold a turn of the human and one of the model, but is {turns!r:.120}.",
    )
