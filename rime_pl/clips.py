"""Makes clips and pages: frames of a video at known times, and pages of a PDF as pictures.

For builders, training, evaluation and search alike. Videos are decoded by PyAV (extra `video`), documents by
pypdfium2 (extra `documents`). A corpus holds what comes out, so that training needs neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image, frombytes

from rime_pl.errors import DataError
from rime_pl.media import MAX_PIXELS, checked_clip, open_picture
from rime_pl.page_process import PageError, PageProcess
from rime_pl.types import Clip, Page

#: A longer video is refused before it is decoded.
MAX_SECONDS = 3600.0
#: So is one with more frames: an hour of 120 frames a second.
MAX_FRAMES = 432_000
#: Containers that hold their own pictures. FFmpeg also knows lists of other files, which it would open.
CONTAINERS = (
    "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,h264,hevc,m4v,gif,apng,mjpeg,ivf,obu,nut,mxf"
)
#: Pixels of the longer side of a page.
PAGE_SIDE = 1024
#: A document with more pages is refused.
MAX_PAGES = 5000
#: A page may be metres wide, and so may one of its sides be many times the other.
MAX_PAGE_POINTS = 20_000.0
#: A page that takes longer is refused: ten forms in each of ten forms, and so on, would take hours.
PAGE_SECONDS = 60.0
_pages = PageProcess()


def even_times(seconds: float, count: int) -> list[float]:
    """Return the middles of ``count`` equal parts of a video: better for loops and black ends than the ends.

    >>> even_times(4.0, 4)
    [0.5, 1.5, 2.5, 3.5]
    """
    return [seconds * (number + 0.5) / count for number in range(count)]


def read_video(
    source: str | Path,
    frames: int = 8,
    max_seconds: float = MAX_SECONDS,
    max_pixels: int | None = None,
) -> Clip:
    """Return frames of a video file, one from the middle of each of ``frames`` equal parts.

    A video with fewer frames keeps those that it has. Pictures are upright, as a person would see them.

    Args:
        source: The file.
        frames: Number of frames.
        max_seconds: Longest video.
        max_pixels: Pixels of a frame, at most (default: those that a picture may have).

    Raises:
        DataError: If it is no video that can be decoded and used, or the package is missing.
        OSError: If the machine fails to read the file.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path} must be a video file, but there is none.")
    try:
        import av  # noqa: F401 - so that a missing package is told first
    except ImportError as error:
        raise DataError(f"{path}: videos need one more package: pip install 'rime_pl[video]'.") from error
    try:
        with _opened(path) as container:
            times, seconds = _frame_times(container, path, max_seconds, max_pixels or MAX_PIXELS)
        wanted = sorted({_nearest(times, at) for at in even_times(seconds, frames)})
        with _opened(path) as container:
            pictures = _decoded(container, wanted)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they stumble over, text in another encoding, too
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} must be a video, but cannot be decoded: {why}.") from error
    start = times[0]
    return checked_clip(Clip(tuple(pictures), tuple(times[number] - start for number in wanted)), str(path))


def _opened(path: Path) -> Any:
    """Open a video so that it can name no other file: an absolute path is no address."""
    import av

    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        return av.open(str(path.absolute()), options=options)
    except av.ArgumentError as error:
        raise DataError(
            f"{path} must be a video, but is a list of other files, or of an unknown kind. Give an MP4, MKV "
            "or WebM."
        ) from error


def _frame_times(
    container: Any, path: Path, max_seconds: float, max_pixels: int
) -> tuple[list[float], float]:
    """Return the time of each frame, and the seconds of the video; what the container claims can be wrong."""
    if not container.streams.video:
        raise DataError(f"{path} must be a video, but holds no pictures.")
    stream = _video_stream(container)
    times: list[float] = []
    for decoded, frame in enumerate(container.decode(stream)):
        if decoded == MAX_FRAMES:
            raise DataError(f"{path} must have at most {MAX_FRAMES:,} frames, but has more. Cut it.")
        if frame.width * frame.height > max_pixels:
            raise DataError(
                f"{path} must have frames of at most {max_pixels:,} pixels, but one has {frame.width} x "
                f"{frame.height}. Shrink it."
            )
        at = float(frame.time) if frame.time is not None else len(times) / float(stream.average_rate or 25)
        if times and at <= times[-1]:
            continue
        times.append(at)
        if at - times[0] > max_seconds:
            raise DataError(
                f"{path} must be a video of at most {max_seconds:.0f} seconds, but is longer. Cut it."
            )
    if not times:
        raise DataError(f"{path} must be a video, but holds no frame that can be decoded.")
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
    return times, times[-1] - times[0] + step


def _video_stream(container: Any) -> Any:
    """Return the first stream that moves: a cover picture is a stream, too."""
    streams = container.streams.video
    moving = [one for one in streams if not one.disposition & type(one.disposition).attached_pic]
    stream = (moving or streams)[0]
    stream.thread_count = 1  # workers and builders have processes of their own
    return stream


def _nearest(times: Sequence[float], at: float) -> int:
    return min(range(len(times)), key=lambda number: abs(times[number] - times[0] - at))


def _decoded(container: Any, wanted: Sequence[int]) -> list[Image]:
    """Return the frames of the given numbers, counted as in ``_frame_times``."""
    found: list[Image] = []
    stream, last, number = _video_stream(container), -math.inf, -1
    for frame in container.decode(stream):
        at = float(frame.time) if frame.time is not None else number + 1.0
        if at <= last:
            continue
        last, number = at, number + 1
        if number in wanted:
            picture = frame.to_image()
            turned = -getattr(frame, "rotation", 0) % 360
            found.append(open_picture(picture.rotate(-turned, expand=True) if turned else picture))
            if len(found) == len(wanted):
                break
    return found


def read_frames(files: Sequence[str | Path], times: Sequence[float]) -> Clip:
    """Return a clip from pictures of its frames, as data sets keep them.

    Args:
        files: Pictures of the frames, in order.
        times: The time of each in seconds.

    Raises:
        DataError: If a picture cannot be used, or sizes and times do not fit together.
        OSError: If the machine fails to read a file.
    """
    name = str(Path(files[0]).parent) if files else "a clip"
    return checked_clip(Clip(tuple(open_picture(file) for file in files), tuple(times)), name)


def in_natural_order(names: Sequence[str]) -> list[str]:
    """Return names in the order in which a person counts.

    >>> in_natural_order(["c10.jpg", "c9.jpg", "c1.jpg"])
    ['c1.jpg', 'c9.jpg', 'c10.jpg']
    """
    return sorted(
        names,
        key=lambda name: [
            (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
            for part in re.split(r"(\d+)", name)
        ],
    )


def read_pages(
    source: str | Path, pages: Sequence[int] | None = None, side: int = PAGE_SIDE
) -> Iterator[Page]:
    """Yield pages of a PDF as pictures; grey where the page has no colour.

    Args:
        source: The file.
        pages: Numbers of the pages, from 0; None for all.
        side: Pixels of the longer side.

    Raises:
        DataError: If it is no document that can be read, if it has no such page, or a page cannot be
            rendered, or the package is missing.
    """
    path = Path(source)
    count = count_pages(path)
    for number in range(count) if pages is None else pages:
        if not 0 <= number < count:
            raise DataError(f"{path} has {count} pages, so there is no page {number + 1}.")
        yield Page(_rendered(path, number, side, f"{path}, page {number + 1}"))


def count_pages(source: str | Path) -> int:
    """Return the number of pages of a PDF; raises as :func:`read_pages`."""
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path} must be a PDF file, but there is none.")
    try:
        import pypdfium2  # noqa: F401 - so that a missing package is told
    except ImportError as error:
        raise DataError(
            f"{path}: documents need one more package: pip install 'rime_pl[documents]'."
        ) from error
    try:
        count: int = _pages.ask(path, None, PAGE_SIDE, MAX_PAGE_POINTS, PAGE_SECONDS)["pages"]
    except PageError as error:
        raise DataError(f"{path} must be a PDF that can be read, but cannot be opened: {error}.") from error
    if not count:
        raise DataError(f"{path} must have pages, but has none.")
    if count > MAX_PAGES:
        raise DataError(f"{path} must have at most {MAX_PAGES:,} pages, but has {count:,}. Split it.")
    return count


def _rendered(path: Path, number: int, side: int, name: str) -> Image:
    try:
        answer = _pages.ask(path, number, side, MAX_PAGE_POINTS, PAGE_SECONDS)
    except PageError as error:
        raise DataError(f"{name} cannot be rendered: {error}.") from error
    if "pixels" not in answer:
        width, height = answer.get("points", (0.0, 0.0))
        raise DataError(
            f"{name} must have sides of at most {MAX_PAGE_POINTS / 72 * 0.0254:.0f} metres, but is "
            f"{width / 72 * 0.0254:.2f} x {height / 72 * 0.0254:.2f} metres large."
        )
    return without_colour(open_picture(frombytes("RGB", tuple(answer["size"]), answer["pixels"]), name))


def without_colour(picture: Image) -> Image:
    """Return a picture as grey where all its pixels are grey; such a PNG has half the bytes.

    >>> from PIL import Image
    >>> [without_colour(Image.new("RGB", (2, 2), colour)).mode for colour in ("grey", "red")]
    ['L', 'RGB']
    """
    grey = picture.convert("L")
    return grey if grey.convert("RGB").tobytes() == picture.tobytes() else picture
