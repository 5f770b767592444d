"""Check the installation, the settings and the adapter of a run; the exit code is 1 if there is a problem.

rime doctor --config configs/cma.yaml --adapter runs/openmoji-tiny-seed0/cma
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
from rime_pl.preflight.doctor.result import Check
from rime_pl.preflight.doctor.settings import batch, check_backbone, precision

STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=False)
    parser.add_argument("--adapter", type=Path, help="folder of a run whose adapter is checked")


def run(args: argparse.Namespace) -> int:
    if args.settings and not args.config:
        raise RimeError(f"{args.settings[0]}: a setting needs a recipe. Add --config FILE.")
    refused: list[Check] = []
    settings: RunSettings | None = None
    if args.config:
        try:
            settings = read_settings(args.config, args.stage, args.settings)
        except RimeError as error:
            refused = [Check("settings", "problem", str(error), "`rime STAGE fit --help` lists every field.")]
    wants_gpu = settings is not None and settings.values.trainer.accelerator in ("gpu", "cuda")
    found = [*check_installation(wants_gpu), *refused]
    if settings is not None:
        found += check_settings(settings)
    if args.adapter:
        found.append(check_adapter(args.adapter, settings.backbone.name_or_path if settings else None))
    print_checks(found)
    return int(any(check.level == "problem" for check in found))


def check_settings(settings: RunSettings) -> list[Check]:
    """Return every check of a recipe."""
    config, values, sharded = settings.backbone, settings.values, settings.strategy == "fsdp"
    return [
        *check_backbone(config, sharded),
        precision(values.trainer.precision, sharded, config.load_in_4bit),
        batch(values.data.batch_size, settings.num_processes),
    ]


def print_checks(checks: list[Check]) -> None:
    """Print level, name and finding of each check, and the remedy below."""
    console = Console(highlight=False, soft_wrap=True)
    for check in checks:
        console.print(f"[{STYLE[check.level]}]{check.level:<8}[/] {check.name}: {escape(check.seen)}")
        if check.remedy:
            console.print(f"         -> {escape(check.remedy)}")
    counts = {level: sum(check.level == level for check in checks) for level in STYLE}
    console.print(", ".join(f"{count} {level}" for level, count in counts.items()))
