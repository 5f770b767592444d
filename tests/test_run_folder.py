"""What a run leaves behind is read in one place, and which run is meant by a folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder, write_json


def make_run(path: Path, age: int = 0, finished: bool = True, adapter: bool = True) -> RunFolder:
    run = RunFolder(path)
    run.path.mkdir(parents=True)
    if adapter:
        run.adapter.mkdir()
    if finished:
        write_json(run.marker, {})
        os.utime(run.marker, (1000 + age, 1000 + age))
    return run


def test_reads_what_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "cma")
    assert not run.finished and not run.reported and run.corpus is None and run.origin == {}
    run.begin({"model": {"init_adapter_from": str(tmp_path / "sft" / "adapter")}}, {"recipe": ["a.yaml"]})
    assert run.before() == RunFolder(tmp_path / "sft") and run.origin == {"recipe": ["a.yaml"]}
    for name, value in (("manifest", {"stage": "cma", "data": str(tmp_path)}), ("summary", {"after": {}})):
        write_json(run.path / f"{name}.json", value)
    write_json(run.path / "ranks.json", [{"key": "k", "task": "t"}])
    assert run.reported and not run.finished
    assert (run.stage, run.corpus, run.summary) == ("cma", tmp_path, {"after": {}})
    assert run.ranks == [{"key": "k", "task": "t"}]
    write_json(run.marker, {})
    assert run.finished


def test_headline_tasks_that_no_query_has(tmp_path: Path) -> None:
    write_json(tmp_path / "ranks.json", [{"key": "k", "task": "twin"}])
    (tmp_path / "config.yaml").write_text("recall: {headline_tasks: [twin, other]}")
    with pytest.raises(RimeError, match=r"config.yaml: recall.headline_tasks must .* but \['other'\] are"):
        RunFolder(tmp_path).ranks  # noqa: B018


def test_a_run_from_the_base_model_has_none_before(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_adapter_from": None}}))
    assert RunFolder(tmp_path).before() is None


@pytest.mark.parametrize("name", ["manifest", "summary", "ranks", "settings"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"(json|yaml) is missing"):
        getattr(RunFolder(tmp_path), name)


def test_a_corpus_that_is_gone(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"data": str(tmp_path / "gone")})
    assert RunFolder(tmp_path).corpus is None


def test_a_run_that_was_copied_with_its_corpus_takes_the_copy(tmp_path: Path) -> None:
    old = RunFolder(tmp_path / "old" / "runs" / "cma")
    old.path.mkdir(parents=True)
    corpus = tmp_path / "old" / "data"
    corpus.mkdir()
    write_json(corpus / "corpus.json", {"data_hash": "a"})
    write_json(old.path / "manifest.json", {"data_hash": "a", **old.corpus_facts(corpus)})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    new = RunFolder(tmp_path / "new" / "runs" / "cma")
    assert old.corpus == corpus and new.corpus == tmp_path / "new" / "data"
    write_json(tmp_path / "new" / "data" / "corpus.json", {"data_hash": "b"})
    assert new.corpus == corpus, "the copy holds other samples by now"
    (tmp_path / "new" / "data" / "corpus.json").write_text("{")
    assert new.corpus == corpus
    write_json(corpus / "corpus.json", {"data_hash": "c"})
    assert new.corpus == tmp_path / "new" / "data", "neither is the same: the one beside the run"
    shutil.rmtree(tmp_path / "old")
    assert new.corpus == tmp_path / "new" / "data"
    shutil.rmtree(tmp_path / "new" / "data")
    assert new.corpus is None


def test_a_claimed_folder_can_be_given_up(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "sft")
    run.begin({"model": {}}, {"recipe": []})
    assert run.config.is_file() and run.origin
    run.give_up()
    assert not list(run.path.iterdir())


def test_newest_finished_run_is_taken(tmp_path: Path) -> None:
    make_run(tmp_path / "old" / "sft", age=0)
    newest = make_run(tmp_path / "old" / "cma-2", age=2)
    make_run(newest.path / "controls" / "plain", age=3)
    make_run(tmp_path / "old" / "cma", age=1)
    make_run(tmp_path / "bare", age=4, adapter=False)
    unfinished = make_run(tmp_path / "unfinished" / "sft", finished=False)
    assert RunFolder.newest(tmp_path) == newest
    with pytest.raises(RimeError, match="old must be one run, but holds 3") as error:
        RunFolder.with_adapter(tmp_path / "old")
    below = [f"\n  {tmp_path / 'old' / name}" for name in ("cma", "cma-2", "sft")]
    assert str(error.value).endswith("".join(below)), "the control is left out"
    only = make_run(tmp_path / "one" / "sft")
    assert RunFolder.with_adapter(tmp_path / "one") == only
    assert RunFolder.with_adapter(unfinished.path) == unfinished
    control = RunFolder(newest.path / "controls" / "plain")
    assert RunFolder.with_adapter(control.path) == control == RunFolder.newest(control.path)
    for folder in (tmp_path / "unfinished", tmp_path / "nowhere"):
        with pytest.raises(RimeError, match="no finished run here or below"):
            RunFolder.newest(folder)


def test_a_half_written_file_never_lies_under_the_name(tmp_path: Path) -> None:
    file = tmp_path / "done.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
