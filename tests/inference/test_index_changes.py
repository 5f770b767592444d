"""What becomes of an index when files change while it is built, and where its folder is a link."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rime_pl.errors import RimeError
from rime_pl.inference.collection import Scan, scan_folder
from rime_pl.inference.corpus_targets import scan_corpus
from rime_pl.inference.index import update_index
from rime_pl.inference.index_folder import Facts, IndexFolder
from rime_pl.inference.index_parts import Counts
from rime_pl.inference.indexed_media import Files
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.search import open_index


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number, colour in enumerate(("red", "lime", "blue", "white")):
        Image.new("RGB", (40 + number, 40), colour).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def update(path: Path, model: Retriever, scan: Scan) -> Counts:
    facts = Facts(model.name, model.dimension, ["discriminative"], "")
    return update_index(path, scan, Files(scan.root), model, facts, part_size=3)


def told(path: Path) -> dict[str, str]:
    lines = map(json.loads, IndexFolder(path).unusable.read_text().splitlines())
    return {line["id"]: line["reason"] for line in lines}


@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
@pytest.mark.parametrize("to", ["another picture", "no picture", "nothing"])
def test_a_file_that_changes_while_it_is_indexed_waits_for_the_next_call(
    when: str, to: str, loaded: Retriever, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encode = tmp_path / "index", Retriever.encode_modes

    def change() -> None:
        if to == "another picture":
            Image.new("RGB", (40, 40), "black").save(photos / "1.png")
        else:
            (photos / "1.png").unlink(missing_ok=True)
            if to == "no picture":
                (photos / "1.png").write_bytes(b"half a file")

    def changing(self: Retriever, items: Any, *args: Any, **kwargs: Any) -> Any:
        if when.startswith("before"):
            change()
        found = encode(self, items, *args, **kwargs)
        if when.startswith("after"):
            change()
        return found

    (photos / "copy.png").write_bytes((photos / "1.png").read_bytes())  # in the second part, not changed
    scan = scan_folder(photos)
    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "encode_modes", changing)
        counts = update(path, loaded, scan)
    assert counts == Counts(total=4, embedded=4, changed=1, unusable=1)
    assert told(path) == {
        "1.png": f"{photos / '1.png'} changed while it was indexed. Give the same command again."
    }
    counts = update(path, loaded, scan_folder(photos))
    if to == "another picture":
        assert counts == Counts(total=5, embedded=1, kept=4)
        index = open_index(path, loaded)
        row = next(row for row in range(5) if index.record(row)[0].id == "1.png")
        vector = loaded.encode(photos / "1.png")
        assert torch.allclose(index.vectors("discriminative", torch.tensor([row]))[0], vector, atol=1e-5)
    else:
        assert counts == Counts(total=4, kept=4, unusable=int(to == "no picture"))


def test_a_corpus_that_is_built_again_meanwhile_is_noticed(scenes_corpus: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(scenes_corpus, tmp_path / "corpus"))
    scan = scan_corpus(corpus, ["val", "val"])
    assert scan.source == "val"
    assert all(scan.changed(record) is None for record in scan.records)
    (tar,) = (corpus / "val").glob("*.tar")
    os.utime(tar, ns=(0, 0))
    assert {scan.changed(record) for record in scan.records} == {tar}


def test_an_item_that_was_repaired_before_a_stopped_build_went_on_is_not_called_unusable(
    loaded: Retriever, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    update(path, loaded, scan_folder(photos))
    refused = [["1.png", "00", "its format is not known", "part-00000.parquet"]]
    IndexFolder(path).building.write_text(json.dumps(refused))
    assert update(path, loaded, scan_folder(photos)) == Counts(total=4, kept=4)
    assert told(path) == {}


def test_a_link_to_the_folder_of_an_index_is_followed_and_a_link_to_nothing_is_refused(
    loaded: Retriever, photos: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.index"
    link.symlink_to(tmp_path / "large-disk")
    with pytest.raises(RimeError, match=r"--output must be the folder of an index, .* is a link to nothing"):
        update(link, loaded, scan_folder(photos))
    (tmp_path / "large-disk").mkdir()
    for kept in (0, 4):
        assert update(link, loaded, scan_folder(photos)) == Counts(total=4, embedded=4 - kept, kept=kept)
    assert link.is_symlink() and len(open_index(link, loaded)) == 4
    assert open_index(tmp_path / "large-disk", loaded)[0] == photos / "0.png"
