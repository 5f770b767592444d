"""Opens a picture in one way, for builders, training, evaluation and search: upright, on white, 8-bit RGB.

What comes in is a photo or a file of any program: 16 bits, transparency, CMYK, palettes, EXIF orientation,
several frames. What comes out is what a person would see. docs/reference/data-format.md lists the rules.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rime_pl.errors import DataError

#: The image processor of Qwen-VL refuses pictures whose sides differ more.
MAX_ASPECT = 200
#: Brands in the header of HEIC files, bytes 8 to 12.
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def open_picture(source: str | Path | bytes | Image.Image, name: str = "") -> Image.Image:
    """Return a picture as a person would see it: decoded, upright, on white ground, 8-bit RGB.

    Of an animated picture it is the first frame. The result shares nothing with the source and holds no file
    open.

    Args:
        source: A file, the bytes of a file, or an opened picture.
        name: What an error calls the picture (default: its path).

    Returns:
        A picture of mode RGB.

    Raises:
        DataError: If the file is missing, or is not a picture that can be decoded and used.
        OSError: If the machine fails to read the file: a picture is not to blame for that.
    """
    if isinstance(source, str | Path):
        name = name or str(source)
        try:
            source = Path(source).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise DataError(f"{name} must be a picture file, but there is none.") from error
    name = name or "a picture"
    try:
        picture = _upright_rgb(source)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} must be a picture, but {_reason(source, error)}.") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders and EXIF readers raise whatever they stumble over
        raise DataError(f"{name} cannot be decoded: {error or type(error).__name__}.") from error
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise DataError(
            f"{name}: the longer side may be at most {MAX_ASPECT} times the shorter one, but the picture has "
            f"{picture.width} x {picture.height} pixels. Crop it."
        )
    return picture


def _upright_rgb(source: bytes | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return _rgb(ImageOps.exif_transpose(source))
    with _opened(source) as image:
        image.load()  # before the orientation is read: Pillow itself turns TIFF files here
        return _rgb(ImageOps.exif_transpose(image))


def _opened(data: bytes) -> Image.Image:
    """Open the bytes of a file; of HEIC only if pillow-heif is installed."""
    if _is_heic(data):
        try:
            from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            pass
        else:
            register_heif_opener()
    return Image.open(io.BytesIO(data))


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC


def _reason(source: bytes | Image.Image, error: Exception) -> str:
    if isinstance(source, bytes) and not source:
        return "the file is empty"
    if isinstance(source, bytes) and _is_heic(source):
        return "HEIC needs one more package: pip install pillow-heif, or save it as JPEG"
    return str(error) if isinstance(error, Image.DecompressionBombError) else "its format is not known"


def _rgb(image: Image.Image) -> Image.Image:
    """Return a new 8-bit RGB picture: 16 bits are scaled, and what is transparent shows white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("it has 32 bits a pixel and no known range. Save it with 8 or 16 bits")
        # 65535 / 257 = 255, rounded to the nearest
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("it has floating-point pixels and no known range. Save it with 8 or 16 bits")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        ground = Image.new("RGBA", shown.size, "white")
        return Image.alpha_composite(ground, shown).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
