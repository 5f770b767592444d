"""The weight of the cross-entropy for the rewrite and for the chain of thought, chosen on validation.

Both arms of the comparison get the same grid, so that neither has the better recipe. No run of the grid sees
the test split. Called by `rime tune`; `rime compare` reads what it wrote.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder
from rime_pl.study.controls import again, longer_completions, train_control
from rime_pl.study.design import COMPARISONS

#: Values of model.lambda_ce that both arms try. The recipe of scenes has 4. 64 is here because 16,
#: the largest of the first three, was the best there.
GRID = (1.0, 4.0, 16.0, 64.0)
#: What is compared: gen-gen on all validation queries after the last epoch.
MEASURE = "recall@1/gen-gen"
ARMS = ("rewrite", "chain_of_thought")

Tuned = dict[str, Any]  # stage, corpus, data_hash, seed, measure, queries, and arm -> tried, chosen


def tune(run: RunFolder) -> Tuned:
    """Train the missing runs of the grid below an SFT run, and return what they found on validation.

    Args:
        run: A finished SFT run, whose settings hold but for the weight. A run of the grid that is finished is
            taken as it is, and an unfinished one goes on.

    Raises:
        RimeError: If the run is no finished SFT run, or a run of the grid fails.
    """
    if not run.finished or run.stage != "sft":
        raise RimeError(
            f"--run must name a finished SFT run, but {run.path} is none. Run `make train-sft` first."
        )
    arms: dict[str, list[str]] = {"rewrite": [], "chain_of_thought": longer_completions(run)[0]}
    # all queries, once, at the end; the test split is not read
    settings = ["--data.limit_val_queries", "null", "--data.test_modes", "[]"]
    settings += ["--trainer.check_val_every_n_epoch", str(run.settings["trainer"]["max_epochs"])]
    found: Tuned = {
        "stage": "sft",
        "corpus": Path(run.manifest["data"]).name,
        "data_hash": run.manifest["data_hash"],
        "seed": run.manifest["seed"],
        "date": date.today().isoformat(),
        "measure": f"val/{MEASURE}",
    }
    for arm, words in arms.items():
        tried, last = {}, {}
        for value in GRID:
            tuned = [*again(run), *words, *settings, "--model.lambda_ce", str(value)]
            control = train_control(run, f"tune_{arm}_{value:g}", tuned)
            last = control.summary["history"][-1]
            tried[f"{value:g}"] = float(last[MEASURE])
        found[arm] = {"tried": tried, "chosen": choose(tried)}
        found["queries"] = int(last["trace/num_reference"])
    return found


def choose(tried: dict[str, float]) -> float:
    """Return the value with the highest result; of equal ones the smallest.

    >>> choose({"1": 0.5, "4": 0.7, "16": 0.7})
    4.0
    """
    return min((float(value) for value in tried), key=lambda value: (-tried[f"{value:g}"], value))


def read_tuned(file: Path, run: RunFolder) -> Tuned:
    """Return what `rime tune` wrote, once it is sure that it holds for a run.

    Raises:
        RimeError: If it is of another corpus, or if the run is not of SFT or has another weight than chosen.
    """
    if run.stage != "sft":
        raise RimeError(f"--tuned is for runs of SFT, but {run.path} is of {run.stage}. Leave it out.")
    try:
        found: Tuned = json.loads(file.read_text())
        chosen = {arm: float(found[arm]["chosen"]) for arm in ARMS}
        made_from = found["data_hash"]
        tried = [{float(value) for value in found[arm]["tried"]} for arm in ARMS]
        is_of_today = tried == [set(GRID)] * len(ARMS) and found["queries"] > 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RimeError(
            f"--tuned must name a file that `rime tune` wrote, but {file} is none: {error!r}."
        ) from error
    if not is_of_today:
        raise RimeError(
            f"--tuned {file} must hold the weights {', '.join(f'{value:g}' for value in GRID)} of both arms, "
            "but does not: an earlier version wrote it. Delete it, and run `rime tune` again."
        )
    if made_from != run.manifest["data_hash"]:
        raise RimeError(f"--tuned {file} must be of the corpus of {run.path}, but is of another one.")
    weight = run.settings["model"]["lambda_ce"]
    if weight != chosen[COMPARISONS["sft"].subject]:
        raise RimeError(
            f"{run.path} must have been trained with the weight that was chosen on validation, but has "
            f"model.lambda_ce {weight} and not {chosen['rewrite']:g}. Train it: rime run sft --corpus "
            f"{run.manifest['data']} --seed {run.manifest['seed']} --model.lambda_ce {chosen['rewrite']:g}"
        )
    return found
