"""The leaderboard: minutes on a laptop's CPU until all four modes find 0.80 on OpenMoji, for one commit.

    python -m benchmarks.leaderboard 98c5d48 FOLDER --what "before the work on speed"
    python -m benchmarks.leaderboard --render

It clones the repository into FOLDER at that commit, takes every part of `make train-cma` with each seed, and
adds a row to docs/results/leaderboard.jsonl, from which it writes docs/results/leaderboard.md. That page says
what counts. Each part that is finished is kept in FOLDER/times.json, so a stopped call can be given again; a
part that was stopped half-way is measured from its start. The clone is run by the Python of this call, or by
the one of --python, where the packages of that commit are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from string import Template
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.report.table import Table
from rime_pl.run_folder import write_json, write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
#: What the three-seed mean of recall@1, over the four modes, must reach.
NEEDED = 0.80
PARTS = ("data", "base", "sft", "cma")
MODE_PAIRS = ("disc-disc", "gen-gen", "gen-disc", "disc-gen")

Times = dict[str, dict[str, Any]]  # "seed 0 sft" -> what was measured


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", help="Commit to measure")
    parser.add_argument("folder", nargs="?", type=Path, help="Folder of the clone and of what was measured")
    parser.add_argument("--what", default="", help="What made this commit faster, in a few words")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--python", default=sys.executable, help="Python of the clone (default: this one)")
    parser.add_argument("--source", default=str(ROOT), help="Repository to clone (default: this one)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="Folder of the page (default: %(default)s)"
    )
    parser.add_argument("--render", action="store_true", help="Only write the page again")
    args = parser.parse_args(words)
    if not args.render:
        if args.folder is None:
            parser.error("name a commit and a folder, or give --render")
        row = measure(args.commit, args.folder, args.seeds, args.python, args.source) | {"what": args.what}
        add_row(args.output / "leaderboard.jsonl", row)
    write_text(args.output / "leaderboard.md", page(read_rows(args.output / "leaderboard.jsonl")))
    print(f"written: {args.output / 'leaderboard.md'}")
    return 0


def measure(commit: str, folder: Path, seeds: Sequence[int], python: str, source: str) -> dict[str, Any]:
    """Return the row of a commit; what is finished in ``folder`` is taken as it is."""
    tree, file = folder.absolute() / "tree", folder / "times.json"
    made = clone(commit, tree, source)
    check_python(python, tree)
    times: Times = json.loads(file.read_text()) if file.is_file() else {}
    if times.setdefault("commit", {"hash": made}) != {"hash": made}:
        raise RimeError(
            f"{folder} must be of commit {made}, but is of {times['commit']['hash']}. Give another one."
        )
    for seed in seeds:
        for part in PARTS:
            if (name := f"seed {seed} {part}") not in times:
                times[name] = run_part(part, seed, tree, python)
                write_json(file, times)
                print(
                    f"{name}: {times[name]['wall'] / 60:.1f} min, CPU {times[name]['cpu'] / 60:.1f} min",
                    flush=True,
                )
    return row_of(made, times, seeds, tree)


def clone(commit: str, tree: Path, source: str) -> str:
    """Clone a commit into ``tree`` unless it is there, and return its short hash."""
    if not (tree / ".git").is_dir():
        tree.parent.mkdir(parents=True, exist_ok=True)
        git("clone", "--quiet", "--no-checkout", source, str(tree))
    git("-C", str(tree), "checkout", "--quiet", "--detach", commit)
    return git("-C", str(tree), "rev-parse", "--short=7", "HEAD")


def git(*words: str) -> str:
    """Return what a git command prints."""
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        raise RimeError(f"`git {' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def check_python(python: str, tree: Path) -> None:
    """Raise unless this Python takes the code of the clone, and not of an installed package."""
    words = [python, "-c", "import rime_pl; print(rime_pl.__file__)"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tree, env=environment(tree))
    if done.returncode:
        raise RimeError(
            f"--python {python} must be able to import rime_pl of {tree}, but: {done.stderr.strip()}"
        )
    found = Path(done.stdout.strip().splitlines()[-1]).resolve()
    if not found.is_relative_to(tree.resolve()):
        raise RimeError(f"--python {python} must import rime_pl from {tree}, but imports {found}.")


def environment(tree: Path) -> dict[str, str]:
    """Return the environment of a part: the clone's code before any installed one."""
    return os.environ | {"PYTHONPATH": str(tree)}


def run_part(part: str, seed: int, tree: Path, python: str) -> dict[str, Any]:
    """Run one part from its start and return its wall and CPU seconds, and whether it was there already."""
    for half in tree.glob(f"runs/openmoji-tiny-seed{seed}/{part}*"):
        shutil.rmtree(half)  # of a call that was stopped: going on from its checkpoint would look faster
    words = [python, "-m", "rime_pl", "run", part, "--corpus", "openmoji", "--seed", str(seed)]
    load, before, start = os.getloadavg()[0], cpu_seconds(), time.perf_counter()
    done = subprocess.run(words, cwd=tree, env=environment(tree), stdout=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise RimeError(f"`rime run {part} --seed {seed}` in {tree} failed; its message is above.")
    return {
        "wall": wall,
        "cpu": cpu_seconds() - before,
        "load": load,
        "shared": part in ("data", "base") and f"{part}: found" in done.stdout,
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row_of(commit: str, times: Times, seeds: Sequence[int], tree: Path) -> dict[str, Any]:
    """Return the row: means over seeds, each as if it had begun in an empty clone."""
    minutes: dict[str, list[float]] = {name: [] for name in (*PARTS, "evaluation")}
    cpu, loads, recalls = [], [], []
    for seed in seeds:
        evaluated = {
            stage: summary(tree, seed, stage)["seconds"].get("test", 0.0) for stage in ("sft", "cma")
        }
        taken = {part: part_of(times, seeds, seed, part) for part in PARTS}
        for part, one in taken.items():
            minutes[part].append((one["wall"] - evaluated.get(part, 0.0)) / 60)
        minutes["evaluation"].append(sum(evaluated.values()) / 60)
        cpu.append(sum(one["cpu"] for one in taken.values()) / 60)
        loads += [one["load"] for one in taken.values()]
        after = summary(tree, seed, "cma")["after"]["recall@1"]
        recalls.append(statistics.mean(after[pair] for pair in MODE_PAIRS))
    return {
        "commit": commit,
        "measured": date.today().isoformat(),
        "seeds": list(seeds),
        "recall@1": round(statistics.mean(recalls), 4),
        "recall@1 of each seed": [round(one, 4) for one in recalls],
        "minutes": {part: round(statistics.mean(values), 2) for part, values in minutes.items()},
        "cpu_minutes": round(statistics.mean(cpu), 2),
        "load": round(max(loads), 1),
        "cores": os.cpu_count(),
    }


def part_of(times: Times, seeds: Sequence[int], seed: int, part: str) -> dict[str, Any]:
    """Return what a part took with a seed; where it was there already, what the seed took that made it."""
    own = times[f"seed {seed} {part}"]
    if not own["shared"]:
        return own
    made = [times[f"seed {other} {part}"] for other in seeds if not times[f"seed {other} {part}"]["shared"]]
    if not made:
        raise RimeError(f"{part} was there before seed {seed} was measured. Give an empty folder.")
    return made[0]


def summary(tree: Path, seed: int, stage: str) -> dict[str, Any]:
    """Return the summary of a finished run of the clone."""
    found: dict[str, Any] = json.loads(
        (tree / f"runs/openmoji-tiny-seed{seed}" / stage / "summary.json").read_text()
    )
    return found


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows, in the order in which they were added."""
    return [json.loads(line) for line in file.read_text().splitlines() if line] if file.is_file() else []


def add_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row, in place of an earlier one of the same commit."""
    rows = [one for one in read_rows(file) if one["commit"] != row["commit"]]
    write_text(file, "".join(json.dumps(one) + "\n" for one in [*rows, row]))


def reached(row: dict[str, Any]) -> bool:
    """Return whether a row has a number: three seeds or more find what is needed."""
    return len(row["seeds"]) >= 3 and row["recall@1"] >= NEEDED


def place_of(row: dict[str, Any]) -> tuple[bool, float]:
    """Return what the rows are sorted by: the minutes, and behind them those without a number."""
    return not reached(row), sum(row["minutes"].values())


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page: what counts, and the rows, the fastest first."""
    head = [
        "commit",
        "minutes",
        *PARTS,
        "evaluation",
        "CPU\nminutes",
        "recall@1",
        "load",
        "measured",
        "what made it faster",
    ]
    cells = []
    for row in sorted(rows, key=place_of):
        total = f"{sum(row['minutes'].values()):.1f}" if reached(row) else "not reached"
        parts = [f"{minutes:.1f}" for minutes in row["minutes"].values()]
        low, high = min(row["recall@1 of each seed"]), max(row["recall@1 of each seed"])
        recall = f"{row['recall@1']:.3f} ({low:.2f}-{high:.2f}, {len(row['seeds'])} seeds)"
        last = [
            f"{row['cpu_minutes']:.1f}",
            recall,
            f"{row['load']:.1f}",
            row["measured"],
            row["what"] or "-",
        ]
        cells.append([f"`{row['commit']}`", total, *parts, *last])
    template = Template((RESULTS / "leaderboard.template.md").read_text())
    return template.substitute(rows=Table("", head, cells).markdown() if cells else "No row yet.")


if __name__ == "__main__":
    sys.exit(main())
