"""What a diverged run leaves behind; saving and resuming are tested in tests/stages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.callbacks.adapter_checkpoint import DIVERGED, PREVIOUS, AdapterCheckpoint
from rime_pl.errors import DivergedError
from rime_pl.run_folder import RunFolder


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
