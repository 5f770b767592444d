"""`python -m tests.torture.kills`: kills runs at random moments and starts them again with the same command.

Each stage trains once undisturbed. Then it trains again and again, and is killed while it does so, on one
process and on two, and on a disk that fills up. In the end each run must equal the undisturbed one: the same
adapter, the same log, nothing left behind. The table goes to docs/results/torture-kills.md. `make torture`
calls this.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rime_pl.run_folder import RunFolder
from tests.micro import build_base, build_corpus
from tests.stages.runs import ENDING, ROOT, refine_rl_arguments, stage_arguments
from tests.torture.kills_page import write_page
from tests.torture.processes import LONG, Started, import_as, in_child, no_process_left, start
from tests.torture.small_disk import MOMENTS, Filled, may_mount, run_on_full_disk
from tests.torture.verdict import Row, after_kill, compare

PAGE = ROOT / "docs/results/torture-kills.md"
#: Ways to end a process, by turns: the whole session or the first process only; Ctrl-C also twice.
WAYS = ("SIGKILL", "SIGTERM", "SIGKILL first", "SIGINT", "SIGTERM first", "SIGINT twice")
#: At most so many kills in one run; then it may finish.
MOST = 8
#: Seconds of CPU that a new interpreter needs for its imports.
IMPORTS = 7.0


@dataclass(eq=False)
class Stage:
    """A stage with its undisturbed run."""

    name: str
    words: Callable[[Path], list[str]]  # run folder -> what follows `rime`
    reference: RunFolder
    seconds: float = 0.0  # of CPU, of the undisturbed run
    typed: bool = False


def micro_stages(folder: Path) -> dict[str, Stage]:
    """Build corpus and base model, and return the three stages; their undisturbed runs are not there yet."""
    corpus, base = folder / "scenes", folder / "base"
    in_child(lambda: (build_corpus(corpus), build_base(base, corpus)))
    ended = folder / "whole" / "sft"  # its rewrites end, so Refine-RL has something to learn from
    # a run takes time for its passes and pictures, not for its size
    quick = ("--data.eval_batch_size", "32", "--recall.rewrite_ablation", "false")
    quick += ("--samples.num_samples", "2", "--samples.top_k", "2")

    def sft(run: Path) -> list[str]:
        return stage_arguments("sft", corpus, base, run, *ENDING, *quick)

    def cma(run: Path) -> list[str]:
        options = ("--model.init_adapter_from", str(ended / "adapter"), "--data.num_workers", "1")
        return stage_arguments("cma", corpus, base, run, *options, *quick)

    def refine_rl(run: Path) -> list[str]:
        return refine_rl_arguments(corpus, base, run, ended / "adapter", *quick)

    words = {"sft": sft, "cma": cma, "refine_rl": refine_rl}
    return {name: Stage(name, make, RunFolder(folder / "whole" / name)) for name, make in words.items()}


def train_undisturbed(stage: Stage, typed: bool = False) -> None:
    """Train the run that all others are compared with, and measure how long that takes."""
    run, stage.typed = stage.reference, typed
    run.path.parent.mkdir(parents=True, exist_ok=True)
    log = run.path.with_suffix(".log")
    started = start(stage.words(run.path), log, run.path.with_suffix(".tmp"), typed)
    with no_process_left(started):
        started.wait(LONG)
    if started.code != 0:
        said = log.read_text()[-3000:]
        raise RuntimeError(f"the undisturbed run of {stage.name} failed, exit code {started.code}:\n{said}")
    stage.seconds = started.used
    if not typed:
        import_as(log)
    print(f"{stage.name}: undisturbed, {stage.seconds:.1f} s of CPU, {started.seconds:.1f} s", flush=True)


def kill_run(stage: Stage, folder: Path, rng: random.Random, row: Row) -> None:
    """Kill one run of a stage several times, and let it finish. The last kills hit typed commands."""
    run = RunFolder(folder / "killed" / f"{stage.name}-{row.runs}")
    left, step = row.wanted - row.kills.total(), 0
    typed = left <= row.typed_wanted
    for _ in range(min(rng.randint(2, MOST), left if typed else left - row.typed_wanted)):
        started = start(stage.words(run.path), _log(run), _temporary(run), typed)
        with no_process_left(started):
            if started.wait_until_used(rng.uniform(0, stage.seconds + IMPORTS * typed)):
                break
            kill(started, WAYS[row.kills.total() % len(WAYS)], run, rng, row)
        step = after_kill(run, step, row.verdict)
        row.typed += typed
    finish(stage, run, row)


def kill(started: Started, way: str, run: RunFolder, rng: random.Random, row: Row) -> None:
    """Send a signal and see that everything ends, in time and in a plain sentence."""
    name, _, how = way.partition(" ")
    row.hit[phase(started, run)] += 1
    row.kills[name] += 1
    started.send(getattr(signal, name), everybody=how != "first")
    if how == "twice" and not started.wait(rng.uniform(0, 0.3)):
        started.send(signal.SIGINT)
    ended(started, f"{run} after {way} in phase {started.phase}", row)
    allowed = {"SIGKILL": (-9,), "SIGTERM": (-15, 143), "SIGINT": (-2, 130)}[name]
    if started.code not in (*allowed, 0) or (started.code == 0 and not run.finished):
        row.verdict.tell(f"{run}: exit code {started.code} after {way}; see {started.log}")


def ended(started: Started, what: str, row: Row) -> None:
    """Wait until all processes of a session have ended, and tell of those that do not."""
    since = time.monotonic()
    started.wait_for_all()
    row.slowest = max(row.slowest, time.monotonic() - since)
    if left := started.remaining():
        row.verdict.tell(f"{what}: {len(left)} processes hang")
    elif "Traceback" in started.output:
        last = started.output.partition("Traceback")[2].strip().splitlines()[-1]
        row.verdict.tell(f"{what}: a traceback that ends with {last!r:.200}; see {started.log}")


def phase(started: Started, run: RunFolder) -> str:
    """Return the phase that a process is in; for a typed one, what its folder tells."""
    if not started.typed:
        return started.phase
    if run.adapter.exists():
        return "end"
    if run.last_checkpoint.with_suffix(".half").exists():
        return "checkpoint"
    began = run.config.is_file() and time.time() - run.config.stat().st_mtime < started.seconds
    return "training" if began else "start"


def finish(stage: Stage, run: RunFolder, row: Row) -> None:
    """Give the same command once more, let it end, and compare."""
    started = start(stage.words(run.path), _log(run), _temporary(run), stage.typed)
    with no_process_left(started):
        started.wait(LONG)
    row.runs += 1
    if started.code != 0:
        row.verdict.tell(f"{run}: does not go on, exit code {started.code}; see {started.log}")
    verdict = compare(run, stage.reference, _temporary(run))
    row.verdict.add(verdict)
    print(f"{run.path.name}: {row.kills.total()} kills so far. {'; '.join(verdict.told)}", flush=True)


def lose_ranks(stage: Stage, folder: Path, rng: random.Random, row: Row) -> None:
    """Kill one of two processes, or stop both, several times: all must end, and the same command go on."""
    run, step = RunFolder(folder / "killed" / f"two-{row.runs}"), 0
    for _ in range(min(rng.randint(2, 5), row.wanted - row.kills.total())):
        started = start(stage.words(run.path), _log(run), _temporary(run), typed=True)
        with no_process_left(started):
            started.wait_for_child()
            if started.wait_until_used(rng.uniform(0.2, 1) * stage.seconds) or not started.children():
                break
            lose_rank(started, ("rank 1", "rank 0", "both")[row.kills.total() % 3], run, row)
        step = after_kill(run, step, row.verdict)
        row.typed += 1
    finish(stage, run, row)


def lose_rank(started: Started, which: str, run: RunFolder, row: Row) -> None:
    """Kill the first process or the one that it has started, or send SIGTERM to both."""
    row.hit[phase(started, run)] += 1
    row.kills["SIGTERM" if which == "both" else "SIGKILL"] += 1
    what = f"{run}, killed in phase {phase(started, run)}: {which}"
    if which == "both":
        started.send(signal.SIGTERM)
    else:
        os.kill(started.children()[0] if which == "rank 1" else started.pid, signal.SIGKILL)
    ended(started, what, row)


def _log(run: RunFolder) -> Path:
    return run.path.with_suffix(".log")


def _temporary(run: RunFolder) -> Path:
    return run.path.with_suffix(".tmp")


def fill_disk(stage: Stage, number: int, folder: Path) -> Filled:
    """Run a stage on a disk that fills up; the moments take turns."""
    moment, disk = MOMENTS[number % len(MOMENTS)], folder / f"disk-{number}"
    filled = run_on_full_disk(stage.name, moment, stage.words(disk / "run"), stage.reference, disk)
    print(
        f"full disk, {stage.name}, {moment.name}: {filled.said} {'; '.join(filled.verdict.told)}", flush=True
    )
    return filled


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.kills", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="Seed of all moments")
    parser.add_argument("--kills", type=int, default=100, help="Kills on one process, over the three stages")
    parser.add_argument("--typed", type=int, default=12, help="How many of these hit a typed command")
    parser.add_argument("--two_processes", type=int, default=10, help="Kills of one of two processes")
    parser.add_argument("--full_disk", type=int, default=5, help="Runs on a disk that fills up")
    parser.add_argument("--minutes", type=float, default=60, help="Minutes after which no new run is begun")
    parser.add_argument("--stages", nargs="+", default=["sft", "cma", "refine_rl"], help="Stages to kill")
    parser.add_argument("--keep", action="store_true", help="Keep all runs, to look at them")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs/results/torture-kills.md", help="The page"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    given, since = parse(words), time.monotonic()
    given.full_disk *= may_mount()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    (folder / "killed").mkdir()
    rows: list[Row] = []
    filled: list[Filled] = []
    bad = True
    try:
        torture(given, folder, lambda: time.monotonic() - since < 60 * given.minutes, rows, filled)
    finally:  # also of a part
        minutes = (time.monotonic() - since) / 60
        bad = write_page(given.output, words or sys.argv[1:], folder, rows, filled, given.full_disk, minutes)
    if given.keep:
        print(f"all runs are in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bad)


def torture(
    given: argparse.Namespace,
    folder: Path,
    in_time: Callable[[], bool],
    rows: list[Row],
    filled: list[Filled],
) -> None:
    """Do all that is asked for, or as much as there is time for: by turns, so that each gets its share."""
    rng, stages = random.Random(given.seed), micro_stages(folder)
    chosen = [stages[name] for name in given.stages]
    for stage in dict.fromkeys([stages["sft"], *chosen]):  # the others start from its adapter
        train_undisturbed(stage)
    shares = [
        [(total + number) // len(chosen) for total in (given.kills, given.typed)]
        for number in range(len(chosen))
    ]
    rows += [Row(stage.name, *share) for stage, share in zip(chosen, shares, strict=True)]
    two = Row("sft, two processes", given.two_processes, given.two_processes)
    rows += [two] if given.two_processes else []
    both = Stage("two", two_processes(stages["sft"]), RunFolder(folder / "whole" / "two"))
    while in_time() and (any(row.more for row in rows) or len(filled) < given.full_disk):
        for stage, row in zip(chosen, rows, strict=False):  # the last row is of two processes
            if row.more and in_time():
                kill_run(stage, folder, rng, row)
        if len(filled) < given.full_disk and in_time():
            filled.append(fill_disk(chosen[len(filled) % len(chosen)], len(filled), folder))
        if two.more and in_time():
            if not both.seconds:
                train_undisturbed(both, typed=True)
            lose_ranks(both, folder, rng, two)


def two_processes(stage: Stage) -> Callable[[Path], list[str]]:
    """Return the words of a stage on two processes."""
    words = stage.words
    return lambda run: [*words(run), "--config", str(ROOT / "configs/overlays/ddp.yaml")]


if __name__ == "__main__":
    sys.exit(main())
