"""Saves checkpoints that survive a kill at any moment, and the adapter folder that PEFT loads.

Added to every stage by ``cli``. ``RunFolder.last_checkpoint`` holds the trainable weights, the optimiser, the
loops, the random state and the position in the data; ``adapter/`` holds what a user of the model needs.
Ctrl-C and SIGTERM end the run after the batch that is being trained, with a checkpoint. A second one ends it
at once.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.bounds import at_least
from rime_pl.callbacks.progress import batches_trained
from rime_pl.errors import DivergedError, RimeError, StoppedError, ToldElsewhereError
from rime_pl.run_folder import RunFolder
from rime_pl.scaling.gather import rank
from rime_pl.training_texts import MAX_SAMPLES, MAX_VOCABULARY, TrainingTexts, tasks_to_json, write_words

#: The checkpoint before the last, and the one of a diverged run; only for stages that check for divergence.
PREVIOUS, DIVERGED = "previous.ckpt", "diverged.ckpt"


class InPlace(TorchCheckpointIO):
    """Writes a checkpoint where it belongs.

    Lightning writes it to the folder for temporary files first. There a kill leaves it for ever, and a full
    disk is another one than the message names.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with Path(path).open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the new name without the content


class AdapterCheckpoint(Checkpoint):
    """Saves a checkpoint every few steps and after each epoch, and the adapter folder at the end.

    Args:
        run_dir: Folder of the run; taken from ``--run_dir``.
        every_n_steps: Number of training batches between two checkpoints within an epoch.
    """

    def __init__(self, run_dir: str, every_n_steps: int = 50) -> None:
        self.run = RunFolder(run_dir)
        self.every_n_steps = every_n_steps
        at_least(1, "checkpoint", self, "every_n_steps")
        self._trained_since = 0  # batches since last.ckpt was written or read
        self._signals: list[int] = []  # that came in while training
        self._handlers: dict[int, Any] = {}  # of these signals, before training
        self._adapter_due = False  # whether this fit has not written the adapter yet
        self._written = False  # whether a checkpoint waits for its name until the log of its batch is written
        self._stops = False  # whether training ends before the next batch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = InPlace()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._adapter_due = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals, self._stops = [], False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {one: signal.signal(one, self._note) for one in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signal.SIGINT in self._signals:
            raise KeyboardInterrupt
        first = not self._signals
        self._signals.append(signum)  # SIGTERM may come twice: to the whole group, and from `rime run`
        if first and rank() == 0:  # not print, which the signal may have interrupted
            os.write(2, b"\nStopping after this batch, with a checkpoint. Ctrl-C again stops at once.\n")

    def _give_signals_back(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained_since += 1
        # Not on the last batch of an epoch: Lightning would restore wrong counters, and the end of the epoch
        # saves anyway.
        if batch_idx + 1 == trainer.num_training_batches:
            return
        self._stops = trainer.strategy.reduce_boolean_decision(bool(self._signals), all=False)
        if self._stops or batches_trained(trainer) % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the checkpoint of the batch before: only now Lightning has logged that batch."""
        self._publish(trainer)
        self._stop_if(self._stops)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stops = trainer.strategy.reduce_boolean_decision(bool(self._signals), all=False)
        self._save(trainer)
        self._publish(trainer)
        self._stop_if(stops)

    def _stop_if(self, stops: bool) -> None:
        if stops:
            raise StoppedError("stopped by a signal", self._signals[0] if self._signals else signal.SIGINT)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write_adapter(trainer, pl_module)
        self._give_signals_back()
        self._stop_if(bool(self._signals))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write that adapter where no test follows; the trainer has moved the model to the CPU by now."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self._adapter_due and data is not None and not data.tests:
            pl_module.to(trainer.strategy.root_device)
            self.write_adapter(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the adapter of a run that was killed between its last checkpoint and its adapter.

        A test has no state to save, so SIGTERM ends it at once. Lightning's handler would talk to the other
        processes while these are in the middle of something else, and all would wait for half an hour.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)  # the trainer puts back what was there before
        if self._adapter_due:
            self.write_adapter(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Add the last good checkpoint to the message of a diverged run.

        Only a later batch shows that saved weights are good. If no batch was trained since the last save, the
        saved weights may have diverged: they are put aside, and the previous checkpoint becomes the last.
        """
        self._give_signals_back()
        self._publish(trainer)
        if not isinstance(exception, DivergedError):
            return
        last = self.run.last_checkpoint
        previous, diverged = last.with_name(PREVIOUS), last.with_name(DIVERGED)
        aside = ""
        if not self._trained_since and last.is_file() and trainer.is_global_zero:
            last.replace(diverged)
            aside = f" The checkpoint saved just before is put aside: {diverged}."
            if previous.is_file():
                previous.replace(last)
        where = str(last) if last.is_file() else "none, because nothing good was saved yet"
        exception.args = (f"{exception} Last good checkpoint: {where}.{aside}",)

    def _save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint beside ``last.ckpt``; where the disk is full, all processes stop."""
        path = self.run.last_checkpoint
        half_written = path.with_suffix(".half")
        module: Any = trainer.lightning_module
        failed: OSError | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero and module.may_diverge and path.is_file():
                shutil.copyfile(path, half_written)
                half_written.replace(path.with_name(PREVIOUS))
            trainer.save_checkpoint(half_written, weights_only=False)
        except OSError as error:
            failed = error
            half_written.unlink(missing_ok=True)
            trainer.strategy.barrier()  # the others are in the one of save_checkpoint
        _stop_together(trainer, failed)
        self._trained_since, self._written = 0, True

    def _publish(self, trainer: L.Trainer) -> None:
        """Give the checkpoint that was written its name; a kill leaves the old file or the new one."""
        due, self._written = self._written, False  # first, because a second Ctrl-C may come here
        if due and trainer.is_global_zero:
            path = self.run.last_checkpoint
            path.with_suffix(".half").replace(path)

    def write_adapter(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the adapter as a PEFT folder; a sharded one is gathered from all processes."""
        backbone: Any = pl_module.model  # a Backbone; callbacks do not import the model
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        gathered: Any = get_model_state_dict(backbone.peft, options=options)
        half_written, failed = self.run.adapter.with_suffix(".half"), None
        try:
            if trainer.is_global_zero:
                state = adapter_state(backbone.peft, gathered)
                shutil.rmtree(half_written, ignore_errors=True)
                _save_with_texts(half_written, backbone, state, trainer.datamodule)  # type: ignore[attr-defined]
                shutil.rmtree(self.run.adapter, ignore_errors=True)  # of an earlier end of this run
                half_written.replace(self.run.adapter)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(half_written, ignore_errors=True)
            failed = error if isinstance(error, OSError) else _of_the_machine(error, self.run.adapter)
        _stop_together(trainer, failed)
        self._adapter_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "python": random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])
        random.setstate(state_dict["python"])


def _save_with_texts(folder: Path, backbone: Any, state: dict[str, Tensor], data: Any) -> None:
    """Save the adapter with its tasks' instructions and, for a tiny base model, the words of its training."""
    texts, tiny = TrainingTexts(), len(backbone.processor.tokenizer) <= MAX_VOCABULARY
    try:
        for pair in data.training_texts(None if tiny else MAX_SAMPLES):
            texts.add(pair, words=tiny)
        for pair in data.caption_texts() if tiny else ():
            texts.add_words(pair)
    except RimeError as error:  # what was trained must not be lost for a damaged file
        warnings.warn(f"The adapter keeps not all texts of its training. {error}", stacklevel=2)
    fingerprint, tasks = backbone.base_hash, tasks_to_json(texts.tasks())
    save_adapter(folder, backbone.peft, state, backbone.processor, backbone.config, fingerprint, tasks)
    if tiny:
        write_words(folder, texts.words)


def _of_the_machine(error: SafetensorError, path: Path) -> OSError:
    """Return the error of the machine that safetensors tells in words of its own, such as a full disk."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{path}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def _stop(signum: int, frame: Any) -> None:
    raise StoppedError("stopped by a signal", signum)


def _stop_together(trainer: L.Trainer, failed: OSError | None) -> None:
    """Raise on all processes if the first could not write: the others must not wait for it."""
    if trainer.strategy.reduce_boolean_decision(failed is not None, all=False):
        raise failed or ToldElsewhereError("the first process could not write")
