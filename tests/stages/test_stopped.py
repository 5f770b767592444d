"""What ends a run early: Ctrl-C, a full disk, a sample that one process cannot read. Nothing is lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rime_pl import cli
from rime_pl.__main__ import main
from rime_pl.callbacks.adapter_checkpoint import InPlace
from rime_pl.modules.sft import SFTModule
from rime_pl.run_folder import RunFolder
from tests.stages.runs import ROOT, scalars, stage_arguments

DDP = ("--config", str(ROOT / "configs/overlays/ddp.yaml"))


class Interrupted(SFTModule):
    """Ctrl-C is pressed while the second batch is trained."""

    times = 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


class InterruptedTwice(Interrupted):
    times = 2


@pytest.mark.long
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    rarely = ("--checkpoint.every_n_steps", "1000")
    assert main(stage_arguments("sft", scenes_corpus, micro_base, whole.path, *rarely)) == 0
    words, handler = stage_arguments("sft", scenes_corpus, micro_base, run.path, *rarely), signal.getsignal(2)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setitem(cli.STAGES, "sft", Interrupted)
        assert main(words) == 130
    said = capsys.readouterr().err
    assert said.endswith(
        f"rime: stopped. The checkpoint is {run.last_checkpoint} (step 2). Go on with the same command.\n"
    )
    assert signal.getsignal(2) is handler and not run.lock.exists()
    time.sleep(1.1)  # TensorBoard names event files by the second
    assert main(words) == 0
    first, second = (load_file(one.adapter / "adapter_model.safetensors") for one in (whole, run))
    assert all(first[name].equal(second[name]) for name in first)
    assert scalars(run.path, "train/loss") == scalars(whole.path, "train/loss"), (
        "no step is lost from the log"
    )


def test_a_second_ctrl_c_stops_at_once(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(cli.STAGES, "sft", InterruptedTwice)
    handler = signal.getsignal(signal.SIGINT)
    rarely = ("--checkpoint.every_n_steps", "1000")
    assert main(stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "run", *rarely)) == 130
    assert "stopped before the first checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler and not (tmp_path / "run").exists()


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    saved, save = [], InPlace.save_checkpoint

    def save_once(self: InPlace, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path)
        saved.append(path)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it: without a file

    monkeypatch.setattr(InPlace, "save_checkpoint", save_once)
    run = RunFolder(tmp_path / "run")
    assert main(stage_arguments("sft", scenes_corpus, micro_base, run.path)) == 2
    half_written = run.last_checkpoint.with_suffix(".half")
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.endswith(
        f"rime: error: {run}: No space left on device. Make room on the disk, and give the same command "
        "again.\n"
    )
    assert cli.global_step(run.last_checkpoint) == 1 and not half_written.exists() and run.config.is_file()


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_stop_when_one_cannot_read_its_data(
    rank: int, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    words = stage_arguments("sft", scenes_corpus, micro_base, tmp_path / "run", *DDP)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.stages.broken", *words]
    done = subprocess.run(  # a collective waits for 30 minutes
        command,
        env=env | {"RIME_BROKEN_RANK": str(rank)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if line.startswith("rime:")]
    assert "Traceback" not in done.stderr and told == [
        f"rime: error: train-000000.tar/7: the picture is cut off. (read by process {rank} of 2)"
    ]
    assert cli.global_step(RunFolder(tmp_path / "run").last_checkpoint) == 2
