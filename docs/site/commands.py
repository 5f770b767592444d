"""The page of all commands: what each prints for ``--help``.

Called by build.py. The names come from the command line itself, so a new command appears by itself.
"""

from __future__ import annotations

import importlib
import io
import os
from contextlib import redirect_stdout, suppress
from unittest import mock

from rime_pl.__main__ import ACTIONS, COMMANDS, STAGES, main

HEAD = """# Commands

Look up here what a command takes. `rime COMMAND --help` prints the same. In a checkout, `rime` is
`.venv/bin/rime`.

"""
WIDTH = "78"


def commands() -> dict[str, list[str]]:
    """Return the words of each command that has a help of its own -> its parts, if it has any."""
    found = {stage.replace("_", "-"): list(ACTIONS) for stage in STAGES}
    for group in COMMANDS.values():
        for name in group:
            module = importlib.import_module(f"rime_pl.commands.{name}")
            found[name] = list(getattr(module, "SUBCOMMANDS", {}))
    return found


def help_of(*words: str) -> str:
    """Return what ``rime WORDS --help`` prints."""
    text = io.StringIO()
    with redirect_stdout(text), mock.patch.dict(os.environ, {"COLUMNS": WIDTH}), suppress(SystemExit):
        main([*words, "--help"])
    return text.getvalue().strip()


def page() -> str:
    """Return the page."""
    lines = [HEAD, _block(help_of()), ""]
    for name, parts in commands().items():
        lines += [f"## rime {name}", ""]
        if name.replace("-", "_") in STAGES:
            lines += [_block(help_of(name, "fit")), "", f"`rime {name} test` takes the same options.", ""]
            continue
        lines += [_block(help_of(name)), ""]
        for part in parts:
            lines += [f"### rime {name} {part}", "", _block(help_of(name, part)), ""]
    return "\n".join(lines)


def _block(text: str) -> str:
    return f"```text\n{text}\n```"
