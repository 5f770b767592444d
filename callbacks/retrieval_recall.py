"""Measures recall of the four mode pairs, the rewrite ablation and the cost of a rewrite.

Added to every stage by ``cli``; it runs after each validation and on the test split. It reads the
``EvalOutput`` of each step. When all queries have their own rewrite, it reads the queries again and embeds
each with the rewrite of another query. All processes rank the same embeddings and log the same values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor

from rime_pl.callbacks.evaluated_items import (
    Record,
    Seen,
    annotated,
    costs,
    evaluation_of,
    modality,
    partners_of,
    rank_rows,
    rewrites_of,
    together,
)
from rime_pl.callbacks.progress import batches_trained
from rime_pl.errors import DataError, RimeError
from rime_pl.metrics.modes import (
    Results,
    crossed_results,
    dimension_results,
    flat,
    gallery_facts,
    is_generative,
    mode_results,
    ranked,
)
from rime_pl.metrics.retrieval import RankTable, RecallMetric
from rime_pl.scaling.gather import gather_objects
from rime_pl.types import MODE_PAIRS, EvalBatch, EvalOutput, Evaluation, content_hash


@dataclass
class Waiting:
    """A batch of queries that will also be embedded with the rewrites of other queries."""

    vectors: dict[str, Tensor]  # view -> (R, D) on the CPU, as all of these tensors
    facts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # item, right target, gallery, task, distractor
    unannotated: Tensor  # (R,) bool: without a reference rewrite


class RetrievalRecall(Callback):
    """Ranks queries against galleries and logs the results as ``val/...`` and ``test/...``.

    Args:
        ks: Values of k for recall@k; null for 1, 5 and 10.
        headline_tasks: Tasks that the overall results average over; null for all but the memory tasks.
        memory_tasks: Tasks whose targets training has shown. They have a table of their own, and are never in
            the overall results.
        rewrite_ablation: Whether to report the rewrite ablation, logged as ``trace/...``.
        chunk_size: Number of queries and of gallery items scored at once; limits memory, changes no result.

    Attributes:
        results: Last evaluation: ``overall`` (the ``before`` or ``after`` of ``summary.json``),
            ``per_task``, ``all_gallery`` (with distractors, None if there are none), ``gallery``, ``chance``,
            ``queries``, ``memory`` (the memory tasks), ``missing`` (queries whose gallery
            lacks the right answer; they count as not found), and on a limited gallery ``gallery_left_out``.
        history: One entry per validation: epoch, step and every overall result by its metric name; on a
            limited gallery also ``gallery_left_out``, the number of items that it lacks. It is
            saved in the checkpoint, so that a resumed run keeps it.
        ranks: For each query of the last test: key, task, generated rewrite and rank in each mode pair.
    """

    def __init__(
        self,
        ks: list[int] | None = None,
        headline_tasks: list[str] | None = None,
        memory_tasks: list[str] | None = None,
        rewrite_ablation: bool = True,
        chunk_size: int = 4096,
    ) -> None:
        self.ks = [1, 5, 10] if ks is None else ks
        if min(self.ks, default=0) < 1 or chunk_size < 1:
            raise RimeError(
                "recall.ks must hold numbers of 1 or more, and recall.chunk_size must be 1 or more, but they "
                f"are {ks} and {chunk_size}."
            )
        self.headline_tasks, self.memory_tasks = headline_tasks, set(memory_tasks or ())
        self.rewrite_ablation = rewrite_ablation
        self.results: Results = {}
        self.history: list[dict[str, float]] = []
        self.ranks: list[dict[str, Any]] = []
        self._chunk_size = chunk_size
        self._evaluation = Evaluation()
        self._metric = self._new_metric()
        self._seen = Seen({"query": {}, "target": {}}, {})
        self._waiting: list[Waiting] = []  # with the rewrite ablation, the queries of this process
        self._crossed: RecallMetric | None = None  # "rewriter-embedder" views, if a stage returns them

    def _new_metric(self) -> RecallMetric:
        pairs = ranked(self._evaluation.generative, self.rewrite_ablation)
        return RecallMetric(pairs, self.ks, self._chunk_size)

    @property
    def _ablation(self) -> bool:
        """Whether this evaluation measures the rewrite ablation."""
        return self.rewrite_ablation and self._evaluation.generative

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse headline tasks and watched results that will not be there, before anything is trained."""
        _refuse_unmeasured(trainer)
        data: Any = getattr(trainer, "datamodule", None)  # None: loaders were handed over instead
        splits = {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}[stage]
        for split in splits if data is not None and self.headline_tasks is not None else ():
            if tasks := data.query_tasks(split):
                self._headline(tasks, split, limited=False)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module, evaluation_of(trainer, "val"))

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module, evaluation_of(trainer, "test"))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._add(batch, outputs)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        limited = _is_limited(trainer.limit_val_batches)
        if trainer.sanity_checking or not self._end(
            trainer, pl_module, trainer.val_dataloaders, limited, "validation"
        ):
            return
        self._log(pl_module, self._evaluation.prefix("val"))
        step = batches_trained(trainer)
        entry = {"epoch": trainer.current_epoch, "step": step, **flat(self.results["overall"])}
        if left_out := self._evaluation.left_out:
            entry["gallery_left_out"] = left_out
        # a resumed run may validate the same step again: the new entry replaces the old one
        self.history = [old for old in self.history if old["step"] < step] + [entry]

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        limited = _is_limited(trainer.limit_test_batches)
        if self._end(trainer, pl_module, trainer.test_dataloaders, limited, "test"):
            self._log(pl_module, "test")

    def _end(self, trainer: pl.Trainer, module: Any, loaders: Any, limited: bool, split: str) -> bool:
        """Fill ``results`` (and ``ranks`` on the test split); return False if there was no query."""
        queries = (trainer.strategy.batch_to_device(batch) for batch in loaders[0])
        return self._finish(module, queries, limited, split, trainer.precision_plugin.val_step_context())

    def _start(self, pl_module: pl.LightningModule, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._metric = self._new_metric().to(pl_module.device)
        self._crossed = None
        self._seen = Seen({"query": {}, "target": {}}, {})
        self._waiting = []

    def _add(self, batch: EvalBatch, output: Any) -> None:
        if not isinstance(output, EvalOutput):
            raise RimeError(
                "validation_step and test_step must return an EvalOutput, but one returned a "
                f"{type(output).__name__}."
            )
        written = output.written if self._evaluation.generative else None
        vectors = {"disc": output.disc} | ({"gen": written.gen} if written else {})
        tasks = torch.tensor([content_hash(name) for name in batch.datasets])
        galleries = torch.tensor([content_hash(name) for name in batch.galleries])
        facts = (batch.item_ids.cpu(), batch.relevant_ids.cpu(), galleries, tasks, batch.distractor.cpu())
        if written and batch.side == "query" and self.rewrite_ablation:
            unannotated = torch.tensor([not annotated(item) for item in batch.items])
            waiting = {view: vector.cpu() for view, vector in (vectors | written.ablation).items()}
            self._waiting.append(Waiting(waiting, facts, unannotated))
        else:
            self._metric.update(batch.side, vectors, *facts)
        if written and written.crossed:
            if self._crossed is None:
                self._crossed = RecallMetric({n: (n, n) for n in written.crossed}, [1]).to(output.disc.device)
            self._crossed.update(batch.side, written.crossed, *facts)
        columns = zip(
            batch.item_ids.tolist(),
            batch.keys,
            batch.datasets,
            batch.distractor.tolist(),
            batch.relevant_ids.tolist(),
            [item.kinds for item in batch.items],
            batch.galleries,
            rewrites_of(batch, written) if written else [None] * len(batch),
            strict=True,
        )
        self._seen.records[batch.side].update({item: Record(*rest) for item, *rest in columns})
        self._seen.rows += len(batch)
        for mode, seconds in output.seconds.items():
            self._seen.seconds[mode] = self._seen.seconds.get(mode, 0.0) + seconds

    def _finish(
        self,
        module: Any,
        again: Iterable[EvalBatch],
        limited: bool,
        split: str,
        step_context: AbstractContextManager[Any] | None = None,
    ) -> bool:
        """Do the work of :meth:`_end`; ``again`` gives the query batches of this process once more."""
        seen = together(gather_objects(self._seen))
        queries, targets = seen.records["query"], seen.records["target"]
        if not queries:
            return False
        if self._ablation:
            with step_context or nullcontext():
                self._add_shuffled(module, again, queries)
        table = self._metric.ranks()
        missing = _check_found(table, queries, split, limited)
        headline = self._headline({record.task for record in queries.values()}, split, limited)
        overall = {**self._over(table, headline), **costs(seen, self.memory_tasks)}
        crossed = self._crossed.ranks() if self._crossed is not None else None
        if crossed is not None:
            overall["crossed"] = crossed_results(crossed, headline, overall)
        if sizes := getattr(module, "dimensions", None):
            overall["dimensions"] = {str(size): self._at_length(size, headline) for size in sizes}
        names = sorted({record.task for record in queries.values()})
        per_task = {name: self._of_task(name, table, seen) for name in names}
        facts = gallery_facts([table.of_task(content_hash(name)) for name in headline])
        facts |= {"missing": missing, "memory": [name for name in names if name in self.memory_tasks]}
        if self._evaluation.left_out:
            facts["gallery_left_out"] = self._evaluation.left_out
        self.results = {"overall": overall, "per_task": per_task, "all_gallery": None, **facts}
        everything = None
        if any(record.distractor for record in targets.values()):
            everything = self._metric.ranks(distractors=True)
            facts = gallery_facts([everything.of_task(content_hash(name)) for name in headline])
            self.results["all_gallery"] = {**self._over(everything, headline), **facts}
        if split == "test":
            self.ranks = rank_rows(table, everything, crossed, queries)
        self._metric.reset()
        return True

    def _of_task(self, name: str, table: RankTable, seen: Seen) -> Results:
        facts = gallery_facts([table.of_task(content_hash(name))])
        return {**self._over(table, [name]), **facts, "modality": modality(name, seen.records)}

    def _at_length(self, size: int, headline: Sequence[str]) -> dict[str, float]:
        """Return recall@1 of each mode pair with the first ``size`` numbers of the embeddings."""
        table = self._metric.cut(size, [pair for pair in MODE_PAIRS if pair in self._metric.pairs]).ranks()
        return dimension_results([table.of_task(content_hash(name)) for name in headline])

    def _add_shuffled(self, module: Any, again: Iterable[EvalBatch], queries: dict[int, Record]) -> None:
        """Rank the waiting queries, also with the rewrites of others; one without a partner is left out.

        The partner is the same for any number of processes and any size of a batch.
        """
        partners = partners_of(queries)
        for waiting, batch in zip(self._waiting, again, strict=False):  # a limit may leave batches out
            items = waiting.facts[0].tolist()
            if batch.item_ids.tolist() != items:
                raise RimeError(
                    "the evaluation loader must give the same queries each time it is read, but gave "
                    f"{batch.keys[:3]} ... the second time. Set recall.rewrite_ablation to false."
                )
            rewrites = [_tokens(queries[partners[item]]) if item in partners else None for item in items]
            waiting.vectors["shuffled"] = module.embed_rewritten(batch, rewrites)
            alone = torch.tensor([item not in partners for item in items])
            absent = {"reference": waiting.unannotated, "shuffled": alone}
            self._metric.update("query", waiting.vectors, *waiting.facts, absent=absent)
        self._waiting = []

    def _over(self, table: RankTable, tasks: list[str]) -> Results:
        tables = [table.of_task(content_hash(name)) for name in tasks]
        return mode_results(tables, self.ks, self._ablation)

    def _headline(self, tasks: set[str], split: str, limited: bool) -> list[str]:
        """Return the tasks that the overall results average over."""
        wanted = sorted(tasks - self.memory_tasks if self.headline_tasks is None else self.headline_tasks)
        if unfit := sorted(self.memory_tasks & set(wanted)):
            raise RimeError(f"recall.headline_tasks must not name memory tasks, but names {unfit}.")
        missing = [name for name in wanted if name not in tasks]
        if missing and not limited:
            raise RimeError(
                f"recall.headline_tasks must name tasks of the {split} split, but {missing} are not there. "
                f"It has {sorted(tasks)}. Correct the list, or leave it out to average over all tasks."
            )
        # limit_val_batches may cut off some tasks: the overall results then average over the others
        return [name for name in wanted if name in tasks] or sorted(tasks - self.memory_tasks or tasks)

    def _log(self, pl_module: pl.LightningModule, prefix: str) -> None:
        names = flat({k: v for k, v in self.results.items() if k not in ("overall", "per_task")})
        names |= flat(self.results["overall"])
        for task, values in self.results["per_task"].items():
            kept = {name: values[name] for name in ("recall@1", "trace") if name in values}
            names |= {f"{name}/{task}": value for name, value in flat(kept).items()}
        for name, value in names.items():
            # the values are already equal on all processes; sync_dist only avoids a warning per metric
            pl_module.log(f"{prefix}/{name}", value, sync_dist=True, batch_size=1)


def _is_limited(limit: int | float | None) -> bool:
    """Return whether the trainer leaves out batches: an int is a number of batches, a float a share."""
    return isinstance(limit, int) or (limit is not None and limit < 1.0)


def _tokens(record: Record) -> list[int]:
    assert record.rewrite is not None, "the rewrite ablation is measured in the generative mode only"
    return record.rewrite.tokens


def _refuse_unmeasured(trainer: pl.Trainer) -> None:
    """Raise if a callback stops or chooses by a result that validation does not measure."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        named = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
        split, _, name = (named or "").partition("/")
        if split != "val":
            continue
        evaluation = evaluation_of(trainer, split)
        prefix = f"{evaluation.prefix(split)}/"
        if name != "reward" and name.startswith("limited_gallery/") != (prefix != "val/"):
            raise RimeError(
                f"trainer.callbacks: {type(callback).__name__} must watch a result that is measured, but "
                f"watches {named}. With data.limit_val_gallery, {evaluation.left_out} items are left out of "
                f"the gallery, so results are called {prefix}..."
            )
        if is_generative(name.removeprefix("limited_gallery/")) and not evaluation.generative:
            raise RimeError(
                f"trainer.callbacks: {type(callback).__name__} must watch a result that is measured, but "
                f"watches {named}, and data.val_modes leaves out the generative mode. Watch "
                f"{prefix}recall@1/disc-disc, or set data.val_modes to null."
            )


def _check_found(table: RankTable, queries: dict[int, Record], split: str, limited: bool) -> int:
    """Return the number of queries without a right answer in the gallery; raise if a task has only those."""
    found = dict(zip(table.item_ids.tolist(), table.found().tolist(), strict=True))
    missing = [queries[item].key for item in found if not found[item]]
    if not missing:
        return 0
    message = (
        f"{split} split: the right answer of {len(missing)} of {len(queries)} queries is not in the gallery "
        f"(first: {', '.join(missing[:3])}; fields target.content_id and gallery)."
    )
    lost = {record.task for record in queries.values()} - {queries[i].task for i in found if found[i]}
    if lost and not limited:
        raise DataError(
            f"{message} No query of the tasks {sorted(lost)} can be answered. Build the corpus again, so "
            "that each target is in the gallery that its query names."
        )
    # skipped broken samples (data.max_broken_share) and limited batches leave such queries
    warnings.warn(f"{message} They count as not found.", stacklevel=2)
    return len(missing)
