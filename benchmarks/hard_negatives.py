"""What mined hard negatives give: further steps of CMA with four of them, next to as many steps without.

    for seed in 0 1 2; do rime run cma --corpus scenes --seed $seed; done
    python -m benchmarks.hard_negatives runs/scenes-tiny-seed0/cma runs/scenes-tiny-seed1/cma \\
      runs/scenes-tiny-seed2/cma

Each run is mined with its own checkpoint, and trained on from its adapter twice: with the negatives and, as
the control, without. Both have the settings, the seed and the number of steps of the run itself. What follows
`--` goes to both, such as `--data.steps_per_epoch 100`. Finished parts are found again. The table has the
means over the runs, and the difference of each run, because three seeds are few.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rime_pl.datamodules.faults import counted
from rime_pl.report.table import Table
from rime_pl.run_folder import RunFolder
from rime_pl.types import MODE_PAIRS

NEGATIVES = 4
#: Name of each training -> whether it draws the negatives.
TRAININGS = {"without": False, "with": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="Finished runs of CMA, one for each seed")
    parser.add_argument("--output", type=Path, default=Path("runs/hard-negatives"), help="%(default)s")
    parser.add_argument("--modes", nargs="+", default=["disc-disc", "gen-gen"], help="Of `rime mine`")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    runs = [RunFolder.with_adapter(run) for run in args.runs]
    recalls = []
    for number, run in enumerate(runs):
        folder = args.output / f"{number}-{run.path.resolve().parent.name}"
        recalls.append(train_on(run, folder, args.modes, words[end + 1 :]))
    print(table(recalls).markdown())


def train_on(
    run: RunFolder, folder: Path, modes: Sequence[str], more: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return recall@1 of each mode pair: of the run, and of both trainings that start from it."""
    corpus, mined = run.corpus, folder / "corpus"
    if corpus is None:
        raise SystemExit(f"{run}: its corpus must be there, but is gone.")
    if not (mined / "corpus.json").is_file():
        places = ["--run", run.path, "--corpus", corpus, "--output", mined]
        rime("mine", *places, "--modes", *modes, "--rules.num_negatives", NEGATIVES)
    recalls = {"before": run.summary["after"]["recall@1"]}
    for name, draws in TRAININGS.items():
        stage = RunFolder(folder / name)
        if not stage.finished:
            data = ["--data.path", mined, "--data.hard_negatives", NEGATIVES if draws else 0]
            start = ["--model.init_adapter_from", run.adapter, "--run_dir", stage.path]
            rime("cma", "fit", "--config", run.config, *data, *start, *more)
        recalls[name] = stage.summary["after"]["recall@1"]
    return recalls


def rime(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "rime_pl", *map(str, words)], check=True)


def table(recalls: Sequence[dict[str, dict[str, float]]]) -> Table:
    """Return recall@1 of each mode pair: means over the runs, and the difference of each run."""
    rows = []
    for pair in MODE_PAIRS:
        means = {name: mean(one[name][pair] for one in recalls) for name in recalls[0]}
        each = [one["with"][pair] - one["without"][pair] for one in recalls]
        rows.append([pair, *(f"{value:.3f}" for value in means.values()), f"{mean(each):+.3f}"])
        rows[-1].append(" ".join(f"{value:+.3f}" for value in each))
    head = ["mode pair", "before", "further steps", "with negatives", "difference", "of each run"]
    return Table(f"recall@1, mean over {counted(len(recalls), 'run', 'runs')}", head, rows)


if __name__ == "__main__":
    main()
