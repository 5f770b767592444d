"""What a user decides about the reading of a benchmark. Called by all readers beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ReadOptions:
    """How tasks are read; the result of an evaluation names these settings.

    Args:
        wording: Where an instruction stands. ``"parts"``: in ``Item.instruction``, where training puts it.
            ``"official"``: in ``Item.text``, joined with the text letter for letter as the official code
            joins them, and ``Item.instruction`` is empty.
        pad_clips: Whether the last frame of a clip with fewer than 8 frames is repeated up to 8, as the
            official code of MMEB-V2 does since 2026-06 (default: such a clip keeps its frames).
        captions: Folder with ``all_captions_<dataset>.json`` for the caption setting of MRMR (default: none,
            pictures are shown).
    """

    wording: Literal["parts", "official"] = "parts"
    pad_clips: bool = False
    captions: Path | None = None

    @property
    def told(self) -> str:
        """The wording in words, for ``BenchmarkTask.version``."""
        return "instruction in its own place" if self.wording == "parts" else "official text"

    @property
    def told_of_clips(self) -> str:
        """The wording, and what becomes of short clips."""
        return f"{self.told}; short clips {'padded to 8 frames' if self.pad_clips else 'not padded'}"


DEFAULT = ReadOptions()
