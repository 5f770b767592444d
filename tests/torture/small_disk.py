"""Runs on a disk that fills up at a chosen moment: a tmpfs of a few MB, and a file that takes what is free.

Used by kills.py. Mounting needs root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rime_pl.run_folder import RunFolder
from tests.torture.processes import LONG, Started, no_process_left, start
from tests.torture.verdict import Verdict, after_kill, compare

#: Size of the disk: many times of what a run writes.
MIB = 64


@dataclass(frozen=True)
class Moment:
    """When the disk fills up.

    Args:
        name: What is about to be written.
        phase: The phase that the process must have reached.
        file: A file that must be there; "" for none.
        words: Further settings, so that nothing else is written before.
    """

    name: str
    phase: str
    file: str = ""
    words: tuple[str, ...] = ()


#: By turns; the stages take turns, too.
MOMENTS = (
    Moment("checkpoint", "training", "checkpoints/last.ckpt"),
    Moment("log", "training", words=("--checkpoint.every_n_steps", "1000")),
    Moment("adapter", "end"),
    Moment("evaluation", "evaluation"),
    Moment("report", "evaluation", "adapter/adapter_model.safetensors"),
    Moment("start", "start"),
)


@dataclass
class Filled:
    """What a run said when its disk was full, and how it went on."""

    stage: str
    moment: str
    said: str
    step: int  # of the checkpoint that stayed
    verdict: Verdict


def may_mount() -> bool:
    return os.geteuid() == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs at a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all space that is free; return the file that takes it."""
    taken = folder / "filler"
    with taken.open("wb", buffering=0) as file:
        try:
            for size in (1 << 20, 1 << 12, 1):
                while file.write(b"0" * size) == size:
                    pass
        except OSError:
            pass
    return taken


def run_on_full_disk(
    stage: str, moment: Moment, words: list[str], reference: RunFolder, folder: Path
) -> Filled:
    """Fill the disk at a moment, look at what the run says, make room, and let it go on.

    Args:
        stage: Name of the stage, for the table.
        moment: When the disk fills up.
        words: What follows `rime`; the run's folder is ``folder / "run"``.
        reference: The undisturbed run.
        folder: A folder that does not exist yet.
    """
    verdict, log, temporary = Verdict(), folder.with_suffix(".log"), folder.with_suffix(".tmp")
    with small_disk(folder):
        run = RunFolder(folder / "run")
        arguments = [*words, *moment.words]
        taken = fill(folder) if moment.phase == "start" else None
        started = start(arguments, log, temporary)
        with no_process_left(started):
            if taken is None:
                started.wait(
                    LONG, lambda: started.phase == moment.phase and (run.path / moment.file).exists()
                )
                taken = fill(folder)
            if not started.wait(LONG):
                verdict.tell(f"{run}: hangs on a full disk")
        said = sentence(started, run, verdict)
        step = after_kill(run, 0, verdict)
        taken.unlink()
        again = start(arguments, log, temporary)
        with no_process_left(again):
            again.wait(LONG)
        if again.code != 0:
            verdict.tell(f"{run}: does not go on after a full disk, exit code {again.code}; see {log}")
        verdict.add(compare(run, reference, temporary))
    return Filled(stage, moment.name, said.replace(str(folder.parent), "..."), step, verdict)


def sentence(started: Started, run: RunFolder, verdict: Verdict) -> str:
    """Return what the run said last; it must be one sentence that names the file or the folder."""
    output = started.output
    told = [line for line in output.splitlines() if line.startswith("rime:")]
    if "Traceback" in output:
        verdict.tell(f"{run}: a traceback on a full disk; see {started.log}")
    elif started.code != 2:
        verdict.tell(f"{run}: exit code {started.code} on a full disk, not 2; see {started.log}")
    elif len(told) != 1 or str(run) not in told[0]:
        verdict.tell(f"{run}: not one sentence that names the folder, but {told}")
    return told[-1] if told else ""
