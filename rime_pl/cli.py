"""The composition root: ties one module, the datamodule and the callbacks into a stage's run.

`rime cma fit --config configs/tiny/cma.yaml --data.path data/openmoji --run_dir runs/x/cma` trains,
tests and writes the report. From here the loss is one file away: rime_pl/modules/<stage>.py.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from rime_pl.callbacks.adapter_checkpoint import AdapterCheckpoint
from rime_pl.callbacks.measures import Measures
from rime_pl.callbacks.progress import EpochsFromOne
from rime_pl.callbacks.retrieval_recall import RetrievalRecall
from rime_pl.callbacks.rewrite_samples import RewriteChanges, RewriteSamples
from rime_pl.callbacks.settings_record import SettingsRecord
from rime_pl.callbacks.utilisation import Utilisation
from rime_pl.checkpoints import global_step, logged_step, resuming
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.errors import RimeError, StoppedError, ToldElsewhereError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.sft import SFTModule
from rime_pl.options.parser import PlainParser
from rime_pl.options.words import needs
from rime_pl.pipeline import differences, listed
from rime_pl.report.stage import write_report
from rime_pl.run_folder import RunFolder
from rime_pl.run_lock import claimed
from rime_pl.scaling.gather import gather_objects

STAGES: dict[str, type[RimeModule]] = {
    "sft": SFTModule,
    "cma": CMAModule,
    "refine_rl": RefineRLModule,
}
#: Settings of the backbone that a resumed run may change; a checkpoint's hash refuses another base model.
FREE = ("gradient_checkpointing", "attn_implementation", "shard_base", "shard_tower", "name_or_path")


class StageParser(PlainParser, LightningArgumentParser):
    """The stages' parser: ``--help`` shows our own settings, ``--help_all`` the trainer's as well."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Any:
        words = ["--help" if word == "-h" else word for word in (sys.argv[1:] if args is None else args)]
        self.everything = bool({"--help_all", "--help-all"} & set(words))
        return super().parse_args(["--help"] if self.everything else words, *rest, **kwargs)

    def refuse_names(self) -> None:
        super().refuse_names()
        if not {"run_dir", "help", "print_config"} & {one.name for one in self.given}:
            raise RimeError(needs(self.prog, (one.name for one in self.given)))

    def missing(self, names: list[str]) -> str:
        if not any(one.name == "config" for one in self.given):
            return needs(self.prog, (one.name for one in self.given))
        values = " and ".join(f"--{name} VALUE" for name in names)
        return f"The settings in --config leave out {' and '.join(names)}. Add {values}."

    def format_help(self, *formatter: Any) -> str:
        """Return the help by groups of settings, the trainer's last or left out."""
        groups = self.groups or {}
        for action in self._actions:
            if action.dest in groups:  # a whole group from a file of its own: --config does that
                action.help = argparse.SUPPRESS
        shown = {"run": self._action_groups[1]} | {name: groups[name] for name in groups if name != "trainer"}
        shown |= {"trainer": groups["trainer"]} if self.everything else {}
        for name, group in shown.items():
            group.title = "run" if name == "run" else f"{name}: {group.title}".replace("``", "")
        self._action_groups = [group for group in shown.values() if group._group_actions]
        self.epilog = (
            None if self.everything else "--help_all (or --help-all) shows the trainer's settings as well"
        )
        return super().format_help(*formatter)


class StageCLI(LightningCLI):
    """LightningCLI with one fixed class pair; the callbacks are always there, no overlay drops them.

    Args:
        stage: A key of ``STAGES``.
        args: The words after ``rime STAGE fit``.
        prog: What an error calls the command.
    """

    def __init__(self, stage: str, args: Sequence[str], prog: str) -> None:
        # LightningCLI warns when sys.argv holds words beside ``args``: those are ours, already taken off
        typed, sys.argv = sys.argv, [prog]
        try:
            super().__init__(
                STAGES[stage],
                RimeDataModule,
                args=list(args),
                run=False,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults={"enable_model_summary": False},  # of one row; ours says what trains
                auto_configure_optimizers=False,
                parser_class=StageParser,
                parser_kwargs={
                    "prog": prog,
                    "usage": f"{prog} --config FILE --run_dir FOLDER [--SETTING VALUE ...]",
                    "description": (sys.modules[STAGES[stage].__module__].__doc__ or "").split("\n\n")[0]
                    + " Defaults are those without a settings file; a recipe sets its own.",
                },
            )
        finally:
            sys.argv = typed  # Lightning starts further processes with the words as typed

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        help_action, config, print_config = parser._actions
        help_action.help = "This help"
        config.metavar, config.help = (
            "FILE",
            "Settings in YAML; of several files, a later one overrides an earlier",
        )
        print_config.help = "Print all settings as YAML and end"
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir", type=str, required=True, help="Folder of this run; an unfinished one is resumed"
        )
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="Seed of the order of the data and of everything random",
        )
        parser.add_argument(
            "--num_threads", type=int | None, help="CPU threads of each process (default: torch's choice)"
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="Checkpoint: `fit` resumes from it, `test` tests it (default: the last one in run_dir)",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RetrievalRecall, "recall")
        parser.add_lightning_class_args(RewriteSamples, "samples")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RewriteChanges, "changes")
        parser.link_arguments("run_dir", "checkpoint.run_dir")
        parser.link_arguments("run_dir", "changes.run_dir")
        parser.link_arguments("model.backbone.name_or_path", "data.name_or_path")
        parser.link_arguments(
            "model", "data.prompt", lambda model: model.config.prompt, apply_on="instantiate"
        )
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        if self.config.trainer is None:
            raise RimeError("trainer must hold settings, but is null. Leave it out for the defaults.")
        if self.config.num_threads:
            torch.set_num_threads(self.config.num_threads)

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.config.run_dir)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as plain data, as ``config.yaml`` holds them."""
        values: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        return values

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to continue from: the one named, else the last of this run folder."""
        if self.config.ckpt_path:
            return Path(self.config.ckpt_path)
        last = self.run_folder.last_checkpoint
        return last if last.is_file() else None

    def logger(self, purge_step: int | None = None) -> TensorBoardLogger:
        """Return TensorBoard's logger, which drops earlier events from ``purge_step`` on."""
        return TensorBoardLogger(
            self.run_folder.path,
            name="tensorboard",
            version="",
            default_hp_metric=False,
            purge_step=purge_step,
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        callbacks = [SettingsRecord(self.run_folder, self.settings), Measures(), Utilisation()]
        if self.config.trainer.enable_progress_bar is not False:
            callbacks.append(EpochsFromOne())
        self.trainer_defaults["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(logger=self.logger(), **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            named = self.config.trainer.accelerator
            if named in ("gpu", "cuda") and not torch.cuda.is_available():
                raise RimeError(
                    f"trainer.accelerator is {named}, but torch finds no GPU. Give --trainer.accelerator "
                    "cpu, or see `rime doctor`."
                ) from error
            raise RimeError(f"The trainer refuses these settings. {error}") from error

    @contextmanager
    def in_run_folder(self) -> Iterator[None]:
        """Work in the run folder alone; say how to go on when somebody stops the run."""
        first, handler = self.trainer.is_global_zero, signal.getsignal(signal.SIGINT)
        try:
            with claimed(self.run_folder) if first else nullcontext():
                yield
        except (KeyboardInterrupt, SystemExit, StoppedError) as stopped:  # Lightning exits after Ctrl-C
            signal.signal(signal.SIGINT, handler)  # and lets nobody press it again
            if not first:
                raise ToldElsewhereError("stopped") from stopped
            by_term = isinstance(stopped, SIGTERMException)
            signum = signal.SIGTERM if by_term else getattr(stopped, "signum", signal.SIGINT)
            raise StoppedError(self.how_to_go_on(), signum) from stopped
        except OSError as error:
            if error.errno is not None and error.filename is None:  # a full disk does not say where
                error.filename = str(self.run_folder)
            raise

    def how_to_go_on(self) -> str:
        """Return the sentence for somebody who stopped the run."""
        last = self.run_folder.last_checkpoint
        if not last.is_file():
            return "stopped before the first checkpoint. The same command starts from the beginning."
        return f"stopped. The checkpoint is {last} (step {global_step(last)}). Go on with the same command."


def run_stage(stage: str, action: str, words: list[str]) -> int:
    """Train or test a stage: ``rime STAGE fit ...`` and ``rime STAGE test ...``.

    Args:
        stage: A key of ``STAGES``.
        action: ``fit`` or ``test``.
        words: What follows on the command line.
    """
    started, typed = time.time(), sys.argv
    cli = StageCLI(stage, words, f"rime {stage.replace('_', '-')} {action}")
    (test if action == "test" else fit)(cli, stage, started, typed)
    return 0


def test(cli: StageCLI, stage: str, started: float, typed: list[str]) -> None:
    """Test a checkpoint, or else the adapter that the settings start from, into a folder of its own."""
    run = cli.run_folder
    if run.finished:
        raise RimeError(
            f"--run_dir {run}: this run is finished, and its report would be overwritten. Give another "
            f"folder, and --ckpt_path {run.last_checkpoint} to test its weights."
        )
    if not cli.datamodule.tests:
        raise RimeError("data.test_modes is [], which is no test. Give --data.test_modes null to test.")
    if not cli.trainer.limit_test_batches:
        raise RimeError("trainer.limit_test_batches must not be 0 in a test. Leave it out.")
    if stage == "refine_rl" and not cli.config.ckpt_path:
        with_itself = "Without it, the reference adapter would be compared with itself."
        last = RunFolder("RUN").last_checkpoint
        raise RimeError(f"Testing a Refine-RL run needs --ckpt_path. {with_itself} Use --ckpt_path {last}.")
    path = cli.config.ckpt_path
    steps = global_step(Path(path)) if path else 0  # also refuses a file that is no checkpoint
    with cli.in_run_folder():
        cli.trainer.test(
            cli.model, datamodule=cli.datamodule, verbose=False, ckpt_path=path, weights_only=True
        )
        finish(cli, stage, {"test": time.time() - started}, typed, steps)


def fit(cli: StageCLI, stage: str, started: float, typed: list[str]) -> None:
    """Train (or go on), test on the split that chose nothing if wanted, write the report and the marker."""
    run = cli.run_folder
    if run.finished:
        print(f"{run} is finished; see {run.summary_text}. Another --run_dir starts a new run.")
        return
    with cli.in_run_folder():
        resume = cli.resume_from
        done = global_step(resume) if resume else 0
        # steps after the checkpoint are trained again: TensorBoard drops the events of the first time
        cli.trainer.logger = cli.logger(logged_step(resume) if resume else 0)
        if cli.trainer.is_global_zero:
            announce(cli, stage, resume, done)
        with resuming(resume, cli.model):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
        trained = time.time()
        steps, seconds = cli.trainer.global_step, {"fit": trained - started}
        if cli.datamodule.tests and cli.trainer.limit_test_batches:
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            seconds["test"] = time.time() - trained
        finish(cli, stage, seconds, typed, steps, steps - done)


def announce(cli: StageCLI, stage: str, resume: Path | None, done: int) -> None:
    """Say where the run goes on and what has changed.

    Raises:
        RimeError: If a setting of the backbone has changed since the run began.
    """
    run = cli.run_folder
    if resume:
        print(f"continuing from {resume} (step {done})", flush=True)
    if resume == run.last_checkpoint and run.config.is_file():
        changed = differences(cli.settings, run.settings)
        for name in ("run_dir", "ckpt_path"):
            changed.pop(name, None)
        backbone = "model.backbone."
        kept = {name for name in changed if name.startswith(backbone)} - {backbone + name for name in FREE}
        refused = {name: pair for name, pair in changed.items() if name in kept}
        if refused:
            raise RimeError(
                f"{run}: a resumed run must keep its backbone, but has {listed(refused)}. Give the old "
                "values, or another folder for a new run."
            )
        if changed:
            print(f"changed since the run began: {listed(changed)}", flush=True)
    before = previous_summary(cli) if stage == "refine_rl" else None
    trace = (before or {"after": {}})["after"].get("trace", {})
    if trace.get("room") is not None:
        print(
            f"room for the rewrite: gen-gen recall@1 is {trace['own']:.3f} with the own one, "
            f"{trace['reference']:.3f} with the reference's: {trace['room']:+.3f}",
            flush=True,
        )


def finish(
    cli: StageCLI,
    stage: str,
    seconds: dict[str, float],
    typed: list[str],
    steps: int,
    steps_timed: int = 0,
) -> None:
    """Report of a run; the rule of the checkpoint is: the last step, nothing was chosen.

    Args:
        seconds: Without the key ``test``, the run was not tested.
        steps: That the tested weights were trained for in this stage.
        steps_timed: Steps that ``seconds["fit"]`` covers: all, unless the run was resumed.
    """
    # each process has read its own part of the data
    read = gather_objects((cli.datamodule.broken, cli.datamodule.cut))
    if not cli.trainer.is_global_zero:
        return
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    recall = next(c for c in callbacks if isinstance(c, RetrievalRecall))
    utilisation = next(c for c in callbacks if isinstance(c, Utilisation))
    write_report(
        run_dir=cli.run_folder.path,
        stage=stage,
        results=recall.results if "test" in seconds else None,  # or else those of the last validation
        history=recall.history,
        ranks=recall.ranks,
        before=previous_summary(cli) if steps else None,  # untrained, the weights would meet themselves
        seconds=seconds,
        facts={
            **cli.run_folder.origin,  # first: what was measured counts, not what was meant
            "argv": typed,
            "seed": cli.config.seed_everything,
            **cli.run_folder.corpus_facts(cli.datamodule.path) | cli.datamodule.corpora.facts(),
            "data_hash": cli.datamodule.data_hash,
            "negatives_per_query": cli.model.negatives_per_query,
            "utilisation": utilisation.facts,
            "processes": cli.trainer.world_size,
            "steps": steps,
            "steps_timed": steps_timed,
            "checkpoint_rule": "the last step",
            "broken_samples": {name: wrong for broken, _ in read for name, wrong in broken.items()},
            "cut_texts": sorted({name for _, cut in read for name in cut}),
            "base": cli.model.config.name_or_path,
            "base_hash": cli.model.model.base_hash,
            "start": cli.model.init_adapter_from,
            "start_hash": cli.model.start_hash,
        },
    )


def previous_summary(cli: StageCLI) -> dict[str, Any] | None:
    """The report of the run that the adapter came from, when it was tested on the same data."""
    if not cli.model.init_adapter_from:
        return None
    run = RunFolder(Path(cli.model.init_adapter_from).parent)
    same = run.tested and run.manifest["data_hash"] == cli.datamodule.data_hash
    return run.summary if same else None
