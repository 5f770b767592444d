"""From ranks to the numbers of the tables: four modes, oracle, trace probe, each with its exact name.

Called by ``rime_pl.callbacks.retrieval_recall``; the dictionaries built here are those of ``summary.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rime_pl.metrics.bootstrap import bootstrap_interval, macro_mean
from rime_pl.metrics.retrieval import RankTable, recall_at, reciprocal_ranks
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION, content_hash

#: The mode pair whose query side the trace probe changes; with the own rewrite it is this pair itself.
PROBED = "gen-gen"
#: (query view, gallery view) of each mode pair, and of the trace probe: the target keeps its own rewrite.
RANKED: dict[str, tuple[str, str]] = {
    **{pair: (pair.split("-")[0], pair.split("-")[1]) for pair in MODE_PAIRS},
    **{f"trace/{name}": (name, "gen") for name in REWRITE_ABLATION if name != "own"},
}
Results = dict[str, Any]


def mode_results(tasks: Sequence[RankTable], ks: Sequence[int], trace: bool = True) -> Results:
    """Every retrieval number over some tasks; each is the mean over tasks of the mean over their queries.

    Args:
        tasks: one table per task, with the pairs of ``RANKED``.
        ks: the k of recall@k. ``recall@1`` is always there.
        trace: whether the tables hold the trace probe.

    Returns:
        ``recall@k`` and ``mrr``: mode pair -> value; ``oracle``: ``recall@k`` -> value, counting for each
        query the better of disc-disc and gen-gen; ``ci``: mode pair -> 95 % bootstrap interval of recall@1;
        ``trace``: rewrite on the query side -> recall@1 of gen-gen, and the differences that say what the
        rewrite is worth: ``own-minus-empty``, ``own-minus-shuffled``, ``room`` (reference minus own).
    """
    oracle = [table.with_best_of("oracle", ("disc-disc", "gen-gen")) for table in tasks]
    every_k = sorted({1, *ks})
    results: Results = {
        f"recall@{k}": {pair: macro_mean(_hits(tasks, pair, k)) for pair in MODE_PAIRS} for k in every_k
    }
    results["mrr"] = {p: macro_mean([reciprocal_ranks(t.ranks[p]) for t in tasks]) for p in MODE_PAIRS}
    results["oracle"] = {f"recall@{k}": macro_mean(_hits(oracle, "oracle", k)) for k in every_k}
    results["ci"] = {pair: list(bootstrap_interval(_hits(tasks, pair, 1))) for pair in MODE_PAIRS}
    if trace:
        names = {name: PROBED if name == "own" else f"trace/{name}" for name in REWRITE_ABLATION}
        probe = {name: macro_mean(_hits(tasks, pair, 1)) for name, pair in names.items()}
        probe["own-minus-empty"] = probe["own"] - probe["empty"]
        probe["own-minus-shuffled"] = probe["own"] - probe["shuffled"]
        probe["room"] = probe["reference"] - probe["own"]
        results["trace"] = probe
    return results


def crossed_results(table: RankTable, tasks: Sequence[str], overall: Results) -> dict[str, float]:
    """gen-gen recall@1 by "rewriter-embedder", each old (before the stage) or new, mean over tasks.

    A better rewrite shows in new-old, a moved embedding in old-new; both sides are of the combination named.

    Args:
        table: ranks of each combination but new-new.
        tasks: names of the headline tasks.
        overall: gives new-new, which is gen-gen.
    """
    of_tasks = [table.of_task(content_hash(name)) for name in tasks]
    crossed = {name: macro_mean(_hits(of_tasks, name, 1)) for name in table.ranks}
    return crossed | {"new-new": overall["recall@1"][PROBED]}


def gallery_facts(tasks: Sequence[RankTable]) -> Results:
    """Smallest gallery (distinct contents) among the tasks, queries in all, chance of recall@1.

    chance = mean over tasks of the mean over queries of 1 / gallery size
    """
    return {
        "gallery": int(min(int(table.gallery_sizes.min()) for table in tasks)),
        "chance": macro_mean([1.0 / table.gallery_sizes.double() for table in tasks]),
        "queries": sum(len(table.item_ids) for table in tasks),
    }


def _hits(tasks: Sequence[RankTable], pair: str, k: int) -> list[Tensor]:
    return [recall_at(table.ranks[pair], k) for table in tasks]


def flat(results: Results) -> dict[str, float]:
    """Nested results as metric names: ``{"recall@1": {"gen-disc": x}}`` -> ``{"recall@1/gen-disc": x}``.

    Intervals (lists) are left out: a logger wants numbers.

    >>> flat({"trace": {"own": 0.9}, "chance": 0.1, "ci": {"gen-gen": [0.8, 1.0]}})
    {'trace/own': 0.9, 'chance': 0.1}
    """
    names: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            names.update({f"{name}/{inner}": number for inner, number in flat(value).items()})
        elif isinstance(value, int | float):
            names[name] = float(value)
    return names
