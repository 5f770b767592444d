"""Commands that README and docs tell somebody to type: targets of make exist, and `rime` takes the words.

Nothing is run: each command's own parser reads the words, as it would before the work begins.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from docs.site.settings import parser_of, settings
from rime_pl.__main__ import ACTIONS, COMMANDS, STAGES
from rime_pl.options.parser import command_parser
from tests.docs.named import PAGES, ROOT, code

NAMES = {name for group in COMMANDS.values() for name in group}
#: Options that a command takes beside those of its function.
BESIDE = {"plan": {"config", "stage"}, "doctor": {"config", "stage"}, "run": {"config"}}
#: Settings that a page adds itself.
ADDED = {"model.lambda_uniform"}
#: Pages of the past keep the commands of their day.
PAST = {ROOT / "CHANGELOG.md", ROOT / "docs/results/log.md"}
MAKE = re.compile(r"(?:^|&& |; )make ((?:[a-z][a-z-]*|[A-Z_]+=\S*)(?: (?:[a-z][a-z-]*|[A-Z_]+=\S+))*)")
SHOWN = re.compile(r"^(?:\S*/)?rime ([a-z][a-z_-]*)(.*)$")


@cache
def targets() -> frozenset[str]:
    """Return the targets of the Makefile."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    heads = [line.split(":")[0] for line in lines if re.match(r"^[a-z][a-z -]*:(?!=)", line)]
    return frozenset(name for head in heads for name in head.split())


def made(line: str) -> list[str]:
    """Return the targets that a line of code calls."""
    return [word for call in MAKE.findall(line) for word in call.split()[:1] if "=" not in word]


def words_of(line: str) -> list[str]:
    """Return the words of a command, up to a comment, a pipe or a placeholder."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quotation mark in prose
        return line.split()


@cache
def options(name: str, part: str | None) -> frozenset[str]:
    """Return the options of a command, or of a part of it."""
    module = importlib.import_module(f"rime_pl.commands.{name}")
    function: Any = module.SUBCOMMANDS[part] if part else module.run
    parsed = (action.dest for action in command_parser(function, name)._actions)
    return frozenset({*parsed, *BESIDE.get(name, ()), "help"})


@cache
def of_stages() -> dict[str, frozenset[str]]:
    """Return the settings of each stage, and with "" those of any."""
    found: dict[str, frozenset[str]] = {}
    for stage in STAGES:
        names = (action.dest for action in parser_of(stage)._actions if action.help is not argparse.SUPPRESS)
        found[stage] = frozenset(names)
    return found | {"": frozenset().union(*found.values(), (one.name for one in settings()))}


def faults(line: str) -> list[str]:
    """Return what is wrong with a line that begins with ``rime``."""
    match = SHOWN.match(line)
    if match is None or match[1].isupper():
        return []
    name, words = match[1].replace("-", "_"), words_of(match[2])
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    given = {
        one
        for one in given - ADDED
        if one and not one.isupper() and one not in ("help", "help_all", "version")
    }
    if name in STAGES:
        action = [word for word in words[:1] if word in ACTIONS]
        return [one for one in given if action and not known(one, of_stages()[name])]
    if name not in NAMES:
        return [f"no command {name}"]
    parts = getattr(importlib.import_module(f"rime_pl.commands.{name}"), "SUBCOMMANDS", {})
    part = words[0] if parts and words and words[0] in parts else None
    if parts and part is None:
        return [] if not words or not words[0].islower() else [f"no part {words[0]} of {name}"]
    own = options(name, part)
    with_settings = name in ("run", "plan", "doctor")
    return [
        one
        for one in given
        if one not in own and not (with_settings and known(of_a_stage(one), of_stages()[""]))
    ]


def of_a_stage(option: str) -> str:
    """Return a setting without the stage that `rime run` lets stand before it."""
    first, _, rest = option.partition(".")
    return rest if first in STAGES or first.replace("-", "_") in STAGES else option


def known(option: str, names: frozenset[str]) -> bool:
    """Return whether a setting is there, or a group of settings, or one of the trainer."""
    return (
        option in names
        or any(name.startswith(f"{option}.") for name in names)
        or option.startswith("trainer.")
    )


def pages() -> list[Path]:
    return [page for page in PAGES if page not in PAST and "results/torture" not in str(page)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_each_target_of_make_exists(page: Path) -> None:
    wrong = [(line, name) for line in code(page) for name in made(line) if name not in targets()]
    assert not wrong


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_rime_takes_its_options(page: Path) -> None:
    lines = [line for line in code(page) if SHOWN.match(line)]
    wrong = {line: found for line in lines if (found := faults(line))}
    assert not wrong


def test_the_first_table_of_commands_was_read() -> None:
    lines = [line for line in code(ROOT / "README.md") if SHOWN.match(line)]
    assert len(lines) > 20 and len(targets()) > 20


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("rime serch x", ["no command serch"]),
        ("rime search x --idnex a", ["idnex"]),
        ("rime cma fit --model.tempature 1", ["model.tempature"]),
        ("rime run cma --sft.model.temperature 1 --dry_run", []),
        ("rime shards bild", ["no part bild of shards"]),
        (".venv/bin/rime plan --config configs/cma.yaml --data.batch_size 4", []),
    ],
)
def test_a_wrong_command_is_found(line: str, found: list[str]) -> None:
    assert faults(line) == found
    assert made("make nothing-such") == ["nothing-such"] and "nothing-such" not in targets()
