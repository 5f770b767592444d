"""What a data worker prints when the trainer was stopped."""

from __future__ import annotations

import multiprocessing
import sys

import pytest

from rime_pl.datamodules.loading import _leave_signals_to_the_trainer


def tell(kind: type[BaseException]) -> None:
    """Do as multiprocessing does in a worker whose batch nobody takes any more."""
    _leave_signals_to_the_trainer(0)
    try:
        raise kind("reset by peer")
    except kind:
        sys.excepthook(*sys.exc_info())


@pytest.mark.parametrize(("kind", "told"), [(ConnectionResetError, False), (ValueError, True)])
def test_only_other_errors_than_a_trainer_that_has_gone_are_printed(
    kind: type[BaseException], told: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = multiprocessing.get_context("fork").Process(target=tell, args=(kind,))
    worker.start()
    worker.join()
    assert ("Traceback" in capfd.readouterr().err) == told
