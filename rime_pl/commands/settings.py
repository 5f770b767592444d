"""A run's settings as `rime STAGE fit` would read them, but without a run: for `run`, `plan` and `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser

from rime_pl.backbone.config import BackboneConfig
from rime_pl.cli import STAGES, StageCLI
from rime_pl.errors import RimeError
from rime_pl.options.parser import add_options, command_parser, options_of
from rime_pl.options.words import nearest, options_given
from rime_pl.prompts import PromptConfig
from rime_pl.run_settings import RunSettings

Stage = Literal["sft", "cma", "refine-rl", "refine_rl"]


class SettingsReader(StageCLI):
    """Parses the settings of a stage, and the options of a command behind them; loads and trains nothing.

    Args:
        stage: A key of ``STAGES``.
        args: The words to parse.
        prog: What an error calls the command.
        command: The function of the command; None if it has no options of its own.
    """

    def __init__(
        self, stage: str, args: Sequence[str], prog: str, command: Callable[..., int] | None = None
    ) -> None:
        self.command = command
        super().__init__(stage, args, prog)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        if self.command:
            add_options(parser, self.command)

    def _set_seed(self) -> None:
        return  # a plan draws nothing, and must not change what its caller draws

    def before_instantiate_classes(self) -> None:
        return

    def instantiate_classes(self) -> None:
        """Make module and data module only to let them refuse values, as they would at the start of a run."""
        self.parser.instantiate_classes(self.config)


@dataclass(frozen=True)
class StageWords:
    """The words of a command line that hold a stage's settings; a command reads them when it needs them.

    Args:
        configs: The settings files in order, recipe first; empty if none is given.
        stage: Whose settings they are; None for the stage in the name of the first file.
        words: All words, ``--config`` among them.
        prog: What an error calls the command.
        command: The function of the command, whose options an error may suggest.
    """

    configs: tuple[Path, ...]
    stage: str | None
    words: tuple[str, ...]
    prog: str
    command: Callable[..., int] | None = None

    def read(self) -> RunSettings:
        """Return the settings as ``rime STAGE fit`` would parse them.

        Raises:
            RimeError: If there is no file, the stage is not known, or a name or value is refused.
        """
        if not self.configs:
            raise RimeError(f"`{self.prog}` needs --config FILE, for example configs/cma.yaml.")
        stage = self.stage or self.configs[0].stem
        if stage not in STAGES:
            raise RimeError(
                f"--config {self.configs[0]}: the name of the file is not a stage. "
                f"Add --stage {' or --stage '.join(STAGES)}."
            )
        # a run needs a folder, a plan does not
        values = SettingsReader(
            stage, ["--run_dir", "runs/none", *self.words], self.prog, self.command
        ).config
        return RunSettings(stage, STAGES[stage], values, _backbone(values), *_processes(values))


def parse_with_settings(command: Callable[..., int], prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a command that takes ``settings`` (:class:`StageWords`) and options of its own.

    Raises:
        RimeError: If one of its own options is refused, or settings are given without a file.
    """
    names = {*options_of(command), "stage", "help"}
    own, others = split_words(words, names)
    parser = command_parser(command, prog)
    group = parser._action_groups[-1]
    group.add_argument("--config", type=Path, help="Settings file of a stage; give several as for a run")
    group.add_argument(
        "--stage", type=Stage, help="Stage of the settings (default: the name of the first file)"
    )
    parser.epilog = "Every setting of the stage is an option as well, such as --data.batch_size 64"
    values = parser.parse_args(own)
    given = list(options_given(others))
    configs = tuple(Path(str(one.value)) for one in given if one.name == "config")
    if given and not configs:
        near = nearest(given[0].name, {*names, "config"})
        hint = f"Did you mean --{near}?" if near else "Add --config FILE if it is a setting of a stage."
        raise RimeError(f"{given[0]} is not an option of `{prog}`. {hint}")
    stage = values["stage"] and values["stage"].replace("-", "_")
    settings = StageWords(configs, stage, tuple(others), prog, command)
    return {"settings": settings, **{name: values[name] for name in options_of(command)}}


def split_words(words: Sequence[str], names: set[str]) -> tuple[list[str], list[str]]:
    """Return the words of the options in ``names``, each with its values, and the other words."""
    own: list[str] = []
    others: list[str] = []
    side = own
    for word in words:
        if word == "-h" or word == "-c" or word.startswith("--"):
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            side = own if name in names or name == "h" else others
        side.append(word)
    return own, others


def complete_settings(stage: str, words: list[str]) -> dict[str, Any]:
    """Return the settings that ``words`` give to a stage, as the run's config.yaml would hold them."""
    command = f"rime {stage.replace('_', '-')} fit"
    return SettingsReader(stage, ["--run_dir", "runs/none", *words], command).settings


def refuse_untrainable(stage: str, words: list[str]) -> None:
    """Raise what would stop a training on its corpus, as far as the index shows: before a model is made.

    Args:
        stage: Whose settings they are.
        words: The settings, as words of the command line.

    Raises:
        RimeError: If a split is missing, or settings and training pairs do not fit together.
    """
    given = StageWords((Path(f"{stage}.yaml"),), stage, tuple(words), f"rime {stage.replace('_', '-')} fit")
    try:
        data = given.read().data(None)
        data.plan_training()
        data.corpora.refuse_missing_splits(data.tests)
    except RimeError as error:
        raise type(error)(f"{error} Give a setting to this stage as --{stage}.NAME VALUE.") from error


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
