"""From a table of one's own to a trained model by one command, and what is refused on the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from rime_pl.__main__ import main
from rime_pl.commands.base import made_otherwise
from rime_pl.corpus_places import BASE_MARKER, BASE_RECORD, find_corpus, find_tiny_base
from rime_pl.datamodules.captions import read_captions
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder, write_json
from tests.stages.runs import ROOT

COLOURS = ("red", "blue", "green", "orange", "purple", "black", "pink", "brown", "teal", "navy")
SHAPES = ("circle", "square", "bar")
SPLITS = ("train", "train", "train", "val", "test")


def draw(path: Path, colour: str, shape: str, side: int = 120) -> None:
    image = Image.new("RGB", (side, side * 3 // 4), "white")
    box = (side // 4, side // 4, side // 2, side // (3 if shape == "bar" else 2))
    pen = ImageDraw.Draw(image)
    pen.ellipse(box, colour) if shape == "circle" else pen.rectangle(box, colour)
    image.save(path)


def own_folder(path: Path, rows: list[dict[str, str]], name: str = "captions.csv") -> Path:
    path.mkdir(parents=True)
    for number in range(30):
        draw(path / f"{number}.png", COLOURS[number % 10], SHAPES[number // 10])
    with (path / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def captions(language: str = "a {colour} {shape}") -> list[dict[str, str]]:
    return [
        {
            "image": f"{n}.png",
            "caption": language.format(colour=COLOURS[n % 10], shape=SHAPES[n // 10]),
            "split": SPLITS[n % 5],
        }
        for n in range(30)
    ]


def texts() -> list[dict[str, str]]:
    return [
        {"query_text": f"who sells {COLOURS[n % 10]}?", "target_text": f"shop {n}", "split": SPLITS[n % 5]}
        for n in range(30)
    ]


def texts_of(corpus: Path, split: str) -> set[str]:
    reader = ShardReader(read_split(corpus, split))
    pairs = [reader.read(n) for n in range(len(reader))]
    return {item.text for pair in pairs for item in (pair.query, pair.target) if item and item.text}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def build(here: Path, rows: list[dict[str, str]], *more: str) -> Path:
    folder = own_folder(here / "mine", rows)
    words = [
        "shards",
        "folder",
        "--table",
        str(folder / "captions.csv"),
        "--output",
        "data/mine",
        "--workers",
        "1",
    ]
    assert main([*words, *more]) == 0
    return Path("data/mine")


SMALL = ("--vision_steps", "2", "--copy_steps", "2", "--num_steps", "2", "--batch_size", "4")


def small_base(corpus: Path, output: str, *more: str) -> int:
    return main(["base", "--data", str(corpus), "--output", output, "--num_threads", "1", *SMALL, *more])


@pytest.mark.parametrize(
    "language", ["a {colour} {shape}", "{colour}の{shape}が見える", "это {colour} {shape}"]
)
def test_a_base_model_is_made_from_training_pairs_only(here: Path, language: str) -> None:
    rows = captions(language)
    for row in rows:
        row["caption"] += f" {row['split']}only{row['image'][0]}"
    corpus = build(here, rows)
    found = read_captions(corpus, None, 48, 100, 0)
    assert len(found.samples) == 18 and all(max(image.size) == 48 for image, _ in found.samples)
    assert {text for _, several in found.samples for text in several} == texts_of(corpus, "train")
    words = "\n".join(found.texts)
    assert "trainonly" in words and "valonly" not in words and "testonly" not in words
    assert small_base(corpus, "models/tiny-mine") == 0
    record = json.loads(Path("models/tiny-mine", BASE_RECORD).read_text())
    assert record["data_hash"] == read_corpus(corpus)["data_hash"]
    as_made = ["--data", str(corpus), "--output", "models/tiny-mine", "--num_threads", "1", *SMALL]
    assert made_otherwise(Path("models/tiny-mine"), as_made) == ""
    assert (
        made_otherwise(Path("models/tiny-mine"), [*as_made, "--tasks", "a"])
        == "made with tasks None instead of ['a']"
    )
    vocabulary = json.loads(Path("models/tiny-mine/tokenizer.json").read_text())["model"]["vocab"]
    assert any("train" in token for token in vocabulary) and not any(
        "testonly" in token for token in vocabulary
    )


def test_each_picture_has_the_captions_of_its_rows(here: Path) -> None:
    rows = captions()
    rows += [row | {"caption": "seen again"} for row in rows if row["image"] in ("0.png", "1.png")]
    found = read_captions(build(here, rows), None, 96, 100, 0)
    assert sorted(several for _, several in found.samples if len(several) > 1) == [
        ["a blue circle", "seen again"],
        ["a red circle", "seen again"],
    ]
    few, other = (read_captions(Path("data/mine"), None, 96, 5, seed).samples for seed in (0, 1))
    assert len(few) == len(other) == 5 and [several for _, several in few] != [
        several for _, several in other
    ]


def test_texts_alone_make_a_base_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = build(here, texts())
    assert small_base(corpus, "models/texts") == 0
    assert "no pictures, texts of 18 of 18 training pairs" in capsys.readouterr().out
    assert Path("models/texts", BASE_MARKER).is_file()


def test_pictures_without_a_text_make_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"query_image": f"{n}.png", "target_image": f"{29 - n}.png", "split": SPLITS[n % 5]}
        for n in range(30)
    ]
    assert small_base(build(here, rows), "models/none") == 2
    assert "none is such a pair. Name a base model with --base" in capsys.readouterr().err
    assert not Path("models/none").exists()


def test_a_base_model_of_other_shards_is_not_taken(here: Path) -> None:
    corpus, base = build(here, captions()), Path("models/tiny-mine")
    assert find_tiny_base(corpus) == base
    base.mkdir(parents=True)
    (base / BASE_MARKER).touch()
    assert find_tiny_base(corpus) == Path("models/tiny-mine-2"), "of an earlier version: no record"
    write_json(base / BASE_RECORD, {"data_hash": "of other shards"})
    assert find_tiny_base(corpus) == Path("models/tiny-mine-2")
    write_json(base / BASE_RECORD, {"data_hash": read_corpus(corpus)["data_hash"]})
    assert find_tiny_base(corpus) == base
    assert find_tiny_base(corpus, seed=1) == Path("models/tiny-mine-seed1")
    write_json(base / BASE_RECORD, {"data_hash": read_corpus(corpus)["data_hash"], "seed": 1})
    assert find_tiny_base(corpus) == Path("models/tiny-mine-2"), "of another seed"
    (base / BASE_RECORD).write_text("{")
    with pytest.raises(RimeError, match=r"rime_base\.json: malformed JSON"):
        find_tiny_base(corpus)


def test_a_table_or_its_folder_names_the_corpus(here: Path) -> None:
    own_folder(here / "mine", captions())
    assert find_corpus("mine") == (Path("data/mine"), Path("mine/captions.csv"))
    assert find_corpus("mine/captions.csv") == (Path("data/captions"), Path("mine/captions.csv"))
    (here / "mine" / "more.jsonl").write_text("{}")
    with pytest.raises(RimeError, match=r"must hold one table, but has captions\.csv, more\.jsonl"):
        find_corpus("mine")
    own_folder(here / "pictures", captions(), "scenes.csv")
    with pytest.raises(RimeError, match=r"scenes is the name of a built-in corpus. Rename the table"):
        find_corpus("pictures/scenes.csv")


def test_a_corpus_of_another_state_of_the_table_is_not_taken(here: Path) -> None:
    build(here, captions())
    assert find_corpus("mine")[0] == Path("data/mine")
    table = here / "mine" / "captions.csv"
    table.write_text(table.read_text().replace("a red circle", "a scarlet circle"))
    with pytest.raises(
        RimeError, match=r"an earlier state of mine/captions\.csv. Build it again: rime shards folder"
    ):
        find_corpus("mine")
    assert find_corpus("data/mine") == (Path("data/mine"), None)
    about = read_corpus("data/mine")
    write_json(Path("data/mine/corpus.json"), about | {"arguments": {"table": "other.csv"}})
    with pytest.raises(RimeError, match="was built from something else"):
        find_corpus("mine")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (texts(), (), "At least one training pair must have a rewrite on both sides, but of 18 none has"),
        (captions(), (), "must be at most 18, but is 32: a batch holds one task"),
        (
            captions(),
            ("--caption_rewrites", "false"),
            "must have a rewrite on both sides, but of 36 none has",
        ),
    ],
    ids=["no rewrites", "few pairs", "no captions as rewrites"],
)
@pytest.mark.parametrize("looks", [(), ("--dry_run",)])
def test_what_cannot_be_trained_is_told_before_a_base_model_is_made(
    here: Path,
    rows: list[dict[str, str]],
    options: tuple[str, ...],
    message: str,
    looks: tuple[str, ...],
    capsys: Any,
) -> None:
    build(here, rows, *options)
    assert main(["run", "cma", "--corpus", "mine", *looks]) == 2
    assert message in capsys.readouterr().err and not Path("models").exists()


def test_a_corpus_without_a_split_to_validate_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = read_corpus(build(here, captions()))
    small = ["--sft.data.batch_size", "4", "--cma.data.batch_size", "4"]
    for split in ("test", "val"):
        del about["splits"][split]
        write_json(Path("data/mine/corpus.json"), about)
        assert main(["run", "cma", "--corpus", "data/mine", *small]) == 2
        assert f"a training needs the split '{split}'" in capsys.readouterr().err
    assert not Path("models").exists()


def test_five_rows_are_refused_by_the_builder(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{n}.png", "caption": f"thing {n}", "split": "train"} for n in range(5)]
    own_folder(here / "five", rows)
    assert main(["run", "cma", "--corpus", "five"]) == 2
    said = capfd.readouterr().err
    assert "split 'val' must have rows, but has none (train 10, val 0" in said
    assert "To give options of its own, build it first: rime shards folder --table five/captions.csv" in said


SHORT = {
    "data.steps_per_epoch": "2",
    "data.batch_size": "4",
    "data.eval_batch_size": "8",
    "trainer.max_epochs": "1",
    "num_threads": "1",
    "model.backbone.lora_r": "4",
}


@pytest.mark.long
def test_from_a_table_to_a_trained_model_by_one_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = ("--vision_steps", "2", "--copy_steps", "2", "--num_steps", "2")
    monkeypatch.setattr("rime_pl.commands.run.BASE_OPTIONS", {"mine": steps})
    own_folder(here / "mine", captions())
    cma = ["run", "cma", "--corpus", "mine"]
    cma += [
        w for stage in ("sft", "cma") for key, value in SHORT.items() for w in (f"--{stage}.{key}", value)
    ]
    assert main(cma) == 0
    aligned = RunFolder(Path("runs/mine-tiny-seed0/cma"))
    assert aligned.finished
    said = capfd.readouterr().out
    assert (
        "data: building data/mine from mine/captions.csv" in said and "base: making models/tiny-mine" in said
    )
    assert aligned.settings["model"]["backbone"]["name_or_path"] == "models/tiny-mine"
    assert main(cma) == 0 and "base: found in models/tiny-mine" in capfd.readouterr().out
