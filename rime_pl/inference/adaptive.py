"""When a rewrite is worth its time: only where the discriminative search is unsure.

`rime search --calibrate` chooses the margin below which a query gets a rewrite, on the validation split, and
keeps it in the run folder; search.py reads it.

Shape legend: Q queries, k results.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.inference.retriever import Retriever
from rime_pl.metrics.bootstrap import bootstrap_interval, macro_mean
from rime_pl.types import Mode

FILE = "adaptive.json"
#: Shares of queries with a rewrite at which the curve is measured.
SHARES = tuple(number / 20 for number in range(21))


@dataclass(frozen=True)
class Threshold:
    """Below this margin a query gets a rewrite, and is searched again with it."""

    margin: float
    target_mode: Mode


@dataclass(frozen=True)
class Asked:
    """What was measured of Q queries with known answers."""

    margin: Tensor  # (Q,) float: best discriminative score minus the second best
    never: Tensor  # (Q,) 1.0 where the search without a rewrite finds the right item first, else 0.0
    always: Tensor  # (Q,) the same with a rewrite
    task: list[str]  # Q names

    def groups(self, values: Tensor) -> list[Tensor]:
        """Return values (Q,) by task, in the order of the names."""
        tasks = sorted(set(self.task))
        places = torch.tensor([tasks.index(name) for name in self.task])
        return [values[places == number] for number in range(len(tasks))]

    def found(self, threshold: float) -> Tensor:
        """Return (Q,): whether an adaptive search finds the right item first."""
        return torch.where(self.margin < threshold, self.always, self.never)


@dataclass(frozen=True)
class Point:
    """A point of the curve."""

    share: float  # of queries with a rewrite
    margin: float  # the threshold
    recall: float  # recall@1, mean over tasks
    low: float  # its 95 % interval
    high: float


def margins(scores: Tensor) -> Tensor:
    """Return how sure a search is: the best score minus the second best.

    Args:
        scores: (Q, k) float, best first.

    Returns:
        (Q,) float; infinity where there is one item only, because no other can be meant.

    Example:
        >>> margins(torch.tensor([[0.9, 0.5, 0.4], [0.7, 0.69, 0.1]]))
        tensor([0.4000, 0.0100])
    """
    if scores.shape[1] < 2:
        return scores.new_full((len(scores),), math.inf)
    return scores[:, 0] - scores[:, 1]


def point(asked: Asked, threshold: float) -> Point:
    """Return share, recall@1 and its interval at a threshold."""
    groups = asked.groups(asked.found(threshold))
    share = float((asked.margin < threshold).float().mean())
    return Point(share, threshold, macro_mean(groups), *bootstrap_interval(groups))


def curve(asked: Asked) -> list[Point]:
    """Return the points from never to always, at the quantiles of the margins."""
    points: list[Point] = []
    for threshold in thresholds(asked):
        if not points or threshold != points[-1].margin:
            points.append(point(asked, threshold))
    return points


def thresholds(asked: Asked) -> list[float]:
    """Return for each of SHARES the threshold below which that share of the margins lies: 0 to infinity."""
    ordered = [0.0, *asked.margin.sort().values.tolist()[1:], math.inf]
    return [ordered[round(share * len(asked.margin))] for share in SHARES]


def choose(points: list[Point]) -> Point:
    """Return the point with the highest recall@1; of equal ones that with the fewest rewrites.

    Example:
        >>> choose([Point(0, 0, 0.5, 0, 1), Point(0.5, 0.1, 0.7, 0, 1), Point(1, 9, 0.7, 0, 1)]).share
        0.5
    """
    return max(points, key=lambda one: (one.recall, -one.share))


def limit_of(
    retriever: Retriever, strategy: str, threshold: float | None, target_mode: Mode | None
) -> Threshold | None:
    """Return the threshold of an adaptive search; None for another one, which must have none.

    Raises:
        RimeError: If a threshold cannot be, is not there, or is of another mode.
    """
    if strategy != "adaptive":
        if threshold is not None:
            raise RimeError(f"threshold is of an adaptive search, but strategy is {strategy!r}.")
        return None
    if threshold is not None:
        if not threshold >= 0:
            raise RimeError(f"threshold must be 0 or more, but is {threshold}.")
        return Threshold(threshold, target_mode or "generative")
    found = read_threshold(retriever)
    if target_mode not in (None, found.target_mode):
        raise RimeError(
            f"target_mode must be {found.target_mode!r}, for which the threshold was chosen, but is "
            f"{target_mode!r}. Leave it out, or give a threshold."
        )
    return found


def read_threshold(retriever: Retriever) -> Threshold:
    """Return the threshold that was chosen for a run.

    Raises:
        RimeError: If none was, or another adapter or a damaged file is there.
    """
    run = retriever.run
    if run is None or not (file := run.path / FILE).is_file():
        raise RimeError(
            "An adaptive search needs a threshold that was chosen on the validation split, but "
            f"{run.path / FILE if run else 'the model'} has none. `rime search --calibrate true --run "
            f"{run.path if run else 'RUN'}` chooses it, or give --threshold."
        )
    return _threshold(file, retriever.name)


def _threshold(file: Path, model: str) -> Threshold:
    try:
        values = json.loads(file.read_text())
        margin, target_mode = values["margin"], values["target_mode"]
        if target_mode not in ("discriminative", "generative") or type(margin) not in (
            int,
            float,
            type(None),
        ):
            raise ValueError("margin or target_mode cannot be")
        if margin is not None and not margin >= 0:  # also where it is no number
            raise ValueError(f"margin must be 0 or more, but is {margin}")
        made_by = values["model"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RimeError(f"{file} is damaged: {error}. Give `rime search --calibrate true` again.") from error
    if made_by != model:
        raise RimeError(
            f"{file} must be of this adapter, but is not. Give `rime search --calibrate true` again."
        )
    return Threshold(math.inf if margin is None else float(margin), target_mode)
