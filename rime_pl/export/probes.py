"""Items of every kind that each loader must embed as our code does, and how other libraries take them.

Called by parity.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from rime_pl.processing import RimeProcessor
from rime_pl.types import Clip, Item, Page, frames_of
from rime_pl.visual_inputs import TOGETHER

#: A probe with more visual tokens is compared by its tokens only: a forward could take minutes.
MOST_TOKENS = 2048
#: A probe with more pixels is not drawn.
MOST_PIXELS = 32_000_000
#: Names of the probes outside of the bounds, and why one of them can be left out.
OUTSIDE = tuple(f"{size} {kind}" for size in ("large", "small") for kind in ("picture", "page", "clip"))
NO_PROBE = f"more than {MOST_PIXELS:,} pixels, or another library reads it with other bounds"
_REWRITE = "A red ring on white ground."
Messages = list[dict[str, Any]]


def probes(processor: RimeProcessor, instruction: str, clips: bool) -> dict[str, Item]:
    """Return name -> item: text, picture, several pictures, clip, both, and media outside the bounds.

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
        found["clip"] = _clip(*frames)
    return found | outside_bounds(processor, clips)


def outside_bounds(processor: RimeProcessor, clips: bool) -> dict[str, Item]:
    """Return media above the largest and below the smallest area that the training had.

    Within the bounds, a loader that does not know them gives the same tokens. A page is left out where pages
    have bounds of their own, because other libraries read it as a picture.

    Args:
        processor: Says the bounds.
        clips: Whether there are clips.
    """
    media = processor.media
    pictures = media.picture_size or media.images.size
    found = {}
    for name, edge, share in (("large", "longest_edge", 1.5), ("small", "shortest_edge", 0.5)):
        width, height = _sides(share * pictures[edge])
        if width * height > MOST_PIXELS:
            continue
        found[f"{name} picture"] = Item("", (_picture(3, width, height),))
        if media.page_size == media.picture_size:
            found[f"{name} page"] = Item("", (Page(_picture(4, height, width)),))
    if clips:
        frames = media.frame_size or media.videos.size
        whole = media.timed and media.frame_size is None  # then the bounds are those of all frames together
        for name, edge, share in (("large", "longest_edge", 1.5), ("small", "shortest_edge", 0.5)):
            width, height = _sides(share * frames[edge] / (TOGETHER if whole else 1))
            if TOGETHER * width * height <= MOST_PIXELS:
                found[f"{name} clip"] = _clip(*(_picture(5 + n, width, height) for n in range(TOGETHER)))
    return found


def affordable(processor: RimeProcessor, items: Mapping[str, Item]) -> dict[str, Item]:
    """Return the probes that the model embeds; of the others, only the tokens are compared."""
    return {name: item for name, item in items.items() if _visual_tokens(processor, item) <= MOST_TOKENS}


def _visual_tokens(processor: RimeProcessor, item: Item) -> int:
    total = 0
    for medium in item.media:
        frames = frames_of(medium)
        tokens, _ = processor.media.size_of(type(medium), len(frames), frames[0].height, frames[0].width)
        total += tokens
    return total


def _sides(area: float) -> tuple[int, int]:
    """Return width and height of a picture of an area, three to two."""
    width = math.sqrt(1.5 * area)
    return math.ceil(width), math.ceil(area / width)


def _clip(*frames: Image.Image) -> Item:
    return Item("", (Clip(frames, tuple(n / 2 for n in range(len(frames)))),))


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
    noise = generator.integers(-8, 9, (height, width, 3), dtype=np.int16)
    return Image.fromarray((np.asarray(areas).astype(np.int16) + noise).clip(0, 255).astype(np.uint8))


def messages(item: Item, rewrite: str | None = None) -> Messages:
    """Return an item as messages of a chat, with its rewrite if one is given."""
    content: list[dict[str, Any]] = []
    for medium in item.media:
        if isinstance(medium, Clip):
            content.append({"type": "video", "video": list(medium.frames)})
        else:
            content.append({"type": "image", "image": frames_of(medium)[0]})
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
    pictures = [frames_of(medium)[0] for medium in item.media if not isinstance(medium, Clip)]
    clips = [medium for medium in item.media if isinstance(medium, Clip)]
    if pictures:
        found["image"] = pictures if len(pictures) > 1 else pictures[0]
    for clip in clips:
        found["video"] = {"array": list(clip.frames), "video_metadata": _times(clip)}
    return found | ({"text": item.text} if item.text else {})
