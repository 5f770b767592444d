"""The page of all settings, from the parsers that read them, so that nothing is missing.

Called by build.py. A setting is a field of a dataclass or an argument of a module, data module or callback.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rime_pl.cli import STAGES
from rime_pl.commands.settings import SettingsReader
from rime_pl.options.parser import PlainHelp

ROOT = Path(__file__).parents[2]
#: What the settings of a group are, by the beginning of their names; the rest belongs to the run.
GROUPS = {
    "model": "The model and its loss",
    "data": "The data",
    "recall": "Evaluation of retrieval",
    "samples": "Sample rewrites",
    "changes": "Rewrites before and after (Refine-RL)",
    "checkpoint": "Checkpoints",
    "run": "The run",
}
#: The trainer's settings are Lightning's own, and its documentation has them.
LEFT_OUT = ("trainer", "help", "print_config", "config")
HEAD = """# Settings

Look up here what a setting means, and what it is if you leave it out. Settings stand in a YAML file, such as
`configs/tiny/cma.yaml`, or on the command line:
`rime cma fit --config configs/tiny/cma.yaml --model.temperature 0.1`. A wrong name is refused.

This page is made from the code. The default is that of the code; a recipe in `configs/` sets its own values.
Settings under `trainer.` are those of Lightning's Trainer: `rime cma fit --help_all` lists them.
"""


@dataclass(frozen=True)
class Setting:
    """One setting of one stage or several."""

    name: str
    kind: str
    help: str
    default: str
    stages: tuple[str, ...] = ()


@cache
def parser_of(stage: str) -> argparse.ArgumentParser:
    """Return the parser of ``rime STAGE fit``."""
    words = ["--config", str(ROOT / f"configs/tiny/{stage}.yaml"), "--run_dir", "runs/none"]
    parser: argparse.ArgumentParser = SettingsReader(stage, words, f"rime {stage} fit").parser
    return parser


@cache
def settings() -> list[Setting]:
    """Return all settings of all stages in the order of the help, each with the stages that have it."""
    found: dict[Setting, list[str]] = defaultdict(list)
    for stage in STAGES:
        for action in parser_of(stage)._actions:
            if action.help is argparse.SUPPRESS or action.dest.split(".")[0] in LEFT_OUT:
                continue
            if action.option_strings and not action.dest.endswith(".help") and _is_leaf(action):
                found[_setting(action)].append(stage)
    return [
        Setting(one.name, one.kind, one.help, one.default, tuple(stages)) for one, stages in found.items()
    ]


def page() -> str:
    """Return the page."""
    by_group: dict[str, list[Setting]] = defaultdict(list)
    for one in settings():
        first = one.name.split(".")[0]
        by_group[first if first in GROUPS else "run"].append(one)
    lines = [HEAD]
    for group, title in GROUPS.items():
        lines += [f"## {title}", ""]
        for one in sorted(by_group[group], key=lambda setting: setting.name.rpartition(".")[0]):
            lines += [_entry(one), ""]
    return "\n".join(lines)


def _is_leaf(action: argparse.Action) -> bool:
    """Return whether the action takes a value, and is no group of settings."""
    return type(action).__name__ not in ("_ActionConfigLoad", "_ActionHelpClassPath")


def _setting(action: argparse.Action) -> Setting:
    formatter = PlainHelp("")
    told = formatter._get_help_string(action)
    default = "required" if action.required else str(action.default)
    if isinstance(action.default, bool) or action.default is None:
        default = {True: "true", False: "false", None: "null"}[action.default]
    text = told.split(" (default: ")[0].removesuffix(" (required)")
    own = told.split(" (default: ")[1].removesuffix(")") if " (default: " in told else default
    return Setting(action.dest, formatter.metavar(action), text, own.replace("%(default)s", default))


def _entry(one: Setting) -> str:
    """Return a setting as a term and its definition; a link leads to it."""
    only = "" if len(one.stages) == len(STAGES) else f" Only in {' and '.join(one.stages)}."
    term = f"[`{one.name}`](#{one.name}){{ #{one.name} }} `{one.kind}`"
    return f"{term}\n:   {_plain(one.help)}.{only} Default: {_plain(one.default)}."


def _plain(text: str) -> str:
    """Return a help text on one line, safe in Markdown."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*")
