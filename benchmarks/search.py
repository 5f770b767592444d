"""Two-step and adaptive search of trained runs: recall@1 against time, on the test split.

`python -m benchmarks.search RUN ...`; several runs are seeds. All queries of the headline tasks are asked in
batches, each in its own gallery. The threshold of the adaptive search is chosen on the validation split of
the same run. Milliseconds are CPU time (set OMP_NUM_THREADS=1), medians over rounds in which the ways to
search take turns: to embed a batch of queries and to search an index of all targets. The last line is JSON,
with means over the runs.

- two-step: the 10 nearest in the discriminative mode, ranked again by generative vectors of the targets; the
  query's vector is the generative one (`gen`, needs a rewrite) or the discriminative one (`disc`).
- adaptive: a rewrite only where the discriminative margin is below the threshold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rime_pl.inference.adaptive import SHARES, Asked, Point, margins, point, thresholds
from rime_pl.inference.calibration import SPLIT, Calibration, calibrate, measure
from rime_pl.inference.encoding import Wanted
from rime_pl.inference.labelled import Vectors
from rime_pl.inference.loading import load
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.metrics.bootstrap import bootstrap_interval, macro_mean
from rime_pl.metrics.retrieval import recall_at
from rime_pl.metrics.top_k import top_k
from rime_pl.report.adaptive_curve import Shown, adaptive_figure
from rime_pl.report.figures import save_figure
from rime_pl.types import Mode

#: A gallery of OpenMoji has 100 items, so 100 candidates would be all of it.
CANDIDATES = 10


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of runs, such as runs/NAME/cma")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Queries of a batch (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="PNG of the adaptive curve, the mean of the runs")
    args = parser.parse_args(words)
    found: list[dict[str, float]] = []
    curves: dict[Mode, list[Asked]] = {mode: [] for mode in MODES}
    at: list[Shown] = []
    for run in args.runs:
        retriever = load(run)
        chosen = calibrate(measure(retriever, SPLIT))
        vectors = measure(retriever, "test")
        result = {
            **recalls(vectors, chosen),
            **times(retriever, vectors, chosen, args.batch_size, args.rounds),
        }
        print(f"{run}: {json.dumps(result)}", flush=True)
        found.append(result)
        for mode, asked in curves.items():
            asked.append(vectors.asked(mode))
        at.append(_shown(point(vectors.asked(chosen.target_mode), chosen.chosen.margin)))
    if args.picture:
        draw(curves, at, args.picture)
    means = {name: round(statistics.mean(one[name] for one in found), 4) for name in found[0]}
    print(json.dumps({"runs": len(found), **means}))


def recalls(vectors: Vectors, chosen: Calibration) -> dict[str, float]:
    """Return recall@1, the mean over tasks, of each way to search."""
    asked = vectors.asked(chosen.target_mode)
    ways: dict[str, Tensor] = {
        "disc_disc": vectors.ranks("discriminative", "discriminative"),
        "gen_gen": vectors.ranks("generative", "generative"),
        "disc_gen": vectors.ranks("discriminative", "generative"),
        "gen_disc": vectors.ranks("generative", "discriminative"),
        "two_step_gen": vectors.two_step_ranks("generative", "generative", CANDIDATES),
        "two_step_disc": vectors.two_step_ranks("discriminative", "generative", CANDIDATES),
    }
    result = {name: macro_mean(asked.groups(recall_at(ranks, 1))) for name, ranks in ways.items()}
    for name in ("two_step_gen", "two_step_disc"):
        result[f"{name}_over_gen_gen"] = result[name] / result["gen_gen"]
    at = point(asked, chosen.chosen.margin)
    never, always = (asked.groups(values) for values in (asked.never, asked.always))
    return {
        **result,
        **{"adaptive": at.recall, "adaptive_low": at.low, "adaptive_high": at.high},
        **{"adaptive_share": at.share, "never": macro_mean(never), "always": macro_mean(always)},
        **{"always_low": bootstrap_interval(always)[0], "always_high": bootstrap_interval(always)[1]},
    }


def times(
    retriever: Retriever, vectors: Vectors, chosen: Calibration, batch_size: int, rounds: int
) -> dict[str, float]:
    """Return CPU milliseconds for each query, embedding and search, and ratios to the discriminative."""
    queries = [vectors.split.queries[n] for n in range(min(batch_size, len(vectors.split.queries)))]
    calls = _calls(retriever, vectors, queries, chosen)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            calls[name]()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    ms = {name: 1000 * statistics.median(took) / len(queries) for name, took in seconds.items()}
    ratios = {f"{name}_over_disc_ms": ms[name] / ms["disc"] for name in ms if name != "disc"}
    return {**{f"{name}_ms": value for name, value in ms.items()}, **ratios}


def _calls(
    retriever: Retriever, vectors: Vectors, queries: Sequence[Any], chosen: Calibration
) -> dict[str, Callable[[], object]]:
    targets = vectors.targets

    def encode(modes: Sequence[Mode], wanted: Wanted | None = None) -> dict[Mode, Tensor]:
        encoded = retriever.encode_modes(queries, modes, len(queries), wanted=wanted)
        return {mode: one.embeddings for mode, one in encoded.items()}

    def one_pass(mode: Mode) -> None:
        top_k(encode((mode,))[mode], [targets[mode]], 10)

    def two_step(mode: Mode) -> None:
        found = encode(MODES if mode == "generative" else (mode,))
        rows = top_k(found["discriminative"], [targets["discriminative"]], CANDIDATES)[1]
        torch.einsum("qd,qcd->qc", found[mode], targets["generative"][rows]).topk(10)

    def adaptive() -> None:
        unsure: list[int] = []

        def wanted(numbers: Sequence[int], disc: Tensor) -> Tensor:
            which = margins(top_k(disc, [targets["discriminative"]], 10)[0]) < chosen.chosen.margin
            unsure.extend(number for number, yes in zip(numbers, which.tolist(), strict=True) if yes)
            return which

        found = encode(MODES, wanted)["generative"]
        top_k(found[unsure], [targets[chosen.target_mode]], 10)

    return {
        "disc": lambda: one_pass("discriminative"),
        "gen": lambda: one_pass("generative"),
        "two_step_gen": lambda: two_step("generative"),
        "two_step_disc": lambda: two_step("discriminative"),
        "adaptive": adaptive,
    }


def draw(runs: Mapping[Mode, Sequence[Asked]], chosen: Sequence[Shown], file: Path) -> None:
    """Write the curves of the test split, means over the runs, and the point that each run chose."""
    curves = {f"rewritten queries against {mode} vectors": mean_curve(asked) for mode, asked in runs.items()}
    of = f"mean of {len(chosen)} runs, and what each" if len(chosen) > 1 else "and what the run"
    title = f"adaptive rewrites on the test split: {of} chose on its validation split"
    save_figure(adaptive_figure(curves, chosen, title), file)


def mean_curve(runs: Sequence[Asked]) -> list[Shown]:
    """Return the points of a curve, each query being the mean of its runs, which all ask the same ones."""
    points = []
    for share, *each in zip(SHARES, *map(thresholds, runs), strict=True):
        found = torch.stack([run.found(at) for run, at in zip(runs, each, strict=True)]).mean(0)
        groups = runs[0].groups(found)
        points.append(Shown(share, macro_mean(groups), *bootstrap_interval(groups)))
    return points


def _shown(one: Point) -> Shown:
    return Shown(one.share, one.recall, one.low, one.high)


if __name__ == "__main__":
    main(sys.argv[1:])
