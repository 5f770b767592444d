"""Our packages are the ones that get imported, and every recipe is one that the command line takes."""

from __future__ import annotations

import ast
import importlib
import tomllib
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from rime_pl.cli import STAGES, StageCLI

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = ROOT / "configs"
RECIPES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("tiny/*.yaml"), *CONFIGS.glob("24gb/*.yaml")])
ADDITIONS = [  # stage, and what is put on top of its recipe
    *((path.stem, path) for path in sorted(CONFIGS.glob("data/*/*.yaml"))),
    *((stage, path) for path in sorted(CONFIGS.glob("overlays/*.yaml")) for stage in sorted(STAGES)),
]


@pytest.mark.parametrize("package", ["rime_pl", "rime_pl.datamodules", "rime_pl.callbacks"])
def test_packages_resolve_inside_this_repository(package: str) -> None:
    assert Path(str(importlib.import_module(package).__file__)).resolve().is_relative_to(ROOT)


def test_every_package_is_listed_for_installation() -> None:
    places = {"rime_pl": "rime_pl", "datamodules": "rime_pl.datamodules", "callbacks": "rime_pl.callbacks"}
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in places.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted({*found, "rime_pl.configs"})


def test_nothing_imports_a_bare_datamodules_or_callbacks() -> None:
    """Both exist as packages elsewhere: ours are imported as parts of rime_pl, whether installed or not."""
    for name in ("rime_pl", "datamodules", "callbacks", "tests", "benchmarks"):
        for file in (ROOT / name).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for module in modules:
                    assert module.split(".")[0] not in ("datamodules", "callbacks"), f"{file}:{node.lineno}"


def test_constraints_pin_what_the_project_needs() -> None:
    pinned = {
        line.split("==")[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {requirement.split(">")[0].split("=")[0].split("[")[0].strip().lower() for requirement in wanted}
    assert {name.replace("_", "-") for name in names} <= pinned


def test_pre_commit_uses_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    version = next(hook["rev"] for hook in hooks if hook["repo"].endswith("ruff-pre-commit"))
    assert f"ruff=={version.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def stage_of(recipe: Path) -> str:
    return recipe.stem


def parsed(recipe: Path, *more: str) -> StageCLI:
    """Through the very class that `rime STAGE fit` uses: unknown fields and wrong types are errors."""
    arguments = ["--config", str(recipe), *more, "--run_dir", "runs/none", "--trainer.accelerator", "cpu"]
    return StageCLI(stage_of(recipe), arguments, "rime test")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_parses(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rime"])
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    cli = parsed(recipe)
    assert type(cli.model) is STAGES[stage_of(recipe)]
    assert cli.model.config.name_or_path == cli.datamodule.name_or_path
    assert cli.model.config.prompt == cli.datamodule.prompt


@pytest.mark.parametrize(
    ("stage", "addition"),
    ADDITIONS,
    ids=[f"{path.relative_to(CONFIGS)}-{stage}" for stage, path in ADDITIONS],
)
def test_every_addition_parses_on_top_of_a_recipe(
    stage: str, addition: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rime"])
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    cli = parsed(CONFIGS / "tiny" / f"{stage}.yaml", "--config", str(addition))

    def check(values: dict[str, Any], config: Any) -> None:
        for name, value in values.items():
            if not isinstance(value, dict):
                assert config[name] == value
            elif "class_path" in value:
                assert config[name]["class_path"] == value["class_path"]
            else:
                check(value, config[name])

    check(yaml.safe_load(addition.read_text()), cli.config)


@pytest.mark.parametrize("corpus", sorted((CONFIGS / "data").iterdir()), ids=lambda path: path.name)
def test_the_stages_of_a_corpus_agree_on_its_tasks(corpus: Path) -> None:
    files = [yaml.safe_load((corpus / f"{stage}.yaml").read_text()) for stage in STAGES]
    for file in files:
        file["data"].pop("steps_per_epoch", None)  # how long a stage trains is its own
    # what training has shown is asked for after SFT in part only, because that takes long
    splits = [set(file["data"].pop("memory_splits", ())) for file in files]
    tasks = [set(file["recall"].pop("memory_tasks", ())) for file in files]
    assert splits[0] <= splits[1] == splits[2] and tasks[0] <= tasks[1] == tasks[2]
    shared = [(file["data"], file["recall"], file.get("model", {}).get("backbone")) for file in files]
    assert shared[0] == shared[1] == shared[2]


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_yaml_says_what_it_is_what_it_needs_and_the_command(path: Path) -> None:
    head = list(takewhile(lambda line: line.startswith("# "), path.read_text().splitlines()))
    assert any(line.startswith("# Needs: ") for line in head[1:])
    command = next(line for line in head if line.startswith("# Command: rime run ")).split()[4:]
    if "overlays" not in path.parts:
        assert command[0] == path.stem.replace("_", "-")


def test_recipes_differ_from_their_tiny_twins_in_values_only() -> None:
    """The laptop takes the same path: a field of one that the other lacks must be a default there."""
    for recipe in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("24gb/*.yaml")):
        real, tiny = (yaml.safe_load(path.read_text()) for path in (recipe, CONFIGS / "tiny" / recipe.name))
        assert real["trainer"].keys() == tiny["trainer"].keys()
        assert real["trainer"]["precision"] == "32-true", "half precision is model.backbone.dtype"
        assert real["model"]["backbone"]["load_in_4bit"] is tiny["model"]["backbone"]["load_in_4bit"] is True


def test_house_rules_that_no_linter_knows() -> None:
    """Files of at most 400 lines, functions of at most 50, no `utils.py`, no probing."""
    for file in (
        file for name in ("rime_pl", "datamodules", "callbacks") for file in (ROOT / name).rglob("*.py")
    ):
        text = file.read_text()
        assert file.name != "utils.py" and len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "hasattr", f"{file}:{node.lineno}"
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 50, f"{file}:{node.lineno}: {node.name} has {lines} lines"
