"""Writes the page docs/results/torture-kills.md. Used by kills.py."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

from rime_pl.report.table import Table
from tests.torture.processes import PHASES
from tests.torture.small_disk import MIB, Filled
from tests.torture.verdict import KINDS, Row

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
INTRODUCTION = """\
# Killed at random moments

Read here what a kill, a lost process and a full disk do to a run. Each stage of a micro model is killed at
random moments and started again with the same command, until it has finished. Then it is compared with an
undisturbed run.

- Command: `{command}`, on {date}. It took {minutes:.0f} minutes on {machine}.
- {conclusion}
"""
HOW = """\
How to read the tables:

- A moment is drawn uniformly from the CPU time of an undisturbed run. A run is killed at most 8 times.
- SIGKILL hits all processes of a run, or only the first one. So does SIGTERM. Ctrl-C (SIGINT) is also pressed
  twice.
- On two processes (DDP, gloo), SIGKILL hits one of the two and SIGTERM both.
- CMA reads its data with a worker process. The other stages read it themselves.
- {typed} kills hit a command in a new interpreter, as a user types it. The others hit a process that was
  forked after the imports. It runs the same code, but starts 10 seconds faster.
- "Identical" means that all files of the adapter equal those of the undisturbed run, byte by byte.
- A row of the log is one curve, text or picture of TensorBoard at one step. A lost row is missing, a repeated
  one is there twice.
- A leftover is a file that the undisturbed run does not have, in the run folder or in the folder for
  temporary files.
- "Other faults" are for example a traceback, a process that hangs, another exit code
  than promised, a checkpoint that went back, or another `summary.json`.
"""


def write_page(
    output: Path,
    words: Sequence[str],
    folder: Path,
    rows: Sequence[Row],
    filled: Sequence[Filled],
    disks: int,
    minutes: float,
) -> bool:
    """Write the page; return whether anything is bad."""
    verdicts = [row.verdict for row in rows] + [one.verdict for one in filled]
    told = [line.replace(f"{folder}/", "") for verdict in verdicts for line in verdict.told]
    asked, done = sum(row.wanted for row in rows), sum(row.kills.total() for row in rows)
    told += [f"only {done} of {asked} kills: there was no time for more"] if done < asked else []
    told += [f"only {len(filled)} of {disks} runs on a full disk"] if len(filled) < disks else []
    conclusion = (
        f"**{len(told)} faults**, listed at the end."
        if told
        else "**No fault**: every run ended with the same adapter, the same log and nothing left behind."
    )
    parts = [
        INTRODUCTION.format(
            command=shlex.join(["python", "-m", "tests.torture.kills", *words]),
            date=datetime.date.today(),
            minutes=minutes,
            machine=f"{os.cpu_count()} cores, {platform.system()}",
            conclusion=conclusion,
        ),
        _kills(rows).markdown(),
        _found(rows).markdown(),
        _disks(filled).markdown() if filled else "The runs on a full disk were left out: they need root.",
        HOW.format(typed=sum(row.typed for row in rows)),
    ]
    if told:
        parts.append("## Faults\n\n" + "\n".join(f"- {line}" for line in told) + "\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return bool(told)


def _kills(rows: Sequence[Row]) -> Table:
    hit = [name for name in PHASES if any(row.hit[name] for row in rows)]
    counts = [
        [row.kills.total(), *(row.kills[one] for one in SIGNALS), *(row.hit[one] for one in hit)]
        for row in rows
    ]
    counts.append([sum(column) for column in zip(*counts, strict=True)])
    names = [*(row.stage for row in rows), "all"]
    body = [[name, *map(str, numbers)] for name, numbers in zip(names, counts, strict=True)]
    head = ["stage", "kills", *SIGNALS, *(f"hit: {name}" for name in hit)]
    return Table("How runs were killed, and what they were doing", head, body)


def _found(rows: Sequence[Row]) -> Table:
    head = ["stage", "runs", "identical", "rows lost", "rows repeated", "stale locks", "leftovers"]
    head += ["other faults", "slowest end, s"]
    body = []
    for row in rows:
        found = row.verdict.found
        counts = [row.runs, row.runs - found["different"], *(found[kind] for kind in KINDS[1:])]
        body.append([row.stage, *map(str, counts), f"{row.slowest:.1f}"])
    return Table("What the runs were like when they had finished", head, body)


def _disks(filled: Sequence[Filled]) -> Table:
    head = ["stage", "full before", "what the run said", "checkpoint kept", "identical", "faults"]
    body = [
        [
            *(one.stage, one.moment, one.said, f"step {one.step}" if one.step else "none yet"),
            *("no" if one.verdict.found["different"] else "yes", str(len(one.verdict.told))),
        ]
        for one in filled
    ]
    note = "Each run then got room, and the same command went on to the end."
    return Table(f"Runs on a disk of {MIB} MiB (tmpfs) that filled up", head, body, note=note)
