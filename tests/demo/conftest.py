"""Search pages that are served, over a made-up gallery and over an index of an untrained micro model."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from rime_pl.demo.searcher import Answer, Column, IndexSearcher, Result, Searcher
from rime_pl.demo.server import Page, application
from rime_pl.inference.collection import Scan
from rime_pl.inference.index import update_index
from rime_pl.inference.index_folder import Facts
from rime_pl.inference.indexed_media import Files
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.search import open_index
from rime_pl.inference.table_items import scan_table
from rime_pl.types import MODE_PAIRS, Item
from tests.inference.conftest import loaded, pictures, run_folder  # noqa: F401 - fixtures

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class MadeUp:
    """Finds one item with a hostile caption; waits for ``gate`` in every search."""

    about = f"2 items of {SCRIPT}"

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), list[Item]()
        self.gate.set()
        self.pictured = False

    def search(self, query: Item, top_k: int) -> Answer:
        assert self.gate.wait(30)
        self.asked.append(query)
        result = Result(0, 0.5, SCRIPT, SCRIPT, SCRIPT, self.pictured)
        columns = [Column(pair, [result], 1.0, 2.0) for pair in MODE_PAIRS[:-1]]
        return Answer([*columns, Column(MODE_PAIRS[-1], missing="None here.")], SCRIPT, SCRIPT)

    def picture(self, id: int) -> bytes | None:
        return png() if id == 0 else None


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


Serve = Callable[[Searcher], str]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Serve a searcher, and return the address."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(searcher: Searcher) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        app = application(Page(searcher, f"runs/{SCRIPT}", 3))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", server_header=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def made_up() -> MadeUp:
    return MadeUp()


@pytest.fixture(scope="module")
def index_searcher(
    loaded: Retriever,  # noqa: F811
    pictures: list[Item],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> IndexSearcher:
    """Six pictures, and a text that would be a script, in an index of the micro model."""
    folder = tmp_path_factory.mktemp("photos")
    rows: list[dict[str, str]] = [{"id": SCRIPT, "text": f"a red ring {SCRIPT}"}]
    for number, item in enumerate(pictures):
        item.media[0].save(folder / f"{number}.png")
        rows.append({"id": f"picture {number}", "image": f"{number}.png"})
    (folder / "table.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    scan: Scan = scan_table(folder / "table.jsonl")
    assert not scan.unusable
    about = Facts(loaded.name, loaded.dimension, list(MODES), "Find the picture.")
    path = folder.with_name("photos.index")
    update_index(path, scan, Files(scan.root), loaded, about)
    return IndexSearcher(open_index(path, loaded), "photos")


def media(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name
