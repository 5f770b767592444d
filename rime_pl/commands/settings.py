"""A run's settings as `rime STAGE fit` would read them, but without a run: for `run`, `plan` and `doctor`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rime_pl.backbone.config import BackboneConfig
from rime_pl.cli import STAGES, StageCLI
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.errors import RimeError
from rime_pl.prompts import PromptConfig


class _Reader(StageCLI):
    """Parses, links nothing that is instantiated, builds nothing, sets no seed."""

    def _set_seed(self) -> None:
        return

    def before_instantiate_classes(self) -> None:
        return

    def instantiate_classes(self) -> None:
        return


@dataclass
class RunSettings:
    """The settings of a stage's run."""

    stage: str
    values: Any  # the namespace of the stage's parser
    backbone: BackboneConfig
    num_processes: int
    strategy: str  # "single", "ddp" or "fsdp"


def add_config_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """`--config` and `--stage`; every further setting goes to the stage's own parser."""
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        required=required,
        help="recipe, then corpus and overlays, as for a run",
    )
    parser.add_argument(
        "--stage",
        choices=sorted(STAGES),
        help="whose settings the recipe holds (default: the first file's name)",
    )


def read_settings(configs: list[Path], stage: str | None, overrides: list[str]) -> RunSettings:
    """Parse as the stage would.

    Args:
        configs: YAML files in order.
        stage: A key of ``STAGES``; None takes the name of the first file.
        overrides: Words such as ``--model.temperature 0.05``.

    Raises:
        RimeError: If the stage is not known, a file is missing, or a name or value is refused.
    """
    stage = stage or configs[0].stem
    if stage not in STAGES:
        raise RimeError(
            f"--config {configs[0]}: its name is no stage; add --stage {' or --stage '.join(STAGES)}."
        )
    words = [word for path in configs for word in ("--config", str(path))]
    values = _parse(stage, [*words, *overrides]).config
    return RunSettings(stage, values, _backbone(values), *_processes(values))


def complete_settings(stage: str, words: list[str]) -> dict[str, Any]:
    """Return the settings that ``words`` give to a stage, as the run's config.yaml would hold them."""
    reader = _parse(stage, words)
    values: dict[str, Any] = yaml.safe_load(reader.parser.dump(reader.config, skip_unset=False))
    return values


def _parse(stage: str, words: list[str]) -> _Reader:
    typed, sys.argv = sys.argv, [f"rime {stage}"]
    try:
        return _Reader(
            STAGES[stage],
            RimeDataModule,
            args=["--run_dir", "runs/none", *words],  # a run needs one, a plan does not
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
        )
    except (argparse.ArgumentError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RimeError(f"{' '.join(words)}: refused by `rime {stage} fit`. {error}") from error
    finally:
        sys.argv = typed


def _backbone(values: Any) -> BackboneConfig:
    given = dict(values.model.backbone.as_dict())
    return BackboneConfig(**given | {"prompt": PromptConfig(**given["prompt"])})


def _processes(values: Any) -> tuple[int, str]:
    """Number of processes and how they share: "auto" devices count as one, "the machine decides"."""
    trainer = values.trainer
    devices = trainer.devices
    if isinstance(devices, str):
        devices = int(devices) if devices.isdigit() else len(devices.split(",")) if "," in devices else 1
    each = len(devices) if isinstance(devices, list) else max(1, devices)
    count = each * trainer.num_nodes
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else str(strategy.get("class_path", ""))
    if "ModelParallel" in name or "fsdp" in name.lower():
        return count, "fsdp"
    return count, "ddp" if count > 1 else "single"
