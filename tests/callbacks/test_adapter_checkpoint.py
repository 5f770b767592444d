"""What a diverged or stopped run leaves behind; saving and resuming are tested in tests/stages."""

import errno
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from replay import Replay
from safetensors import SafetensorError

from rime_pl.callbacks import adapter_checkpoint as saving
from rime_pl.callbacks.adapter_checkpoint import DIVERGED, PREVIOUS, AdapterCheckpoint
from rime_pl.errors import DivergedError, StoppedError
from rime_pl.run_folder import RunFolder


class Trained(Replay):
    """Logs its batches, and stops at one of them if asked to."""

    may_diverge = False
    stops_at = -1

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.stops_at:
            signal.raise_signal(signal.SIGTERM)
        self.log("train/number", float(batch_idx))
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        signal.raise_signal(signal.SIGTERM)


class Log(CSVLogger):
    """Notes each row that is logged: its step, and the step of the checkpoint at that moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.last, self.rows = RunFolder(folder).last_checkpoint, []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        saved = torch.load(self.last, weights_only=True)["global_step"] if self.last.is_file() else 0
        self.rows.append((step, saved))


def fit(folder: Path, module: L.LightningModule, monkeypatch: pytest.MonkeyPatch) -> Log:
    """Train for four batches with a checkpoint after each; there is no adapter to write."""
    monkeypatch.setattr(AdapterCheckpoint, "write_adapter", lambda *_: None)
    log = Log(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=log,
        callbacks=[AdapterCheckpoint(str(folder), every_n_steps=1)],
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with suppress(StoppedError):
        trainer.fit(module, torch.utils.data.DataLoader(list(range(4)), batch_size=1))
    return log


@pytest.fixture
def handler() -> Iterator[Any]:
    """A handler of SIGTERM that does nothing, so that a failure does not end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_a_batch_is_logged_before_its_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between the two trains and logs the batch again. Nothing is lost from the log."""
    assert fit(tmp_path, Trained(), monkeypatch).rows == [(0, 0), (1, 1), (2, 2), (3, 3)]
    files = [path.name for path in RunFolder(tmp_path).last_checkpoint.parent.iterdir()]
    assert files == ["last.ckpt"]


def test_the_batch_before_a_stop_is_in_the_log(
    handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Trained()
    module.stops_at = 1
    log = fit(tmp_path, module, monkeypatch)
    assert [step for step, _ in log.rows] == [0, 1] and signal.getsignal(signal.SIGTERM) is handler
    assert torch.load(log.last, weights_only=True)["global_step"] == 2
    assert [path.name for path in log.last.parent.iterdir()] == ["last.ckpt"]


def test_sigterm_ends_a_test_at_once(handler: Any, tmp_path: Path) -> None:
    """Lightning would go on after the last batch, and hang on several processes."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[AdapterCheckpoint(str(tmp_path))],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(StoppedError) as stopped:
        trainer.test(Trained(), torch.utils.data.DataLoader([1]), verbose=False)
    assert stopped.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_while_the_adapter_is_written_is_not_forgotten(
    handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, trainer = AdapterCheckpoint(str(tmp_path)), cast(Any, None)
    callback.on_train_start(trainer, trainer)
    monkeypatch.setattr(callback, "write_adapter", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StoppedError):
        callback.on_train_end(trainer, trainer)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_while_the_texts_are_read_leaves_no_adapter_without_them(
    handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged text is left out, so the signal must be no error like that of a damaged text."""

    def training_texts(most: int | None) -> Any:
        signal.raise_signal(signal.SIGTERM)
        yield from ()

    monkeypatch.setattr(saving, "save_adapter", lambda *_: pytest.fail("an adapter was saved"))
    signal.signal(signal.SIGTERM, saving._stop)
    data = SimpleNamespace(training_texts=training_texts)
    backbone = SimpleNamespace(processor=SimpleNamespace(tokenizer=[]))
    with pytest.raises(StoppedError):
        saving._save_with_texts(tmp_path / "adapter", backbone, {}, data)


def test_a_full_disk_told_by_safetensors_is_that_of_the_machine(tmp_path: Path) -> None:
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    error = saving._of_the_machine(SafetensorError(told), tmp_path)
    assert (error.errno, error.filename) == (errno.ENOSPC, str(tmp_path))
    assert saving._of_the_machine(SafetensorError("cut"), tmp_path).args == (f"{tmp_path}: cut",)


def test_a_checkpoint_needs_no_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves there stays there, and that disk may be full when the one of the run is not."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert len(fit(tmp_path, Trained(), monkeypatch).rows) == 4


@pytest.mark.parametrize("looked_at", [True, False], ids=["a batch has passed", "just saved"])
@pytest.mark.parametrize("has_previous", [True, False])
def test_only_weights_that_a_batch_has_passed_are_good(
    looked_at: bool, has_previous: bool, tmp_path: Path
) -> None:
    callback = AdapterCheckpoint(str(tmp_path), every_n_steps=10)
    last = RunFolder(tmp_path).last_checkpoint
    previous, diverged = last.with_name(PREVIOUS), last.with_name(DIVERGED)
    last.parent.mkdir()
    last.write_text("new")
    if has_previous:
        previous.write_text("old")
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        num_training_batches=100,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=11)))
        ),
    )
    module: Any = None
    if looked_at:
        callback.on_train_batch_end(trainer, module, None, None, 10)
    error = DivergedError("stopped.")
    callback.on_exception(trainer, module, error)
    if looked_at:
        assert last.read_text() == "new" and not diverged.exists()
        assert str(error) == f"stopped. Last good checkpoint: {last}."
        return
    assert diverged.read_text() == "new" and str(diverged) in str(error)
    if has_previous:
        assert last.read_text() == "old" and not previous.exists()
    else:
        assert not last.exists() and "nothing good was saved yet" in str(error)
