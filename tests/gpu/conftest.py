"""Fixtures of the checks on a GPU. The same checks also run on the CPU, with a micro model, in `make test`.

A fixture makes each training run once for all tests that look at it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
import torch

from tests.gpu.bench import Bench
from tests.gpu.watch import CountingWatch, Run, Watch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]
FindRun = Callable[[str], Run]


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Fail where only checks on a GPU are asked for and there is none: skipping all of them is no check."""
    if config.getoption("markexpr") == "gpu" and not torch.cuda.is_available():
        pytest.exit("torch finds no CUDA device on this machine, so nothing was checked.", returncode=1)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=GPU)])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A 2B-shaped checkpoint on a GPU, a micro one on the CPU."""
    folder = tmp_path_factory.mktemp("bench")
    if request.param == "cpu":
        return Bench(folder, torch.device("cpu"), "micro", CountingWatch)
    return Bench(folder, torch.device("cuda", 0), "2b", Watch)


@pytest.fixture(scope="session")
def find_run(bench: Bench) -> FindRun:
    """Give a run by name; each is made once, and a run that failed is not tried again."""
    made: dict[str, Run] = {}
    failed: dict[str, str] = {}  # not the exceptions, because they hold the memory of the run

    def find(name: str) -> Run:
        if name not in made and name not in failed:
            try:
                made[name] = bench.run(bench.cases[name])
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
        if name in failed:
            pytest.fail(f"the run {name} failed: {failed[name]}")
        return made[name]

    return find
