"""What people see is what is trained on: bits, transparency, orientation, frames, damage."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from rime_pl.errors import DataError
from rime_pl.media import (
    _named_warnings,
    _num_scans,
    _show_named,
    open_picture,
    picture_shape,
    stored_picture,
)


def encoded(image: Image.Image, form: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def noise(form: str) -> bytes:
    return encoded(Image.effect_noise((64, 64), 90).convert("RGB"), form)


def turned(form: str, orientation: int = 6) -> bytes:
    """A picture of 40 x 20 pixels, red on the left, that is to be shown as 20 x 40, red above."""
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, form, exif=exif)


def test_16_bits_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    shown = np.asarray(open_picture(encoded(Image.fromarray(ramp), "PNG")))
    assert shown.shape == (16, 16, 3)
    assert np.array_equal(shown[..., 0].ravel(), np.arange(256))
    tiff = open_picture(encoded(Image.fromarray(ramp), "TIFF"))
    assert np.array_equal(np.asarray(tiff), shown)


def test_pixels_without_a_range_are_refused() -> None:
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    with pytest.raises(DataError, match=r"floating-point pixels and no known range"):
        open_picture(encoded(floats, "TIFF"), "scan.tif")
    large = Image.fromarray(np.full((4, 4), 1 << 20, np.int32))
    with pytest.raises(DataError, match=r"scan.tif cannot be decoded: it has 32 bits"):
        open_picture(encoded(large, "TIFF"), "scan.tif")


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_what_is_transparent_shows_white(form: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    lossless = {"lossless": True, "exact": True} if form == "WEBP" else {}
    shown = open_picture(encoded(image, form, **lossless))
    assert shown.getpixel((7, 4)) == (255, 255, 255)
    assert shown.getpixel((0, 4)) == (255, 0, 0)


def test_half_transparent_grey_and_palette() -> None:
    grey = Image.merge("LA", (Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 128)))
    assert open_picture(encoded(grey, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert open_picture(encoded(palette, "PNG")).getpixel((0, 0)) == (10, 200, 30)
    assert open_picture(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_each_format_is_turned_once(form: str) -> None:
    shown = open_picture(turned(form))
    assert shown.size == (20, 40)
    red, blue = shown.getpixel((10, 5)), shown.getpixel((10, 35))
    assert isinstance(red, tuple) and isinstance(blue, tuple)
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]


def test_an_opened_picture_is_treated_like_its_file(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(turned("JPEG"))
    with Image.open(file) as opened:
        assert open_picture(opened).tobytes() == open_picture(file).tobytes()
    file.unlink()  # nothing is held open, nothing is read later


def test_cmyk_and_frames() -> None:
    red = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert open_picture(red).getpixel((0, 0)) == (255, 0, 0)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("lime", "red")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(gif).getpixel((0, 0)) == (0, 255, 0)


def test_a_picture_is_not_shared_with_its_source() -> None:
    source = Image.new("RGB", (4, 4), "red")
    open_picture(source).paste("blue", (0, 0, 4, 4))
    assert source.getpixel((0, 0)) == (255, 0, 0)


def bomb(side: int) -> bytes:
    """A PNG of 20 kB."""
    return encoded(Image.new("1", (side, side)), "PNG")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "x.jpg must be a picture, but the file is empty"),
        (b"not a picture", "x.jpg must be a picture, but its format is not known"),
        (b"\0\0\0\x18ftypheic" + bytes(64), "pip install pillow-heif"),
        (noise("JPEG")[:-600], "x.jpg is cut off: its end is missing"),
        (noise("PNG")[:-600], "x.jpg is cut off: its end is missing"),
        (
            encoded(Image.new("RGB", (3, 900)), "PNG"),
            "at most 200 times the shorter one.* 3 x 900 pixels. Crop",
        ),
        (
            bomb(12_000),
            "cannot be decoded: it has 12000 x 12000 pixels, but may have 100,000,000. Shrink it",
        ),
    ],
    ids=["empty", "text", "heic", "half a JPEG", "half a PNG", "a line", "a bomb"],
)
def test_what_cannot_be_used_is_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_picture(data, "x.jpg")


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (4, 4), lines: bytes | None = None) -> bytes:
    """A PNG of 8-bit RGB with more chunks before its pixels, and with any claim about its size."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = bytes(13) * 4 if lines is None else lines
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose first scan comes again and again."""
    data = encoded(Image.effect_noise((16, 16), 90).convert("RGB"), "JPEG", progressive=True)
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    return data[: starts[0]] + data[starts[0] : starts[1]] * count + data[starts[1] :]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n%%EOF\n"
_UNPACKED = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(size=(60_000, 60_000)), "3600000000 pixels. exceeds limit"),
        (png(size=(9_000, 11_000), lines=b""), "x is cut off|x cannot be decoded"),
        (png((b"zTXt", b"a\0\0" + _UNPACKED)), "x cannot be decoded: Decompressed data too large"),
        (png((b"iTXt", b"a\0\1\0\0\0" + _UNPACKED)), "x cannot be decoded: Decompressed data too large"),
        (png((b"iCCP", b"a\0\0" + _UNPACKED)), "x cannot be decoded: Decompressed data too large"),
        (with_scans(300), r"x cannot be decoded: it draws its pixels \d+ times \(scans\), but may do so 200"),
        (POSTSCRIPT, "x cannot be decoded: it is PostScript, a program. Save it as PNG or JPEG"),
    ],
    ids=["60000 x 60000", "99 megapixels of nothing", "zTXt bomb", "iTXt bomb", "iCCP bomb", "scans", "EPS"],
)
def test_a_file_that_would_take_memory_or_time_is_refused_first(
    data: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.check_call", None)  # what Pillow starts Ghostscript with
    for opened in (open_picture, stored_picture):
        with pytest.raises(DataError, match=said):
            opened(data, "x")


@pytest.mark.parametrize("length", [3, 4, 999, 1000])
def test_scans_are_counted_at_even_and_odd_bytes(length: int) -> None:
    for seed in range(20):
        data = np.random.default_rng(seed).choice([0x00, 0xDA, 0xFF], length).astype(np.uint8).tobytes()
        assert _num_scans(data) == data.count(b"\xff\xda")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_thousands_of_frames_one_is_decoded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 8), (number % 256, number // 256, 9)) for number in range(3000)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3000  # type: ignore[attr-defined]
    for name in (
        "GifImagePlugin.GifImageFile",
        "PngImagePlugin.PngImageFile",
        "TiffImagePlugin.TiffImageFile",
    ):
        monkeypatch.setattr(f"PIL.{name}.seek", None)
    assert open_picture(data).size == (8, 8)
    assert open_picture(stored_picture(data)).size == (8, 8)


def test_a_flipped_bit_in_the_pixels_ends_in_a_picture_or_a_sentence() -> None:
    """A JPEG has no checksums, so many flips give other pixels; the index of a corpus finds them."""
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = noise(form)
        for place in rng.integers(8, len(whole), 40).tolist():
            data = bytearray(whole)
            data[place] ^= 1 << int(rng.integers(8))
            try:
                assert max(open_picture(bytes(data), "x").size) <= 65_535
            except DataError as error:
                assert str(error).startswith("x")


def test_the_shape_is_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "a.png", "a.webp", "a.gif"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (1000, 3)).save(tmp_path / "line.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for name in ("a.jpg", "a.png", "a.webp", "a.gif"):
        assert picture_shape(tmp_path / name) == (20, 30)
    assert picture_shape(Image.new("RGB", (30, 20))) == (20, 30)
    for name in ("text.jpg", "line.png", "none.jpg", "."):
        assert picture_shape(tmp_path / name) is None


def test_warnings_of_several_threads_name_their_own_pictures() -> None:
    before, together = warnings.showwarning, threading.Barrier(4)

    def warn(number: int) -> None:
        with _named_warnings(f"{number}.tif"):
            together.wait()
            warnings.warn(f"of picture {number}", stacklevel=1)
            together.wait()

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *more: shown.append(str(message))
        shown: list[str] = []
        list(pool.map(warn, range(4)))
        assert not caught and warnings.showwarning is not _show_named
    assert sorted(shown) == [f"{number}.tif: of picture {number}" for number in range(4)]
    assert warnings.showwarning is before


def test_a_warning_of_pillow_names_the_picture() -> None:
    """Its EXIF is cut, so how to turn it is unknown."""
    with pytest.warns(UserWarning, match=r"^x.tif: "), pytest.raises(DataError, match=r"^x.tif "):
        open_picture(turned("TIFF")[:20], "x.tif")


def test_an_orientation_that_cannot_be_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")  # as Pillow did for damaged EXIF

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.raises(DataError, match=r"x.jpg cannot be decoded: unpack requires"):
        open_picture(turned("JPEG"), "x.jpg")


def test_a_missing_file_is_the_data_and_a_failing_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"gone.png must be a picture file, but there is none"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"but there is none"):
        open_picture(tmp_path)

    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("loop.png", "endless.png", "pipe.png", "x" * 300, "a\0.png"):
        with pytest.raises(DataError, match=r"must be a picture file, but there is none"):
            open_picture(tmp_path / name)

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=r"Input/output error"):
        open_picture(tmp_path / "x.png")


# -- what a corpus keeps -------------------------------------------------------------------------------


def deep(colour: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but cannot write."""
    pixel = colour.to_bytes(2, "big") * 3
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b""))
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_plain_file_keeps_its_bytes(form: str, mode: str) -> None:
    data = encoded(Image.effect_noise((24, 40), 60).convert(mode), form)
    assert stored_picture(data) is data
    upright = turned(form, orientation=1)
    assert stored_picture(upright) is upright


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (turned("JPEG"), "JPEG"),
        (turned("MPO"), "JPEG"),
        (turned("PNG"), "PNG"),
        (turned("TIFF"), "PNG"),
        (turned("WEBP"), "JPEG"),
        (encoded(Image.new("RGB", (9, 9), "red"), "WEBP", lossless=True), "PNG"),
        (encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 90)), "WEBP"), "PNG"),
        (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), "JPEG"),
        (encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 90)), "PNG"), "PNG"),
        (encoded(Image.new("P", (9, 9), 1), "PNG"), "PNG"),
        (encoded(Image.new("RGB", (9, 9)), "PNG", transparency=(0, 0, 0)), "PNG"),
        (encoded(Image.new("I;16", (9, 9), 40000), "PNG"), "PNG"),
        (deep(40000), "PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_else_is_stored_as_it_is_seen(data: bytes, form: str) -> None:
    stored = stored_picture(data)
    assert stored != data
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.format, image.mode) == (form, "RGB")
        assert image.getexif().get(0x0112) is None
        seen = open_picture(data)
        assert image.size == seen.size
        difference = np.abs(np.asarray(image, int) - np.asarray(seen, int))
    assert difference.max() <= (0 if form == "PNG" else 40) and difference.mean() < 3


def test_what_is_stored_has_been_decoded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 7 is cut off: its end is missing"):
        stored_picture(noise("JPEG")[:-600], "line 7")
    file = tmp_path / "a.png"
    file.write_bytes(turned("PNG", orientation=1))
    assert stored_picture(file) == file.read_bytes()
