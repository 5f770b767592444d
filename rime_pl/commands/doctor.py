"""Check the installation, and the settings, the corpus and the adapter of a run; exit code 1 for a problem.

rime doctor --config configs/tiny/cma.yaml --adapter runs/openmoji-tiny-seed0/cma
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rime_pl.commands.settings import StageWords
from rime_pl.commands.settings import parse_with_settings as parse  # noqa: F401 - parses this command
from rime_pl.datamodules.checking import check_training
from rime_pl.errors import RimeError
from rime_pl.preflight import doctor
from rime_pl.preflight.plan.weightless import read_own_processor
from rime_pl.run_settings import RunSettings

STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def run(settings: StageWords, *, adapter: Path | None = None) -> int:
    """Check the installation, a run's settings, corpus and adapter; print each problem with its remedy.

    The exit code is 1 if there is a problem. With --config every sample of the corpus is read.

    Args:
        settings: Settings of the run, read from --config.
        adapter: Folder of a run; its adapter is checked against its base model.
    """
    found: list[doctor.Check] = []
    given: RunSettings | None = None
    if settings.configs:
        try:
            given = settings.read()
            data = given.data(read_own_processor(given.backbone))
            found += doctor.corpus(check_training(data), data.path)
        except RimeError as error:
            remedy = "`rime STAGE fit --help` lists every field."
            found.append(doctor.Check("settings", "problem", str(error), remedy))
    if given is not None:
        config, trainer, sharded = given.backbone, given.values.trainer, given.strategy == "fsdp"
        found += doctor.check_backbone(config)
        found.append(doctor.precision(trainer.precision, sharded, config.load_in_4bit))
        found.append(doctor.batch(given.values.data.batch_size, given.num_processes))
    if adapter:
        found.append(doctor.check_adapter(adapter, given.backbone.name_or_path if given else None))
    wants_gpu = given is not None and given.values.trainer.accelerator in ("gpu", "cuda")
    found = [*doctor.check_installation(wants_gpu), *found]
    print_checks(found)
    return int(any(check.level == "problem" for check in found))


def print_checks(checks: list[doctor.Check]) -> None:
    """Print level, name and finding of each check, and the remedy below."""
    console = Console(highlight=False, soft_wrap=True)
    for check in checks:
        console.print(f"[{STYLE[check.level]}]{check.level:<8}[/] {check.name}: {escape(check.seen)}")
        if check.remedy:
            console.print(f"         -> {escape(check.remedy)}")
    counts = {level: sum(check.level == level for check in checks) for level in STYLE}
    console.print(", ".join(f"{count} {level}" for level, count in counts.items()))
