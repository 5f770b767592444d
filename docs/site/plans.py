"""Memory and time of each recipe, as `rime plan` predicts them.

python -m docs.site.plans asks `rime plan` and writes docs/reference/memory-and-time.json and its page, which
takes minutes. The tiny recipes need the corpus and the base model that `make base` makes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs/reference/memory-and-time.json"
STAGES = ("sft", "cma", "refine_rl")
#: Recipe as `--recipe` takes it -> its folder.
RECIPES = {"tiny": "configs/tiny", "2b": "configs", "2b-24gb": "configs/24gb"}
#: What is put on top of a recipe: by the name in the table.
OVERLAYS = {"2b, bfloat16 base model": ("2b", "configs/overlays/bf16.yaml")}
#: The cards whose step times are shown.
CARDS = ("RTX 4090", "A100 80GB", "H100 SXM")
GIB = 2**30
HEAD = """# Memory and time of each recipe

Look up here which recipe fits your card, and how long a step takes on it. The numbers are **predictions** of
`rime plan`, not measurements. [The results](../results/numbers.md) say how far they were from measured
peaks, and what was measured on a card is in [Results on a GPU](../results/gpu.md).

"""
NOTES = """
- Memory is that of one process at the peak of a step on the longest pairs. {lengths}
- Time is that of one step, from the FLOPs of a mean batch and 25 % of the data sheet's rate. Loading of data,
  evaluation and checkpoints are not in it.
- In Refine-RL, sampling takes longer than its FLOPs say.
- The tiny recipes train on a CPU. There `make train-cma` took 8 to 11 minutes on two idle cores, from the
  data to the table.
- `rime plan --config FILE --memory 24` makes the plan of your own settings, and says what to change if it
  does not fit ([Plan a run](../how-to/plan-a-run.md)).

Command: `python -m docs.site.plans --date {date}`.
"""


def cases() -> dict[str, list[str]]:
    """Return the name of each row -> the settings files of it, for a stage to be filled in."""
    plain = {name: [f"{folder}/{{stage}}.yaml"] for name, folder in RECIPES.items()}
    return plain | {name: [*plain[recipe], overlay] for name, (recipe, overlay) in OVERLAYS.items()}


def ask(files: list[str]) -> dict[str, Any]:
    """Return what `rime plan --json` prints for some settings files."""
    words = [word for file in files for word in ("--config", str(ROOT / file))]
    done = subprocess.run(
        [sys.executable, "-m", "rime_pl", "plan", *words, "--json"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def row(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a plan."""
    (peak,) = [one["peak_bytes"] for one in plan["stages"] if one["stage"] == plan["stage"]]
    seconds = {one["gpu"]: one["seconds_per_step"] for one in plan["hours"]}
    kept = {name: plan[name] for name in ("stage", "checkpoint", "batch_size", "tokens_per_batch", "lengths")}
    return kept | {"peak_gib": peak / GIB, "seconds": {card: seconds[card] for card in CARDS}}


def page(record: dict[str, Any]) -> str:
    """Return the page of what was recorded."""
    head = [
        "recipe",
        "stage",
        "pairs in a batch",
        "tokens in a batch",
        "memory, GiB",
        *(f"s a step, {one}" for one in CARDS),
    ]
    lines = [HEAD, f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for name, plans in record["plans"].items():
        for plan in plans:
            numbers = [f"{plan['batch_size']}", f"{plan['tokens_per_batch']:,}", f"{plan['peak_gib']:.1f}"]
            # a model of 3 million parameters never reaches the assumed share of a GPU's rate
            times = ["-" if name == "tiny" else f"{plan['seconds'][card]:.2g}" for card in CARDS]
            lines.append(f"| {name} | {plan['stage']} | {' | '.join(numbers + times)} |")
    if missing := [name for name in cases() if name not in record["plans"]]:
        lines += ["", f"Not planned yet: {', '.join(missing)}. The command below does it."]
    assumed = (
        "2B recipes assume 256 visual tokens and a rewrite of 128 tokens on each side. "
        "Tiny ones read `openmoji`."
    )
    return "\n".join([*lines, NOTES.format(lengths=assumed, date=record["date"])])


def main() -> None:
    """Ask for all plans and record them."""
    parser = argparse.ArgumentParser(description="Plan each recipe, and record what the page shows.")
    parser.add_argument("--date", required=True, help="Day of the plans, such as 2026-11-28")
    given = parser.parse_args()
    plans: dict[str, list[dict[str, Any]]] = {}
    for name, files in cases().items():
        plans[name] = [row(ask([file.format(stage=stage) for file in files])) for stage in STAGES]
        print(name, flush=True)
        record = {"date": given.date, "plans": plans}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        RECORD.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
