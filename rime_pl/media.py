"""Opens a picture in one way, for builders, training, evaluation and search: upright, on white, 8-bit RGB.

What comes in is a photo or a file of any program: 16 bits, transparency, CMYK, palettes, EXIF orientation,
several frames. What comes out is what a person would see. docs/reference/data-format.md lists the rules.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rime_pl.errors import DataError
from rime_pl.types import Clip

#: The image processor of Qwen-VL refuses pictures whose sides differ more.
MAX_ASPECT = 200
#: A file of some kilobytes can hold so many pixels. With transparency they take 1.9 GB while it is opened.
MAX_PIXELS = 100_000_000
#: Scans of a JPEG: progressive ones have about ten. Each visits all pixels, and many fit in a small file.
MAX_SCANS = 200
#: Brands in the header of HEIC files, bytes 8 to 12.
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
#: What a system answers if a name leads to no file, whatever the state of the disk.
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_ORIENTATION = 0x0112  # of EXIF; 2 to 8 mean that the picture is to be turned
_SCAN = 0xDAFF  # 0xff, 0xda: marker before each scan of a JPEG; inside a scan a zero follows each 0xff
_HEAD = 12  # bytes that tell a HEIC file
_PNG_DEPTH = 24  # the byte that holds the bits of a channel


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
        source, name = _file(source, name)
    return _seen(source, name)[0]


def stored_picture(source: str | Path | bytes, name: str = "") -> bytes:
    """Return the bytes of a PNG or JPEG that shows what ``open_picture`` returns. A corpus keeps these.

    A plain file keeps its bytes: 8-bit RGB or grey, PNG or JPEG, one frame, upright, not transparent. Of the
    others, lossy formats (JPEG, WebP, HEIC) become a JPEG of quality 95 and all the rest a PNG, because a
    photo as PNG has several times the bytes.

    Args:
        source: A file, or the bytes of a file. It is decoded once, so a truncated one is found.
        name: What an error calls the picture (default: its path).

    Raises:
        DataError: As ``open_picture``.
        OSError: As ``open_picture``.
    """
    if isinstance(source, str | Path):
        source, name = _file(source, name)
    picture, form = _seen(source, name, stored=True)
    if not form:
        return source
    buffer = io.BytesIO()
    if form == "JPEG":
        picture.save(buffer, form, quality=95, subsampling=0)
    else:
        picture.save(buffer, form)
    return buffer.getvalue()


def picture_shape(source: str | Path | Image.Image) -> tuple[int, int] | None:
    """Return height and width of a picture in pixels, from its header: nothing is decoded.

    Returns:
        None if there is no picture that can be used; ``open_picture`` says what is wrong.
    """
    try:
        if isinstance(source, Image.Image):
            width, height = source.size
        else:
            path = Path(source)
            if not path.is_file():  # to read a pipe or a device may never end
                return None
            with path.open("rb") as file, _named_warnings(str(path)), _opened(file) as image:
                width, height = image.size
    except Exception:  # decoders raise whatever they stumble over
        return None
    usable = 0 < max(width, height) <= MAX_ASPECT * min(width, height)
    return (height, width) if usable and width * height <= MAX_PIXELS else None


#: Of the thread: the name of the picture that it opens.
_opening = threading.local()
_show: Callable[..., Any] = warnings.showwarning  # what shows warnings while no picture is opened
_threads = 0  # that open pictures
_lock = threading.Lock()


def _show_named(message: Warning | str, *more: Any, **kwargs: Any) -> None:
    name = _opening.__dict__.get("name")
    _show(f"{name}: {message}" if name else message, *more, **kwargs)


@contextmanager
def _named_warnings(name: str) -> Iterator[None]:
    """Put the name of the picture before what Pillow warns of, such as EXIF that it cannot read.

    Filters are left alone: a change of them makes Python repeat all warnings that it has shown. Several
    threads may be inside, each with its own picture; the last to leave puts back what was there.
    """
    global _show, _threads
    with _lock:
        _threads += 1
        if warnings.showwarning is not _show_named:
            _show, warnings.showwarning = warnings.showwarning, _show_named
    _opening.name = name
    try:
        yield
    finally:
        _opening.name = None
        with _lock:
            _threads -= 1
            if not _threads and warnings.showwarning is _show_named:
                warnings.showwarning = _show


def _file(path: str | Path, name: str) -> tuple[bytes, str]:
    path, name = Path(path), name or str(path)
    try:
        if path.exists() and not path.is_file():  # to read a pipe or a device may never end
            raise IsADirectoryError(errno.EISDIR, "no file", str(path))
        return path.read_bytes(), name
    except (OSError, ValueError) as error:  # a zero byte in the name is a ValueError
        if isinstance(error, OSError) and error.errno not in _NO_FILE:
            raise
        raise DataError(f"{name} must be a picture file, but there is none.") from error


def _seen(source: bytes | Image.Image, name: str, stored: bool = False) -> tuple[Image.Image, str]:
    """Return the picture as a person would see it, and the form to store it in; "" as it is."""
    name = name or "a picture"
    try:
        with _named_warnings(name):
            picture, form = _upright_rgb(source, stored)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} must be a picture, but {_reason(source, error)}.") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders and EXIF readers raise whatever they stumble over
        if "truncated" in str(error).lower():  # Pillow adds a number of bytes that helps nobody
            raise DataError(f"{name} is cut off: its end is missing. Copy or download it again.") from error
        raise DataError(f"{name} cannot be decoded: {error or type(error).__name__}.") from error
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise DataError(
            f"{name}: the longer side may be at most {MAX_ASPECT} times the shorter one, but the picture has "
            f"{picture.width} x {picture.height} pixels. Crop it."
        )
    return picture, form


def _upright_rgb(source: bytes | Image.Image, stored: bool) -> tuple[Image.Image, str]:
    if isinstance(source, Image.Image):
        return _rgb(ImageOps.exif_transpose(source)), "PNG"
    with _opened(source) as image:
        _refuse_programs(image, source)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, but may have {MAX_PIXELS:,}. Shrink it"
            )
        image.load()  # before the orientation is read: Pillow itself turns TIFF files here
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        form = _form(image, source, turned) if stored else ""
        # what was decoded here is nobody else's, so it needs no copy: ``_new`` is how Pillow's ``copy`` ends
        seen = ImageOps.exif_transpose(image) if turned else image._new(image.im)
        return _rgb(seen), form


def _refuse_programs(image: Image.Image, data: bytes) -> None:
    """Raise a ValueError on a file that may run for hours: nothing is decoded yet."""
    if image.format == "EPS":  # Pillow would hand it to Ghostscript
        raise ValueError("it is PostScript, a program. Save it as PNG or JPEG")
    if image.format in ("JPEG", "MPO") and (scans := _num_scans(data)) > MAX_SCANS:
        raise ValueError(
            f"it draws its pixels {scans:,} times (scans), but may do so {MAX_SCANS} times. Save it again"
        )


def _num_scans(data: bytes) -> int:
    """Return how often the marker of a scan is there, at even and at odd bytes; ``bytes.count`` is slow."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - first) // 2, first) for first in (0, 1))
    return sum(int(np.count_nonzero(pair == _SCAN)) for pair in pairs)


def _form(image: Image.Image, data: bytes, turned: bool) -> str:
    plain = (
        image.format in ("PNG", "JPEG")
        and image.mode in ("RGB", "L")
        and not (image.format == "PNG" and data[_PNG_DEPTH] > 8)
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and not turned
    )
    if plain:
        return ""
    lossy = image.format in ("JPEG", "MPO", "HEIF", "AVIF") or (
        image.format == "WEBP" and b"VP8L" not in data and not image.has_transparency_data
    )
    return "JPEG" if lossy else "PNG"


def _opened(data: bytes | BinaryIO) -> Image.Image:
    """Open a file or its bytes; of HEIC only if pillow-heif is installed."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    head = file.read(_HEAD)
    file.seek(0)
    if _is_heic(head):
        try:
            from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            pass
        else:
            register_heif_opener()
    return Image.open(file)


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC


def _reason(source: bytes | Image.Image, error: Exception) -> str:
    if isinstance(source, bytes) and not source:
        return "the file is empty"
    if isinstance(source, bytes) and _is_heic(source):
        return "HEIC needs one more package: pip install pillow-heif, or save it as JPEG"
    return str(error) if isinstance(error, Image.DecompressionBombError) else "its format is not known"


def _rgb(image: Image.Image) -> Image.Image:
    """Return an 8-bit RGB picture: 16 bits are scaled, and what is transparent shows white."""
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
    return image.convert("RGB") if image.mode != "RGB" else image


def thinned(clip: Clip, count: int) -> Clip:
    """Return at most ``count`` frames of a clip, evenly spaced, the first and the last among them.

    >>> thinned(Clip(tuple("abcdefg"), (0, 1, 2, 3, 4, 5, 6)), 3)
    Clip(frames=('a', 'd', 'g'), times=(0, 3, 6))
    """
    if len(clip.frames) <= count:
        return clip
    kept = np.linspace(0, len(clip.frames) - 1, count).round().astype(int).tolist()
    return Clip(tuple(clip.frames[n] for n in kept), tuple(clip.times[n] for n in kept))


def checked_clip(clip: Clip, name: str) -> Clip:
    """Return a clip that can be used.

    Raises:
        DataError: If it has no frames, frames of several sizes, or times that do not fit.
    """
    if len(sizes := {frame.size for frame in clip.frames}) != 1:
        found = ", ".join(sorted(f"{width} x {height}" for width, height in sizes))
        raise DataError(
            f"{name}: all frames of a clip must have one size, but they have {found or 'none'}. Bring them "
            "to one size."
        )
    times = clip.times
    rising = all(later > earlier for earlier, later in itertools.pairwise(times))
    if len(times) != len(clip.frames) or not rising or not 0 <= times[0] <= times[-1] < math.inf:
        raise DataError(
            f"{name}: each of the {len(clip.frames)} frames of a clip must have its time in seconds, rising "
            f"from 0 or later, but the times are {list(times)!r:.90}."
        )
    return clip
