"""A build of an index is killed at random moments and started again, until it is there."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rime_pl.inference.collection import Scan
from rime_pl.inference.index import update_index
from rime_pl.inference.index_folder import Facts, IndexFolder, records_of
from rime_pl.inference.indexed_media import Files
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.table_items import scan_table

KILLS = 20


def collection(folder: Path) -> Scan:
    """Texts, pictures and both; some of the same content, some that cannot be used."""
    folder.mkdir()
    lines = []
    for number in range(40):
        text = "a <gen_emb> ring" if number % 11 == 5 else f"ring {number % 33}"
        lines.append(f'{{"id": "{number}", "text": "{text}", "image": "{number}.png"}}')
        size = (30 + number % 7, 40)
        Image.new("RGB", size, (number % 33, 90, 10)).save(folder / f"{number}.png")
    (folder / "7.png").write_bytes(b"no picture")
    (folder / "table.jsonl").write_text("\n".join(lines))
    return scan_table(folder / "table.jsonl")


def build(path: Path, scan: Scan, model: Retriever) -> None:
    facts = Facts(model.name, model.dimension, list(MODES), "")
    update_index(path, scan, Files(scan.root), model, facts, part_size=4)


def start(path: Path, scan: Scan, model: Retriever, log: Path) -> int:
    """Start a build in a process of its own, which writes down what it embeds, and return its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        encode = Retriever.encode_modes

        def watched(self: Retriever, items: Any, *args: Any, **kwargs: Any) -> Any:
            found = encode(self, items, *args, **kwargs)
            with log.open("a") as file:
                file.writelines(f"{item.content_id}\n" for item in items)
            return found

        Retriever.encode_modes = watched  # type: ignore[method-assign]
        build(path, scan, model)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def indexed(path: Path) -> set[str]:
    folder = IndexFolder(path)
    return (
        {one.id for part in folder.parts() for one in records_of(part)}
        if folder.facts_file.is_file()
        else set()
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_kills_leave_the_same_index_and_embed_nothing_again(loaded: Retriever, tmp_path: Path) -> None:
    rng, scan = random.Random(0), collection(tmp_path / "items")
    began = time.monotonic()
    build(tmp_path / "whole", scan, loaded)
    seconds, kills, in_the_middle = time.monotonic() - began, 0, 0
    while kills < KILLS:
        path = tmp_path / f"killed-{kills}"
        while True:
            there, log = indexed(path), tmp_path / "log.txt"
            log.unlink(missing_ok=True)
            pid = start(path, scan, loaded, log)
            if kills < KILLS:
                time.sleep(rng.uniform(0, 0.5 * seconds))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            again = there & set(log.read_text().split() if log.is_file() else ())
            assert not again, f"embedded again: {again}"
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            kills += 1
            in_the_middle += 0 < len(indexed(path)) < 35
        same(path, tmp_path / "whole")
    assert in_the_middle >= 3, "kills must hit builds that have parts, and are not complete"


def same(path: Path, whole: Path) -> None:
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in path.iterdir()) == names
    assert "building.json" not in names and not [name for name in names if name.endswith(".half")]
    for name in names:
        if name.endswith(".parquet"):
            assert pq.read_table(path / name).equals(pq.read_table(whole / name)), name
        else:
            assert (path / name).read_text().replace(path.name, "") == (whole / name).read_text().replace(
                whole.name, ""
            )
