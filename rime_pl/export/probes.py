"""Items of every kind that each loader must embed as our code does, and how other libraries take them.

Called by parity.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from rime_pl.processing import RimeProcessor
from rime_pl.types import Clip, Item

_REWRITE = "A red ring on white ground."
Messages = list[dict[str, Any]]


def probes(processor: RimeProcessor, instruction: str, clips: bool) -> dict[str, Item]:
    """Return name -> item: text, picture, several pictures, clip, both.

    Args:
        processor: Says how many pictures an item may have.
        instruction: Of two of them, so that prompts are tested, too.
        clips: Whether there is a clip.
    """
    several = tuple(
        _picture(10 + n, 90 - 25 * n, 50 + 30 * n) for n in range(min(3, processor.prompt.media_limit))
    )
    found = {
        "text": Item("a woman firefighter with medium skin, 3.5 m tall", instruction=instruction),
        "picture": Item("", (_picture(1, 120, 80),)),
        "several pictures": Item("the same in green", several),
        "both": Item("the same in green", (_picture(2, 64, 96),), instruction=instruction),
    }
    if clips:
        frames = tuple(_picture(20 + n, 96, 64) for n in range(min(4, processor.prompt.frame_limit)))
        found["clip"] = Item("", (Clip(frames, tuple(n / 2 for n in range(len(frames)))),))
    return found


def rewrite_for(processor: RimeProcessor) -> str:
    """Return the rewrite that each probe is given, so that both sides read the same one."""
    words = _REWRITE.split()
    while words and len(processor.tokenizer(" ".join(words)).input_ids) > processor.prompt.max_rewrite_tokens:
        words.pop()
    return " ".join(words)


def _picture(seed: int, width: int, height: int) -> Image.Image:
    """Return a picture of a few coloured areas with noise, always the same one."""
    generator = np.random.default_rng(seed)
    areas = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = generator.integers(-8, 9, (height, width, 3))
    return Image.fromarray((np.asarray(areas).astype(int) + noise).clip(0, 255).astype(np.uint8))


def messages(item: Item, rewrite: str | None = None) -> Messages:
    """Return an item as messages of a chat, with its rewrite if one is given."""
    content: list[dict[str, Any]] = []
    for medium in item.media:
        if isinstance(medium, Clip):
            content.append({"type": "video", "video": list(medium.frames)})
        else:
            content.append({"type": "image", "image": medium})
    content += [_text(item.text)] if item.text else []
    chat = [{"role": "system", "content": [_text(item.instruction)]}] if item.instruction else []
    chat.append({"role": "user", "content": content})
    return chat if rewrite is None else [*chat, {"role": "assistant", "content": [_text(rewrite)]}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def clip_times(item: Item) -> list[dict[str, Any]]:
    """Return what transformers calls the metadata of each clip of an item: when its frames are shown."""
    return [_times(medium) for medium in item.media if isinstance(medium, Clip)]


def _times(clip: Clip) -> dict[str, Any]:
    count = len(clip.times)
    fps = (count - 1) / (clip.times[-1] - clip.times[0]) if count > 1 else 1.0
    return {"fps": fps, "total_num_frames": count, "frames_indices": list(range(count))}


def one_input(item: Item) -> dict[str, Any]:
    """Return an item as sentence-transformers takes it; its instruction goes in as the prompt."""
    found: dict[str, Any] = {}
    pictures = [medium for medium in item.media if not isinstance(medium, Clip)]
    clips = [medium for medium in item.media if isinstance(medium, Clip)]
    if pictures:
        found["image"] = pictures if len(pictures) > 1 else pictures[0]
    for clip in clips:
        found["video"] = {"array": list(clip.frames), "video_metadata": _times(clip)}
    return found | ({"text": item.text} if item.text else {})
