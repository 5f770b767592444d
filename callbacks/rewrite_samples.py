"""Shows examples of what the model writes and finds, so that a person can follow them over the epochs.

Only pictures that may be shown are kept: a gallery can have 100,000 of them.

``RewriteSamples`` writes sample rewrites and retrieval sheets to TensorBoard. ``RewriteChanges`` writes the
rewrites before and after Refine-RL to ``rewrites.md``. Both are added to every stage by ``cli``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from rime_pl.bounds import at_least
from rime_pl.callbacks.evaluated_items import evaluation_of
from rime_pl.callbacks.progress import batches_trained, step_of_validation
from rime_pl.report.sheets import Card, SheetRow, sheet
from rime_pl.scaling.gather import gather_objects
from rime_pl.types import EvalBatch, EvalOutput, Item, RewriteChange

#: The table of ``RewriteChanges`` in the run folder.
FILE = "rewrites.md"
#: View of an embedding in this file -> name of the sheet.
_SHEETS = {"gen": "gen-gen", "disc": "disc-disc"}


@dataclass
class Shown:
    """One query that may be shown, with small pictures."""

    item_id: int
    key: str
    task: str
    gallery: str
    relevant: int  # content of the right answer
    item: Item  # with small pictures
    rewrite: str | None  # None: not evaluated in the generative mode
    vectors: dict[str, Tensor]  # "disc" and, in the generative mode, "gen" -> (D,) on the CPU


@dataclass
class Found:
    """One gallery item found for a sample query."""

    score: float
    content: int
    item: Item
    rewrite: str | None


class RewriteSamples(Callback):
    """Shows the same sample queries after each validation and test, if the logger is TensorBoard.

    Args:
        num_samples: Number of sample queries, spread over the tasks.
        top_k: Number of gallery items shown for each query.
    """

    def __init__(self, num_samples: int = 8, top_k: int = 5) -> None:
        self.num_samples = num_samples
        self.top_k = top_k
        at_least(1, "samples", self, "num_samples", "top_k")
        self._queries: dict[str, dict[int, Shown]] = {}  # task -> item id -> candidate
        self._chosen: list[Shown] | None = None  # of all processes, once all queries were read
        self._best: dict[str, list[list[Found]]] = {}  # view -> best items here so far, for each sample

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

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
        if not trainer.sanity_checking and isinstance(trainer.logger, TensorBoardLogger):
            self._add(batch, outputs)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._show(trainer, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer, "test")

    def _start(self) -> None:
        self._queries, self._chosen, self._best = {}, None, {}

    def _add(self, batch: EvalBatch, output: EvalOutput) -> None:
        vectors, written = {"disc": output.disc.float().cpu()}, output.written
        if written:
            vectors["gen"] = written.gen.float().cpu()
        # without distractors, because the overall recall does not count them either
        rows = (~batch.distractor).nonzero()[:, 0].tolist()
        if batch.side == "target":  # the gallery comes last, so the samples are known
            rewrites = written.rewrites if written else [None] * len(batch)
            self._add_targets(batch, rows, vectors, rewrites)
            return
        ids, relevant = batch.item_ids.tolist(), batch.relevant_ids.tolist()
        for row in rows:
            known = self._queries.setdefault(batch.datasets[row], {})
            if len(known) >= self.num_samples and ids[row] > max(known):
                continue
            shown = Shown(
                ids[row],
                batch.keys[row],
                batch.datasets[row],
                batch.galleries[row],
                relevant[row],
                batch.items[row],
                written.rewrites[row] if written else None,
                {view: vector[row] for view, vector in vectors.items()},
            )
            # the lowest ids of each task: this choice does not depend on batches and processes
            known[ids[row]] = shown
            for item_id in sorted(known)[self.num_samples :]:
                del known[item_id]

    def _add_targets(
        self, batch: EvalBatch, rows: list[int], vectors: dict[str, Tensor], rewrites: Sequence[str | None]
    ) -> None:
        """Keep the items of a batch that are among the best ``top_k`` of a sample so far."""
        contents = batch.relevant_ids.tolist()
        for view, vector in vectors.items():
            best = self._best.setdefault(view, [[] for _ in self._samples()])
            for number, sample in enumerate(self._samples()):
                scores = (vector @ sample.vectors[view]).tolist()
                new = [
                    Found(scores[row], contents[row], batch.items[row], rewrites[row])
                    for row in rows
                    if batch.galleries[row] == sample.gallery
                ]
                best[number] = _best([*best[number], *new], self.top_k)

    def _show(self, trainer: pl.Trainer, split: str) -> None:
        logger = trainer.logger
        if not isinstance(logger, TensorBoardLogger):
            return
        samples = self._samples()
        measured = [view for view in _SHEETS if samples and view in samples[0].vectors]
        found = {view: self._find(samples, view) for view in measured}
        self._start()
        if not samples or not trainer.is_global_zero:
            return
        step = batches_trained(trainer)
        logged = step_of_validation(trainer) if split == "val" else step
        prefix = evaluation_of(trainer, split).prefix(split)
        logger.experiment.add_text(f"{prefix}/rewrites", rewrite_table(samples, found), logged)
        for view, name in ((view, _SHEETS[view]) for view in measured):
            rows = [_row(sample, hits) for sample, hits in zip(samples, found[view], strict=True)]
            picture = sheet(rows, f"{split} split, step {step}: {name}, the first {self.top_k}")
            logger.experiment.add_image(
                f"{prefix}/retrieval/{name}", np.asarray(picture), logged, dataformats="HWC"
            )

    def _samples(self) -> list[Shown]:
        """Return the sample queries, taken in turn from each task; they are equal on every process.

        The first call is a collective. Each process has the same number of batches of either side, so all
        make it at their first batch of the gallery.
        """
        if self._chosen is not None:
            return self._chosen
        tasks: dict[str, dict[int, Shown]] = {}
        for part in gather_objects(self._queries):
            for task, shown in part.items():
                tasks.setdefault(task, {}).update(shown)
        lists = [[shown for _, shown in sorted(tasks[task].items())] for task in sorted(tasks)]
        turns = [shown for turn in zip_longest(*lists) for shown in turn if shown is not None]
        self._chosen = sorted(turns[: self.num_samples], key=lambda shown: (shown.task, shown.item_id))
        self._queries = {}
        return self._chosen

    def _find(self, samples: list[Shown], view: str) -> list[list[Found]]:
        """Return the best ``top_k`` distinct contents for each sample, over all processes."""
        parts = gather_objects(self._best.get(view, [[] for _ in samples]))
        return [
            _best([found for part in parts for found in part[n]], self.top_k) for n in range(len(samples))
        ]


def _best(found: list[Found], top_k: int) -> list[Found]:
    """Return the best item of each content, best first."""
    best: dict[int, Found] = {}
    for one in sorted(found, key=lambda one: -one.score):
        best.setdefault(one.content, one)
    return list(best.values())[:top_k]


def _row(sample: Shown, hits: list[Found]) -> SheetRow:
    """Return the row of a retrieval sheet for one sample query."""
    cards = [
        Card(
            hit.item,
            f"{place}.  {hit.score:.3f}\n{hit.item.text or hit.rewrite or ''}",
            hit.content == sample.relevant,
        )
        for place, hit in enumerate(hits, 1)
    ]
    notes = [f"reference: {sample.item.rewrite or '(none)'}", f"generated: {_generated(sample)}"]
    words = f"{sample.item.instruction} {sample.item.text}".strip()
    return SheetRow(Card(sample.item, words), cards, f"{sample.task}   {sample.key}", notes)


def rewrite_table(samples: list[Shown], found: dict[str, list[list[Found]]]) -> str:
    """Return a Markdown table: the rewrites of each sample query, and whether the first hits are right."""
    rows = []
    for number, sample in enumerate(samples):
        words = f"{sample.item.instruction} {sample.item.text}".strip()
        pictures = f"[{len(sample.item.media)} media] " if sample.item.media else ""
        firsts = []
        for hits in (of_view[number] for of_view in found.values()):
            right = bool(hits) and hits[0].content == sample.relevant
            wrong = f"wrong: {hits[0].rewrite or hits[0].item.text or '(picture)'}" if hits else "nothing"
            firsts.append("right" if right else wrong)
        reference = sample.item.rewrite or "(none)"
        rows.append([sample.task, pictures + words, reference, _generated(sample), *firsts])
    sheets = [_SHEETS[view] for view in found]
    return _table(["task", "query", "reference rewrite", "generated rewrite", *sheets], rows)


def _generated(sample: Shown) -> str:
    return "(not measured)" if sample.rewrite is None else sample.rewrite or "(empty)"


class RewriteChanges(Callback):
    """Writes a table of held-out queries with their rewrites and rewards before and after Refine-RL.

    Other stages have nothing to compare with and write no table.

    Args:
        run_dir: Folder of the run; taken from ``--run_dir``.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        module: Any = pl_module  # a RimeModule; callbacks do not import the modules
        changes: list[RewriteChange] = module.rewrite_changes()
        if not changes or not trainer.is_global_zero:
            return
        table = change_table(changes)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        title = f"# Rewrites before and after, step {batches_trained(trainer)}"
        (self.run_dir / FILE).write_text(f"{title}\n\n{table}\n")
        if isinstance(trainer.logger, TensorBoardLogger):
            writer, step = trainer.logger.experiment, step_of_validation(trainer)
            writer.add_text("val/rewrites_before_and_after", table, step)
            writer.add_scalar("val/reward", fmean(one.reward_after for one in changes), step)


def change_table(changes: list[RewriteChange]) -> str:
    """Return a Markdown table with one line for each query, and the mean rewards below it.

    >>> change = RewriteChange("k", "t", "a|b", "ref", "old", "new", 0.5, 1.25)
    >>> print(change_table([change]).splitlines()[2])
    | t | a\\|b | ref | old | 0.50 | new | 1.25 |
    """
    head = ["task", "query", "reference", "before", "reward", "after", "reward"]
    rows = [
        [
            *(one.task, one.query or "(picture)", one.reference or "(none)"),
            *(one.before or "(empty)", f"{one.reward_before:.2f}"),
            *(one.after or "(empty)", f"{one.reward_after:.2f}"),
        ]
        for one in changes
    ]
    before = fmean(one.reward_before for one in changes)
    after = fmean(one.reward_after for one in changes)
    changed = sum(one.before != one.after for one in changes)
    means = f"Mean reward: {before:.3f} before, {after:.3f} after."
    return f"{_table(head, rows)}\n\n{means} {changed} of {len(changes)} rewrites changed."


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; line breaks and ``|`` inside a cell are made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
