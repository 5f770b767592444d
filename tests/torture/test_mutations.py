"""The watching process sees each way in which an input can end badly; a few inputs of each kind end well."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from rime_pl.errors import RimeError
from tests.torture.mutations import KINDS, faults, table, torture
from tests.torture.watched import MARKER, Case, Reading, watch


def refuse(folder: Path) -> Reading:
    raise RimeError(f"{folder}/a.txt must be good.")


def refuse_without_a_name(folder: Path) -> Reading:
    raise RimeError("malformed")


def hang(folder: Path) -> Reading:
    while True:
        time.sleep(0.01)


def hang_for_good(folder: Path) -> Reading:
    while True:
        try:
            time.sleep(100)
        except BaseException:
            continue


def crash(folder: Path) -> Reading:
    os.kill(os.getpid(), 6)
    return Reading("")


def fill_the_memory(folder: Path) -> Reading:
    return Reading(str(len(bytes(1 << 31))))


def write_outside(folder: Path) -> Reading:
    (folder.parent / "new.txt").touch()
    return Reading("")


def unpickle(folder: Path) -> Reading:
    Path(MARKER).touch()
    return Reading("")


ENDS: list[tuple[Callable[[Path], Reading], set[str]]] = [
    (lambda folder: Reading("good"), {"same"}),
    (lambda folder: Reading("else"), {"other"}),
    (lambda folder: Reading("", ("a.txt line 3 is bad",)), {"counted"}),
    (lambda folder: Reading("", ("line 3 is bad",)), {"counted", "nameless"}),
    (refuse, {"refused"}),
    (refuse_without_a_name, {"refused", "nameless"}),
    (hang, {"hang"}),
    (hang_for_good, {"hang"}),
    (crash, {"traceback"}),
    (lambda folder: Reading(str(1 // 0)), {"traceback"}),
    (fill_the_memory, {"memory"}),
    (write_outside, {"other", "outside"}),
    (unpickle, {"other", "unpickled"}),
]


def test_each_end_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.torture.watched.PATIENCE", 1)
    cases = [Case(str(ends), Path.touch, read, ("a.txt",), "good") for read, ends in ENDS]
    cases.append(
        Case("must be refused", Path.touch, lambda folder: Reading("good"), ("a.txt",), "good", True)
    )
    found = watch(cases, tmp_path / "work", seconds=0.5, memory=1 << 30)
    assert [one.ends for one in found] == [*(ends for _, ends in ENDS), {"same", "accepted"}]
    assert len(faults({"made": found})) == 10
    assert table({"made": found}, "this").conclusion == "14 mutated inputs, 10 of which ended badly."


def test_a_few_inputs_of_each_kind_end_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads that sleep
        found = torture({kind: 5 for kind in KINDS if kind != "real commands"}, 1, tmp_path)
    assert all(len(of_kind) == 5 for of_kind in found.values())
    assert not faults(found), "\n\n".join(faults(found))
