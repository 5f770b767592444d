"""A checkpoint is read as tensors and plain values: nothing in it is run, and a damaged one is named."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rime_pl.__main__ import main
from rime_pl.checkpoints import global_step, logged_step, read_checkpoint, resuming, unlike
from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder
from tests.stages.runs import stage_arguments

ROOT = Path(__file__).parents[1]
LOOPS = {"fit_loop": {"epoch_loop.batch_progress": {"total": {"processed": 5}}}}
GOOD: dict[str, Any] = {"global_step": 10, "loops": LOOPS, "state_dict": {"w": torch.ones(1000)}}
GOOD |= {"optimizer_states": [{}], "base_hash": "b", "pytorch-lightning_version": "2"}


class Command:
    """A pickle of this runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("action", ["fit", "test"])
def test_a_crafted_checkpoint_runs_nothing(
    action: str, scenes_corpus: Path, micro_base: Path, tmp_path: Path, capsys
) -> None:
    run, ran = RunFolder(tmp_path / "run"), tmp_path / "ran"
    run.last_checkpoint.parent.mkdir(parents=True)
    torch.save(GOOD | {"callbacks": Command(f"touch {ran}")}, run.last_checkpoint)
    words = stage_arguments("sft", scenes_corpus, micro_base, run.path)
    if action == "test":
        words = [*words, "--ckpt_path", str(run.last_checkpoint), "--run_dir", str(tmp_path / "other")]
        words[1] = "test"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(words) == 2
    assert (
        f"{run.last_checkpoint} is not used: it is damaged, or holds other objects" in capsys.readouterr().err
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.keys() == before.keys()
    assert not ran.exists()
    torch.load(run.last_checkpoint, weights_only=False)
    assert ran.exists(), "else this test shows nothing"


def test_a_good_one_is_read(tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / "last.ckpt")
    assert (global_step(tmp_path / "last.ckpt"), logged_step(tmp_path / "last.ckpt")) == (10, 5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_one_is_named(share: float, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(GOOD, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RimeError, match=re.escape(f"{path} is not used: it is damaged")):
        read_checkpoint(path)


def test_one_behind_another_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(GOOD, path)
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(RimeError, match=re.escape(f"{path} is not used: it is damaged")):
        read_checkpoint(path)


def test_a_changed_tensor_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(GOOD, path)
    content = bytearray(path.read_bytes())
    at = content.index(b"\x00\x00\x80\x3f" * 10)
    content[at + 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(RimeError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [[], {"global_step": 3}, GOOD | {"loops": 3}, GOOD | {"global_step": "x"}])
def test_another_file_of_tensors_is_no_checkpoint(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "last.ckpt")
    with pytest.raises(RimeError, match="is no checkpoint of a run"):
        read_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("value", [torch.full((3,), float("nan")), torch.tensor([1.0, float("inf")]), 3])
def test_weights_that_are_no_numbers_are_refused(value: Any, tmp_path: Path) -> None:
    torch.save(GOOD | {"state_dict": {"w": value}}, tmp_path / "last.ckpt")
    with pytest.raises(RimeError, match=r"last.ckpt is not used: w must hold finite numbers"):
        read_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("step", [-1, 1 << 70])
def test_a_step_that_no_run_has(step: int, tmp_path: Path) -> None:
    torch.save(GOOD | {"global_step": step}, tmp_path / "last.ckpt")
    with pytest.raises(RimeError, match=rf"last.ckpt is no checkpoint of a run: its step is {step}"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_what_the_trainer_cannot_restore_is_refused_and_other_errors_stay() -> None:
    path = Path("last.ckpt")
    told = r"last.ckpt does not fit this run, or is damaged \(KeyError: 'lr'\)"
    with pytest.raises(RimeError, match=told), resuming(path, SimpleNamespace(restoring=True)):
        raise KeyError("lr")
    for checkpoint, restoring in ((path, False), (None, True)):
        with pytest.raises(KeyError), resuming(checkpoint, SimpleNamespace(restoring=restoring)):
            raise KeyError("lr")
    with pytest.raises(RimeError, match=r"^named$"), resuming(path, SimpleNamespace(restoring=True)):
        raise RimeError("named")


@pytest.mark.parametrize(
    ("found", "place"),
    [
        ({"a": {"n": 2, "m": True}, "more": 3}, ""),
        ({}, ""),
        ({"a": {"n": -1}}, "a.n"),
        ({"a": {"n": "2"}}, "a.n"),
        ({"a": 3}, "a"),
        ({"a": {}, "l": {}}, "l"),
    ],
)
def test_counters_of_another_kind(found: dict[str, Any], place: str) -> None:
    assert unlike(found, {"a": {"n": 1, "m": False}, "l": []}) == place


def test_a_missing_one_and_one_without_a_position_are_named(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save(GOOD | {"loops": {}}, tmp_path / "last.ckpt")
    with pytest.raises(RimeError, match="does not say how far"):
        logged_step(tmp_path / "last.ckpt")


def test_nothing_is_unpickled_anywhere() -> None:
    """``torch.load`` only with ``weights_only=True``, and no pickle."""
    for folder in ("rime_pl", "datamodules", "callbacks", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert not re.search(r"\bimport (pickle|dill|joblib|shelve)\b|allow_pickle=True", text), file
            assert "weights_only=False" not in text.replace(
                "save_checkpoint(half_written, weights_only=False)", ""
            )
            for call in re.findall(r"torch\.load\([^\n]*", text):
                assert "weights_only=True" in call, f"{file}: {call}"


@pytest.mark.parametrize("states", [[], [{}, {}]])
def test_another_number_of_optimizers_is_refused(states: list[dict[str, int]], tmp_path: Path) -> None:
    """The trainer would go on without the moments of the optimizer, and without a word."""
    torch.save(GOOD | {"optimizer_states": states}, tmp_path / "last.ckpt")
    with pytest.raises(RimeError, match=f"must hold one optimizer, but holds {len(states)}"):
        read_checkpoint(tmp_path / "last.ckpt")
