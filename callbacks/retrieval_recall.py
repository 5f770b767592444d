"""Recall of the four modes, the trace probe and the cost of a rewrite, per epoch and on the test split.

It reads the ``EvalOutput`` that ``validation_step`` and ``test_step`` return, and changes nothing. All
processes rank the same gathered embeddings, so that all log the same keys with the same values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from rime_pl.callbacks.progress import batches_trained
from rime_pl.errors import DataError, RimeError
from rime_pl.metrics.modes import RANKED, Results, crossed_results, flat, gallery_facts, mode_results
from rime_pl.metrics.retrieval import RankTable, RecallMetric
from rime_pl.metrics.words import slot_scores
from rime_pl.scaling.gather import gather_objects
from rime_pl.types import EvalBatch, EvalOutput, Side, content_hash


@dataclass
class Record:
    """What is kept of one evaluated item beside its embeddings."""

    key: str
    task: str
    distractor: bool
    rewrite: str
    length: int  # generated tokens
    well_formed: bool
    slots: tuple[float, float] | None  # recall and F1 against the reference rewrite, where there is one


@dataclass
class Seen:
    """What one process saw in one evaluation; with ``gather_objects`` what all of them saw."""

    records: dict[
        Side, dict[int, Record]
    ]  # side -> item id -> record; repeats of a padded sampler fall together
    seconds: dict[str, float]  # mode -> wall seconds
    rows: int = 0  # embedded items, repeats counted


class RetrievalRecall(Callback):
    """Ranks queries against galleries and logs ``val/...`` and ``test/...``.

    Args:
        ks: the k of recall@k.
        headline_tasks: tasks over which the overall numbers are averaged; default all tasks of the split.
        trace: whether the trace probe is reported. ``validation_step`` must then return its embeddings.
        chunk_size: rows of queries and gallery that are scored at once; bounds memory, changes no number.

    Attributes:
        results: the last evaluation: ``overall`` (the ``before`` or ``after`` of ``summary.json``),
            ``per_task``, ``all_gallery`` (with distractors, None if there are none), ``gallery``, ``chance``,
            ``queries``, ``missing`` (queries whose gallery lacks the right answer; they count as not found).
        history: one entry per validation: epoch, step and every overall number by its metric name. Saved in
            the checkpoint, so that a resumed run keeps it.
        ranks: per query of the last test its key, task, generated rewrite and the rank in each pair.
    """

    def __init__(
        self,
        ks: list[int] | None = None,
        headline_tasks: list[str] | None = None,
        trace: bool = True,
        chunk_size: int = 4096,
    ) -> None:
        self.ks = [1, 5, 10] if ks is None else ks
        self.headline_tasks = headline_tasks
        self.trace = trace
        self.results: Results = {}
        self.history: list[dict[str, float]] = []
        self.ranks: list[dict[str, Any]] = []
        pairs = {name: views for name, views in RANKED.items() if trace or not name.startswith("trace/")}
        self._metric = RecallMetric(pairs, self.ks, chunk_size)
        self._seen = Seen({"query": {}, "target": {}}, {})
        self._crossed: RecallMetric | None = None  # "rewriter-embedder" views, where a stage returns them

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    on_test_epoch_start = on_validation_epoch_start

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
        if trainer.sanity_checking or not self._finish(_is_limited(trainer.limit_val_batches), "validation"):
            return
        self._log(pl_module, "val")
        step = batches_trained(trainer)
        entry = {"epoch": trainer.current_epoch, "step": step, **flat(self.results["overall"])}
        # a resumed run that validates the same step again replaces what it had
        self.history = [old for old in self.history if old["step"] < step] + [entry]

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._finish(_is_limited(trainer.limit_test_batches), "test"):
            self._log(pl_module, "test")

    def _start(self, pl_module: pl.LightningModule) -> None:
        self._metric.reset()
        self._metric.to(pl_module.device)
        self._crossed = None
        self._seen = Seen({"query": {}, "target": {}}, {})

    def _add(self, batch: EvalBatch, output: Any) -> None:
        if not isinstance(output, EvalOutput):
            raise RimeError(
                f"RetrievalRecall: validation_step/test_step must return an EvalOutput, not {type(output)}"
            )
        vectors = {"disc": output.embeddings.disc, "gen": output.embeddings.gen}
        if batch.side == "query" and self.trace:
            vectors.update(output.ablation)
        device = batch.item_ids.device
        tasks = torch.tensor([content_hash(name) for name in batch.datasets], device=device)
        galleries = torch.tensor([content_hash(name) for name in batch.galleries], device=device)
        self._metric.update(
            batch.side, vectors, batch.item_ids, batch.relevant_ids, galleries, tasks, batch.distractor
        )
        if output.crossed:
            if self._crossed is None:
                self._crossed = RecallMetric({n: (n, n) for n in output.crossed}, [1]).to(
                    batch.item_ids.device
                )
            self._crossed.update(
                *(batch.side, output.crossed, batch.item_ids, batch.relevant_ids),
                *(galleries, tasks, batch.distractor),
            )
        columns = zip(
            batch.item_ids.tolist(),
            batch.keys,
            batch.datasets,
            batch.distractor.tolist(),
            output.rewrites,
            output.rewrite_lengths.tolist(),
            output.well_formed.tolist(),
            [
                slot_scores(rewrite, item.rewrite) if item.rewrite else None
                for rewrite, item in zip(output.rewrites, batch.items, strict=True)
            ],
            strict=True,
        )
        self._seen.records[batch.side].update({item: Record(*rest) for item, *rest in columns})
        self._seen.rows += len(batch)
        for mode, seconds in output.seconds.items():
            self._seen.seconds[mode] = self._seen.seconds.get(mode, 0.0) + seconds

    def _finish(self, limited: bool, split: str) -> bool:
        """Rank and fill ``results`` (and ``ranks`` on the test split); False if there was no query."""
        seen = _together(gather_objects(self._seen))
        queries, targets = seen.records["query"], seen.records["target"]
        if not queries:
            return False
        table = self._metric.ranks()
        missing = _check_found(table, queries, split, limited)
        headline = self._headline({record.task for record in queries.values()}, split, limited)
        overall = {**self._over(table, headline), **_costs(seen)}
        crossed = self._crossed.ranks() if self._crossed is not None else None
        if crossed is not None:
            overall["crossed"] = crossed_results(crossed, headline, overall)
        names = sorted({record.task for record in queries.values()})
        per_task = {
            name: {**self._over(table, [name]), **gallery_facts([table.of_task(content_hash(name))])}
            for name in names
        }
        facts = gallery_facts([table.of_task(content_hash(name)) for name in headline])
        facts["missing"] = missing
        self.results = {"overall": overall, "per_task": per_task, "all_gallery": None, **facts}
        everything = None
        if any(record.distractor for record in targets.values()):
            everything = self._metric.ranks(distractors=True)
            facts = gallery_facts([everything.of_task(content_hash(name)) for name in headline])
            self.results["all_gallery"] = {**self._over(everything, headline), **facts}
        if split == "test":
            self.ranks = _rank_rows(table, everything, crossed, queries)
        self._metric.reset()
        return True

    def _over(self, table: RankTable, tasks: list[str]) -> Results:
        return mode_results([table.of_task(content_hash(name)) for name in tasks], self.ks, self.trace)

    def _headline(self, tasks: set[str], split: str, limited: bool) -> list[str]:
        """The tasks of the overall numbers, all there or told to the user."""
        wanted = sorted(tasks if self.headline_tasks is None else self.headline_tasks)
        missing = [name for name in wanted if name not in tasks]
        if missing and not limited:
            raise RimeError(
                f"RetrievalRecall.headline_tasks names {missing}, which the {split} split does not hold; "
                f"it holds {sorted(tasks)}. Correct the list, or leave it out to average over all tasks."
            )
        # with limit_val_batches some tasks are cut off: the overall numbers are then those of the rest
        return [name for name in wanted if name in tasks] or sorted(tasks)

    def _log(self, pl_module: pl.LightningModule, prefix: str) -> None:
        names = flat({k: v for k, v in self.results.items() if k not in ("overall", "per_task")})
        names |= flat(self.results["overall"])
        for task, values in self.results["per_task"].items():
            kept = {name: values[name] for name in ("recall@1", "trace") if name in values}
            names |= {f"{name}/{task}": value for name, value in flat(kept).items()}
        for name, value in names.items():
            # equal on all processes already; sync_dist spares the user a warning per metric
            pl_module.log(f"{prefix}/{name}", value, sync_dist=True, batch_size=1)


def _is_limited(limit: int | float | None) -> bool:
    """Whether the trainer leaves out batches of the split: an int counts batches, a float is a share."""
    return isinstance(limit, int) or (limit is not None and limit < 1.0)


def _together(parts: list[Seen]) -> Seen:
    whole = Seen({"query": {}, "target": {}}, {})
    for part in parts:
        for side, records in part.records.items():
            whole.records[side].update(records)
        whole.rows += part.rows
        for mode, seconds in part.seconds.items():
            whole.seconds[mode] = whole.seconds.get(mode, 0.0) + seconds
    return whole


def _costs(seen: Seen) -> Results:
    """What the rewrites look like, over distinct items of both sides, and what an embedding costs."""
    records = [*seen.records["query"].values(), *seen.records["target"].values()]
    slots = [record.slots for record in seen.records["query"].values() if record.slots]
    named = (
        {
            "slot_recall": sum(recall for recall, _ in slots) / len(slots),
            "slot_f1": sum(f1 for _, f1 in slots) / len(slots),
        }
        if slots
        else {}
    )
    return {
        "rewrite": {
            **named,
            "mean_length": sum(record.length for record in records) / len(records),
            "well_formed": sum(record.well_formed for record in records) / len(records),
        },
        "milliseconds": {mode: 1000 * seconds / seen.rows for mode, seconds in sorted(seen.seconds.items())},
    }


def _check_found(table: RankTable, queries: dict[int, Record], split: str, limited: bool) -> int:
    """Number of queries whose right answer is in no gallery; an error when a task has nothing else."""
    found = dict(zip(table.item_ids.tolist(), table.found().tolist(), strict=True))
    missing = [queries[item].key for item in found if not found[item]]
    if not missing:
        return 0
    message = (
        f"{split} split: for {len(missing)} of {len(queries)} queries the gallery lacks the right answer "
        f"(first: {', '.join(missing[:3])}; fields target.content_id and gallery)."
    )
    lost = {record.task for record in queries.values()} - {queries[i].task for i in found if found[i]}
    if lost and not limited:
        raise DataError(
            f"{message} Of the tasks {sorted(lost)} not one query can be answered. Rebuild the shards, so "
            "that each target is in the gallery that its query names."
        )
    # broken samples below data.max_broken_share and limited batches leave such queries behind
    warnings.warn(f"{message} They count as not found.", stacklevel=2)
    return len(missing)


def _rank_rows(
    table: RankTable,
    everything: RankTable | None,
    crossed: RankTable | None,
    queries: dict[int, Record],
) -> list[dict[str, Any]]:
    rows = []
    for place, item in enumerate(table.item_ids.tolist()):
        record = queries[item]
        row: dict[str, Any] = {"key": record.key, "task": record.task, "rewrite": record.rewrite}
        row["gallery"] = int(table.gallery_sizes[place])
        row["ranks"] = {pair: int(ranks[place]) for pair, ranks in table.ranks.items()}
        if crossed is not None:  # the same queries in the same order
            row["ranks"] |= {f"crossed/{name}": int(ranks[place]) for name, ranks in crossed.ranks.items()}
        if everything is not None:
            row["ranks_all_gallery"] = {pair: int(ranks[place]) for pair, ranks in everything.ranks.items()}
        rows.append(row)
    return rows
