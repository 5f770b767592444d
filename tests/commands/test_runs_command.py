"""`rime runs`: every run of a folder with its state, its recalls and what differs, also a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.commands.runs import find_runs, recipe_changes, row
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.run_lock import locked
from rime_pl.types import MODE_PAIRS
from tests.study.runs import run_folder

DIFFERS = {"model.temperature": {"value": 0.05, "recipe": 0.02}}
SETTINGS: dict[str, Any] = {
    "seed_everything": 3,
    "data": {"path": "data/scenes"},
    "model": {"lambda_ce": 1, "lambda_cma": 1},
}


def finish(run: RunFolder, **manifest: Any) -> None:
    facts = {"stage": "cma", "seed": 3, "data": "data/scenes"} | manifest
    write_json(run.path / "manifest.json", facts)
    recalls = {pair: n / 10 for n, pair in enumerate(MODE_PAIRS)}
    write_json(run.path / "summary.json", {"after": {"recall@1": recalls}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six runs: finished, a control of it, unfinished, tested, damaged, and one that is just beginning."""
    whole = RunFolder(tmp_path / "scenes-tiny-seed3" / "cma")
    for run in (whole, whole.control("plain")):
        run.begin(SETTINGS, {"differs_from_recipe": DIFFERS if run == whole else {}})
        finish(run)
        write_json(run.marker, {})
    RunFolder(tmp_path / "unfinished").begin(SETTINGS | {"model": {"lambda_ce": 1}}, {"recipe": []})
    (tmp_path / "tested").mkdir()
    finish(RunFolder(tmp_path / "tested"), seed=None)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("{a: ")
    (tmp_path / "begins").mkdir()
    RunFolder(tmp_path / "begins").lock.write_text("")
    return tmp_path


def test_each_run_has_a_row(folder: Path) -> None:
    with locked(RunFolder(folder / "begins")):
        begins, damaged, cma, plain, tested, unfinished = (row(run, folder) for run in find_runs(folder))
    recalls = ["0.000", "0.100", "0.200", "0.300"]
    told = "model.temperature 0.05 instead of 0.02"
    assert cma == ["scenes-tiny-seed3/cma", "cma", "scenes", "3", "finished", *recalls, told]
    assert plain == ["scenes-tiny-seed3/cma/controls/plain", "cma", "scenes", "3", "finished", *recalls, "-"]
    assert unfinished == ["unfinished", "sft", "scenes", "3", "unfinished", *"----", "?"]
    assert tested == ["tested", "cma", "scenes", "None", "tested", *recalls, "?"]
    assert damaged[:5] == ["damaged", "?", "?", "?", "damaged"] and "config.yaml is damaged" in damaged[-1]
    assert begins[:4] == ["begins", "?", "?", "?"] and begins[4].startswith("running (process ")


@pytest.mark.parametrize("option", [[], ["--folder"]])
def test_the_folder_is_given_by_its_place_or_by_name(option: list[str], folder: Path, capsys) -> None:
    assert main(["runs", *option, str(folder / "scenes-tiny-seed3" / "cma")]) == 0
    said = capsys.readouterr().out
    assert "Runs in" in said and "controls/plain" in said and "unfinished" not in said


def test_runs_are_compared_with_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "cma", [1, 2, 2, 1])
    run_folder(tmp_path / "cma-2", [1, 1, 2, 1])
    assert main(["runs", str(tmp_path), "--against", str(tmp_path / "cma")]) == 0
    said = capsys.readouterr().out
    assert "recall@1 minus that of" in said and said.count("+0.250") == 5 and said.count("+0.000 to") == 5
    assert main(["runs", "--against", str(tmp_path / "cma"), str(tmp_path)]) == 0
    assert capsys.readouterr().out == said, "the folder may stand behind the option"
    assert main(["runs", str(tmp_path), "--against", str(tmp_path / "cma-3")]) == 2
    assert "--against must name the folder of a tested run" in capsys.readouterr().err


def test_an_index_is_no_run(tmp_path: Path) -> None:
    """While it is built, it has a lock, as a run has: it was listed as an unfinished run."""
    (tmp_path / "mine.index").mkdir()
    for name in ("index.json", "lock.json"):
        (tmp_path / "mine.index" / name).write_text("{}")
    assert not [*find_runs(tmp_path)]


def test_no_runs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "runs: no run here or below. `rime run cma` trains one." in capsys.readouterr().err


def test_a_recipe_that_was_edited_between_two_runs_is_told(tmp_path: Path) -> None:
    """Neither run differs from its own recipe, so both were shown as alike."""
    first, edited, typed, stage = (RunFolder(tmp_path / name) for name in ("cma", "cma-2", "cma-3", "sft"))
    model = {"lambda_cma": 1, "lambda_ce": 1, "temperature": 0.02}
    first.begin(SETTINGS | {"model": model}, {"differs_from_recipe": {}})
    weighted = model | {"lambda_uniform": 0.1}
    edited.begin(SETTINGS | {"model": weighted, "seed_everything": 4}, {"differs_from_recipe": {}})
    typed.begin(SETTINGS | {"model": weighted | {"temperature": 0.05}}, {"differs_from_recipe": DIFFERS})
    stage.begin(SETTINGS | {"model": {"lambda_ce": 1}}, {"differs_from_recipe": {}})
    with_term = "recipe then: model.lambda_uniform 0.1"
    assert recipe_changes([first, edited, typed, stage]) == {
        first.path: "recipe then: model.lambda_uniform -",
        edited.path: with_term,
        typed.path: with_term,
    }
    assert not recipe_changes([edited, typed, stage]), "a typed setting is no other recipe"
    other = RunFolder(tmp_path / "of-2b")
    other.begin(
        SETTINGS | {"model": model | {"margin": 3}}, {"differs_from_recipe": {}, "recipe": ["b.yaml"]}
    )
    assert not recipe_changes([edited, typed, other]), "another recipe is no edited one"
    order = {"value": {"a": 2}, "recipe": {}}
    weights = SETTINGS | {"model": weighted, "data": {"path": "data/scenes", "order": {"a": 2}, "new": None}}
    mapped = RunFolder(tmp_path / "cma-4")
    mapped.begin(weights, {"differs_from_recipe": {"data.order": order}})
    assert not recipe_changes([edited, mapped]), "a typed mapping is no other recipe, nor is a new null"
    typed.config.write_text("{a: ")
    assert not recipe_changes([edited, typed, stage]), "a damaged run is told elsewhere"
    assert row(edited, tmp_path, with_term)[-1] == with_term


def test_the_table_tells_an_edited_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, temperature in (("cma", 0.02), ("cma-2", 0.03)):
        settings = SETTINGS | {"model": {"lambda_cma": 1, "temperature": temperature}}
        RunFolder(tmp_path / name).begin(settings, {"differs_from_recipe": {}})
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("then") == 3, "in both rows, and in the note that explains it"
