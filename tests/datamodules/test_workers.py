"""How data workers end, and what they print when the trainer was stopped."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.datamodules.loading import BatchLoader, _begin_worker


class Endless:
    """Hands over empty batches; what a loader needs of its source."""

    reader: tuple[int, ...] = ()

    def __getitem__(self, number: int) -> Fetched:
        return Fetched()


def begin(loaders: list[Iterator[Fetched]]) -> None:
    """Read one batch and keep the loader, as the traceback of a failed run does."""
    loaders.append(BatchLoader(Endless(), 1000, BrokenSamples("x", 0.0), num_workers=1)._read())
    next(loaders[0])


def test_a_process_ends_with_a_loader_in_the_middle_of_an_epoch() -> None:
    """Its worker ignores SIGTERM, which multiprocessing sends before it waits for the worker."""
    words = "from tests.datamodules.test_workers import begin; kept = []; begin(kept); print('read')"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def tell(kind: type[BaseException]) -> None:
    """Do as multiprocessing does in a worker whose batch nobody takes any more."""
    _begin_worker(0)
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
