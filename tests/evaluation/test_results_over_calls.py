"""Summaries over several calls: tasks stay, other settings are refused, faults and cut texts are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.errors import RimeError
from rime_pl.evaluation.records import earlier
from rime_pl.evaluation.results import Results
from tests.datamodules.benchmarks.damage import PARQUET, edit
from tests.datamodules.benchmarks.official_copies import write_image_task
from tests.datamodules.benchmarks.official_documents import write_document_task, write_mrmr_task

FAST = ("--accelerator", "cpu", "--modes", "disc-disc")


def evaluate(root: Path, run: Path, output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    words = ["eval", "mmeb-v2", "--root", str(root), "--run", str(run), "--output", str(output)]
    code = main([*words, *FAST, *more])
    return code, json.loads((output / "result.json").read_text())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("CIRR", "HatefulMemes", "NIGHTS"):
        write_image_task(tmp_path / "root", name)
    return tmp_path / "root"


def test_tasks_of_earlier_calls_stay_and_other_settings_are_refused(
    run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(root, run, out, "--tasks", "CIRR")[0] == 0
    code, result = evaluate(root, run, out, "--tasks", "NIGHTS", "K700")
    assert code == 1 and list(result["tasks"]) == ["CIRR", "NIGHTS"] and list(result["missing"]) == ["K700"]
    assert len(result["not_asked_for"]) == 75 and result["averages"]["disc-disc"]["tasks"] == "2 of 78"
    assert result["last_call"]["tasks"] == ["NIGHTS", "K700"]
    report = json.loads((out / "disc-disc" / "demo-cma.json").read_text())["metrics"]
    assert all(isinstance(report["image"][name], dict) for name in ("CIRR", "NIGHTS"))
    table = (out / "table.md").read_text()
    assert "Scored tasks: 2; without scores: 1; not asked for: 75" in table and "wording parts" in table
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    other = tmp_path / "runs" / "demo" / "cma"
    shutil.copytree(run, other)
    contract = json.loads((other / "adapter" / "rime.json").read_text())
    contract["prompt"]["max_text_tokens"] = 2
    (other / "adapter" / "rime.json").write_text(json.dumps(contract))
    capsys.readouterr()
    for words, said in (
        (("--limit", "2"), "limit was None, and is 2 now"),
        (("--wording", "official"), "wording was 'parts', and is 'official' now"),
        (("--modes", "disc-disc", "gen-disc"), r"modes was ['disc-disc'], and is ['disc-disc', 'gen-disc']"),
        (("--pad_clips", "true"), "pad_clips was 'False', and is 'True' now"),
        (("--model_name", "other"), "model_name was 'demo-cma', and is 'other' now"),
        (("--run", str(other)), "weights was "),
    ):
        assert evaluate(root, run, out, "--tasks", "CIRR", *words)[0] == 2
        assert f"holds results of other settings: {said}" in capsys.readouterr().err
    write_mrmr_task(tmp_path / "mrmr", "traffic")
    words = ["--root", str(tmp_path / "mrmr"), "--run", str(run), "--output", str(out)]
    assert main(["eval", "mrmr", *words, *FAST, "--tasks", "traffic"]) == 2
    assert "benchmark was 'mmeb-v2', and is 'mrmr' now" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_a_task_that_is_missing_now_keeps_the_score_that_it_had(
    run: Path, root: Path, tmp_path: Path
) -> None:
    _, before = evaluate(root, run, tmp_path / "out", "--tasks", "CIRR")
    shutil.rmtree(root / "image-tasks" / "CIRR")
    code, result = evaluate(root, run, tmp_path / "out", "--tasks", "CIRR")
    assert code == 1 and result["tasks"] == before["tasks"] and not result["missing"]


def test_two_commands_that_fill_one_folder_lose_nothing(run: Path, root: Path, tmp_path: Path) -> None:
    """The second one begins, and ends, while the first one is at its only task."""
    out, add = tmp_path / "out", Results.add

    def meanwhile(self: Results, *scored: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Results, "add", add)
            assert evaluate(root, run, out, "--tasks", "NIGHTS")[0] == 0
        add(self, *scored)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Results, "add", meanwhile)
        code, result = evaluate(root, run, out, "--tasks", "CIRR")
    assert code == 0 and set(result["tasks"]) == {"CIRR", "NIGHTS"}


@pytest.mark.parametrize("option", ["--output", "--cache"])
def test_a_place_that_is_a_file_is_refused_before_the_work(
    option: str, run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    words = ["--root", str(root), "--run", str(run), "--output", str(tmp_path / "out")]
    assert main(["eval", "mmeb-v2", *words, *FAST, "--tasks", "CIRR", option, str(tmp_path / "file")]) == 2
    assert f"{option} must be a folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_plain_name_of_a_page_set_means_the_fixed_one(run: Path, tmp_path: Path) -> None:
    write_document_task(tmp_path / "root", "ViDoSeek-page")
    code, result = evaluate(tmp_path / "root", run, tmp_path / "out", "--tasks", "ViDoSeek-page")
    assert code == 0 and list(result["tasks"]) == ["ViDoSeek-page-fixed"]


def test_results_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert earlier(file, {"limit": None}) == ({}, {})
    for content in ("{", "[]", "{}", '{"protocol": 1, "tasks": {}, "missing": {}}'):
        file.write_text(content)
        with pytest.raises(RimeError, match="must be results of `rime eval`, but cannot be read"):
            earlier(file, {"limit": None})
    file.write_text('{"protocol": {"limit": null, "of_before": 1}, "tasks": {}, "missing": {}}')
    with pytest.raises(RimeError, match="of_before was 1, and is None now"):
        earlier(file, {"limit": None})


def test_one_missing_picture_fails_its_task_only(
    run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is missing, which is found before anything is embedded; one is damaged, which is found later."""
    folder = root / "image-tasks"
    pictures = {name: sorted(folder.glob(f"{name}/*.png")) for name in ("CIRR", "HatefulMemes")}
    pictures["CIRR"][0].unlink()
    pictures["HatefulMemes"][1].write_bytes(b"no picture")
    names = ("CIRR", "HatefulMemes", "NIGHTS")
    code, result = evaluate(root, run, tmp_path / "out", "--tasks", *names)
    told = capsys.readouterr().out
    assert code == 1 and list(result["tasks"]) == ["NIGHTS"]
    assert {name: one["code"] for name, one in result["missing"].items()} == dict.fromkeys(
        names[:2], "READ_ERROR"
    )
    assert pictures["CIRR"][0].name in result["missing"]["CIRR"]["reason"]
    assert "CIRR failed: CIRR: all" in told and "HatefulMemes failed: mmeb-v2, HatefulMemes: " in told
    assert "2 of 3 tasks have no score from this call: CIRR, HatefulMemes" in told.splitlines()
    report = json.loads((tmp_path / "out" / "disc-disc" / "demo-cma.json").read_text())["metrics"]["image"]
    assert report["CIRR"] == report["HatefulMemes"] == "READ_ERROR" and report["NIGHTS"]["num_pred"] == 3
    averages = result["averages"]["disc-disc"]
    assert averages["tasks"] == "1 of 78" and averages["overall"] is averages["meta_tasks"]["I-RET"] is None


def test_broken_page_sets_stand_for_no_fixed_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_document_task(tmp_path / "root", "ViDoSeek-page", folder="ViDoSeek-page")
    code, result = evaluate(tmp_path / "root", run, tmp_path / "out", "--tasks", "ViDoSeek-page-fixed")
    assert code == 1 and list(result["tasks"]) == ["ViDoSeek-page"]
    assert result["missing"]["ViDoSeek-page-fixed"]["code"] == "FILE_N/A"
    assert "ViDoSeek-page-fixed is missing: only its broken data" in capsys.readouterr().out


def test_costs_of_the_cache_say_when_they_were_measured(run: Path, root: Path, tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "cache"), "--tasks", "CIRR")
    _, first = evaluate(root, run, tmp_path / "a", *cache, "--batch_size", "4")
    _, second = evaluate(root, run, tmp_path / "b", *cache)
    costs = second["tasks"]["CIRR"]["cost"]
    assert costs == first["tasks"]["CIRR"]["cost"]
    assert costs["query"]["batch_sizes"] == [4] and costs["query"]["processes"] == [1]
    assert second["last_call"]["batch_size"] == 32
    assert costs["target"]["measured_to"] <= first["tasks"]["CIRR"]["scored_at"]
    measured = f"Measured from {costs['query']['measured_from']} to {costs['target']['measured_to']}, with "
    assert measured + "batch size 4." in (tmp_path / "b" / "table.md").read_text()


def test_cut_texts_are_counted_also_from_the_cache(run: Path, tmp_path: Path) -> None:
    write_image_task(tmp_path / "root", "MSCOCO_i2t")
    table = tmp_path / "root" / "image-tasks" / "MSCOCO_i2t" / PARQUET
    edit(table, lambda rows: rows[0]["tgt_text"].append("red ring " * 200))
    short = tmp_path / "short"
    shutil.copytree(run, short)
    contract = json.loads((short / "adapter" / "rime.json").read_text())
    contract["prompt"]["max_text_tokens"] = 100
    (short / "adapter" / "rime.json").write_text(json.dumps(contract))
    given = ("--cache", str(tmp_path / "cache"), "--tasks", "MSCOCO_i2t")
    with pytest.warns(UserWarning, match="has more than 100 tokens and is cut there"):
        _, first = evaluate(tmp_path / "root", short, tmp_path / "a", *given)
    _, second = evaluate(tmp_path / "root", short, tmp_path / "b", *given)
    task = second["tasks"]["MSCOCO_i2t"]
    assert task["texts_cut"] == first["tasks"]["MSCOCO_i2t"]["texts_cut"]
    assert task["texts_cut"] == {"query": 0, "target": 1}
    told = (tmp_path / "b" / "table.md").read_text()
    row = next(line for line in told.splitlines() if line.startswith("| MSCOCO_i2t"))
    assert row.split("|")[-2].strip() == "1"
    assert "Texts cut: items whose text the model read in part" in told
    _, whole = evaluate(tmp_path / "root", run, tmp_path / "c", *given)
    assert whole["tasks"]["MSCOCO_i2t"]["texts_cut"] == {"query": 0, "target": 0}
