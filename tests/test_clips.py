"""Frames of a video and pages of a document: what comes out, and what is refused by name."""

from __future__ import annotations

import builtins
import io
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pypdfium2
import pytest
from PIL import Image

import rime_pl
from rime_pl import clips
from rime_pl.clips import even_times, in_natural_order, read_frames, read_pages, read_video
from rime_pl.errors import DataError
from rime_pl.media import thinned
from rime_pl.types import Clip

pytestmark = pytest.mark.timeout(120)

FPS = 10


def write_video(path: Path, frames: int, codec: str = "libx264", times: list[int] | None = None) -> Path:
    """A video whose frame n has brightness 8 n at time n / FPS, or at ``times`` in hundredths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "1"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for number in range(frames):
            pixels = np.full((48, 64, 3), 8 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip: Clip) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / 8) for frame in clip.frames]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264")]
)
def test_frames_come_from_the_middles_of_equal_parts(name: str, codec: str, tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / name, 24, codec), frames=4)
    assert numbers(clip) == [3, 9, 15, 21] and clip.frames[0].size == (64, 48)
    assert clip.times == pytest.approx([number / FPS for number in (3, 9, 15, 21)], abs=0.002)


def test_a_short_video_keeps_the_frames_it_has(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "short.mp4", 3), frames=8)
    assert numbers(clip) == [0, 1, 2] and clip.times == pytest.approx([0, 0.1, 0.2], abs=0.002)
    assert len(read_video(write_video(tmp_path / "one.mp4", 1)).frames) == 1


def test_times_count_and_not_the_number_of_frames(tmp_path: Path) -> None:
    """Ten frames in the first second, then one after three more seconds."""
    times = [*range(0, 100, 10), 400]
    clip = read_video(write_video(tmp_path / "uneven.mkv", 11, times=times), frames=4)
    assert numbers(clip)[-1] == 10 and clip.times[-1] == pytest.approx(4.0, abs=0.01)


def test_what_is_no_video_is_refused_by_name(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 20)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, says in (
        ("cut.mp4", "must be a video, but"),
        ("empty.mp4", "must be a video, but"),
        ("text.mp4", "must be a video, but cannot be decoded"),
        ("sound.mkv", "must be a video, but holds no pictures"),
        ("missing.mp4", "must be a video file, but there is none"),
    ):
        with pytest.raises(DataError, match=rf"{name} {says}"):
            read_video(tmp_path / name)
    with pytest.raises(DataError, match=r"must be a video of at most 1 seconds, but is longer. Cut it"):
        read_video(whole, max_seconds=1.0)


def test_a_flipped_byte_ends_in_a_clip_or_a_sentence(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "whole.mp4", 20).read_bytes())
    rng = np.random.default_rng(0)
    for number in range(40):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 20):
            broken[place] ^= 0xFF
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(broken)
        try:
            clip = read_video(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert 1 <= len(clip.frames) <= 8


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile {}\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"),
    ],
)
def test_a_list_of_other_files_is_no_video(name: str, content: str, tmp_path: Path) -> None:
    """FFmpeg would open what it names, in its folder or elsewhere."""
    write_video(tmp_path / "secret.mp4", 12)
    (tmp_path / name).write_text(content.format("secret.mp4"))
    with pytest.raises(DataError, match=rf"{name} must be a video, but is a list of other files"):
        read_video(tmp_path / name)


def test_a_name_that_reads_like_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = write_video(tmp_path / "secret.mp4", 24)
    monkeypatch.chdir(tmp_path)
    name = "subfile,,start,0,end,0,,:secret.mp4"
    Path(name).write_bytes(write_video(tmp_path / "own.mp4", 3).read_bytes())
    assert len(read_video(name).frames) == 3 and len(read_video(secret).frames) == 8


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    """A red cover, as shops put it into their files; it may be stream 0."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "JPEG")
    film = write_video(tmp_path / "film.mp4", 12)
    with av.open(str(film)) as source, av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = type(cover.disposition).attached_pic
        moving = container.add_stream_from_template(source.streams.video[0])
        packet = av.Packet(buffer.getvalue())
        packet.stream, packet.pts, packet.dts = cover, 0, 0
        container.mux(packet)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = moving
                container.mux(packet)
    with av.open(str(tmp_path / "a.mp4")) as container:
        streams = container.streams.video
        covers = [bool(one.disposition & type(one.disposition).attached_pic) for one in streams]
        assert sorted(covers) == [False, True]
        for order in (streams, streams[::-1]):
            container_of = SimpleNamespace(streams=SimpleNamespace(video=order))
            assert clips._video_stream(container_of) is streams[covers.index(False)]
    assert numbers(read_video(tmp_path / "a.mp4", frames=4)) == numbers(read_video(film, frames=4))


#: The 3 x 3 matrix of a track: as it is, and turned by 90 degrees. The last column counts in 2.30 bits.
UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
TURNED = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)


def test_a_phone_held_upright(tmp_path: Path) -> None:
    """The pictures are stored lying, and the matrix of the track turns them clockwise."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = 255  # white on the left, which is to be above
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    track = data.index(UPRIGHT, data.index(b"tkhd"))
    path.write_bytes(data[:track] + TURNED + data[track + len(UPRIGHT) :])
    frame = np.asarray(read_video(path).frames[0].convert("L"))
    assert frame.shape == (64, 48) and frame[:28].min() > 200 and frame[36:].max() < 50


def test_what_a_container_claims_is_not_believed(tmp_path: Path) -> None:
    """A track of 12 frames claims a billion, and then a length of a century."""
    whole = write_video(tmp_path / "whole.mp4", 12)
    data = whole.read_bytes()
    count = data.index(b"stts") + 12  # after version and number of entries: the count of frames, their length
    claims = data[:count] + struct.pack(">I", 10**9) + data[count + 4 :]
    (tmp_path / "many.mp4").write_bytes(claims)
    assert numbers(read_video(tmp_path / "many.mp4")) == numbers(read_video(whole))
    header = data.index(b"mvhd") + 4 + 16
    (tmp_path / "long.mp4").write_bytes(data[:header] + b"\x7f" + data[header + 1 :])
    assert numbers(read_video(tmp_path / "long.mp4")) == numbers(read_video(whole))


def test_too_many_or_too_large_frames_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 12)
    monkeypatch.setattr(clips, "MAX_FRAMES", 11)
    with pytest.raises(DataError, match=r"a.mp4 must have at most 11 frames, but has more. Cut it"):
        read_video(path)
    monkeypatch.setattr(clips, "MAX_FRAMES", 12)
    assert len(read_video(path).frames) == 8
    monkeypatch.setattr(clips, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match=r"frames of at most 3,071 pixels, but one has 64 x 48. Shrink it"):
        read_video(path)


@pytest.mark.parametrize(("package", "extra", "call"), [
    ("av", "video", lambda path: read_video(path)),
    ("pypdfium2", "documents", lambda path: list(read_pages(path))),
])  # fmt: skip
def test_a_missing_package_is_named(
    package: str, extra: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"x")
    import_as_usual = builtins.__import__

    def refuse(name: str, *more: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return import_as_usual(name, *more, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=rf"pip install 'rime_pl\[{extra}\]'"):
        call(tmp_path / "x")


def write_pdf(path: Path, sizes: list[tuple[float, float]], colour: str = "white") -> Path:
    document = pypdfium2.PdfDocument.new()
    for width, height in sizes:
        page = document.new_page(width, height)
        if colour != "white":
            spot = Image.new("RGB", (10, 10), colour)
            picture = pypdfium2.PdfImage.new(document)
            picture.set_bitmap(pypdfium2.PdfBitmap.from_pil(spot))
            picture.set_matrix(pypdfium2.PdfMatrix().scale(width / 2, height / 2))
            page.insert_obj(picture)
            page.gen_content()
    document.save(str(path))
    return path


def test_pages_have_a_fixed_longer_side_and_are_grey_without_colour(tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "a.pdf", [(595, 842), (842, 595), (200, 200)])
    pages = list(read_pages(path, side=400))
    assert [page.image.size for page in pages] == [(283, 400), (400, 283), (400, 400)]
    assert all(page.image.mode == "L" for page in pages)
    (red,) = read_pages(write_pdf(tmp_path / "red.pdf", [(200, 200)], "red"), side=100)
    assert red.image.mode == "RGB" and red.image.getpixel((10, 90)) == (255, 0, 0)
    assert [page.image.size for page in read_pages(path, pages=[2], side=100)] == [(100, 100)]


def test_what_is_no_document_is_refused_by_name(tmp_path: Path) -> None:
    good = write_pdf(tmp_path / "good.pdf", [(200, 200)])
    (tmp_path / "cut.pdf").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.pdf").write_text("no pdf")
    write_pdf(tmp_path / "huge.pdf", [(200, 28_346)])  # ten metres
    for name, says in (
        ("cut.pdf", "must be a PDF that can be read"),
        ("text.pdf", "must be a PDF that can be read"),
        ("missing.pdf", "must be a PDF file, but there is none"),
        ("huge.pdf", "page 1 must have sides of at most 7 metres, but is 0.07 x 10.00 metres large"),
    ):
        with pytest.raises(DataError, match=says):
            list(read_pages(tmp_path / name))
    with pytest.raises(DataError, match=r"has 1 pages, so there is no page 2"):
        list(read_pages(good, pages=[1]))


def test_a_narrow_page_is_refused_like_a_narrow_picture(tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "narrow.pdf", [(10, 8000)])
    with pytest.raises(DataError, match="at most 200 times the shorter one"):
        list(read_pages(path))


def test_frames_that_lie_as_files(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"c{number}.png")
    names = in_natural_order([path.name for path in tmp_path.iterdir()])
    assert names == ["c1.png", "c2.png", "c10.png"]
    clip = read_frames([tmp_path / name for name in names], [0.0, 0.5, 1.0])
    assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == [1, 2, 10]  # type: ignore[index]
    with pytest.raises(DataError, match="each of the 3 frames"):
        read_frames([tmp_path / name for name in names], [0.0, 0.5])
    with pytest.raises(DataError, match="must have one size, but they have none"):
        read_frames([], [])


def test_even_times_and_thinning() -> None:
    assert even_times(1.0, 1) == [0.5]
    clip = Clip(tuple(Image.new("RGB", (1, 1)) for _ in range(9)), tuple(map(float, range(9))))
    assert (
        thinned(clip, 5).times == (0, 2, 4, 6, 8)
        and thinned(clip, 9) is clip
        and len(thinned(clip, 1).frames) == 1
    )


def test_they_are_part_of_the_package() -> None:
    assert rime_pl.read_video is read_video and rime_pl.Clip is Clip
    with pytest.raises(AttributeError, match="nonsense"):
        rime_pl.nonsense  # noqa: B018
