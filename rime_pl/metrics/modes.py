"""From ranks to the results of the tables: four mode pairs, oracle, rewrite ablation, each with its name.

Called by callbacks/retrieval_recall.py. The dictionaries made here are those of ``summary.json``; there, the
rewrite ablation is called ``trace``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rime_pl.metrics.bootstrap import bootstrap_interval, macro_mean
from rime_pl.metrics.retrieval import RankTable, measured, recall_at, reciprocal_ranks
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION, content_hash

#: The mode pair in which the rewrite ablation replaces the rewrites of the queries.
ABLATED = "gen-gen"
#: (query view, gallery view) of each mode pair and of the rewrite ablation; targets keep their own rewrite.
RANKED: dict[str, tuple[str, str]] = {
    **{pair: (pair.split("-")[0], pair.split("-")[1]) for pair in MODE_PAIRS},
    **{f"trace/{name}": (name, "gen") for name in REWRITE_ABLATION if name != "own"},
}
#: Difference -> (first, second): recall@1 with the first rewrite minus recall@1 with the second.
DIFFERENCES = {
    "own-minus-empty": ("own", "empty"),
    "own-minus-shuffled": ("own", "shuffled"),
    "room": ("reference", "own"),
}
Results = dict[str, Any]
#: Groups of results that exist in the generative mode only.
_GENERATIVE = ("oracle", "trace", "rewrite", "crossed", "generative", "reward")


def is_generative(name: str) -> bool:
    """Return whether a result, such as ``recall@1/gen-disc``, is measured only where rewrites are written.

    Source: ours.

    Example:
        >>> [is_generative(name) for name in ("mrr/disc-disc", "recall@1/gen-disc/names", "trace/own")]
        [False, True, True]
    """
    pairs = set(MODE_PAIRS) - {"disc-disc"}
    return any(part in pairs or part in _GENERATIVE for part in name.split("/")[:2])


def ranked(generative: bool, ablation: bool) -> dict[str, tuple[str, str]]:
    """Return the views to rank: all of ``RANKED``, or those of an evaluation without some of them.

    Source: ours.

    Example:
        >>> ranked(generative=False, ablation=False)
        {'disc-disc': ('disc', 'disc')}
    """
    return {
        name: views
        for name, views in RANKED.items()
        if (generative or not is_generative(name)) and (ablation or not name.startswith("trace/"))
    }


def mode_results(tasks: Sequence[RankTable], ks: Sequence[int], ablation: bool = True) -> Results:
    """Return all retrieval results; each is the mean over tasks of the mean over their queries.

    Args:
        tasks: One table per task, with the pairs of :func:`ranked`.
        ks: The k of recall@k; ``recall@1`` is always added.
        ablation: Whether the tables hold the rewrite ablation.

    Returns:
        - ``recall@k`` and ``mrr``: mode pair -> value, for the mode pairs that the tables hold.
        - ``oracle``: ``recall@k`` -> value, with the better of disc-disc and gen-gen for each query; only
          where both were measured.
        - ``ci``: mode pair -> 95 % bootstrap interval of recall@1.
        - ``trace``: see :func:`ablation_results`.

    Source: ours; the four pairs follow the purpose of CMA in RIME, arXiv 2604.22280.

    Example:
        >>> import torch
        >>> one = torch.tensor([1])
        >>> table = RankTable(one, one, one, one, {"disc-disc": one})
        >>> mode_results([table], ks=(1,), ablation=False)["recall@1"]
        {'disc-disc': 1.0}
    """
    every_k, pairs = sorted({1, *ks}), [pair for pair in MODE_PAIRS if pair in tasks[0].ranks]
    results: Results = {
        f"recall@{k}": {pair: macro_mean(_hits(tasks, pair, k)) for pair in pairs} for k in every_k
    }
    results["mrr"] = {p: macro_mean([reciprocal_ranks(t.ranks[p]) for t in tasks]) for p in pairs}
    results["ci"] = {pair: list(bootstrap_interval(_hits(tasks, pair, 1))) for pair in pairs}
    if ABLATED in pairs:
        oracle = [table.with_best_of("oracle", ("disc-disc", "gen-gen")) for table in tasks]
        results["oracle"] = {f"recall@{k}": macro_mean(_hits(oracle, "oracle", k)) for k in every_k}
    if ablation:
        results["trace"] = ablation_results(tasks)
    return results


def dimension_results(tasks: Sequence[RankTable]) -> dict[str, float]:
    """Return recall@1 of each mode pair, for embeddings of one length: mean over tasks.

    Source: Matryoshka, arXiv 2205.13147.

    Example:
        >>> import torch
        >>> one = torch.tensor([1])
        >>> dimension_results([RankTable(one, one, one, one, {"disc-disc": one})])
        {'disc-disc': 1.0}
    """
    return {pair: macro_mean(_hits(tasks, pair, 1)) for pair in tasks[0].ranks}


def ablation_results(tasks: Sequence[RankTable]) -> dict[str, float | None]:
    """Return recall@1 of gen-gen for each rewrite on the query side, and differences.

    A query without a reference rewrite, or without another query's rewrite, has rank 0 there. It is left out,
    and a difference compares only the queries that have both rewrites.

    Returns:
        - ``own``, ``reference``, ``shuffled``, ``empty``: recall@1; None if no query has this rewrite.
        - ``own-minus-empty``, ``own-minus-shuffled`` and ``room``, the headroom: reference minus own.
        - ``num_reference``, ``num_shuffled``: number of queries that have this rewrite.

    Source: ours.

    Example:
        >>> import torch
        >>> one = torch.tensor([1])
        >>> ranks = {name: one for name in (ABLATED, *ranked(True, True))}
        >>> ablation_results([RankTable(one, one, one, one, ranks)])["own-minus-empty"]
        0.0
    """
    pairs = {name: ABLATED if name == "own" else f"trace/{name}" for name in REWRITE_ABLATION}
    results = {name: _recall_of(tasks, pair, pair) for name, pair in pairs.items()}
    for key, (first, second) in DIFFERENCES.items():
        left = _recall_of(tasks, pairs[first], pairs[second])
        right = _recall_of(tasks, pairs[second], pairs[first])
        results[key] = None if left is None or right is None else left - right
    for name in ("reference", "shuffled"):
        results[f"num_{name}"] = sum(len(measured(table.ranks[pairs[name]])) for table in tasks)
    return results


def _recall_of(tasks: Sequence[RankTable], pair: str, other: str) -> float | None:
    """Return recall@1 of a pair over the queries that were measured in both pairs; None without any."""
    both = [(table.ranks[pair], table.ranks[other]) for table in tasks]
    kept = [ranks[(ranks > 0) & (others > 0)] for ranks, others in both]
    hits = [recall_at(ranks, 1) for ranks in kept if len(ranks)]
    return macro_mean(hits) if hits else None


def crossed_results(table: RankTable, tasks: Sequence[str], overall: Results) -> dict[str, float]:
    """Return gen-gen recall@1 by "rewriter-embedder", each old (before the stage) or new, mean over tasks.

    Better rewrites raise new-old; changed embeddings change old-new. Queries and targets use the same pair.

    Args:
        table: Ranks of each combination except new-new.
        tasks: Names of the headline tasks.
        overall: From :func:`mode_results`; its gen-gen is new-new.

    Source: ours.

    Example:
        >>> import torch
        >>> one, task = torch.tensor([1]), torch.tensor([content_hash("names")])
        >>> table = RankTable(one, task, one, one, {"old-old": one})
        >>> crossed_results(table, ["names"], {"recall@1": {"gen-gen": 0.5}})
        {'old-old': 1.0, 'new-new': 0.5}
    """
    of_tasks = [table.of_task(content_hash(name)) for name in tasks]
    crossed = {name: macro_mean(_hits(of_tasks, name, 1)) for name in table.ranks}
    return crossed | {"new-new": overall["recall@1"][ABLATED]}


def gallery_facts(tasks: Sequence[RankTable]) -> Results:
    """Return the smallest gallery of the tasks (distinct contents), the number of queries, and chance.

    ``chance = mean over tasks of the mean over queries of 1 / gallery size``, the recall@1 of random ranks

    Source: ours.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([1, 1]), torch.tensor([4, 4])
        >>> gallery_facts([RankTable(one, one, one, two, {"disc-disc": one})])
        {'gallery': 4, 'chance': 0.25, 'queries': 2}
    """
    return {
        "gallery": int(min(int(table.gallery_sizes.min()) for table in tasks)),
        "chance": macro_mean([1.0 / table.gallery_sizes.double() for table in tasks]),
        "queries": sum(len(table.item_ids) for table in tasks),
    }


def _hits(tasks: Sequence[RankTable], pair: str, k: int) -> list[Tensor]:
    return [recall_at(table.ranks[pair], k) for table in tasks]


def flat(results: Results) -> dict[str, float]:
    """Return nested results as a flat dictionary of metrics, for loggers; intervals are left out.

    Source: ours.

    Example:
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
