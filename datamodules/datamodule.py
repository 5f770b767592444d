"""The data module of every stage: shards in, batches of tokens and patches out.

Built by the command line. It owns the order of the data (plan.py) and its position; files are read in
shards.py, batches made in loading.py and in the processor.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from rime_pl.datamodules.annotation import Written
from rime_pl.datamodules.batch_plan import BatchPlan, Rewrites, plan_training, rank_batches, rank_slice
from rime_pl.datamodules.loading import BatchLoader, EvalBatches, PairBatches, TrainBatches
from rime_pl.datamodules.shards import Entry, ShardReader, read_corpus, read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Side

#: What a resumed run must have in common with the run that it continues.
_SAME = (
    "data_hash",
    "seed",
    "batch_size",
    "tasks",
    "annotated_share",
    "annotated_batch_share",
    "rewrites",
    "written",
)


class RimeDataModule(L.LightningDataModule):
    """Batches of a corpus folder (docs/reference/data-format.md).

    Args:
        path: Corpus folder, made by ``rime shards``.
        name_or_path: Checkpoint whose processor makes tokens and patches; linked from the model.
        prompt: Chat layout and rewrite budget; linked from the model.
        batch_size: Pairs of a training batch over all processes together.
        steps_per_epoch: Batches of an epoch; null for one pass over the data.
        num_workers: Worker processes of a loader; 0 reads in the training process.
        seed: Order of the training data and choice of the val queries.
        tasks: Tasks to use; null for all of the corpus.
        eval_batch_size: Items of an evaluation batch on each process.
        limit_val_queries: Val queries, chosen evenly over the tasks; null for all. The gallery stays whole.
        distractors: Whether the test gallery also holds the items that answer no query.
        require_rewrites: Whether a training sample without a rewrite counts as broken.
        max_broken_share: Share of broken samples above which the run stops with their list.
        annotated_share: Share of the training pairs whose rewrites are shown, chosen by their names; a pair
            of the rest takes part in the discriminative contrast alone.
        annotated_batch_share: Where not every pair has a rewrite, the share of each batch that has: those
            pairs come round more often, so that rewrites are learned at a steady pace; null draws from all
            alike.
        rewrites: The training pairs to use: all, the annotated ones, or those without (for RL).
        written: What is written before the generative embedding: the rewrite, the corpus' steps and then the
            rewrite (cot), or full stops in place of its words (pause, a control). Raise
            model.backbone.prompt.max_rewrite_tokens for cot.
    """

    def __init__(
        self,
        path: str,
        name_or_path: str,
        prompt: PromptConfig,
        batch_size: int = 64,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tasks: list[str] | None = None,
        eval_batch_size: int = 64,
        limit_val_queries: int | None = None,
        distractors: bool = True,
        require_rewrites: bool = True,
        max_broken_share: float = 0.0,
        annotated_share: float = 1.0,
        annotated_batch_share: float | None = 0.5,
        rewrites: Rewrites = "all",
        written: Written = "rewrite",
    ) -> None:
        super().__init__()
        for name, share in (("share", annotated_share), ("batch_share", annotated_batch_share)):
            if share is not None and not 0 < share <= 1:
                raise RimeError(f"data.annotated_{name}: {share} is no share. Give more than 0, at most 1.")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise RimeError(
                f"data.steps_per_epoch: {steps_per_epoch} must be 1 or more, or null for one pass."
            )
        self.path = path
        self.name_or_path = name_or_path
        self.prompt = prompt
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.num_workers = num_workers
        self.seed = seed
        self.tasks = tasks
        self.eval_batch_size = eval_batch_size
        self.limit_val_queries = limit_val_queries
        self.distractors = distractors
        self.require_rewrites = require_rewrites
        self.max_broken_share = max_broken_share
        self.annotated_share = annotated_share
        self.annotated_batch_share = annotated_batch_share
        self.rewrites = rewrites
        self.written = written
        self.broken: dict[str, str] = {}  # sample -> what is wrong, met so far on this process
        self.processor: RimeProcessor | None = None
        self._position = 0
        self._plan: BatchPlan | None = None

    def setup(self, stage: str) -> None:
        """Read indices and processor; every fault of the corpus that an index shows comes up here."""
        read_corpus(self.path)  # a wrong path is told before anything is loaded
        if self.processor is None:
            self.processor = RimeProcessor.from_pretrained(self.name_or_path, self.prompt)
        if stage == TrainerFn.FITTING and self._plan is None:
            self._train, self._plan = plan_training(
                self._train_entries(),
                self.batch_size,
                self.seed,
                self.annotated_share,
                self.annotated_batch_share,
                self.rewrites,
            )
            rank, world_size = self._rank()
            rank_slice(
                range(self.batch_size), rank, world_size
            )  # not divisible: say so before the model loads

    def _train_entries(self) -> list[Entry]:
        return self._of_tasks(read_split(self.path, "train"))

    # -- training -------------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        assert self._plan is not None and self.processor is not None, "setup('fit') comes first"
        reader = ShardReader(self._train, self.require_rewrites, self.written)
        length = self.steps_per_epoch or len(self._plan)
        return BatchLoader(
            TrainBatches(reader, self.processor, self._plan, *self._rank()),
            length,
            lambda: self._positions(length),
            self.num_workers,
            lambda broken: self._on_broken(broken, len(self._train)),
            lambda: self.position,
        )

    @property
    def position(self) -> int:
        """Global batches trained on since the start, prefetched ones not counted."""
        trainer = self.trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._position = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        return self._position

    def _positions(self, length: int) -> range:
        """The batches of the current epoch that are still to come."""
        done = self.position % length
        trainer = self.trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return range(self.position, self.position + length - done)

    @property
    def data_hash(self) -> str:
        """SHA-256 over the corpus' shards."""
        return str(read_corpus(self.path)["data_hash"])

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the position of a checkpoint.

        Raises:
            RimeError: If data, seed, batch size or tasks are not those of the checkpoint.
        """
        trainer = self.trainer
        if trainer is not None and trainer.state.fn != TrainerFn.FITTING:
            return  # a checkpoint may be evaluated on other data
        for name, value in self._identity().items():
            if state_dict[name] != value:
                setting = f"data.path={self.path}: {name}" if name == "data_hash" else f"data.{name}"
                raise RimeError(
                    f"{setting} is {value!r}, but the checkpoint was trained with {state_dict[name]!r}. "
                    "Resume with the same data and settings, or start a new run folder."
                )
        self._position = state_dict["position"]

    def _identity(self) -> dict[str, Any]:
        tasks = None if self.tasks is None else sorted(self.tasks)
        return {name: getattr(self, name) for name in _SAME} | {"tasks": tasks}

    # -- for the reward of reinforcement learning ------------------------------------------------------

    def anchor_batches(self, num_anchors: int) -> BatchLoader:
        """Up to ``num_anchors`` training pairs of each task with distinct targets, whatever is annotated.

        Equal on all processes; a batch holds one task.
        """
        entries = self._train_entries()
        chosen: dict[str, dict[str, int]] = {}
        for index in random.Random(f"anchors {self.seed}").sample(range(len(entries)), len(entries)):
            of_task = chosen.setdefault(entries[index].dataset, {})
            if len(of_task) < num_anchors:
                of_task.setdefault(entries[index].target_content, index)
        return self._pair_loader(entries, [list(chosen[task].values()) for task in sorted(chosen)])

    def sample_batches(self, num_samples: int) -> BatchLoader:
        """``num_samples`` pairs of the val split, evenly over the tasks, to watch; a batch holds one task."""
        entries = self._of_tasks(read_split(self.path, "val"))
        tasks: dict[str, list[int]] = {}
        for index in _sample_per_task(entries, num_samples, self.seed):
            tasks.setdefault(entries[index].dataset, []).append(index)
        return self._pair_loader(entries, [tasks[task] for task in sorted(tasks)])

    def _pair_loader(self, entries: list[Entry], groups: list[list[int]]) -> BatchLoader:
        assert self.processor is not None, "setup() comes first"
        size = self.eval_batch_size
        batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        return BatchLoader(
            PairBatches(ShardReader(entries, written=self.written), self.processor, batches),
            len(batches),
            lambda: range(len(batches)),
            0,
            lambda broken: self._on_broken(broken, len(entries)),
            lambda: self.position,
        )

    # -- evaluation -----------------------------------------------------------------------------------

    def val_dataloader(self) -> list[BatchLoader]:
        """Two loaders: the queries of the val split and its gallery."""
        entries = self._of_tasks(read_split(self.path, "val"))
        queries = _sample_per_task(entries, self.limit_val_queries, self.seed)
        return self._eval_loaders(entries, queries, _gallery(entries))

    def test_dataloader(self) -> list[BatchLoader]:
        """Two loaders: the queries of the test split and its gallery, with or without distractors."""
        entries = self._of_tasks(read_split(self.path, "test"))
        queries = list(range(len(entries)))
        if self.distractors and "distractors" in read_corpus(self.path)["splits"]:
            galleries = {entry.gallery for entry in entries}
            entries = entries + [e for e in read_split(self.path, "distractors") if e.gallery in galleries]
        return self._eval_loaders(entries, queries, _gallery(entries))

    def _eval_loaders(
        self, entries: list[Entry], queries: list[int], gallery: list[int]
    ) -> list[BatchLoader]:
        sides: tuple[tuple[Side, list[int]], ...] = (("query", queries), ("target", gallery))
        return [self._eval_loader(entries, side, indices) for side, indices in sides]

    def _eval_loader(self, entries: list[Entry], side: Side, indices: list[int]) -> BatchLoader:
        assert self.processor is not None, "setup() comes first"
        rank, world_size = self._rank()
        kinds: dict[str, list[int]] = {}  # one task, or one gallery, per batch: pictures and texts apart
        for index in indices:
            kinds.setdefault(
                entries[index].dataset if side == "query" else entries[index].gallery, []
            ).append(index)
        batches = [
            batch
            for kind in sorted(kinds)
            for batch in rank_batches(kinds[kind], self.eval_batch_size, rank, world_size)
        ]
        return BatchLoader(
            EvalBatches(ShardReader(entries, written=self.written), self.processor, side, batches),
            len(batches),
            lambda: range(len(batches)),
            self.num_workers,
            lambda broken: self._on_broken(broken, len(entries)),
            lambda: self.position,
        )

    # -- both -----------------------------------------------------------------------------------------

    def _of_tasks(self, entries: list[Entry]) -> list[Entry]:
        """The samples of the chosen tasks."""
        if self.tasks is None:
            return entries
        known = {entry.dataset for entry in entries}
        if unknown := sorted(set(self.tasks) - known):
            raise RimeError(f"data.tasks: {unknown} not in {self.path}; there are {sorted(known)}.")
        return [entry for entry in entries if entry.dataset in self.tasks]

    def _rank(self) -> tuple[int, int]:
        """Rank and number of the processes that see different data."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)

    def _on_broken(self, broken: dict[str, str], num_samples: int) -> None:
        self.broken.update(broken)
        if len(self.broken) > self.max_broken_share * num_samples:
            listed = "\n".join(f"  {message}" for _, message in sorted(self.broken.items()))
            raise DataError(
                f"{len(self.broken)} broken of {num_samples} samples in {self.path}, more than "
                f"data.max_broken_share={self.max_broken_share}:\n{listed}\n"
                "Repair or build the corpus again, or raise data.max_broken_share to skip them."
            )


def _gallery(entries: Iterable[Entry]) -> list[int]:
    """The first sample of each distinct target; queries' targets come before distractors."""
    distinct: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(entries):
        distinct.setdefault((entry.gallery, entry.target_content), index)
    return list(distinct.values())


def _sample_per_task(entries: list[Entry], limit: int | None, seed: int) -> list[int]:
    """Indices of ``limit`` queries, as evenly over the tasks as their sizes allow."""
    everything = range(len(entries))
    if limit is None or limit >= len(entries):
        return list(everything)
    waiting: dict[str, list[int]] = {}
    for index in random.Random(f"val {seed}").sample(everything, len(entries)):
        waiting.setdefault(entries[index].dataset, []).append(index)
    chosen: list[int] = []
    while len(chosen) < limit:
        for task in sorted(waiting):
            if waiting[task] and len(chosen) < limit:
                chosen.append(waiting[task].pop())
    return sorted(chosen)
