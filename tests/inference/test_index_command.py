"""`rime index`, `rime search --index` and `--calibrate` with a real but untrained micro model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from rime_pl.__main__ import main
from rime_pl.inference.adaptive import FILE, Asked, choose, curve, point
from rime_pl.inference.index_folder import IndexFolder
from rime_pl.run_folder import RunFolder
from rime_pl.run_lock import locked
from rime_pl.types import Item


@pytest.fixture
def photos(pictures: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, item in enumerate(pictures):
        item.media[0].save(f"photos/{number}.png")
    return Path("photos")


def test_from_a_folder_to_a_search(
    run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--run", str(run_folder), "--device", "cpu")
    (photos / "broken.png").write_bytes(b"")
    assert main(["index", "photos", "--output", "made.index", *run]) == 0
    printed = capsys.readouterr().out
    assert "index: made.index   6 items (6 embedded)" in printed
    assert "1 item cannot be used and was left out" in printed and "the file is empty" in printed
    (photos / "0.png").unlink()
    assert main(["index", "photos", "--output", "made.index", *run]) == 0
    assert "5 items (0 embedded, 5 kept, 1 dropped)" in capsys.readouterr().out
    for words in (
        ["a red ring"],
        ["--query_media", "photos/1.png"],
        ["a ring", "--query-media", "photos/1.png"],
    ):
        assert main(["search", *words, "--index", "made.index", "--top_k", "2", *run]) == 0
        printed = capsys.readouterr().out
        assert "made.index, 5 items" in printed and "generative: query in" in printed
        assert ("photos/1.png" in printed) == (len(words) > 1) and "as rewritten" in printed
    for mode in ("two-step", "adaptive"):
        given = ["--index", "made.index", "--strategy", mode]
        given += ["--threshold", "9"] if mode == "adaptive" else []
        assert main(["search", "a red ring", *given, *run]) == 0
        assert "as rewritten" in capsys.readouterr().out
    assert Image.open("search.png").width > 148


def test_a_search_takes_the_run_that_made_the_index(
    run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the last run, so that a further training made every index useless until --run was given."""
    monkeypatch.setattr("rime_pl.bars.EVERY", 0.0)
    first, later = Path("runs/first/cma"), Path("runs/later/cma")
    shutil.copytree(run_folder / "cma", first)
    words = ["index", "photos", "--output", "made.index", "--device", "cpu"]
    assert main(words) == 0
    assert "embedding: 6 of 6" in capsys.readouterr().out, "a file shows no bar, so it gets lines"
    shutil.copytree(run_folder / "cma", later)
    (later / "done.json").touch()
    asked = ["search", "a red ring", "--index", "made.index", "--device", "cpu"]
    assert main(asked) == 0
    assert f"run: {first.absolute()} (it made made.index)" in capsys.readouterr().out
    assert main(words) == 0, "nor does a later run stand in the way of the same command"
    assert "(0 embedded, 6 kept)" in capsys.readouterr().out
    shutil.rmtree(first / "adapter")
    facts = json.loads(Path("made.index/index.json").read_text())
    Path("made.index/index.json").write_text(json.dumps(facts | {"model": "of other weights"}))
    assert main(asked) == 2
    out, error = capsys.readouterr()
    assert f"run: {later} (finished last in runs; {first.absolute()}, which made made.index" in out
    assert f"It was made with {first.absolute()}, as that was then" in error


@pytest.mark.parametrize("command", [["search", "a red ring"], ["demo"]])
def test_an_index_that_is_being_built_is_no_damaged_one(
    command: list[str], run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(run_folder), "--device", "cpu"]
    assert main(["index", "photos", "--output", "made.index", "--mode", "discriminative", *run]) == 0
    (IndexFolder("made.index").building).write_text("[]")
    with locked(RunFolder("made.index")):
        assert main([*command, "--index", "made.index", *run]) == 2
    assert "made.index is being built by process" in capsys.readouterr().err
    assert main([*command, "--index", "made.index", *run]) == 2
    assert "made.index must be complete, but is not" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(
    run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, there = ["--run", str(run_folder), "--device", "cpu"], ["--output", "made.index"]
    Path("a.xyz").write_text("")
    Path("a.jsonl").write_text('{"price": 3}')
    for words, error in (
        (["index", "nope", *there, *run], "nope must be a folder or a file, but there is none"),
        (["index", "a.xyz", *there, *run], "a.xyz must end in"),
        (["index", "a.jsonl", *there, *run], "must have one of the columns text, image, video and page"),
        (["index", "photos", *run], "`rime index` needs --output PATH"),
        (["index", *there, *run], "`rime index` needs SOURCE"),
        (["index", "photos", *there, "--media", "photos", *run], "--media has no effect because the source"),
        (["index", "photos", *there, "--splits", "test", *run], "--splits has no effect because the source"),
        (["index", "photos", *there, "--part_size", "0", *run], "--part_size must be 1 or more"),
        (
            ["index", "photos", *there, "--from_parquet", "x", *run],
            "SOURCE has no effect next to --from_parquet",
        ),
        (["index", *there, "--from_parquet", "x", *run], "--from_parquet must be a Parquet file"),
        (["search", "", *run], "The query must have at least one word, but is empty"),
        (["search", *run], "`rime search` needs QUERY"),
        (["search", "--query_media", "nope.png", *run], "--query_media must be a picture or video, but"),
        (["search", "a", "--strategy", "adaptive", *run], "--strategy has no effect without --index FOLDER"),
        (
            ["search", "a", "--index", "x", "--images", "photos", *run],
            "--images has no effect next to --index",
        ),
        (["search", "a", "--index", "photos", *run], "photos must be an index"),
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.startswith("rime: error: ") and error in told, told


@pytest.mark.parametrize(
    "recall",
    [
        {"headline_tasks": ["describe", "relative"]},
        {"memory_tasks": ["composed", "count", "table", "twin"]},  # in no mean, as in training
    ],
)
def test_calibrate_keeps_a_threshold_and_its_curve(
    recall: dict[str, list[str]], run_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = run_folder / "cma"
    settings = {"recall": recall}
    (stage / "config.yaml").write_text(yaml.safe_dump(settings))
    try:
        assert main(["search", "--calibrate", "--run", str(run_folder), "--device", "cpu"]) == 0
        kept = json.loads((stage / FILE).read_text())
        assert kept["queries"] == 4 and set(kept["curves"]) == {"discriminative", "generative"}
        for points in kept["curves"].values():
            assert points[0]["share"] == 0 and points[-1]["share"] == 1
            assert kept["recall"] >= max(one["recall"] for one in points)
        assert Image.open((stage / FILE).with_suffix(".png")).width > 500
        assert "never   rewrites for   0% of the queries" in capsys.readouterr().out
    finally:
        for name in ("config.yaml", FILE, "adaptive.png"):
            (stage / name).unlink(missing_ok=True)


def test_the_curve_goes_from_never_to_always() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.rand(200, generator=generator)
    never = (torch.rand(200, generator=generator) < margin).float()  # sure searches are right more often
    always = (torch.rand(200, generator=generator) < 0.6).float()
    task = ["a", "b"] * 100
    asked = Asked(margin, never, always, task)
    points = curve(asked)

    def mean(values: torch.Tensor) -> float:
        return float(values[::2].double().mean() + values[1::2].double().mean()) / 2

    assert points[0].recall == pytest.approx(mean(never)) and points[-1].recall == pytest.approx(mean(always))
    assert (points[0].share, points[-1].share) == (0.0, 1.0) and math.isinf(points[-1].margin)
    half = points[10]
    written = margin < half.margin
    assert half.share == pytest.approx(float(written.float().mean())) == 0.5
    assert half.recall == pytest.approx(mean(torch.where(written, always, never)))
    assert half.low < half.recall < half.high
    best = choose(points)
    assert best.recall == max(one.recall for one in points) > max(points[0].recall, points[-1].recall)
    assert point(asked, best.margin) == best
