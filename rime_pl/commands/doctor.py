"""Check the installation, the settings and the adapter of a run; the exit code is 1 if there is a problem.

rime doctor --config configs/cma.yaml --adapter runs/openmoji-tiny-seed0/cma
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rime_pl.commands.settings import StageWords
from rime_pl.commands.settings import parse_with_settings as parse
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor import (
    Check,
    batch,
    check_adapter,
    check_backbone,
    check_installation,
    precision,
)
from rime_pl.preflight.plan.planning import RunSettings

__all__ = ["parse", "run"]

STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def run(settings: StageWords, *, adapter: Path | None = None) -> int:
    """Check the installation, the settings of a run and its adapter; print each problem with its remedy.

    The exit code is 1 if there is a problem.

    Args:
        settings: Settings of the run, read from --config.
        adapter: Folder of a run; its adapter is checked against its base model.
    """
    of_settings: list[Check] = []
    given: RunSettings | None = None
    if settings.configs:
        try:
            given = settings.read()
            of_settings = check_settings(given)
        except RimeError as error:
            remedy = "`rime STAGE fit --help` lists every field."
            of_settings = [Check("settings", "problem", str(error), remedy)]
    wants_gpu = given is not None and given.values.trainer.accelerator in ("gpu", "cuda")
    found = [*check_installation(wants_gpu), *of_settings]
    if adapter:
        found.append(check_adapter(adapter, given.backbone.name_or_path if given else None))
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
