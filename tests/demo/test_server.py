"""The search page as a program meets it: what it answers, what it refuses, and how it bears many at once."""

from __future__ import annotations

import io
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette import formparsers

from rime_pl.demo import server, uploads
from rime_pl.demo.searcher import IndexSearcher
from rime_pl.errors import RimeError
from rime_pl.types import MODE_PAIRS
from tests.demo.conftest import SCRIPT, MadeUp, Serve, png


def get(address: str, **settings: Any) -> httpx.Response:
    return httpx.get(address, timeout=60, **settings)


def ask(
    address: str, text: str = "", file: tuple[str, bytes] | None = None, **headers: str
) -> httpx.Response:
    files = {"file": file} if file else {"file": ("", b"")}
    return httpx.post(f"{address}search", data={"text": text}, files=files, headers=headers, timeout=60)


def refused(address: str, text: str = "", file: tuple[str, bytes] | None = None, status: int = 400) -> str:
    reply = ask(address, text, file)
    assert reply.status_code == status, reply.text
    told: str = reply.json()["error"]
    assert "/tmp" not in told and "rime-" not in told  # the visitor learns no path of the server
    return told


def test_four_columns_with_scores_rewrites_and_times(index_searcher: IndexSearcher, serve: Serve) -> None:
    reply = ask(serve(index_searcher), "a red ring")
    assert reply.status_code == 200
    answer = reply.json()
    assert [column["pair"] for column in answer["columns"]] == list(MODE_PAIRS)
    for column in answer["columns"]:
        scores = [result["score"] for result in column["results"]]
        assert (
            len(scores) == 3 and scores == sorted(scores, reverse=True) and -1 <= scores[-1] <= scores[0] <= 1
        )
        assert column["encode_ms"] > 0 and column["search_ms"] > 0 and not column["missing"]
        shows_rewrites = column["pair"].endswith("gen")
        assert all(shows_rewrites or not result["rewrite"] for result in column["results"])
    found = index_searcher.index.search("a red ring", "generative", "discriminative", 3)
    assert answer["rewrite"] == found.rewrite
    assert [hit.place for hit in found.hits] == [one["id"] for one in answer["columns"][2]["results"]]
    assert "The two best discriminative scores differ by" in answer["adaptive"]


def test_the_adaptive_choice_follows_the_threshold_of_the_run(
    index_searcher: IndexSearcher, serve: Serve
) -> None:
    retriever = index_searcher.index.retriever
    assert retriever.run is not None
    file, address = retriever.run.path / "adaptive.json", serve(index_searcher)
    for margin, told in ((3.0, "so a rewrite is worth writing."), (0.0, "so no rewrite is needed.")):
        file.write_text(json.dumps({"margin": margin, "target_mode": "generative", "model": retriever.name}))
        assert ask(address, "a red ring").json()["adaptive"].endswith(told)
    file.unlink()
    assert "--calibrate" in ask(address, "a red ring").json()["adaptive"]


def test_an_index_without_generative_vectors_fills_two_columns(
    index_searcher: IndexSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_searcher.index.facts, "modes", ["discriminative"])
    columns = {column.pair: column for column in index_searcher.search(uploads.to_query("a ring"), 2).columns}
    for pair in ("gen-gen", "disc-gen"):
        assert columns[pair].missing == "The index holds no generative vectors." and not columns[pair].results
    assert len(columns["gen-disc"].results) == 2


def test_pictures_come_by_row_and_by_nothing_else(index_searcher: IndexSearcher, serve: Serve) -> None:
    address = serve(index_searcher)
    rows = {index_searcher.index.record(row)[0].id: row for row in range(7)}
    picture = get(f"{address}picture/{rows['picture 3']}")
    assert picture.status_code == 200 and picture.content[8:12] == b"WEBP"
    assert picture.headers["content-type"] == "image/webp"
    for path in (
        str(rows[SCRIPT]),
        "7",
        "99999999999",
        "-1",
        "0.png",
        "..%2F..%2Fetc%2Fpasswd",
        "../page.html",
        "%00",
    ):
        assert get(f"{address}picture/{path}").status_code == 404, path
    for path in ("server.py", "page.html", "..%2fpyproject.toml", "%2e%2e/server.py", "/etc/passwd"):
        assert get(f"{address}{path}").status_code == 404, path


def test_every_answer_has_the_headers_and_only_known_hosts_get_one(made_up: MadeUp, serve: Serve) -> None:
    address = serve(made_up)
    home = get(address)
    for reply in (home, get(f"{address}page.js"), get(f"{address}none"), ask(address, "x")):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["x-frame-options"] == "DENY" and reply.headers["cache-control"] == "no-store"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert SCRIPT not in home.text and "&lt;script&gt;" in home.text
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80"):
        assert ask(address, "x", Host=host).status_code == 400, host
        assert get(address, headers={"Host": host}).status_code == 400, host
    assert get(address, headers={"Host": "localhost:1"}).status_code == 200
    asked = len(made_up.asked)
    assert ask(address, "x", Origin="http://evil.example").status_code == 403 and len(made_up.asked) == asked
    for origin in ("null", "http://[", ""):  # a sandboxed page, and none that can be
        assert ask(address, "x", Origin=origin).status_code == 403
    assert ask(address, "x", Origin=address.rstrip("/")).status_code == 200
    assert get(f"{address}search").status_code == 405


def test_words_that_cannot_be_searched_for_are_told(
    index_searcher: IndexSearcher, made_up: MadeUp, serve: Serve
) -> None:
    address = serve(made_up)
    for text in ("", "   \n"):
        assert "Type some words" in refused(address, text)
    assert "at most 2,000 characters" in refused(address, "x" * 2001)
    reply = httpx.post(
        f"{address}search", content=b"no form", headers={"Content-Type": "multipart/form-data"}
    )
    assert reply.status_code == 400 and "boundary" in reply.json()["error"]
    assert "special token" in refused(serve(index_searcher), "a <|im_end|> b")


def test_files_that_cannot_be_used_are_told(made_up: MadeUp, serve: Serve) -> None:
    address = serve(made_up)
    assert "cut.png is cut off" in refused(address, file=("cut.png", png((300, 300))[:120]))
    assert "notes.txt must be a picture, but its format is not known" in refused(
        address, file=("notes.txt", b"hi")
    )
    assert "must be a picture, but the file is empty" in refused(address, file=("empty.png", b""))
    told = refused(address, file=("large.png", grey(10_000)))  # 100 megapixels in 100 kB
    assert told == "large.png must have at most 50 megapixels, but has 10,000 x 10,000 pixels. Shrink it."
    told = refused(address, file=("larger.png", grey(14_000)))
    assert told.startswith("larger.png must be a picture, but Image size (196000000 pixels) exceeds limit")
    assert "clip.mp4 must be a video" in refused(address, file=("clip.mp4", b"\0\0\0\x18ftypmp42 no video"))
    assert "page.pdf must be a PDF that can be read" in refused(address, file=("page.pdf", b"%PDF-1.7 none"))
    path = ("../../etc/<b>.png", b"x")
    assert refused(address, file=path).startswith("<b>.png must be a picture")
    assert not made_up.asked


def test_too_many_bytes_are_refused_before_they_are_kept(made_up: MadeUp, serve: Serve) -> None:
    address = serve(made_up)
    told = refused(address, file=("x.png", bytes(uploads.MAX_BYTES)), status=413)
    assert told == "A picture or clip must have at most 32 MB. Shrink it."

    def parts() -> Any:  # without a content-length
        yield b"--b\r\nContent-Disposition: form-data; name=file; filename=x.png\r\n\r\n"
        for _ in range(40):
            yield bytes(1_000_000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = httpx.post(f"{address}search", content=parts(), headers=headers, timeout=60)
    assert reply.status_code == 413 and "32 MB" in reply.json()["error"]
    assert ask(address, "still there").status_code == 200


def test_a_picture_a_clip_and_a_page_become_a_query(made_up: MadeUp, serve: Serve, tmp_path: Path) -> None:
    address = serve(made_up)
    assert ask(address, " two red ", ("a.png", png())).status_code == 200
    assert made_up.asked[-1].text == "two red" and made_up.asked[-1].media[0].size == (40, 30)
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    assert ask(address, file=("clip.MP4", (tmp_path / "clip.mp4").read_bytes())).status_code == 200
    assert made_up.asked[-1].kinds == "clip" and len(made_up.asked[-1].media[0].frames) == 8
    for count in (1, 2):
        told = ask(address, file=("page.pdf", pdf(count)))
        if count == 1:
            assert told.status_code == 200 and made_up.asked[-1].kinds == "page"
        else:
            assert "page.pdf must have one page, but has 2" in told.json()["error"]


def grey(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def pdf(count: int) -> bytes:
    pdfium = pytest.importorskip("pypdfium2")
    document = pdfium.PdfDocument.new()
    for _ in range(count):
        document.new_page(200, 100)
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def test_fifty_uploads_at_once_are_answered_or_told_to_wait(made_up: MadeUp, serve: Serve) -> None:
    address = serve(made_up)
    made_up.gate.clear()
    with ThreadPoolExecutor(50) as pool:
        replies = [pool.submit(ask, address, str(n), ("a.png", png((600, 400)))) for n in range(50)]
        while sum(reply.done() for reply in replies) < 50 - server.QUERIES:
            get(address).raise_for_status()  # the page itself still answers
        made_up.gate.set()
        found = [reply.result() for reply in replies]
    codes = sorted(reply.status_code for reply in found)
    assert codes == [200] * server.QUERIES + [503] * (50 - server.QUERIES)
    busy = next(reply for reply in found if reply.status_code == 503)
    assert (
        busy.json()["error"] == server.BUSY.format(limit=server.QUERIES)
        and busy.headers["retry-after"] == "2"
    )
    assert len(made_up.asked) == server.QUERIES and ask(address, "again").status_code == 200


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders for uploads that were made, all of them below a folder of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[Path] = []

    class Watched(tempfile.TemporaryDirectory[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(Path(self.name))

    monkeypatch.setattr(server.tempfile, "TemporaryDirectory", Watched)
    return made


def test_no_upload_stays_on_disk(
    files: list[Path], made_up: MadeUp, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve(made_up)
    assert ask(address, file=("a.png", png())).status_code == 200
    assert "is cut off" in refused(address, file=("cut.png", png((300, 300))[:120]))

    def broken(query: Any, top_k: int) -> Any:
        raise RimeError("The model is ill.")

    monkeypatch.setattr(made_up, "search", broken)
    assert refused(address, file=("a.png", png())) == "The model is ill."
    assert len(files) == 3 and not list(tmp_path.iterdir())


def test_an_upload_is_neither_kept_nor_decoded_while_the_queue_is_full(
    files: list[Path], made_up: MadeUp, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spooled: list[Any] = []
    keep, decode = formparsers.SpooledTemporaryFile, server.to_query
    decoded: list[str] = []
    monkeypatch.setattr(
        formparsers, "SpooledTemporaryFile", lambda **given: spooled.append(given) or keep(**given)
    )
    monkeypatch.setattr(server, "to_query", lambda *args: decoded.append(args[2]) or decode(*args))
    address = serve(made_up)
    made_up.gate.clear()
    with ThreadPoolExecutor(server.QUERIES) as pool:
        first = [pool.submit(ask, address, "x", ("a.png", png())) for _ in range(server.QUERIES)]
        end = time.monotonic() + 60
        while len(files) < server.QUERIES:
            assert time.monotonic() < end
            time.sleep(0.02)
        told = refused(address, file=("late.png", bytes(5_000_000)), status=503)
        assert told == server.BUSY.format(limit=server.QUERIES)
        assert len(files) == len(spooled) == server.QUERIES and "late.png" not in decoded
        made_up.gate.set()
        assert [one.result().status_code for one in first] == [200] * server.QUERIES
    assert not list(tmp_path.iterdir())
    assert ask(address, file=("late.png", png())).status_code == 200, "all places are free again"


def test_who_sends_slowly_does_not_keep_a_place(
    made_up: MadeUp, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ARRIVAL", 0.2)
    address = serve(made_up)

    def slow() -> Any:
        yield b"--b\r\nContent-Disposition: form-data; name=file; filename=x.png\r\n\r\n"
        time.sleep(1)
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = httpx.post(f"{address}search", content=slow(), headers=headers, timeout=60)
    assert reply.status_code == 408 and "must arrive within" in reply.json()["error"]
    assert not made_up.asked
