"""`rime doctor`: is everything as a run needs it? A line for each check; exit code 1 on a problem.

rime doctor --config configs/cma.yaml --adapter runs/openmoji-tiny-seed0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rime_pl.commands.settings import RunSettings, add_config_arguments, read_settings
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor.adapter import check_adapter
from rime_pl.preflight.doctor.installation import check_installation
from rime_pl.preflight.doctor.result import Check, problem
from rime_pl.preflight.doctor.settings import batch, check_backbone, precision
from rime_pl.run_folder import RunFolder

STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=False)
    parser.add_argument("--adapter", type=Path, help="a run folder: its adapter is checked against its base")


def run(args: argparse.Namespace) -> int:
    if args.settings and not args.config:
        raise RimeError(f"{args.settings[0]}: settings need a recipe; add --config FILE.")
    found: list[Check] = []
    settings: RunSettings | None = None
    if args.config:
        try:
            settings = read_settings(args.config, args.stage, args.settings)
        except RimeError as error:
            found.append(problem("settings", str(error), "`rime STAGE fit --help` lists every field."))
    wants_gpu = settings is not None and settings.values.trainer.accelerator in ("gpu", "cuda")
    found = [*check_installation(wants_gpu), *found]
    if settings is not None:
        found += check_settings(settings)
    if args.adapter:
        found += check_run(args.adapter, settings)
    print_checks(found)
    return int(any(check.level == "problem" for check in found))


def check_settings(settings: RunSettings) -> list[Check]:
    """What can be said about a recipe before its run."""
    config, values = settings.backbone, settings.values
    return [
        *check_backbone(config, settings.strategy == "fsdp"),
        precision(values.trainer.precision, settings.strategy == "fsdp", config.load_in_4bit),
        batch(values.data.batch_size, settings.num_processes),
    ]


def check_run(folder: Path, settings: RunSettings | None) -> list[Check]:
    """The adapter of a run, of its last finished stage."""
    try:
        adapter = RunFolder.with_adapter(folder).adapter
    except RimeError as error:
        return [problem("adapter", str(error), "Give --adapter the folder of a finished run.")]
    return check_adapter(adapter, settings.backbone.name_or_path if settings else None)


def print_checks(checks: list[Check], console: Console | None = None) -> None:
    """Level, name and what was seen; the remedy below."""
    console = console or Console()
    for check in checks:
        style = STYLE[check.level]
        line = f"[{style}]{check.level:<8}[/] {check.name}: {escape(check.seen)}"
        console.print(line, soft_wrap=True, highlight=False)
        if check.remedy:
            console.print(f"         -> {escape(check.remedy)}", soft_wrap=True, highlight=False)
    counts = {level: sum(check.level == level for check in checks) for level in STYLE}
    console.print(", ".join(f"{count} {level}" for level, count in counts.items()), highlight=False)
