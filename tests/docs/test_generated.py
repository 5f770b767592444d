"""What `make docs` makes from the code is whole: settings, commands, API, drawings, plans, curves."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from docs.site import api, commands, curves, docstrings, drawing, imports, plans, settings
from rime_pl.callbacks.retrieval_recall import RetrievalRecall
from rime_pl.cli import STAGES
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.modules import settings as module_settings

ROOT = Path(__file__).parents[2]


def fields_of(kind: type, prefix: str) -> set[str]:
    """Return the settings that the arguments of a class are, those of its dataclasses included."""
    names: set[str] = set()
    hints = typing.get_type_hints(kind.__init__)
    for name in inspect.signature(kind.__init__).parameters:
        if name == "self":
            continue
        hint = hints[name]
        inner = hint if dataclasses.is_dataclass(hint) else None
        names |= fields_of(typing.cast(type, inner), f"{prefix}.{name}") if inner else {f"{prefix}.{name}"}
    return names


def test_every_setting_of_the_classes_is_on_the_page() -> None:
    """The page comes from the parser; here the classes themselves are asked."""
    wanted = set().union(*(fields_of(stage, "model") for stage in STAGES.values()))
    wanted |= fields_of(RimeDataModule, "data") | fields_of(RetrievalRecall, "recall")
    linked = {"data.name_or_path", "data.prompt", "data.seed"}  # always have the value of another setting
    wanted = {name for name in wanted - linked if not name.startswith("data.prompt.")}
    page = settings.page()
    assert len(wanted) > 90
    assert not [name for name in sorted(wanted) if f"[`{name}`]" not in page]


def test_every_setting_has_a_help_text() -> None:
    assert not [one.name for one in settings.settings() if not one.help.strip() or not one.default]


def test_every_settings_group_is_read_by_a_stage() -> None:
    groups = {
        name
        for name, kind in vars(module_settings).items()
        if dataclasses.is_dataclass(kind) and name.endswith("Settings")
    }
    used = {
        getattr(hint, "__name__", "")
        for stage in STAGES.values()
        for hint in typing.get_type_hints(stage.__init__).values()
    }
    assert groups <= used


def test_every_command_is_on_the_page_with_its_help() -> None:
    page = commands.page()
    hidden = {
        "conflicts",
        "settings",
        "mine_report",
        "search_index",
        "shards_inspect",
    }  # parts of other commands
    files = {path.stem for path in (ROOT / "rime_pl/commands").glob("[a-z]*.py")} - hidden
    for name in sorted(files | {stage.replace("_", "-") for stage in STAGES}):
        assert f"## rime {name}\n" in page
    for part in commands.commands()["shards"]:
        assert f"usage: rime shards {part}" in page
    assert page.count("usage: rime ") > 30 and "--run_dir" in page


def test_api_pages_name_modules_that_exist() -> None:
    known = imports.modules()
    for name, (_, packages) in api.PAGES.items():
        assert all(module in known for package in packages for module in api.modules_of(package)), name
    assert "::: rime_pl.losses.contrastive" in api.page("losses")


def test_drawings_follow_the_imports() -> None:
    for drawn in (drawing.architecture(), drawing.batch_way()):
        texts = [text.text for text in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts) > 20
    assert "losses" in drawing.architecture() and "rime_pl.losses.alignment" in drawing.batch_way()


def test_a_drawing_that_the_code_contradicts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ("losses.contrastive", "x", ("losses.contrastive", "modules.cma"))
    monkeypatch.setattr(drawing, "WAY", [wrong])
    with pytest.raises(
        ValueError, match=r"rime_pl\.losses\.contrastive does not import rime_pl\.modules\.cma"
    ):
        drawing.batch_way()
    monkeypatch.setattr(drawing, "ROOMS", {"losses": ("losses", "")})
    with pytest.raises(ValueError, match=r"has no room in docs/site/drawing\.py"):
        drawing.rooms()


def test_rooms_in_a_circle_are_named() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        imports.layers({"a": {"b"}, "b": {"a"}})


def test_the_page_of_plans_has_every_recipe_or_says_that_it_is_missing() -> None:
    record = json.loads(plans.RECORD.read_text())
    made = plans.page(record)
    assert made == plans.RECORD.with_suffix(".md").read_text()
    assert {"tiny", "2b"} <= set(record["plans"]) <= set(plans.cases())
    for name in plans.cases():
        planned = [row["stage"] for row in record["plans"].get(name, [])]
        assert planned == list(plans.STAGES) or f"{name}" in made.split("Not planned yet:")[1].split(".")[0]
    assert made.count("\n| ") == 1 + len(record["plans"]) * len(plans.STAGES)


def test_docstrings_become_markdown() -> None:
    text = "See :func:`rime_pl.load`.\n\nExample:\n    >>> 1\n    1\n\n    Then:\n\n    >>> 2\n    2"
    made = docstrings.in_markdown(text).splitlines()
    assert made[0] == "See `rime_pl.load`."
    fences = [line.strip() for line in made if "```" in line]
    assert fences == ["```python", "```", "```python", "```"]


def test_the_page_shows_the_pictures_of_the_curves_that_were_recorded() -> None:
    recorded = json.loads(curves.RECORD.read_text())
    page = (ROOT / "docs/reference/metrics.md").read_text()
    drawn = [one.file for one in curves.drawable(recorded)]
    assert len(drawn) >= 5
    for name in (one.file for one in curves.PICTURES):
        assert (f"](metrics/{name})" in page) == (name in drawn), name
        assert (ROOT / "docs/reference/metrics" / name).is_file() == (name in drawn), name


def test_a_curve_that_was_not_recorded_is_not_drawn() -> None:
    assert curves.drawable({"sft": {"curves": {"train/loss": [[0, 1.0]]}}}) == []
