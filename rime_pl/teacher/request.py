"""One request to a teacher: made of one item, so that who writes a query's rewrite never sees its target.

The key of a request is a hash of all that decides its answer. Equal content is asked for once, and an answer
is found again in later runs. Called by jobs.py and client.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile

from rime_pl.media import open_picture
from rime_pl.teacher import wording
from rime_pl.teacher.settings import CHARACTERS, Teacher
from rime_pl.types import Item, frames_of

_QUALITY = 90  # of a JPEG
_PATCH = 28  # pixels of a side that Qwen2-VL makes a token; other models are of the same order


@dataclass(frozen=True)
class Request:
    """What the teacher is asked about one item."""

    key: str  # hash of all that decides the answer
    system: str
    text: str  # may be empty if there are pictures
    pictures: tuple[bytes, ...]  # files, as the corpus holds them
    name: str  # what an error calls the item
    instruction: str  # that of the item's task
    prompt_tokens: int  # estimate

    def messages(self, max_pixels: int) -> list[dict[str, Any]]:
        """Return the messages of the request; pictures are decoded here and sent as data URLs.

        Raises:
            DataError: If a picture cannot be decoded.
        """
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(picture, max_pixels, self.name)}}
            for picture in self.pictures
        ]
        if self.text:
            parts.append({"type": "text", "text": self.text})
        content = parts if self.pictures else self.text  # plain text is understood by text-only models, too
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]


def make_request(item: Item, name: str, system: str, teacher: Teacher, thoughts: str = "") -> Request:
    """Return the request about one item. Nothing but this item is in it.

    Args:
        item: One side of a pair; its pictures may be undecoded.
        name: What an error calls it.
        system: The prompt of its side.
        teacher: Settings of the endpoint.
        thoughts: The item's chain of thought, if it is to be distilled.
    """
    text = wording.about(item, thoughts)
    frames = [frame for medium in item.media for frame in frames_of(medium)]  # a clip is shown frame by frame
    pictures = tuple(map(file_of, frames))
    decides: list[Any] = [teacher.model, system, text, teacher.max_tokens, teacher.temperature]
    decides += [teacher.more_fields(), [hashlib.sha256(picture).hexdigest() for picture in pictures]]
    if pictures:
        decides.append(teacher.max_pixels)
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    visual = sum(_visual_tokens(image, teacher.max_pixels) for image in frames)
    tokens = (len(system) + len(text)) // CHARACTERS + visual + 1
    return Request(key, system, text, pictures, name, item.instruction, tokens)


def file_of(image: Image.Image) -> bytes:
    """Return the file of an undecoded picture, and of a decoded one a PNG."""
    if isinstance(image, ImageFile.ImageFile) and image.fp:
        image.fp.seek(0)
        return image.fp.read()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(picture: bytes, max_pixels: int, name: str) -> str:
    """Return a picture as a data URL: upright, on white, JPEG, at most ``max_pixels`` large."""
    image = scaled(open_picture(picture, name), max_pixels)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def scaled(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return a picture of at most ``max_pixels``, in its own shape."""
    factor = (max_pixels / (image.width * image.height)) ** 0.5
    if factor >= 1:
        return image
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))


def _visual_tokens(image: Image.Image, max_pixels: int) -> int:
    return -(-min(image.width * image.height, max_pixels) // _PATCH**2)
