"""The page of `rime report`: every part, no markup from data, and a sentence for each missing part."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from rime_pl.__main__ import main
from rime_pl.commands.report import MAX_RUNS, intervals, read, started_from
from rime_pl.report.page.page import POLICY
from rime_pl.report.stage import write_report
from rime_pl.run_folder import RunFolder
from rime_pl.types import MODE_PAIRS
from tests.report.pages import BREAKER, SCRIPT, Read, make_run, ranks, results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    folder = tmp_path_factory.mktemp("runs") / "<b>scenes"
    first = make_run(folder / "cma")
    return first, make_run(folder / "refine_rl", "refine_rl", first, temperature=0.5)


@pytest.fixture(scope="module")
def page(runs: tuple[RunFolder, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("page"), *runs)


def written(folder: Path, *runs: RunFolder) -> str:
    output = folder / "new" / "page.html"
    assert main(["report", *(str(run) for run in runs), "--output", str(output)]) == 0
    return output.read_text(encoding="ascii")


def section(page: str, name: str) -> str:
    return Read(re.split(r'<section id="', page.partition(f'<section id="{name}"')[2])[0]).text


def test_every_part_is_there(page: str) -> None:
    read = Read(page)
    assert {"svg", "table", "img", "details", "nav"} <= read.tags
    modes = section(page, "modes")
    for k, value in ((1, "0.500"), (5, "0.750"), (10, "1.000")):
        assert f"recall@{k}" in modes and value in modes
    for pair in MODE_PAIRS:
        assert pair in modes
    assert "0.25 to 0.80" in modes and "before" in modes and "oracle" in modes
    assert "picture" in section(page, "tasks") and "7.0" in section(page, "cost")
    assert "headroom (reference - own)" in section(page, "ablation")
    examples = section(page, "examples")
    assert "gen-gen: right" in examples and "disc-disc: wrong" in examples
    assert "right with the rewrite only (gen-gen)125.0 %" in examples
    curves, reward = section(page, "curves"), section(page, "reward")
    assert "train/loss (means of 3 steps)" in curves and "train/grad_norm" in curves
    assert "train/reward" in reward and "train/kl" in reward and "train/reward" not in curves
    settings = section(page, "settings")
    assert "Settings in which the runs differ" in settings and "model.temperature0.020.5" in settings
    assert "data_hash" in section(page, "manifest")


def test_no_text_of_a_run_becomes_markup(page: str) -> None:
    read = Read(page)
    assert not {"script", "b"} & read.tags and "onerror" not in {name for _, name, _ in read.attributes}
    assert all(
        value.startswith("data:image/webp;base64,") for tag, name, value in read.attributes if name == "src"
    )
    for part in ("tasks", "examples", "settings", "manifest"):
        assert SCRIPT in section(page, part), part
    assert "<b>scenes" in section(page, "runs")
    for tail in ("onerror=alert(2)>", "</style></title>"):
        assert tail in section(page, "examples") and tail in section(page, "settings")
    assert page.count("<style>") == page.count("</style>") == 1 and BREAKER[-1] not in page


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    read = Read(page)
    assert ("meta", "content", POLICY) in read.attributes and "default-src 'none'" in POLICY
    links = [value for _, name, value in read.attributes if name in ("href", "src", "action", "data")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"url\((?!#)|@import|https?:", page.replace(POLICY, ""))


def test_pictures_have_a_title_a_description_and_ids_of_their_own(page: str) -> None:
    read = Read(page)
    ids = [value for _, name, value in read.attributes if name == "id"]
    labelled = [value for tag, name, value in read.attributes if tag == "svg" and name == "aria-labelledby"]
    assert len(labelled) > 10 and set(labelled) <= set(ids)
    drawn = dict.fromkeys(re.findall(r"<svg .*?</svg>", page))
    for picture in drawn:
        own = re.findall(r' id="([^"]*)"', picture)
        used = re.findall(r'(?:url\(#|href="#)([^")]*)', picture)
        assert len(own) == len(set(own)) and set(used) <= set(own) and "<desc" in picture
    assert "gen-gen 0.500" in page  # what a picture shows is told in words, too


def test_equal_runs_give_an_equal_page(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    pages = [written(tmp_path, runs[0]) for _ in range(2)]
    first, second = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", one) for one in pages)
    assert first == second


def test_intervals_of_every_k_come_from_the_ranks(runs: tuple[RunFolder, RunFolder]) -> None:
    facts = read(runs[1], "A")
    for side in ("before", "after"):
        low, high = facts.intervals[side]["recall@5"]["gen-gen"]
        assert 0 <= low < 0.75 < high <= 1
    assert facts.intervals["after"]["recall@10"]["gen-disc"] == (1.0, 1.0)
    assert not facts.faults


def test_of_two_copies_of_the_run_before_the_one_beside_counts(
    runs: tuple[RunFolder, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs[0].path.parent, tmp_path / "copied")
    beside, run = (RunFolder(tmp_path / "copied" / one.path.name) for one in runs)
    assert started_from(run) == beside and started_from(runs[1]) == runs[0]
    written(tmp_path, run)
    assert f"run A: intervals before it are those of {beside}" in capsys.readouterr().out
    summary = json.loads((beside.path / "summary.json").read_text())
    summary["after"]["recall@1"]["gen-gen"] = 0.25
    (beside.path / "summary.json").write_text(json.dumps(summary))
    assert started_from(run) == runs[0], "the one beside has other results"
    shutil.rmtree(beside.path)
    assert started_from(run) == runs[0]
    written(tmp_path, run)
    assert f"intervals before it are those of {runs[0]}" in capsys.readouterr().out


def test_ranks_of_another_test_give_no_intervals(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs[0].path, tmp_path / "run"))
    rows = [row | {"ranks": dict.fromkeys(MODE_PAIRS, 1)} for row in ranks()]
    (run.path / "ranks.json").write_text(json.dumps(rows))
    page = written(tmp_path, run)
    assert "ranks.json gives recall@1 1.0000 for disc-disc, but the summary says 0.5000" in section(
        page, "runs"
    )
    assert "0.25 to 0.80" in section(page, "modes")  # the summary's own


@pytest.mark.parametrize("kept", ["lock.json", "config.yaml"])
def test_a_run_that_has_just_begun_gets_sentences(
    kept: str, runs: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "begun")
    run.path.mkdir()
    if kept == "config.yaml":
        shutil.copy(runs[0].config, run.path)
    else:
        run.lock.write_text("")
    page = written(tmp_path, run)
    for name in ("modes", "tasks", "ablation"):
        assert "This run has no results of the test split yet." in section(page, name)
    assert "No run has results of the test split yet." in section(page, "cost")
    assert "has kept no samples yet" in section(page, "examples")
    assert "has logged no curves yet" in section(page, "curves")
    assert "The run has no manifest.json yet" in section(page, "manifest")
    assert "cannot be shown" not in page and ("has no config.yaml" in page) == (kept == "lock.json")


def test_a_test_of_one_mode_gets_a_sentence_for_the_other(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "sft")
    write_report(
        run.path, "sft", results(gen=False), [], ranks(gen=False), None, {"test": 1.0}, {"data_hash": "x"}
    )
    page = written(tmp_path, run)
    assert "The generative mode was not tested" in section(page, "ablation")
    assert "disc-disc" in section(page, "modes") and "gen-gen0." not in section(page, "modes")
    assert "There is no run before it" in section(page, "modes")
    assert "No run here is of Refine-RL" in section(page, "reward") and "cannot be shown" not in page
    write_report(run.path, "sft", None, [], [], None, {"fit": 1.0}, {"data_hash": "x"})
    assert "no results of the test split" in section(written(tmp_path, RunFolder(run.path)), "modes")


@pytest.mark.parametrize(
    "name", ["summary.json", "manifest.json", "ranks.json", "config.yaml", "origin.json"]
)
@pytest.mark.parametrize(
    "text", ["{", '{"after": {"recall@1": 3}}', "[]", '{"per_task": {}, "after": {"recall@1": {}}}']
)
def test_damaged_files_are_told_and_the_rest_is_shown(
    name: str, text: str, runs: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(runs[0].path, tmp_path / "run"))
    (run.path / name).write_text(text)
    page = written(tmp_path, run)
    if text == "{":
        assert f"{name} is damaged" in section(page, "runs")
    assert "train/loss" in section(page, "curves")


def test_damaged_samples_are_told(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(runs[0].path, tmp_path / "run"))
    shutil.rmtree(run.path / "tensorboard")
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "events.out.tfevents.1.x").write_bytes(b"no events")
    assert "has kept no samples yet" in section(written(tmp_path, run), "examples")


def test_what_is_no_run_is_refused_by_name(
    runs: tuple[RunFolder, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["report", *words]) == 2
        return capsys.readouterr().err

    assert "there is no folder" in refused(str(tmp_path / "none"))
    told = refused(str(runs[0].path.parent))
    assert "holds no config.yaml" in told and f"  {runs[1]}" in told
    assert "none below it" in refused(str(tmp_path))
    assert "names" in (told := refused(str(runs[0]), str(runs[0]))) and "twice" in told
    assert f"{MAX_RUNS} runs at most" in refused(*(str(tmp_path / str(n)) for n in range(9)))
    assert "must be the name of an HTML file" in refused(str(runs[0]), "--output", str(tmp_path / "x.json"))
    (tmp_path / "x.html").mkdir()
    assert "is a folder" in refused(str(runs[0]), "--output", str(tmp_path / "x.html"))
    assert "needs --run" in refused()


def test_intervals_need_the_ranks_of_each_pair(runs: tuple[RunFolder, RunFolder]) -> None:
    found = intervals(runs[0], runs[0].summary["after"])
    assert list(found) == ["recall@1", "recall@5", "recall@10"] and list(found["recall@1"]) == list(
        MODE_PAIRS
    )
