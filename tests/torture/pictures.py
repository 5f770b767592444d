"""Mutated picture files, and all that opens them: training, builders, evaluation and search."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from rime_pl.inference.sources import to_item
from rime_pl.media import open_picture, stored_picture
from rime_pl.processing import RimeProcessor
from tests.datamodules.dirty_pictures import bad_files, encoded, good_files, turned, two_colours
from tests.torture.damage import BYTES, byte_changes
from tests.torture.watched import Case, Reading, digest

#: Pictures with more pixels are not made into patches here: it would only take time.
SMALL = 200_000
#: What a picture is stored as may differ by so much in the mean: JPEG loses a little.
LOSS = 12.0


def sources() -> dict[str, bytes]:
    """Small files of each format, as people have them."""
    files = {name: data for name, data in good_files().items() if name != "large.png"}
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    alpha = noise.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(noise.size))
    frames = [noise, noise.rotate(180)]
    return files | {
        "progressive.jpg": encoded(noise, "JPEG", progressive=True),
        "pixel.jpg": encoded(Image.new("RGB", (1, 1), "red"), "JPEG"),
        "pixel.gif": encoded(Image.new("P", (1, 1)), "GIF"),
        "pixel.bmp": encoded(Image.new("RGB", (1, 1)), "BMP"),
        "alpha.webp": encoded(alpha, "WEBP"),
        "alpha.tif": encoded(alpha, "TIFF"),
        "moving.webp": encoded(noise, "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tif": encoded(noise, "TIFF", save_all=True, append_images=frames[1:]),
        "packed.tif": encoded(noise, "TIFF", compression="tiff_lzw"),
        "grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "see_through.gif": encoded(two_colours().quantize(4), "GIF", transparency=0),
        "grey.bmp": encoded(noise.convert("L"), "BMP"),
        "turned.webp": turned("WEBP"),
        "turned.tif": turned("TIFF"),
    }


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, depth: int, colours: int, rows: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    content = _chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + content + _chunk(b"IEND", b"")


def _bomb(side: int, palette: bool = False) -> bytes:
    """A PNG of some kilobytes that decodes to ``side`` x ``side`` pixels."""
    rows = (b"\0" + bytes(-(-side // 8))) * side
    if not palette:
        return _png(side, side, 1, 0, rows)
    return _png(side, side, 1, 3, rows, _chunk(b"PLTE", bytes(6)), _chunk(b"tRNS", bytes(2)))


def _with_sizes(form: str, width: int, height: int) -> bytes:
    """A small picture whose header says that it is of another size."""
    data = bytearray(encoded(Image.effect_noise((24, 24), 60).convert("RGB"), form))
    if form == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif form == "JPEG":
        at = next(n for n in range(len(data)) if data[n : n + 2] in (b"\xff\xc0", b"\xff\xc2"))
        struct.pack_into(">HH", data, at + 5, height & 0xFFFF, width & 0xFFFF)
    elif form == "GIF":
        struct.pack_into("<HH", data, 6, width & 0xFFFF, height & 0xFFFF)
        at = data.index(b"\x2c")
        struct.pack_into("<HH", data, at + 5, width & 0xFFFF, height & 0xFFFF)
    elif form == "BMP":
        struct.pack_into("<II", data, 18, width & 0x7FFFFFFF, height & 0xFFFFFFFF)
    elif form == "TIFF":
        entries = struct.unpack_from("<I", data, 4)[0]
        for n in range(struct.unpack_from("<H", data, entries)[0]):
            at = entries + 2 + 12 * n
            tag = struct.unpack_from("<H", data, at)[0]
            if tag in (256, 257):
                struct.pack_into("<HII", data, at + 2, 4, 1, (width if tag == 256 else height) & 0xFFFFFFFF)
    elif form == "WEBP":  # lossy: the frame's own header holds the size
        struct.pack_into("<HH", data, 26, width & 0x3FFF, height & 0x3FFF)
    return bytes(data)


def _sizes() -> Iterator[tuple[str, str, bytes]]:
    many = ((60_000, 60_000), (2**31 - 1, 1), (0, 24), (0, 0), (12_000, 12_000), (1, 65_535))
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        for width, height in many:
            name = f"a.{form.lower()}"
            yield f"header says {width} x {height}", name, _with_sizes(form, width, height)


def _bombs() -> Iterator[tuple[str, str, bytes]]:
    for side in (9_000, 13_000, 20_000):
        yield f"{side} x {side} pixels in some kB", "a.png", _bomb(side)
        yield f"{side} x {side} transparent pixels in some kB", "a.png", _bomb(side, palette=True)
    text = _chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(200 << 20), 9))
    profile = _chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200 << 20), 9))
    rows = (b"\0" + bytes(30)) * 10
    yield "a comment of 200 MB in some kB", "a.png", _png(10, 10, 8, 2, rows, text)
    yield "a colour profile of 200 MB in some kB", "a.png", _png(10, 10, 8, 2, rows, profile)
    yield "20 MB more pixels than the header says", "a.png", _png(10, 10, 8, 2, rows + bytes(20 << 20))
    yield "one row of the ten", "a.png", _png(10, 10, 8, 2, rows[:31])
    yield "a palette image without a palette", "a.png", _png(10, 10, 8, 3, (b"\0" + bytes(10)) * 10)
    yield "depth 3", "a.png", _png(10, 10, 3, 2, rows)
    yield "an unknown filter in each row", "a.png", _png(10, 10, 8, 2, (b"\x09" + bytes(30)) * 10)
    frames = [Image.new("P", (10, 10), n % 2) for n in range(3_000)]
    yield (
        "3,000 frames",
        "a.gif",
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False),
    )


def _exif(rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    for value in (0, 9, 255, 65_535):
        for form in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield f"EXIF orientation {value}", f"a.{form.lower()}", turned(form, value)
    for form in ("JPEG", "PNG", "WEBP"):
        data = turned(form)
        at = next(data.index(name) for name in (b"Exif", b"eXIf", b"EXIF") if name in data)
        for name, piece in (("noise", rng.randbytes(24)), ("zeros", bytes(24)), ("0xff", b"\xff" * 24)):
            yield f"{name} in the EXIF block", f"a.{form.lower()}", data[: at + 6] + piece + data[at + 30 :]
    data = turned()
    start = data.index(b"Exif")
    little = data[start + 6 : start + 8] == b"II"
    at = data.index(struct.pack("<H" if little else ">H", 0x0112), start)
    for name, kind, count in (("text", 2, 4), ("double", 12, 1), ("unknown type", 99, 1), ("2^31", 3, 2**31)):
        entry = data[:at] + struct.pack("<HHI" if little else ">HHI", 0x0112, kind, count)
        yield f"EXIF orientation as {name}", "a.jpeg", entry + data[at + 8 :]


def _wrong_names(files: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    for name, data in files.items():
        for suffix in (".png", ".jpg", ".gif", ".txt"):
            if not name.endswith(suffix):
                yield f"{name} named {suffix}", f"a{suffix}", data


def damaged(files: dict[str, bytes], rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    changes = {
        name: islice(byte_changes(data, rng), 7 * number % len(BYTES), None)
        for number, (name, data) in enumerate(files.items())
    }
    while True:
        for name in files:
            what, data = next(changes[name])
            yield f"{name}: {what}", name, data


def _special() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What lies under the name is no file, or another file."""
    yield "a folder", Path.mkdir
    yield "a pipe without a writer", os.mkfifo
    yield "a link to itself", lambda path: path.symlink_to(path)
    yield "a link to nothing", lambda path: path.symlink_to("nothing")
    yield "a device without end", lambda path: path.symlink_to("/dev/zero")
    yield "nothing", lambda path: None


def cases(processor: RimeProcessor, count: int, rng: random.Random) -> list[Case]:
    """Return cases: some of each sort of damage, the rest changed bytes."""
    files = sources()
    sorts = (
        list(_sizes()),
        list(_bombs()),
        list(_exif(rng)),
        list(_wrong_names(files)),
        [(f"not usable: {name}", name, data) for name, data in bad_files().items()],
    )
    found = []
    for what, make in islice(_special(), max(1, count // 10)):
        found.append(Case(what, _maker(make), _reader("a.png", processor), ("a.png",)))
    for sort in sorts:
        for what, name, data in rng.sample(sort, min(len(sort), max(1, count // 8))):
            found.append(_case(what, name, data, processor))
    others = damaged(files, rng)
    originals = {name: _digest(Image.open(io.BytesIO(data)), data) for name, data in files.items()}
    while len(found) < count:
        what, name, data = next(others)
        found.append(_case(what, name, data, processor, originals[name]))
    return found[:count]


def _case(what: str, name: str, data: bytes, processor: RimeProcessor, original: str | None = None) -> Case:
    return Case(
        what, lambda folder: (folder / name).write_bytes(data), _reader(name, processor), (name,), original
    )


def _maker(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: make(folder / "a.png")


def _digest(_: Image.Image, data: bytes) -> str:
    picture = open_picture(data, "a picture")
    return digest(picture.size, picture.tobytes())


def _reader(name: str, processor: RimeProcessor) -> Callable[[Path], Reading]:
    """Open the file as a builder, a training and a search do, and compare what they see."""

    def read(folder: Path) -> Reading:
        path = folder / name
        seen = open_picture(path)
        stored = stored_picture(path)
        again = open_picture(stored, f"{name}, stored")
        assert again.size == seen.size, f"stored as {again.size}, seen as {seen.size}"
        if seen.width * seen.height < SMALL:
            apart = np.abs(np.asarray(again, dtype=float) - np.asarray(seen, dtype=float)).mean()
            assert apart < LOSS, f"stored with other colours: {apart:.1f}"
            processor.prompts([to_item(path)], [name])
        return Reading(digest(seen.size, seen.tobytes()))

    return read
