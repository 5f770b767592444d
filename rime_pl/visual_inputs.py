"""Turn the media of items into what a vision tower reads, and into their places in the prompts.

Called by processing.py. Pictures, pages and the frames of clips go through the image and the video processor
of the checkpoint. A picture is to the tower what a clip of two equal frames is, so the patches of all media
stand in one tensor, in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from rime_pl.errors import DataError, RimeError
from rime_pl.media import checked_clip, thinned
from rime_pl.prompts import PromptConfig, clip_slot, picture_slot
from rime_pl.types import Clip, Medium, Page, frames_of

#: Frames that the tower takes together.
TOGETHER = 2
#: Tokens of the time before each pair of frames, with the marks around the pair, at most.
MARK_TOKENS = 12
#: Seconds from frame to frame of a clip that has only one, where a model asks for them.
ONE_FRAME = 1.0


@dataclass(frozen=True)
class VisualInputs:
    """M media as a vision tower reads them."""

    pixel_values: Tensor | None  # (patches, patch_dim) uint8; None without media
    grid_thw: Tensor | None  # (M, 3) int64
    seconds: Tensor | None  # (M,) float64, see Prompts
    slots: list[str]  # M places in prompts


class MediaProcessor:
    """The image and the video processor of a checkpoint, with the bounds of a prompt.

    Args:
        processor: ``Qwen3VLProcessor``, ``Qwen2_5_VLProcessor``, ``Qwen2VLProcessor`` or one with the same
            interface.
        prompt: Bounds of pictures, pages and frames.

    Raises:
        RimeError: If a bound cannot hold.
    """

    def __init__(self, processor: Any, prompt: PromptConfig) -> None:
        self.images: Any = processor.image_processor
        self.videos: Any = getattr(processor, "video_processor", None)
        self.prompt = prompt
        #: Whether the prompt states times as text, and bounds of the video processor hold for a whole clip.
        self.timed = type(processor).__name__.startswith("Qwen3VL")
        self.picture_size = self._size("max_pixels", "min_pixels")
        pages = self._size("max_page_pixels", "min_page_pixels")
        self.page_size = self.picture_size if pages is None else pages
        self.frame_size = self._size("max_frame_pixels", "min_frame_pixels")

    def __call__(self, media: Sequence[Medium], names: Sequence[str]) -> VisualInputs:
        """Return media for the tower.

        Args:
            media: M media.
            names: What an error calls each of them.

        Raises:
            DataError: If a clip has frames of several sizes or times that do not fit, or if the checkpoint
                reads no clips.
        """
        if not media:
            return VisualInputs(None, None, None, [])
        parts: dict[int, tuple[Tensor, Tensor]] = {}  # patches and grid of each medium
        seconds, slots = torch.zeros(len(media), dtype=torch.float64), [""] * len(media)
        for kind, size in ((None, self.picture_size), (Page, self.page_size)):
            chosen = [n for n, one in enumerate(media) if _is_kind(one, kind)]
            pictures = [frames_of(media[number])[0] for number in chosen]
            for number, part in zip(chosen, self._pictures(pictures, size), strict=True):
                parts[number] = part
                slots[number] = picture_slot(self._tokens(part[1]))
        for number, clip in enumerate(media):
            if isinstance(clip, Clip):
                clip = thinned(clip, self.prompt.frame_limit)
                parts[number] = self._frames(clip, names[number])
                seconds[number] = TOGETHER * _spacing(clip)
                patches = int(parts[number][1][0])
                times = clip.times if self.timed else None
                slots[number] = clip_slot(patches, self._tokens(parts[number][1]) // patches, times)
        of_media = [parts[number] for number in range(len(media))]
        pixels, grid = torch.cat([part[0] for part in of_media]), torch.stack([part[1] for part in of_media])
        return VisualInputs(pixels, grid, seconds, slots)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return patches (P, patch_dim) as float32, scaled and normalised as the image processor would.

        Patches are kept as bytes until then: a fourth of the memory, and of what goes to the device.
        """
        settings = self.images
        scale = 1 / settings.rescale_factor if settings.do_rescale else 1.0
        mean, std = torch.zeros(1), torch.full((1,), scale)
        if settings.do_normalize:
            mean, std = torch.tensor(settings.image_mean) * scale, torch.tensor(settings.image_std) * scale
        values = pixels.float().view(len(pixels), len(mean), -1)  # channels, then time, rows and columns
        values = values.sub_(mean.to(pixels.device)[:, None]).div_(std.to(pixels.device)[:, None])
        return values.view(pixels.shape)

    def size_of(self, kind: type, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the visual tokens of a medium from its pixels, and the pixels that it is decoded to.

        Args:
            kind: Clip or Page; anything else is a picture.
            frames: Frames of a clip; 1 of the others.
            height, width: Of each frame.
        """
        merge = int(self.images.merge_size) ** 2
        if kind is not Clip:
            bounds = _bounds(self.page_size if kind is Page else self.picture_size)
            patches = self.images.get_number_of_image_patches(height, width, bounds)
            return patches // merge, height * width
        count = min(frames, self.prompt.frame_limit)
        even = count + count % TOGETHER
        size = self._clip_size(even)
        patches = self.videos.get_num_of_video_patches(even, height, width, {"size": size} if size else {})
        marks = even // TOGETHER * MARK_TOKENS if self.timed else 0
        return patches // merge + marks, count * height * width

    def _tokens(self, grid: Tensor) -> int:
        return int(grid.prod()) // int(self.images.merge_size) ** 2

    def _pictures(self, pictures: list[Image], size: dict[str, int] | None) -> list[tuple[Tensor, Tensor]]:
        """Return patches and grid of each picture."""
        if not pictures:
            return []
        bounds = {} if size is None else {"size": size}
        found = self.images(
            images=pictures, return_tensors="pt", do_rescale=False, do_normalize=False, **bounds
        )
        grid = found["image_grid_thw"]
        return list(zip(found["pixel_values"].split(grid.prod(-1).tolist()), grid, strict=True))

    def _frames(self, clip: Clip, name: str) -> tuple[Tensor, Tensor]:
        """Return patches and grid of a clip."""
        self._check(clip, name)
        frames = [*clip.frames, *([clip.frames[-1]] if len(clip.frames) % TOGETHER else [])]
        size = self._clip_size(len(frames))
        found = self.videos(
            videos=[np.stack([np.asarray(frame) for frame in frames])],
            return_tensors="pt",
            do_sample_frames=False,
            do_rescale=False,
            do_normalize=False,
            cap_pixels_per_frame=False,
            **({} if size is None else {"size": size}),
        )
        return found["pixel_values_videos"], found["video_grid_thw"][0]

    def _check(self, clip: Clip, name: str) -> None:
        checked_clip(clip, name)
        unlike = [
            setting
            for setting in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
            if _value(self.images, setting) != _value(self.videos, setting)
        ]
        if unlike:
            raise DataError(
                f"{name}: this base model reads no clips, because its video processor has another "
                f"{unlike[0]} than its image processor. Leave clips out, or use another base model."
            )

    def _clip_size(self, frames: int) -> dict[str, int] | None:
        """Return the bounds of a clip as the video processor takes them; Qwen3-VL's are of the whole clip."""
        if self.frame_size is None or not self.timed:
            return self.frame_size
        return {edge: pixels * frames for edge, pixels in self.frame_size.items()}

    def _size(self, largest: str, smallest: str) -> dict[str, int] | None:
        """Return the smallest and largest area of a picture, as Qwen's processors take them.

        Returns:
            None if neither bound is set, so that the base model's own hold.

        Raises:
            RimeError: If a bound leaves no visual token, or the smallest area is larger than the largest one.
        """
        name, prompt = "model.backbone.prompt", self.prompt
        most, least = getattr(prompt, largest), getattr(prompt, smallest)
        if most is None and least is None:
            return None
        if "page" in largest:  # what is not set for pages is as for pictures
            most, least = most or prompt.max_pixels, least or prompt.min_pixels
        side = self.images.patch_size * self.images.merge_size
        low, high = self.images.size["shortest_edge"], self.images.size["longest_edge"]
        if most is not None:
            if most < side**2:
                raise RimeError(
                    f"{name}.{largest} must be at least {side**2}, the {side} x {side} pixels of one visual "
                    f"token, but is {most}. For N visual tokens, set it to N x {side**2}."
                )
            low, high = min(low, most), most
        if least is not None:
            if least > high:
                raise RimeError(
                    f"{name}.{smallest} must be at most the {high} pixels of the largest picture, but is "
                    f"{least}. Lower it, or raise {name}.{largest}."
                )
            low = least
        return {"shortest_edge": int(low), "longest_edge": int(high)}


def _is_kind(medium: Medium, kind: type[Page] | None) -> bool:
    return isinstance(medium, kind) if kind else not isinstance(medium, Page | Clip)


def _bounds(size: dict[str, int] | None) -> dict[str, int]:
    limits = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    return {limits[edge]: pixels for edge, pixels in (size or {}).items()}


def _spacing(clip: Clip) -> float:
    """Return the mean seconds from frame to frame."""
    if len(clip.times) < 2:
        return ONE_FRAME
    return (clip.times[-1] - clip.times[0]) / (len(clip.times) - 1)


def _value(processor: Any, setting: str) -> Any:
    value = getattr(processor, setting, None)
    return list(value) if isinstance(value, list | tuple) else value
