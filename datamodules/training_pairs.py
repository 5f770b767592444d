"""Chooses the training pairs of a run from the index of the split, and plans their batches.

Called by the data module. Nothing here holds an object for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rime_pl.datamodules.annotation import are_annotated
from rime_pl.datamodules.batch_plan import BatchPlan, OrderSettings
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.split_index import QUERY_REWRITE, TARGET_REWRITE
from rime_pl.errors import DataError, RimeError

#: The training pairs that a stage uses: all, those with both rewrites, or the others. With "none" it uses all
#: pairs and reads no rewrite.
Rewrites = Literal["all", "annotated", "unannotated", "none"]
_BOTH = QUERY_REWRITE | TARGET_REWRITE


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs of the training split that a run uses."""

    entries: Samples
    annotated: NDArray[np.bool_]  # both sides have a rewrite that may be read: the losses' own rule
    hidden: NDArray[np.bool_]  # the settings hide the rewrites
    counts: dict[str, tuple[int, int]]  # task -> annotated pairs and all pairs of the split, used or not

    def report(self, annotated_share: float, rewrites: Rewrites) -> str:
        """Return what is printed at the start of training.

        Example:
            >>> none = np.zeros(0, bool)
            >>> pairs = TrainingPairs(Samples([]), none, none, {"a": (20, 25), "b": (11, 20)})
            >>> pairs.report(1.0, "all")
            '31 of 45 pairs annotated (a: 20 of 25, b: 11 of 20)'
        """
        if rewrites == "none":
            return f"{len(self.entries)} pairs; no rewrite is read (data.rewrites none)"
        known, total = (sum(column) for column in zip(*self.counts.values(), strict=True))
        tasks = ", ".join(f"{task}: {few} of {all_}" for task, (few, all_) in sorted(self.counts.items()))
        words = f"{known} of {total} pairs annotated" + (f" ({tasks})" if len(self.counts) > 1 else "")
        if annotated_share < 1:
            words += f", other rewrites are hidden (data.annotated_share {annotated_share})"
        return words + ("" if rewrites == "all" else f", {len(self.entries)} used (data.rewrites {rewrites})")

    def without_rewrite(self) -> NDArray[np.intp]:
        """Return the numbers of the pairs that lack a rewrite which the settings would let a run read."""
        return np.flatnonzero(~self.hidden & ((self.entries.column("flags") & _BOTH) != _BOTH))

    def refuse_missing_rewrites(self, max_broken_share: float) -> None:
        """Raise before training what would end it later: samples that ``require_rewrites`` calls broken."""
        missing, total = self.without_rewrite(), len(self.entries)
        if len(missing) > max_broken_share * total:
            some = ", ".join(self.entries[int(number)].name for number in missing[:3])
            raise DataError(
                f"data.require_rewrites is true, but {len(missing)} of {total} training pairs have no "
                f"rewrite on one side or both, for example {some}. Add the rewrites, or "
                "set data.require_rewrites to false: such pairs then train the discriminative mode. With "
                "`rime run`: --sft.data.require_rewrites false --cma.data.require_rewrites false."
            )


def choose_pairs(
    entries: Samples, annotated_share: float, rewrites: Rewrites, annotated_seed: int | None = None
) -> TrainingPairs:
    """Return the training pairs that the settings choose.

    Raises:
        RimeError: If no pair is left, or if none is annotated, unless ``rewrites`` asks for that by name.
    """
    shown = np.full(len(entries), rewrites != "none")
    if annotated_share < 1 and rewrites != "none":
        shown = are_annotated(entries.column("draw"), annotated_share, annotated_seed)
    annotated = shown & ((entries.column("flags") & _BOTH) == _BOTH)
    used = {"annotated": annotated, "unannotated": ~annotated}.get(rewrites)
    if rewrites in ("all", "annotated") and not annotated.any():
        raise RimeError(
            f"At least one training pair must have a rewrite on both sides, but of {len(entries)} none has "
            f"with data.annotated_share={annotated_share}. The generative mode would learn nothing. Add "
            "rewrites to queries and targets. To train the discriminative mode only, or for Refine-RL, which "
            "reads no rewrites, set data.rewrites to none."
        )
    if used is not None and not used.any():
        raise RimeError(
            f"data.rewrites={rewrites} and data.annotated_share={annotated_share} leave no training pair. "
            "Change data.annotated_share, or set data.rewrites to all."
        )
    codes = entries.task_codes()
    everyone = np.bincount(codes, minlength=len(entries.tasks)).tolist()
    known = np.bincount(codes[annotated], minlength=len(entries.tasks)).tolist()
    counts = {t: (k, n) for t, k, n in zip(entries.tasks, known, everyone, strict=True) if n}
    hidden = np.ones(len(entries), bool) if rewrites == "unannotated" else ~shown
    if used is None or used.all():
        return TrainingPairs(entries, annotated, hidden, counts)
    return TrainingPairs(entries.select(np.flatnonzero(used)), annotated[used], hidden[used], counts)


def plan_training(
    entries: Samples,
    batch_size: int,
    seed: int,
    annotated_share: float = 1.0,
    annotated_batch_share: float | None = 0.5,
    rewrites: Rewrites = "all",
    order: OrderSettings | None = None,
    weights: Sequence[float] = (),
    annotated_seed: int | None = None,
) -> tuple[TrainingPairs, BatchPlan]:
    """Return the training pairs that the settings choose, and the plan of their batches.

    Args:
        entries: Index of the training split, of one corpus or of several.
        batch_size, seed, annotated_share, annotated_batch_share, rewrites, order, annotated_seed: As in
            ``RimeDataModule``.
        weights: Weight of each corpus; () for 1.

    Raises:
        RimeError: If ``choose_pairs`` finds no pairs, or ``BatchPlan`` cannot fill a batch.
    """
    pairs = choose_pairs(entries, annotated_share, rewrites, annotated_seed)
    share = annotated_batch_share if rewrites == "all" and not pairs.annotated.all() else None
    samples, codes = pairs.entries, pairs.entries.task_codes()
    names, of_source = samples.tasks, [1.0] * len(samples.tasks)
    if len(samples.parts) > 1:  # a task of two corpora is two sources
        codes = (codes + samples.part_numbers() * len(names)).astype(np.uint32)
        of_source = [weight for weight in weights or [1.0] * len(samples.parts) for _ in names]
        names = names * len(samples.parts)
    elif weights:
        of_source = [weights[0]] * len(names)
    plan = BatchPlan(
        *(names, codes, partial(samples.column, "target_content"), batch_size, seed),
        annotated=pairs.annotated,
        annotated_share=share,
        shards=samples.shard_numbers(),
        order=order,
        weights=of_source,
    )
    return pairs, plan
