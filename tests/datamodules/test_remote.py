"""Remote corpora over a local HTTP server and a pipe: copies, retries, the cache and its limit."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from colour_corpus import make_pairs, write

from rime_pl.datamodules import remote
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.remote import CacheSettings, RemoteFolder
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.errors import DataError, RimeError

pytestmark = pytest.mark.timeout(120)

MakeData = Callable[..., RimeDataModule]


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server with faults: it can fail, stop in the middle, change bits and know no ranges."""

    served: ClassVar[Counter[str]] = Counter()  # bytes of each file
    fail, cut, flip = 0, 0, 0  # how many requests fail, or end early, or are changed
    endless, hangs = False, 0.0  # whether a file has no end; seconds before an answer
    moved = ""  # another place, to which all requests are sent on
    page = ""  # files of this name are a page of words, as a network with a login gives
    ranges: bool | None = True  # None: it has none and does not say so

    def do_GET(self) -> None:
        cls = type(self)
        if cls.fail > 0:
            cls.fail -= 1
            self.send_error(503)
            return
        time.sleep(cls.hangs)
        if cls.moved:
            self.send_response(302)
            self.send_header("Location", f"{cls.moved}{self.path}")
            self.end_headers()
            return
        if cls.page and self.path.endswith(cls.page):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in</html>")
            return
        if cls.endless and self.path.endswith(".tar"):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while self.command == "GET":
                    self.wfile.write(bytes(1 << 16))
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        begin, end = 0, len(data)
        asked = self.headers.get("Range") if cls.ranges else None
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)) + 1, len(data))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin))
        if cls.ranges is not None:
            self.send_header("Accept-Ranges", "bytes" if cls.ranges else "none")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        content = bytearray(data[begin:end])
        if path.suffix == ".tar" and cls.flip > 0:
            cls.flip -= 1
            content[len(content) // 2] ^= 1
        if path.suffix == ".tar" and cls.cut > 0 and len(content) > 1000:
            cls.cut -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)
        self.wfile.flush()
        cls.served[path.name] += len(content)
        if len(content) < end - begin:
            self.connection.close()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Handler], Path]]:
    """The URL of a corpus of 60 pairs in tars of 6, the handler that serves it, and its folder."""
    folder = write(tmp_path / "served", {"train": make_pairs("a", 60, 60)}, samples_per_shard=6)
    handler = type("Faulty", (Handler,), {"served": Counter()})
    made = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", handler, folder
    made.shutdown()
    made.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"), wait=0.01)


def read_all(place: str, cache: CacheSettings) -> list[str]:
    reader = ShardReader(read_split(place, "train", cache=cache))
    return [reader.read(number).key for number in range(len(reader))]


def local(folder: Path) -> list[str]:
    return [entry.name for entry in read_split(folder, "train")]


@pytest.mark.parametrize("ranges", [True, False, None])
def test_each_file_is_copied_once_when_it_is_needed(
    server: tuple[str, type[Handler], Path], cache: CacheSettings, ranges: bool | None
) -> None:
    place, handler, folder = server
    handler.ranges = ranges
    assert read_corpus(place, cache) == read_corpus(folder)
    read_split(place, "train", cache=cache)
    assert not any(name.endswith(".tar") for name in handler.served)
    assert read_all(place, cache) == local(folder)
    assert read_all(place, cache) == local(folder)
    sizes = {file.name: file.stat().st_size for file in (folder / "train").iterdir()}
    assert {name: handler.served[name] for name in sizes} == sizes


def test_a_copy_that_breaks_off_goes_on_where_it_stopped(
    server: tuple[str, type[Handler], Path], cache: CacheSettings
) -> None:
    place, handler, folder = server
    index = read_split(place, "train", cache=cache).parts[0]
    shard = index.shards[0]
    target = index.folder / shard.name
    whole = (folder / "train" / shard.name).read_bytes()
    target.with_name(f"{target.name}.part").write_bytes(whole[:7000])  # of a process that was killed
    handler.fail = 2
    assert ShardReader(read_split(place, "train", cache=cache)).read(0).key == f"{shard.name}/a-0000"
    assert target.read_bytes() == whole and handler.served[shard.name] == len(whole) - 7000


@pytest.mark.parametrize("fault", ["fail", "cut", "flip"])
@pytest.mark.parametrize("ranges", [True, False, None])
def test_faults_of_the_server_are_tried_again(
    server: tuple[str, type[Handler], Path], cache: CacheSettings, fault: str, ranges: bool | None
) -> None:
    place, handler, folder = server
    handler.ranges = ranges
    entries = read_split(place, "train", cache=cache)
    setattr(handler, fault, 2)
    assert [ShardReader(entries).read(n).key for n in range(60)] == local(folder)


def test_a_server_that_stays_away_ends_the_run_and_is_no_broken_sample(
    server: tuple[str, type[Handler], Path], cache: CacheSettings
) -> None:
    place, handler, _ = server
    few = CacheSettings(cache.folder, retries=2, wait=0.01)
    entries = read_split(place, "train", cache=few)
    handler.fail = 10**6
    began = time.monotonic()
    with pytest.raises(
        RimeError, match=r"train-000000.tar of http.* is not after 3 tries: .*the copy goes on"
    ) as e:
        ShardReader(entries).read(0)
    assert not isinstance(e.value, DataError) and time.monotonic() - began < 20
    handler.fail, handler.flip = 0, 10**6
    with pytest.raises(RimeError, match=r"its bytes are not those that the index of the corpus was made of"):
        ShardReader(entries).read(0)


def test_a_tar_without_end_is_not_read_to_its_end(
    server: tuple[str, type[Handler], Path], cache: CacheSettings
) -> None:
    place, handler, _ = server
    few = CacheSettings(cache.folder, retries=1, wait=0.01)
    entries = read_split(place, "train", cache=few)
    handler.endless = True
    with pytest.raises(RimeError, match=r"after 2 tries: it must have at most [\d,]+ bytes, but more came"):
        ShardReader(entries).read(0)
    assert sum(file.stat().st_size for file in few.path.rglob("*") if file.is_file()) < 100_000
    handler.endless = False
    assert ShardReader(entries).read(0)


def test_a_server_that_answers_nothing_is_given_up(
    server: tuple[str, type[Handler], Path], cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, handler, _ = server
    entries = read_split(place, "train", cache=CacheSettings(cache.folder, retries=1, wait=0.01))
    monkeypatch.setattr(remote, "_TIMEOUT", 0.2)
    handler.hangs, began = 5.0, time.monotonic()
    with pytest.raises(RimeError, match=r"train-000000.tar of http.* is not after 2 tries: "):
        ShardReader(entries).read(0)
    assert time.monotonic() - began < 5


def test_a_redirect_is_followed_and_what_comes_is_compared(
    server: tuple[str, type[Handler], Path], cache: CacheSettings
) -> None:
    """Stores of files send on to other hosts. A corpus that has moved is the same by its hashes."""
    place, handler, folder = server
    other = type("Moved", (Handler,), {"moved": place, "served": Counter()})
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), other)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    moved = f"http://127.0.0.1:{made.server_port}"
    few = CacheSettings(cache.folder, retries=1, wait=0.01)
    entries = read_split(moved, "train", cache=few)
    handler.flip = 10**6
    with pytest.raises(RimeError, match=r"its bytes are not those that the index of the corpus was made of"):
        ShardReader(entries).read(0)
    handler.flip = 0
    assert read_all(moved, few) == local(folder)
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("page", ["corpus.json", "index.json", "index.names", "train-000000.tar"])
def test_a_page_in_the_place_of_a_file_is_named_and_not_kept(
    server: tuple[str, type[Handler], Path], cache: CacheSettings, page: str
) -> None:
    place, handler, folder = server
    handler.page = page
    few = CacheSettings(cache.folder, retries=1, wait=0.01)
    with pytest.raises(RimeError, match=page.replace("index.names", "index.names of http")):
        read_all(place, few)
    handler.page = ""
    remote.open_remote.cache_clear()
    assert read_all(place, few) == local(folder)


def test_a_corpus_that_is_not_there(server: tuple[str, type[Handler], Path], cache: CacheSettings) -> None:
    place, _, folder = server
    with pytest.raises(DataError, match=r"http.*/nowhere/corpus.json must be there and readable, but is not"):
        read_corpus(f"{place}/nowhere", cache)
    with pytest.raises(RimeError, match=r"xyz://a/corpus.json cannot be opened"):
        read_corpus("xyz://a", cache)
    (folder / "train" / "train-000002.tar").unlink()
    reader = ShardReader(read_split(place, "train", cache=cache))
    assert reader.read(0)
    with pytest.raises(DataError, match=r"train-000002.tar must be there and readable, but is not"):
        reader.read(13)


def test_the_cache_keeps_its_size_and_what_was_used_last(
    server: tuple[str, type[Handler], Path], cache: CacheSettings
) -> None:
    place, _, folder = server
    size = (folder / "train" / "train-000000.tar").stat().st_size
    small = CacheSettings(cache.folder, gib=3.5 * size / 2**30, wait=0.01)
    entries = read_split(place, "train", cache=small)
    for number in (0, 6, 12, 0, 18, 0, 24):  # the first tar is used again and again
        assert ShardReader(entries, tars=TarFiles()).read(number)
        kept = sorted(small.path.glob("*/*/*.tar"))
        assert sum(tar.stat().st_size for tar in kept) <= 3.5 * size
    assert [tar.name for tar in kept] == [f"train-00000{n}.tar" for n in (0, 3, 4)]
    assert read_all(place, small) == local(folder)
    with pytest.raises(
        RimeError, match=r"data.cache.gib must be at least .*, the size of the largest tar of"
    ):
        read_split(place, "train", cache=CacheSettings(cache.folder, gib=0.5 * size / 2**30))
    for wrong in (CacheSettings(gib=0.0), CacheSettings(wait=0.0), CacheSettings(retries=-1)):
        with pytest.raises(RimeError, match=r"data.cache.(gib|wait|retries) must be"):
            wrong.check()


def test_a_changed_corpus_is_copied_anew(
    server: tuple[str, type[Handler], Path], cache: CacheSettings
) -> None:
    place, _, folder = server
    assert len(read_all(place, cache)) == 60
    write(folder, {"train": make_pairs("b", 12, 12)}, samples_per_shard=6)
    assert len(read_all(f"{place}/", cache)) == 12  # a process reads corpus.json of a place once


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_a_remote_corpus_gives_the_batches_of_a_local_one(
    make_data: MakeData, server: tuple[str, type[Handler], Path], cache: CacheSettings, num_workers: int
) -> None:
    place, _, folder = server

    def keys(path: str, workers: int) -> list[list[str]]:
        made = make_data()
        data = RimeDataModule(
            path, "no-model", made.prompt, 4, num_workers=workers, cache=cache, steps_per_epoch=20
        )
        data.setup("fit")
        return [batch.keys for batch in data.train_dataloader()]  # type: ignore[union-attr]

    assert keys(place, num_workers) == keys(str(folder), 0)


def test_a_pipe_of_the_users_own_settings(
    server: tuple[str, type[Handler], Path], cache: CacheSettings, tmp_path: Path
) -> None:
    _, _, folder = server
    assert read_all(f"pipe:cat '{folder}'/{{}}", cache) == local(folder)
    with pytest.raises(RimeError, match=r"must be 'pipe:COMMAND' with \{\} where the name"):
        read_corpus("pipe:cat x", cache)
    few = CacheSettings(cache.folder, retries=1, wait=0.01)
    with pytest.raises(RimeError, match=r"after 2 tries: the command ended with code 3: sorry"):
        read_corpus("pipe:echo sorry >&2; exit 3; {}", few)
    # a name of a corpus is never a command
    corpus = folder / "corpus.json"
    corpus.write_text(corpus.read_text().replace("train-000000.tar", "pipe:touch evil.tar"))
    for place in (str(folder), f"pipe:cat '{folder}'/{{}} #"):
        with pytest.raises(DataError, match=r"or other tars"):
            read_split(place, "train", cache=cache)
    name = "; touch evil #.tar"
    with pytest.raises(RimeError, match=r"after 2 tries"):
        RemoteFolder(f"pipe:cat '{folder}'/{{}}", few, "x").file(name)
    assert not list(tmp_path.rglob("evil*")) and not Path("evil").exists()
