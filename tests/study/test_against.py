"""Two finished runs are compared on the same queries, or the reason why they are not is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.study.against import COLUMNS, differences
from tests.study.runs import change, run_folder


def queries(run: RunFolder, **facts: Any) -> RunFolder:
    """The run with other facts about each query, read anew."""
    write_json(run.path / "ranks.json", [query | facts for query in run.ranks])
    return RunFolder(run.path)


def settings(run: RunFolder, **model: Any) -> RunFolder:
    """The run with other settings of its model, read anew."""
    written = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump(written | {"model": written["model"] | model}))
    return RunFolder(run.path)


def test_a_difference_has_its_interval_on_paired_queries(tmp_path: Path) -> None:
    other = run_folder(tmp_path / "cma", [1, 2, 2, 1])
    better = run_folder(tmp_path / "cma-2", [1, 1, 2, 1])
    table = differences([("cma", other), ("cma-2", better)], other)
    (row,) = table.rows  # a run is not compared with itself
    assert row[0] == "cma-2" and row[-1] == "-" and len(row) == len(table.head) == len(COLUMNS) + 2
    # one query of four is won and none is lost: with resampled queries between 0 and 3 of 4, as a rule
    assert set(row[1:-1]) == {"+0.250\n+0.000 to\n+0.750"}
    (row,) = differences([("cma", other)], better).rows
    assert set(row[1:-1]) == {"-0.250\n-0.750 to\n+0.000"}, "the sign is that of the run minus the other"


def test_a_bound_near_0_keeps_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "-0.051 to -0.000" did not tell whether 0 is inside."""
    monkeypatch.setattr("rime_pl.study.against.paired_bootstrap", lambda *_: (-0.025, -0.051, -0.0002))
    other, worse = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2"))
    (row,) = differences([("cma-2", worse)], other).rows
    assert set(row[1:-1]) == {"-0.025\n-0.0510 to\n-0.0002"}


def test_one_query_has_no_interval(tmp_path: Path) -> None:
    other, better = run_folder(tmp_path / "cma", [2]), run_folder(tmp_path / "cma-2", [1])
    (row,) = differences([("cma-2", better)], other).rows
    assert set(row[1:-1]) == {"+1.000"}, "resampled, it would always be the same query"


def test_all_that_differs_is_told(tmp_path: Path) -> None:
    other = run_folder(tmp_path / "cma", [1, 2], before=RunFolder(tmp_path / "sft"))
    unlike = run_folder(tmp_path / "cma-2", [1, 2], seed=4, before=RunFolder(tmp_path / "sft-2"))
    other, unlike = queries(other, target=7), queries(unlike, target=7)
    write_json(other.path / "origin.json", {"base_files": "a", "differs_from_recipe": {}})
    write_json(unlike.path / "origin.json", {"base_files": "b", "differs_from_recipe": {}})
    unlike = change(unlike, "manifest.json", steps=5, data_hash="of another")
    unlike = settings(unlike, temperature=0.05, margin=None)
    (row,) = differences([("cma-2", unlike)], other).rows
    assert row[-1] == (
        "seed 4 instead of 3; training steps 5 instead of 9; another corpus; another base model; "
        "another start; model.temperature 0.05 instead of -"
    )


def test_the_hash_of_a_start_counts_more_than_its_place(tmp_path: Path) -> None:
    """A 20-step SFT before the same CMA was "no difference"."""
    starts = RunFolder(tmp_path / "sft"), RunFolder(tmp_path / "moved")
    runs = [run_folder(tmp_path / f"cma-{n}", [1, 2], before=one) for n, one in enumerate(starts)]
    (row,) = differences([("cma-1", runs[1])], runs[0]).rows
    assert row[-1] == "another start"
    for run, found in zip(runs, ("same", "same"), strict=True):
        write_json(run.path / "origin.json", {"start_hash": found, "differs_from_recipe": {}})
    runs = [RunFolder(run.path) for run in runs]
    (row,) = differences([("cma-1", runs[1])], runs[0]).rows
    assert row[-1] == "-"


def test_a_run_of_another_stage_is_told_by_its_stage(tmp_path: Path) -> None:
    other, sft = run_folder(tmp_path / "cma", [1, 2]), run_folder(tmp_path / "sft", [1, 2], stage="sft")
    (row,) = differences([("sft", settings(sft, temperature=0.05))], other).rows
    assert row[-1] == "stage sft instead of cma"


@pytest.mark.parametrize("facts", [{"key": "another"}, {"gallery": 900}, {"target": 8}])
def test_other_queries_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Among more candidates, too, the same query is harder: the difference would not be of the runs."""
    other, unlike = (queries(run_folder(tmp_path / name, [1]), target=7) for name in ("cma", "cma-2"))
    (row,) = differences([("cma-2", queries(unlike, **facts))], other).rows
    assert set(row[1:-1]) == {"-"} and row[-1].startswith("tested on other queries or among other candid")


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_earlier_run_is_compared_on_the_same_corpus(tmp_path: Path, earlier: int) -> None:
    """It does not say what a query looks for, and was refused as tested on other queries."""
    runs = [run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2")]
    runs[1 - earlier] = queries(runs[1 - earlier], target=7)
    (row,) = differences([("cma", runs[0])], runs[1]).rows
    assert row[1].startswith("+0.000") and row[-1] == "-"
    (row,) = differences([("cma", queries(runs[0], gallery=900))], runs[1]).rows
    assert row[-1].startswith("tested on other queries or among other candidates")


@pytest.mark.parametrize("data_hash", ["of another", None])
def test_a_key_alone_does_not_tell_a_query(tmp_path: Path, data_hash: str | None) -> None:
    """Keys are places in files: those of two corpora are the same, and the queries are not."""
    other, unlike = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2"))
    unlike = change(unlike, "manifest.json", data_hash=data_hash or "of mine")
    if data_hash is None:  # of an earlier version
        for run in (other, unlike):
            write_json(
                run.path / "manifest.json", {k: v for k, v in run.manifest.items() if k != "data_hash"}
            )
        other, unlike = RunFolder(other.path), RunFolder(unlike.path)
    (row,) = differences([("cma-2", unlike)], other).rows
    assert set(row[1:-1]) == {"-"} and row[-1].startswith("tested on another corpus")
    mined = [queries(run, target=7) for run in (other, unlike)]  # new training pairs, the same queries
    (row,) = differences([("cma-2", mined[1])], mined[0]).rows
    assert row[1].startswith("+0.000") and row[-1] == "another corpus"


def test_a_mode_that_was_not_measured_has_no_difference(tmp_path: Path) -> None:
    other, cheap = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2"))
    write_json(cheap.path / "ranks.json", [query | {"ranks": {"disc-disc": 1}} for query in cheap.ranks])
    (row,) = differences([("cma-2", RunFolder(cheap.path))], other).rows
    assert dict(zip(COLUMNS, row[1:-1], strict=True)) == dict.fromkeys(COLUMNS, "-") | {
        "disc-disc": "+0.500\n+0.000 to\n+1.000"
    }


@pytest.mark.parametrize("name", ["ranks.json", "summary.json", "manifest.json", "config.yaml"])
def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, name: str) -> None:
    other, damaged, whole = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2", "cma-3"))
    (damaged.path / name).write_text("[{")
    first, second = differences([("cma-2", damaged), ("cma-3", whole)], other).rows
    assert "damaged" in first[-1] and second[1].startswith("+0.000")


def test_the_other_run_must_be_whole(tmp_path: Path) -> None:
    other, whole = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2"))
    (other.path / "ranks.json").unlink()
    with pytest.raises(RimeError, match=r"cma: ranks.json is missing"):
        differences([("cma-2", whole)], other)
