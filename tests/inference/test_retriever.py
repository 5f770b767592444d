"""Load a run, encode and search, with a real but untrained micro model, so rankings have no meaning."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import rime_pl
from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.mllm import Backbone
from rime_pl.commands import search
from rime_pl.errors import RimeError
from rime_pl.inference import retriever as module
from rime_pl.inference.retriever import Retriever
from rime_pl.options.parser import parse
from rime_pl.types import Item


@pytest.fixture(scope="module")
def run_folder(
    shared_backbone: Backbone, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files that `rime cma fit` leaves: <run>/cma with adapter, manifest and done.json."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    stage, backbone = folder / "cma", shared_backbone
    state = adapter_state(backbone.peft)
    save_adapter(
        stage / "adapter", backbone.peft, state, backbone.processor, backbone.config, backbone.base_hash
    )
    (stage / "manifest.json").write_text(json.dumps({"data": str(scenes_corpus)}))
    (stage / "done.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> Retriever:
    return rime_pl.load(run_folder)


@pytest.fixture(scope="module")
def pictures(scenes_corpus: Path) -> list[Item]:
    return search.demo_pictures(scenes_corpus)[:6]


def test_encode_takes_texts_pictures_paths_and_items(
    loaded: Retriever, pictures: list[Item], tmp_path: Path
) -> None:
    picture = pictures[0].images[0]
    picture.save(tmp_path / "one.png")
    items = ["a red ring", tmp_path / "one.png", picture, Item("a red ring", (picture,), "")]
    for mode in ("discriminative", "generative"):
        vectors = loaded.encode(items, mode=mode)
        assert vectors.shape == (4, 64) and vectors.dtype == torch.float32
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(4), atol=1e-5)
        assert torch.allclose(vectors[1], vectors[2], atol=1e-5)  # the same picture from disk and from memory
        assert not torch.allclose(vectors[2], vectors[3], atol=1e-3)


def test_encode_equals_the_backbone_and_batches_change_nothing(
    loaded: Retriever, pictures: list[Item]
) -> None:
    prompts = loaded.backbone.processor.prompts(pictures)
    with torch.no_grad():
        expected = loaded.backbone(prompts).disc
    assert torch.allclose(loaded.encode(pictures, batch_size=2), expected, atol=1e-5)
    assert torch.allclose(loaded.encode(pictures), expected, atol=1e-6)


def test_instruction_is_used_where_the_item_has_none(loaded: Retriever) -> None:
    bare, instructed = Item("a ring", (), ""), Item("a ring", (), "", "Find it.")
    plain, named = loaded.encode([bare]), loaded.encode([bare], instruction="Find it.")
    own = loaded.encode([instructed], instruction="Other.")
    assert not torch.allclose(plain, named, atol=1e-4)
    assert torch.allclose(named, own, atol=1e-6)


def test_search_finds_the_picture_itself_and_takes_any_pair_of_modes(
    loaded: Retriever, pictures: list[Item]
) -> None:
    loaded.index(pictures)
    found = loaded.search(pictures[3], "discriminative", top_k=4)
    assert len(found.hits) == 4 and found.hits[0].item is loaded.gallery[3]
    assert found.hits[0].score == pytest.approx(1.0, abs=1e-4)
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert found.rewrite is None and found.encode_ms > 0
    crossed = loaded.search(pictures[3], "discriminative", top_k=99, target_mode="generative")
    assert len(crossed.hits) == len(pictures) and crossed.hits[0].rewrite is not None
    assert loaded.search("a ring", "generative").rewrite is not None


def test_gallery_is_encoded_once_for_each_adapter_mode_and_content(
    loaded: Retriever, pictures: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.index(pictures[:3])
    before = loaded.search("a ring").hits
    files = sorted(loaded.cache.iterdir())
    monkeypatch.setattr(loaded, "encode_full", None)  # encoding anything again would fail
    loaded.index(pictures[:3])
    assert sorted(loaded.cache.iterdir()) == files
    monkeypatch.undo()
    assert [hit.score for hit in loaded.search("a ring").hits] == [hit.score for hit in before]
    orders = (pictures[:2], pictures[1::-1])
    keys = {module._fingerprint(n, mode, items) for n in "ab" for mode in module.MODES for items in orders}
    assert len(keys) == 8


def test_wrong_use_is_an_error(loaded: Retriever, tmp_path: Path) -> None:
    with pytest.raises(RimeError, match="mode must be 'discriminative' or 'generative', but is 'gen'"):
        loaded.encode(["a"], mode="gen")
    with pytest.raises(RimeError, match="list of items is empty"):
        loaded.encode([])
    with pytest.raises(RimeError, match="gallery is empty"):
        loaded.index([])
    with pytest.raises(RimeError, match=r"needs a gallery in mode 'discriminative', but indexed is: nothing"):
        Retriever(loaded.backbone).search("a")
    with pytest.raises(RimeError, match=r"missing\.png must be a readable picture"):
        loaded.encode([tmp_path / "missing.png"])
    Image.new("RGB", (1000, 3)).save(tmp_path / "line.png")
    with pytest.raises(RimeError, match=r"line\.png: the longer side must be .* 1000 x 3 pixels"):
        loaded.encode([tmp_path / "line.png"])
    with pytest.raises(RimeError, match="no finished run here"):
        rime_pl.load(tmp_path)


def rime_search(*words: str) -> int:
    """What `rime search` does, with its errors as exceptions."""
    return search.run(**parse(search.run, "rime search", ["a red ring", "--device", "cpu", *words]))


def test_search_command_shows_both_modes_over_the_demo_pictures(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "sheet.png"
    assert rime_search("--run", str(run_folder), "--output", str(output), "--top_k", "3") == 0
    printed = capsys.readouterr().out
    for words in (
        "discriminative: query in",
        "generative: query in",
        "ms",
        "cosine",
        "as rewritten",
        "a red ring",
    ):
        assert words in printed
    assert Image.open(output).width > 3 * 148


def test_search_command_over_a_folder_of_ones_own(
    run_folder: Path, pictures: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "below").mkdir()
    pictures[0].images[0].save(tmp_path / "a.png")
    pictures[1].images[0].save(tmp_path / "below" / "b.JPG")
    (tmp_path / "notes.txt").write_text("no picture")
    words = ["--run", str(run_folder / "cma"), "--images", str(tmp_path), "--mode", "discriminative"]
    rime_search(*words, "--output", str(tmp_path / "out" / "sheet.png"))
    printed = capsys.readouterr().out
    assert "gallery: 2 pictures" in printed and "a.png" in printed and "below/b.JPG" in printed
    assert "generative" not in printed


def test_search_command_names_what_is_wrong(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run = ["--run", str(run_folder)]
    with pytest.raises(RimeError, match=r"--images .*empty: no pictures in it"):
        rime_search(*run, "--images", str(empty))
    with pytest.raises(RimeError, match=r"--images .*gone: no such folder"):
        rime_search(*run, "--images", str(tmp_path / "gone"))
    (empty / "broken.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(RimeError, match=r"broken\.png must be a readable picture"):
        rime_search(*run, "--images", str(empty))
    with pytest.raises(RimeError, match="--top_k must be 1 or more, but is 0"):
        rime_search(*run, "--top_k", "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RimeError, match=r"runs: no finished run here .* `make train-cma`"):
        rime_search()


def test_importing_the_package_stays_fast() -> None:
    code = "import sys, rime_pl; assert callable(rime_pl.load); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
