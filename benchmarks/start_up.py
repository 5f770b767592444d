"""Seconds until something happens: `rime --help`, the imports of a stage, and its first training step.

    python -m benchmarks.start_up        (after `make base`; --base and --corpus name others)

Each is a new process on one thread, with the files in the cache of the system; all take turns. The first step
is that of SFT with configs/tiny/sft.yaml. The last line is JSON with medians of the seconds that the
processor worked, which other processes hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Runs `rime` and ends as soon as the first training batch is done.
FIRST_STEP = """
import os, sys
from rime_pl.callbacks.measures import Measures
def end(*_):
    sys.stdout.flush()
    os._exit(0)
Measures.on_train_batch_end = end
from rime_pl.__main__ import main
sys.exit(main(sys.argv[1:]) or 1)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("data/openmoji"), help="(default: %(default)s)")
    parser.add_argument(
        "--base", type=Path, default=Path("models/tiny-openmoji"), help="(default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="Measured rounds (default: %(default)s)")
    args = parser.parse_args()
    for place in (args.corpus, args.base):
        if not place.is_dir():
            parser.error(f"{place} must be a folder. Make it with `make base`, or name another.")
    seen: dict[str, list[float]] = {}
    for round_number in range(args.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="rime-start-") as folder:
            for name, words in commands(args.corpus, args.base, Path(folder)).items():
                seconds = cpu_seconds(name, words)
                if round_number:  # the first round fills the cache
                    seen.setdefault(name, []).append(seconds)
    for name, values in seen.items():
        print(f"{name}: {min(values):.2f} to {max(values):.2f} s")
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in seen.items()}))


def commands(corpus: Path, base: Path, folder: Path) -> dict[str, list[str]]:
    """Return what is started, by what it measures."""
    settings = ["--config", str(ROOT / "configs/tiny/sft.yaml"), "--data.path", str(corpus)]
    settings += ["--model.backbone.name_or_path", str(base), "--run_dir", str(folder / "run")]
    return {
        "rime --help": ["-m", "rime_pl", "--help"],
        "imports of a stage": ["-c", "import rime_pl.cli"],
        "first step of sft": ["-c", FIRST_STEP, "sft", "fit", *settings],
    }


def cpu_seconds(name: str, words: list[str]) -> float:
    """Return the processor's seconds of a new process, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed.\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
