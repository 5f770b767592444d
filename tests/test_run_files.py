"""The files of a run folder: a damaged one is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_pl.errors import RimeError
from rime_pl.run_files import read_facts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", "[]", "it cannot be []"),
        ("manifest.json", "[" * 100_000, "is damaged: maximum recursion"),
        ("manifest.json", '{"steps": "9"}', "steps cannot be '9'"),
        ("manifest.json", '{"device": 3}', "device cannot be 3"),
        ("origin.json", "3", "it cannot be 3"),
        ("summary.json", '{"after": null}', "after cannot be None"),
        ("summary.json", '{"after": {"recall@1": 0.5}}', "after.recall@1 cannot be 0.5"),
        (
            "summary.json",
            '{"after": {"recall@1": {"gen-gen": "0.5"}}}',
            "recall@1.gen-gen cannot be '0.5'",
        ),
        ("summary.json", '{"per_task": {"twin": []}}', "per_task.twin cannot be []"),
        ("ranks.json", "{}", "it cannot be {}"),
        ("ranks.json", "[]", "it cannot be []"),
        ("summary.json", '{"after": {"ci": {"gen-gen": [null]}}}', "after.ci.gen-gen.0 cannot be None"),
        ("config.yaml", "recall: {headline_tasks: [{}]}", "recall.headline_tasks.0 cannot be {}"),
        ("ranks.json", '[{"ranks": {"gen-gen": null}}]', "0.ranks.gen-gen cannot be None"),
        ("config.yaml", "model: 3", "model cannot be 3"),
        ("config.yaml", "model: {init_adapter_from: [x]}", "model.init_adapter_from cannot be ['x']"),
        ("config.yaml", "a: 1\na: 2", "is damaged. "),
    ],
)
def test_another_shape_is_refused_by_name(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RimeError) as error:
        read_facts(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} is damaged") and said in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("manifest.json", {"seed": None, "steps": 3, "more": [1]}),
        ("summary.json", {"before": None, "after": {"recall@1": {"gen-gen": 0.5}, "crossed": None, "n": 3}}),
        ("ranks.json", [{"key": "a", "ranks": {"gen-gen": 1.0}}]),
        ("other.json", [3]),
    ],
)
def test_what_a_run_writes_is_read_as_it_is(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(value))
    assert read_facts(tmp_path / name) == value


def test_a_missing_key_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"after": {}}')
    with pytest.raises(RimeError, match=r"summary.json must hold 'recall@1', but does not: it is damaged"):
        read_facts(tmp_path / "summary.json")["after"]["recall@1"]
