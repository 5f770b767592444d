"""What a diverged run leaves behind; saving and resuming are tested in tests/stages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.callbacks.adapter_checkpoint import DIVERGED, LAST, PREVIOUS, AdapterCheckpoint
from rime_pl.errors import DivergedError


@pytest.mark.parametrize("looked_at", [True, False], ids=["a batch has passed", "just saved"])
@pytest.mark.parametrize("has_previous", [True, False])
def test_only_weights_that_a_batch_has_passed_are_good(
    looked_at: bool, has_previous: bool, tmp_path: Path
) -> None:
    callback = AdapterCheckpoint(str(tmp_path), every_n_steps=10)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / LAST).write_text("new")
    if has_previous:
        (tmp_path / PREVIOUS).write_text("old")
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
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
        assert (tmp_path / LAST).read_text() == "new" and not (tmp_path / DIVERGED).exists()
        assert str(error) == f"stopped. Last good checkpoint: {tmp_path / LAST}."
        return
    assert (tmp_path / DIVERGED).read_text() == "new" and str(tmp_path / DIVERGED) in str(error)
    if has_previous:
        assert (tmp_path / LAST).read_text() == "old" and not (tmp_path / PREVIOUS).exists()
    else:
        assert not (tmp_path / LAST).exists() and "nothing good was saved yet" in str(error)
