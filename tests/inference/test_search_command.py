"""`rime search` with a real but untrained micro model, so rankings have no meaning."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import rime_pl
from rime_pl.commands import search
from rime_pl.datamodules.builders import folder
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.errors import RimeError
from rime_pl.inference.retriever import CACHE, Retriever
from rime_pl.options.parser import parse
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.types import Item

INSTRUCTION = "Find the picture."  # of the scenes


def test_an_adapter_of_an_earlier_version_loads_and_says_what_is_missing(
    old_run: Path, pictures: list[Item], capsys: pytest.CaptureFixture[str]
) -> None:
    old = rime_pl.load(old_run)
    assert old.encode("a red ring").shape == (64,) and old.unknown_words("zebra") == []
    for call in (old.encode_query, old.encode_target, old.index):
        with pytest.raises(
            RimeError, match="must keep the instructions of its tasks, but an earlier version"
        ):
            call("a red ring")
    old.index(pictures, instruction="")
    assert old.search("a red ring", instruction=INSTRUCTION).hits
    words = ["--run", str(old_run), "--mode", "discriminative", "--output", str(old_run / "sheet.png")]
    rime_search(*words)
    from_corpus = capsys.readouterr().out
    assert "warning" not in from_corpus
    (old_run / "manifest.json").unlink()
    pictures[0].media[0].save(old_run / "one.png")
    rime_search(*words, "--images", str(old_run))
    assert "warning: the adapter does not keep the instructions" in capsys.readouterr().out


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
    pictures[0].media[0].save(tmp_path / "a.png")
    pictures[1].media[0].save(tmp_path / "below" / "b.JPG")
    (tmp_path / "notes.txt").write_text("no picture")
    words = ["--run", str(run_folder / "cma"), "--images", str(tmp_path), "--mode", "discriminative"]
    rime_search(*words, "--output", str(tmp_path / "out" / "sheet.png"))
    printed = capsys.readouterr().out
    assert "gallery: 2 pictures" in printed and "a.png" in printed and "below/b.JPG" in printed
    assert "generative" not in printed


def test_pictures_that_cannot_be_used_are_left_out_and_listed(
    run_folder: Path, pictures: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a-broken.png").write_bytes(b"\x89PNG no picture")
    pictures[0].media[0].save(folder / "b.png")
    (folder / "c-empty.jpg").touch()
    (folder / "d-gone.png").symlink_to(tmp_path / "nowhere.png")
    pictures[1].media[0].save(folder / "x.png")
    Image.new("RGB", (1000, 3)).save(folder / "line.png")
    words = ["--run", str(run_folder), "--images", str(folder), "--output", str(tmp_path / "sheet.png")]
    for _ in range(2):  # the second time from the embeddings that were kept
        assert rime_search(*words) == 0
        printed = capsys.readouterr().out
        assert "gallery: 2 pictures" in printed and printed.count("b.png") == printed.count("x.png") == 2
        assert "4 pictures cannot be used and were left out:\n" in printed
        assert f"  {folder / 'a-broken.png'} must be a picture, but its format is not known." in printed
        assert f"there is none: {folder / 'd-gone.png'}" in printed and "1000 x 3 pixels" in printed
        assert f"{folder / 'c-empty.jpg'} must be a picture, but the file is empty" in printed


def test_without_images_the_corpus_is_found_from_any_folder_and_after_a_move(
    run_folder: Path,
    scenes_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    other.mkdir()
    stage = RunFolder(shutil.copytree(run_folder / "cma", here / "runs" / "cma"))
    shutil.copytree(scenes_corpus, here / "data" / "scenes")
    monkeypatch.chdir(here)
    facts = RunFolder("runs/cma").corpus_facts("data/scenes")  # as at the end of a run
    facts["data_hash"] = read_corpus(scenes_corpus)["data_hash"]
    write_json(stage.path / "manifest.json", facts)
    monkeypatch.chdir(other)

    def searched(run: Path) -> str:
        rime_search("--run", str(run), "--mode", "discriminative", "--output", str(tmp_path / "sheet.png"))
        return capsys.readouterr().out

    assert "gallery: " in searched(stage.path)
    moved = here.rename(tmp_path / "moved") / "runs" / "cma"
    assert "warning" not in searched(moved)
    write_json(moved / "manifest.json", facts | {"data_hash": "another"})
    assert f"warning: {moved.parents[1] / 'data/scenes'} holds other samples than when the run" in searched(
        moved
    )
    shutil.rmtree(moved.parents[1] / "data")
    with pytest.raises(RimeError, match=r"the corpus of this run, .* must be there, but is not in") as error:
        searched(moved)
    for place in (here / "data/scenes", moved.parents[1] / "data/scenes", other / "data/scenes"):
        assert str(place) in str(error.value)
    assert str(error.value).endswith("Copy it there, or give --images FOLDER.")


@pytest.fixture
def own_run(run_folder: Path, tmp_path: Path) -> Path:
    """A run on a corpus of one's own: 5 pictures in three splits; two show the same content."""
    rows = ["query_text,target_text,target_image,target_content_id,split"]
    for number, split in enumerate(["train", "train", "train", "val", "test"]):
        Image.new("RGB", (30 + number, 30), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"picture {number},,{number}.png,{'mug' if number < 2 else ''},{split}")
    rows.append("the first again,,0.png,mug,train")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    folder.build(tmp_path / "mine", table=tmp_path / "pairs.csv")
    stage = RunFolder(shutil.copytree(run_folder / "cma", tmp_path / "run", ignore=lambda *_: {CACHE}))
    write_json(stage.path / "manifest.json", {"data": str(tmp_path / "mine")})
    return stage.path


def test_all_pictures_of_a_corpus_of_ones_own_are_searched_and_named_by_their_row(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", str(own_run), "--mode", "discriminative", "--output", str(tmp_path / "sheet.png")]
    rime_search(*words)
    printed = capsys.readouterr().out
    mine = tmp_path / "mine"
    assert f"gallery: 5 pictures, of the splits train, val and test of {mine}   query: a red ring" in printed
    names = re.findall(r"(line \d+|mug)\W*$", printed, re.M)
    assert sorted(names) == ["line 4", "line 5", "line 6", "mug", "mug"]
    table = tmp_path / "pairs.csv"
    table.write_text(table.read_text().replace("picture 2,,", "picture 2,a <gen_emb>,"))
    folder.build(mine, table=table)
    rime_search(*words)
    printed = capsys.readouterr().out
    assert "gallery: 4 pictures" in printed and "1 picture cannot be used and was left out" in printed
    assert "train-000000.tar/row-00000004: field 'target.text' must not contain '<gen_emb>'" in printed


def test_of_a_built_in_corpus_the_pictures_of_the_test_are_searched(
    run_folder: Path, scenes_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "sheet.png"), "--mode", "discriminative"]
    rime_search("--run", str(run_folder), *output)
    splits = [name for name in ("test", "distractors") if name in read_corpus(scenes_corpus)["splits"]]
    place = f"of the split{'s' * (len(splits) > 1)} {' and '.join(splits)} of {scenes_corpus}"
    assert f" pictures, {place}   query" in capsys.readouterr().out


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
    (tmp_path / "one.png").touch()
    with pytest.raises(RimeError, match=r"--images must be a folder of pictures, but .*one\.png is a file\."):
        rime_search(*run, "--images", str(tmp_path / "one.png"))
    (empty / "broken.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(RimeError, match=r"broken\.png must be a picture, but its format is not known"):
        rime_search(*run, "--images", str(empty))
    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "index", None)  # the gallery would take minutes
        for query, error in (
            ("", "The query must have at least one word"),
            ("a <gen_emb>", "must not contain '<gen_emb>'"),
        ):
            with pytest.raises(RimeError, match=error):
                search.run(query, run=run_folder, device="cpu")
    with pytest.raises(RimeError, match=r"--output must be the name of a picture, .* but is sheet.pnk"):
        rime_search(*run, "--output", "sheet.pnk")
    with pytest.raises(RimeError, match="--top_k must be 1 or more, but is 0"):
        rime_search(*run, "--top_k", "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RimeError, match=r"runs: no finished run here .* `make train-cma`"):
        rime_search()


def test_search_command_names_the_run_and_the_words_that_training_lacks(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "query": "a red pizza",
        "output": tmp_path / "sheet.png",
        "mode": "discriminative",
        "device": "cpu",
    }
    search.run(**words, run=run_folder)
    printed = capsys.readouterr().out
    assert f"run: {run_folder / 'cma'}\n" in printed
    assert "in no training text: pizza. The model may not know" in printed
    shutil.copytree(run_folder, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    search.run(**words | {"query": "a red ring"})
    printed = capsys.readouterr().out
    assert "run: runs/demo/cma (finished last in runs)\n" in printed and "training text" not in printed
    with pytest.raises(RimeError, match=r"task must be one .* but is 'nope'"):
        search.run(**words, task="nope")


def test_brackets_in_a_query_are_no_markup(
    run_folder: Path, pictures: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures[0].media[0].save(tmp_path / "[bold] ring.png")
    words = {"run": run_folder, "images": tmp_path, "output": tmp_path / "out" / "sheet.png", "device": "cpu"}
    search.run("a [/red] ring :star:", mode="discriminative", **words)
    printed = capsys.readouterr().out
    assert "query: a [/red] ring :star:" in printed and "[bold] ring.png" in printed


def test_importing_the_package_stays_fast() -> None:
    code = "import sys, rime_pl; assert callable(rime_pl.load); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
