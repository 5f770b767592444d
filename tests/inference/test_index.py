"""Indices of a real but untrained micro model: what they hold, keep, drop and refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rime_pl.errors import RimeError
from rime_pl.inference import collection
from rime_pl.inference.collection import Scan
from rime_pl.inference.corpus_targets import scan_corpus
from rime_pl.inference.index import Counts, update_index
from rime_pl.inference.index_folder import Facts, IndexFolder, records_of
from rime_pl.inference.indexed_media import CorpusTargets, Files
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.search import open_index
from rime_pl.inference.table_items import scan_table
from rime_pl.types import Item, Mode
from tests.datamodules.tiny_sources import write_video

INSTRUCTION = "Find the picture."


def facts(model: Retriever, modes: list[Mode] | None = None, **changes: Any) -> Facts:
    return Facts(model.name, model.dimension, modes or list(MODES), INSTRUCTION, **changes)


def update(path: Path, model: Retriever, scan: Scan, **changes: Any) -> Counts:
    media = CorpusTargets(scan.root) if scan.kind == "corpus" else Files(scan.root)
    return update_index(path, scan, media, model, facts(model, **changes), part_size=3)


@pytest.fixture
def photos(pictures: list[Item], tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, item in enumerate(pictures):
        place = folder / "more" if number % 2 else folder
        item.media[0].save(place / f"{number}.png")
    return folder


def rows(path: Path) -> dict[str, list[float]]:
    found = {}
    for part in IndexFolder(path).parts():
        table = pq.read_table(part.path)
        found |= dict(zip(table["id"].to_pylist(), table["gen"].to_pylist(), strict=True))
    return found


def test_an_index_holds_both_vectors_of_each_picture(loaded: Retriever, photos: Path, tmp_path: Path) -> None:
    counts = update(tmp_path / "index", loaded, collection.scan_folder(photos))
    assert counts == Counts(total=6, embedded=6)
    index = open_index(tmp_path / "index", loaded)
    assert [part.rows for part in index.parts] == [3, 3] and len(index) == 6
    names = [index.record(row)[0].id for row in range(6)]
    assert names == sorted(names, key=lambda name: (name.count("/"), name))
    for mode in MODES:
        encoded = loaded.encode_full([photos / name for name in names], mode, instruction=INSTRUCTION)
        assert torch.allclose(torch.cat(list(index.blocks(mode))), encoded.embeddings, atol=1e-5)
        if encoded.rewrites is not None:
            assert [index.record(row)[1] for row in range(6)] == encoded.rewrites


def test_only_what_is_new_is_embedded_and_what_has_gone_is_dropped(
    loaded: Retriever, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encoded = tmp_path / "index", []
    encode = Retriever.encode_modes

    def watched(self: Retriever, items: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.extend(str(item) for item in items)
        return encode(self, items, *args, **kwargs)

    monkeypatch.setattr(Retriever, "encode_modes", watched)
    update(path, loaded, collection.scan_folder(photos))
    before = rows(path)
    assert len(encoded) == 6
    assert update(path, loaded, collection.scan_folder(photos)) == Counts(total=6, kept=6)
    (photos / "0.png").rename(photos / "renamed.png")
    (photos / "2.png").unlink()
    Image.new("RGB", (40, 40), "red").save(photos / "more" / "1.png")
    (photos / "copy.png").write_bytes((photos / "4.png").read_bytes())
    counts = update(path, loaded, collection.scan_folder(photos))
    assert counts == Counts(total=6, embedded=1, kept=3, renamed=1, copied=1, dropped=2)
    assert encoded[6:] == [str(photos / "more" / "1.png")], "nothing else was embedded again"
    after = rows(path)
    assert set(after) == {"4.png", "copy.png", "renamed.png", "more/1.png", "more/3.png", "more/5.png"}
    assert after["renamed.png"] == before["0.png"] and after["copy.png"] == before["4.png"]
    assert after["more/1.png"] != before["more/1.png"]


def test_what_cannot_be_used_is_named_and_nothing_outside_the_folder_is_opened(
    loaded: Retriever, photos: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "secret.png"
    Image.new("RGB", (40, 40), "red").save(outside)
    (tmp_path / "elsewhere").mkdir()
    (photos / "link.png").symlink_to(outside)
    (photos / "folder").symlink_to(tmp_path / "elsewhere")
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "wide.png").write_bytes(b"")
    os.mkfifo(photos / "pipe.png")
    (photos / "notes.md").write_text("notes")
    scan = collection.scan_folder(photos)
    assert "1 other file is no picture, video or PDF" in scan.notes[0]
    counts = update(tmp_path / "index", loaded, scan)
    assert (counts.total, counts.unusable) == (6, 5)
    lines = IndexFolder(tmp_path / "index").unusable.read_text().splitlines()
    told = {line["id"]: line["reason"] for line in map(json.loads, lines)}
    assert "leaves" in told["link.png"] and "not followed" in told["folder"]
    assert "its format is not known" in told["broken.png"] and "the file is empty" in told["wide.png"]
    assert "no ordinary file" in told["pipe.png"]
    (photos / "broken.png").unlink()
    Image.new("RGB", (40, 40), "blue").save(photos / "broken.png")
    counts = update(tmp_path / "index", loaded, collection.scan_folder(photos))
    assert (counts.embedded, counts.kept, counts.unusable) == (1, 6, 4)


def test_one_faulty_text_does_not_stop_the_others(loaded: Retriever, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"a red ring\n\na <gen_emb> star\na blue star\n\xff\nword " * 2)
    scan = collection.scan_texts(tmp_path / "lines.txt")
    counts = update(tmp_path / "index", loaded, scan)
    told = IndexFolder(tmp_path / "index").unusable.read_text()
    assert counts.unusable == 4 and told.count("special token") == 2 and told.count("0xff") == 2
    assert counts.total == len(scan.records) - 2 == 5 and counts.copied == 1


def test_a_table_names_texts_and_media(loaded: Retriever, photos: Path, tmp_path: Path) -> None:
    table = [
        {"id": "both", "text": "a ring", "image": "0.png", "price": 3},
        {"id": 7, "target_image": "2.png"},
        {"caption": "a star", "image": "4.png"},
        {"caption": "only a caption"},
        {"id": "out", "image": "../secret.png"},
        {"id": "both", "text": "something else"},
        {"id": "empty"},
    ]
    (photos / "table.jsonl").write_text("\n".join(map(json.dumps, table)) + "\n[1]\n")
    scan = scan_table(photos / "table.jsonl")
    counts = update(tmp_path / "index", loaded, scan)
    assert [record.id for record in scan.records] == ["both", "7", "row 3", "row 4"]
    assert scan.records[3].text == "only a caption" and not scan.records[2].text
    assert counts.total == 4 and counts.unusable == 4
    assert "must not contain '..'" in scan.unusable["row 5"] and "price" in scan.notes[0]
    assert "earlier row" in scan.unusable["both (row 6)"]
    index = open_index(tmp_path / "index", loaded)
    assert index[0].text == "a ring" and index[1] == photos / "2.png"


def test_a_corpus_is_indexed_by_its_distinct_targets(
    loaded: Retriever, scenes_corpus: Path, tmp_path: Path
) -> None:
    scan = scan_corpus(scenes_corpus, ["val"], ["pictures"])
    assert len({record.digest for record in scan.records}) == len(scan.records) > 3
    counts = update(tmp_path / "index", loaded, scan)
    assert counts.total == len(scan.records)
    index = open_index(tmp_path / "index", loaded)
    hit = index.search("a red ring", "generative", "discriminative", top_k=2).hits[0]
    assert hit.item.media and hit.record.media[0].startswith("val#")
    with pytest.raises(RimeError, match=r"--galleries must name galleries .* has \['nope'\]"):
        scan_corpus(scenes_corpus, ["val"], ["nope"])
    with pytest.raises(RimeError, match=r"--splits must name splits .* has \['nope'\]"):
        scan_corpus(scenes_corpus, ["nope"])


def test_another_model_and_other_settings_are_refused_by_name(
    loaded: Retriever, photos: Path, tmp_path: Path
) -> None:
    path, scan = tmp_path / "index", collection.scan_folder(photos)
    update(path, loaded, scan)
    other = Retriever(
        loaded.backbone, loaded.tasks, loaded.run, loaded.name.replace('"lora_r": 4', '"lora_r": 5')
    )
    for call in (lambda: update(path, other, scan), lambda: open_index(path, other)):
        with pytest.raises(RimeError, match="the model's lora_r is 4 there and 5 here"):
            call()
    with pytest.raises(RimeError, match="dtype is 'float32' there and 'float16' here"):
        update(path, loaded, scan, dtype="float16")
    with pytest.raises(RimeError, match=r"must be an index, .* but is not"):
        open_index(photos, loaded)
    with pytest.raises(RimeError, match="an index or an empty folder, but"):
        update(photos, loaded, scan)
    with pytest.raises(
        RimeError, match=r"source is '' there and '0.png' here"
    ):  # not: all others are dropped
        update(path, loaded, collection.scan_file(photos / "0.png"))
    (tmp_path / "others").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "others" / "one.png")
    with pytest.raises(RimeError, match="has none of its items"):
        update(path, loaded, collection.scan_folder(tmp_path / "others"))
    assert records_of(IndexFolder(path).parts()[0]), "all is still there"


def test_a_damaged_or_unfinished_index_is_refused(loaded: Retriever, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    update(path, loaded, collection.scan_folder(photos))
    IndexFolder(path).building.write_text("[]")
    with pytest.raises(RimeError, match="must be complete, but is not"):
        open_index(path, loaded)
    IndexFolder(path).building.unlink()
    part = IndexFolder(path).parts()[1].path
    whole = part.read_bytes()
    part.unlink()
    with pytest.raises(RimeError, match=r"must hold 6 items, .* hold 3"):
        open_index(path, loaded)
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RimeError, match="cannot be read as Parquet"):
        open_index(path, loaded)
    part.unlink()
    assert update(path, loaded, collection.scan_folder(photos)) == Counts(total=6, embedded=3, kept=3)
    about = json.loads(IndexFolder(path).facts_file.read_text())
    for name, value in (("format", 9), ("modes", ["x"]), ("dimension", "64"), ("kind", "x")):
        IndexFolder(path).facts_file.write_text(json.dumps(about | {name: value}))
        with pytest.raises(RimeError, match=f"'{name}'"):
            open_index(path, loaded)
    IndexFolder(path).facts_file.write_text("[")
    with pytest.raises(RimeError, match="is damaged"):
        open_index(path, loaded)


def test_pages_and_videos_are_items(loaded: Retriever, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    folder = tmp_path / "mixed"
    folder.mkdir()
    pages = [Image.new("RGB", (60, 80), colour) for colour in ("red", "blue")]
    pages[0].save(folder / "manual.PDF", save_all=True, append_images=pages[1:])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 no")
    write_video(folder / "clip.mp4")
    counts = update(tmp_path / "index", loaded, collection.scan_folder(folder))
    assert (counts.total, counts.unusable) == (3, 1)
    index = open_index(tmp_path / "index", loaded)
    kinds = {hit.id: hit.item.kinds for hit in index.search("red", instruction="").hits}
    assert kinds == {"manual.PDF#1": "page", "manual.PDF#2": "page", "clip.mp4": "clip"}
    first, second = (
        hit.item for hit in sorted(index.search("a", instruction="").hits, key=lambda h: h.name)[1:]
    )
    shown = [page.image.convert("RGB").getpixel((5, 5)) for item in (first, second) for page in item.media]
    assert shown[0][0] > 200 > shown[1][0], "the first page is red"
