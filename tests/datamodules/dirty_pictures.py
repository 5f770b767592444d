"""Picture files as people have them: formats, modes, sizes and damages, a few hundred bytes each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

TURN_LEFT = 6  # the orientation of EXIF that shows the right side of the stored picture below


def two_colours(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    return image


def encoded(image: Image.Image, form: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def turned(form: str = "JPEG", orientation: int = TURN_LEFT) -> bytes:
    """A picture of 40 x 20 pixels, red on the left, that is to be shown as 20 x 40, red above."""
    image = two_colours()
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, form, exif=exif)


def good_files() -> dict[str, bytes]:
    """Files that every picture viewer shows."""
    see_through = Image.new("RGBA", (24, 36), (0, 0, 0, 0))
    see_through.paste((200, 30, 10, 255), (4, 4, 20, 30))
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("lime", "red")]
    ramp = np.linspace(0, 65535, 32 * 16).astype(np.uint16).reshape(16, 32)
    return {
        "plain.jpg": encoded(Image.effect_noise((48, 32), 60).convert("RGB"), "JPEG"),
        "plain.png": encoded(two_colours(17, 51), "PNG"),
        "grey.jpg": encoded(Image.linear_gradient("L").resize((32, 40)), "JPEG"),
        "photo.webp": encoded(two_colours(64, 40), "WEBP"),
        "drawing.webp": encoded(two_colours(40, 64), "WEBP", lossless=True),
        "print.jpg": encoded(two_colours().convert("CMYK"), "JPEG"),
        "scan.png": encoded(Image.fromarray(ramp), "PNG"),
        "scan.tif": encoded(Image.fromarray(ramp), "TIFF"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "turned.jpg": turned(),
        "turned.png": turned("PNG"),
        "see_through.png": encoded(see_through, "PNG"),
        "palette.png": encoded(two_colours().quantize(4), "PNG"),
        "bitmap.bmp": encoded(two_colours(50, 50), "BMP"),
        "black_white.png": encoded(Image.new("1", (16, 16), 1), "PNG"),
        "large.png": encoded(Image.new("L", (8000, 6000), 200), "PNG", compress_level=1),
        "pixel.png": encoded(Image.new("RGB", (1, 1), "green"), "PNG"),
    }


def bad_files() -> dict[str, bytes]:
    """Files that no corpus can hold."""
    photo = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    return {
        "line.png": encoded(Image.new("RGB", (3, 900)), "PNG"),
        "half.jpg": photo[: len(photo) // 2],
        "half.png": encoded(Image.effect_noise((64, 64), 90), "PNG")[:900],
        "empty.jpg": b"",
        "words.png": b"not a picture",
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(64),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
