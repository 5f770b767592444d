"""The judge of killed runs sees each kind of fault; a judge that passes everything would prove nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from rime_pl.run_folder import RunFolder, write_json
from rime_pl.run_lock import locked
from tests.torture.verdict import Verdict, after_kill, compare


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """Two finished runs that are equal, apart from times."""
    whole = RunFolder(tmp_path / "whole")
    whole.adapter.mkdir(parents=True)
    (whole.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    writer = SummaryWriter(str(whole.path / "tensorboard"), purge_step=0)
    for step in range(3):
        writer.add_scalar("train/loss", 1 / (step + 1), step)
    writer.add_text("val/rewrites", "a cat", 2)
    writer.close()
    write_json(whole.path / "summary.json", {"after": {"recall@1": 0.5}, "seconds": {"fit": 1}})
    write_json(whole.path / "ranks.json", [])
    write_json(whole.path / "manifest.json", {"steps": 3})
    write_json(whole.marker, {})
    run = RunFolder(tmp_path / "killed")
    shutil.copytree(whole.path, run.path)
    write_json(run.path / "summary.json", {"after": {"recall@1": 0.5}, "seconds": {"fit": 2}})
    return run, whole


def log_again(run: RunFolder, purge_step: int, step: int) -> None:
    """Log one step as a resumed run does."""
    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge_step, filename_suffix=".later")
    writer.add_scalar("train/loss", 1 / (step + 1), step)
    writer.close()


FAULTS: dict[str, Callable[[RunFolder], object]] = {
    "different": lambda run: (run.adapter / "adapter_model.safetensors").write_bytes(b"other"),
    "lost": lambda run: log_again(run, 1, 2),
    "repeated": lambda run: log_again(run, 3, 2),
    "locks": lambda run: run.lock.write_text("{}"),
    "left": lambda run: (run.path / "summary.half").write_text(""),
    "others": lambda run: write_json(run.path / "summary.json", {"after": {"recall@1": 0.6}}),
}


def test_equal_runs_have_no_fault(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    assert compare(*runs, tmp_path / "none").told == []
    log_again(runs[0], 2, 2)  # killed and gone on; the text of step 2 is lost
    assert [told.split(": ")[1] for told in compare(*runs, tmp_path / "none").told] == [
        "val/rewrites/text_summary has no value at step [2]"
    ]


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_seen(kind: str, runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    FAULTS[kind](runs[0])
    assert compare(*runs, tmp_path / "none").found[kind] >= 1


def test_temporary_files_that_are_left_are_seen(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / "tmpx").write_text("")
    assert compare(*runs, tmp_path / "temporary").found["left"] == 1


def test_what_a_kill_leaves(tmp_path: Path) -> None:
    run, verdict = RunFolder(tmp_path), Verdict()
    assert after_kill(run, 0, verdict) == 0 and not verdict.told
    after_kill(run, 2, verdict)
    run.last_checkpoint.parent.mkdir()
    parts: dict[str, Any] = {"state_dict": {}, "loops": {}, "global_step": 1, "optimizer_states": [{}]}
    parts |= {"base_hash": "", "pytorch-lightning_version": "2"}
    torch.save(parts, run.last_checkpoint)
    assert after_kill(run, 1, verdict) == 1
    after_kill(run, 2, verdict)
    run.last_checkpoint.write_bytes(b"half")
    with locked(run):
        after_kill(run, 1, verdict)
    words = ("step 2 is gone", "went back from step 2 to 1", "still locked", "damaged")
    assert len(verdict.told) == len(words)
    assert all(word in told for word, told in zip(words, verdict.told, strict=True))
