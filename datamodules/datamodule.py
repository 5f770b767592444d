"""The data module of every stage: it reads shards and gives batches of tokens and patches.

The command line builds it. It owns the order of the data (batch_plan.py) and the position in it; shards.py
reads the files, loading.py and the processor make the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from rime_pl.bounds import at_least
from rime_pl.datamodules.annotation import CompletionKind
from rime_pl.datamodules.batch_plan import BatchPlan, OrderSettings
from rime_pl.datamodules.broken_samples import BrokenSamples
from rime_pl.datamodules.corpora import Corpora
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.eval_plan import (
    EvalPlan,
    check_modes,
    query_tasks,
    sample_per_task,
    test_plan,
    val_plan,
)
from rime_pl.datamodules.loading import BatchLoader, EvalBatches, PairBatches, Position, TrainBatches
from rime_pl.datamodules.ranks import local_batch_size
from rime_pl.datamodules.remote import CacheSettings
from rime_pl.datamodules.resuming import SAME, refuse_other
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader
from rime_pl.datamodules.shuffling import anchors
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.datamodules.training_pairs import Rewrites, TrainingPairs, plan_training
from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Evaluation, Mode, Pair, Side


class RimeDataModule(L.LightningDataModule):
    """The training, validation and test data of a corpus folder (docs/reference/data-format.md).

    Args:
        path: Corpus folder, made by ``rime shards``, or its URL; or several with weights, such as
            {data/a: 1, data/b: 2}. The first one is evaluated, too. A weight says how often the pairs of a
            corpus come in a pass.
        name_or_path: Checkpoint of the processor that makes tokens and patches; taken from the model.
        prompt: Chat layout and token budget of a rewrite; taken from the model.
        batch_size: Number of pairs in a training batch, over all processes together.
        steps_per_epoch: Number of batches in an epoch; null for one pass over the data.
        num_workers: Number of worker processes for each loader; 0 reads in the training process.
        seed: Seed of the order of the training data and of the choice of validation queries.
        tasks: Names of the tasks to use; null for all tasks of the corpus.
        eval_batch_size: Number of items in an evaluation batch on each process.
        limit_val_queries: Number of validation queries, chosen evenly from the tasks; null for all.
        limit_val_gallery: Number of items in each validation gallery besides the right answers of its
            queries; null for all. If it leaves out any, results are called ``val/limited_gallery/...``.
        val_modes: Modes that validation measures: null for both, or [discriminative], which is much faster.
        test_modes: Modes that the test after training measures: null for both, [discriminative], or [].
        distractors: Whether the test gallery also holds items that answer no query.
        memory_splits: Further splits whose queries the test asks, in galleries of their own, about items that
            training has seen. Name their tasks in recall.memory_tasks.
        require_rewrites: Whether a training sample without a rewrite counts as broken.
        max_broken_share: Largest share of the samples of a split that may be broken and are left out, over
            all processes and since the run began; with more, the run stops and lists them. In training
            another sample of the task takes the place of a broken one.
        too_long: What happens to texts and rewrites with more tokens than model.backbone.prompt allows: their
            sample counts as broken, or they are cut and counted. An instruction is never cut.
        annotated_share: Share of the training pairs that keep their rewrites, more than 0 and at most 1. The
            other pairs train the discriminative embedding only.
        annotated_seed: Seed that chooses these pairs; null for the choice of seed 0. `rime run` gives --seed.
        annotated_batch_share: Share of annotated pairs in each batch, if not every pair is annotated. The
            annotated pairs then repeat more often. Null samples from all pairs alike.
        rewrites: Training pairs to use: all, annotated (a rewrite on both sides) or unannotated (the others,
            for Refine-RL). With none, all are used, none is read, and only the discriminative mode trains.
        hard_negatives: Number of hard negatives of each training pair that are drawn for a batch, as far as
            it has so many. Every query is compared with those of the whole batch.
        positives: The same of further right targets of its query.
        completion: Text that the model learns to write before the generative embedding: rewrite, cot (the
            chain of thought and then the rewrite) or filler (filler tokens, one for each word of the
            rewrite, as a control). cot needs a larger model.backbone.prompt.max_rewrite_tokens.
        order: Weights and caps of the tasks, blocks that mix tasks in a batch, and the window.
        cache: Folder and size of the cache for remote corpora, and how often a copy is tried.
    """

    _train: TrainingPairs | None = None  # with the plan of their batches, from setup("fit") on
    _plan: BatchPlan | None = None
    _train_loader: BatchLoader | None = None

    def __init__(
        self,
        path: str | dict[str, float],
        name_or_path: str,
        prompt: PromptConfig,
        batch_size: int = 64,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tasks: list[str] | None = None,
        eval_batch_size: int = 64,
        limit_val_queries: int | None = None,
        limit_val_gallery: int | None = None,
        val_modes: list[Mode] | None = None,
        test_modes: list[Mode] | None = None,
        distractors: bool = True,
        memory_splits: list[str] | None = None,
        require_rewrites: bool = True,
        max_broken_share: float = 0.0,
        too_long: Literal["broken", "cut"] = "broken",
        annotated_share: float = 1.0,
        annotated_seed: int | None = None,
        annotated_batch_share: float | None = 0.5,
        rewrites: Rewrites = "all",
        completion: CompletionKind = "rewrite",
        hard_negatives: int = 0,
        positives: int = 0,
        order: OrderSettings = OrderSettings(),
        cache: CacheSettings = CacheSettings(),
    ) -> None:
        super().__init__()
        self.order = order
        self.corpora = Corpora.of(path, cache)
        self.path, self.name_or_path, self.prompt = self.corpora.first, name_or_path, prompt
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.num_workers, self.seed, self.annotated_seed = num_workers, seed, annotated_seed
        self.eval_batch_size, self.tasks = eval_batch_size, tasks
        self.limit_val_queries, self.limit_val_gallery = limit_val_queries, limit_val_gallery
        self.val_modes, self.test_modes = val_modes, test_modes
        self.distractors, self.memory_splits = distractors, memory_splits or []
        self.max_broken_share, self.too_long = max_broken_share, too_long
        self.annotated_share, self.annotated_batch_share = annotated_share, annotated_batch_share
        self.require_rewrites, self.rewrites, self.completion = require_rewrites, rewrites, completion
        self.hard_negatives, self.positives = hard_negatives, positives
        self.processor: RimeProcessor | None = None
        self._broken: dict[str, BrokenSamples] = {}
        self._tars = TarFiles()
        self._position = Position()
        self._check_settings()

    def _check_settings(self) -> None:
        at_least(1, "data", self, "batch_size", "eval_batch_size", "steps_per_epoch", "limit_val_queries")
        at_least(0, "data", self, "num_workers", "limit_val_gallery", "hard_negatives", "positives")
        if not 0 <= self.max_broken_share <= 1:
            raise RimeError(
                f"data.max_broken_share must be at least 0 and at most 1, but is {self.max_broken_share}."
            )
        for name in ("annotated_share", "annotated_batch_share"):
            if (share := getattr(self, name)) is not None and not 0 < share <= 1:
                raise RimeError(f"data.{name} must be greater than 0 and at most 1, but is {share}.")
        check_modes("val_modes", self.val_modes)
        check_modes("test_modes", self.test_modes or None)
        if self.tasks is not None and not self.tasks:
            raise RimeError("data.tasks must name a task, or be null for all of them, but is an empty list.")

    def setup(self, stage: str) -> None:
        """Read indices and processor; raise on every fault of the corpus that an index shows."""
        self._position.trainer = self.trainer
        for path in self.corpora.weights:
            read_corpus(path, self.corpora.cache)  # raises on a wrong path before anything is loaded
        if self.processor is None:
            self.processor = RimeProcessor.from_pretrained(self.name_or_path, self.prompt)
        if stage == TrainerFn.FITTING and self._plan is None:
            self._print(self.plan_training().report(self.annotated_share, self.rewrites))
            assert self._plan is not None
            self._print(self._plan.report())

    def plan_training(self) -> TrainingPairs:
        """Plan the batches of training, from the index only.

        Raises:
            RimeError: If the settings and the corpus do not fit together.
        """
        self._train, self._plan = plan_training(
            self.corpora.train(self.tasks),
            self.batch_size,
            self.seed,
            self.annotated_share,
            self.annotated_batch_share,
            self.rewrites,
            self.order,
            self.corpus_weights,
            self.annotated_seed,
        )
        local_batch_size(self.batch_size, self._rank()[1])  # raises before the model is loaded
        if self.require_rewrites:
            self._train.refuse_missing_rewrites(self.max_broken_share)
        return self._train

    def teardown(self, stage: str) -> None:
        """Print which samples were left out, and which texts were cut; of the texts only this process's."""
        if self._train_loader is not None:
            self._train_loader.close()
        for samples in self._broken.values():
            for words in samples.news():
                self._print(words)

    def _print(self, words: str) -> None:
        if self._rank()[0] == 0:
            print(words, flush=True)

    def _samples(self, split: str) -> BrokenSamples:
        """Return what is known about the broken samples of a split."""
        where = f"{self.path}/{split}"
        return self._broken.setdefault(split, BrokenSamples(where, self.max_broken_share))

    # -- training -------------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        pairs, cut = self._train, self.too_long == "cut"
        assert self._plan is not None and pairs is not None and self.processor is not None, (
            "setup comes first"
        )
        reader = ShardReader(
            pairs.entries,
            self.require_rewrites,
            self.completion,
            pairs.hidden,
            self._tars,
            self.prompt.media_limit,
            self.prompt.frame_limit,
            (self.hard_negatives, self.positives),
        )
        self._train_loader = BatchLoader(
            TrainBatches(reader, self.processor, self._plan, *self._rank(), cut),
            self.steps_per_epoch or len(self._plan),
            self._samples("train"),
            self.num_workers,
            self._position,
            self.trainer,
        )
        return self._train_loader

    @property
    def position(self) -> int:
        """The number of global batches trained on since the start; prefetched ones do not count."""
        return self._position.trained

    @property
    def broken(self) -> dict[str, str]:
        """The broken samples found so far on all processes: name of the sample -> what is wrong."""
        return {name: wrong for samples in self._broken.values() for name, wrong in samples.found.items()}

    @property
    def cut(self) -> list[str]:
        """The texts cut so far on this process, such as "train-000000.tar/x (query): text"."""
        return sorted(name for samples in self._broken.values() for name in samples.cut)

    @property
    def data_hash(self) -> str:
        """The SHA-256 hash of all shards of the corpora."""
        return self.corpora.data_hash

    @property
    def corpus_weights(self) -> list[float]:
        """The weight of each corpus of ``data.path``, in order; a corpus may have moved."""
        return list(self.corpora.weights.values())

    def state_dict(self) -> dict[str, Any]:
        broken = {split: dict(samples.found) for split, samples in self._broken.items()}
        return {**self._identity(), "position": self.position, "broken": broken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position of a checkpoint, and the broken samples that were found before it.

        Raises:
            RimeError: If the data or a setting of the data differs from the checkpoint's.
        """
        trainer = self.trainer
        if trainer is not None and trainer.state.fn != TrainerFn.FITTING:
            return  # a checkpoint may be evaluated on other data
        refuse_other(state_dict, self._identity(), self.path)
        self._position.restore(state_dict["position"])
        for split, found in state_dict.get("broken", {}).items():  # an earlier version kept none
            self._samples(split).found.update(found)

    def _identity(self) -> dict[str, Any]:
        tasks = None if self.tasks is None else sorted(self.tasks)
        return {name: getattr(self, name) for name in SAME} | {"tasks": tasks, "order": asdict(self.order)}

    def training_texts(self, most: int | None = None) -> Iterator[Pair]:
        """Yield the training pairs as the run saw them, about ``most`` of them, without their pictures."""
        assert self._train is not None, "setup comes first"
        yield from read_texts(
            TextReader(self._train.entries, hidden=self._train.hidden, tars=self._tars), most
        )

    def caption_texts(self) -> Iterator[Pair]:
        """Yield the captions that the tiny base model learned from, if the corpus has any."""
        if "captions" in self.corpora.splits:
            yield from read_texts(TextReader(self.corpora.split("captions")))

    # -- for Refine-RL ---------------------------------------------------------------------------------

    def anchor_batches(self, num_anchors: int) -> BatchLoader:
        """Return up to ``num_anchors`` training pairs of each task, annotated or not, with distinct targets.

        The batches are equal on all processes. A batch holds one task.
        """
        if self.order.block_size not in (None, self.batch_size):
            raise RimeError(
                "data.order.block_size must be null for Refine-RL, because anchors are those of the one task "
                f"of a batch, but is {self.order.block_size}."
            )
        entries = self.corpora.train(self.tasks)
        chosen = anchors(entries, num_anchors, self.seed)
        return self._pair_loader("train", entries, chosen)

    def sample_batches(self, num_samples: int) -> BatchLoader:
        """Return ``num_samples`` pairs of the val split, chosen evenly from the tasks, to report on.

        A batch holds one task. There is none if validation writes no rewrites.
        """
        num_samples = num_samples if self.evaluation("val").generative else 0
        entries = self.corpora.split("val", self.tasks)
        tasks: dict[str, list[int]] = {}
        for index in sample_per_task(entries, num_samples, self.seed):
            tasks.setdefault(entries[index].dataset, []).append(index)
        return self._pair_loader("val", entries, [tasks[task] for task in sorted(tasks)])

    def _pair_loader(self, split: str, entries: Samples, groups: list[list[int]]) -> BatchLoader:
        assert self.processor is not None, "setup() comes first"
        size = self.eval_batch_size
        batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        return BatchLoader(
            PairBatches(self._reader(entries), self.processor, batches, self.too_long == "cut"),
            len(batches),
            self._samples(split),
            trainer=self.trainer,
        )

    def _reader(self, entries: Samples) -> ShardReader:
        prompt = self.prompt
        return ShardReader(
            entries,
            completion=self.completion,
            tars=self._tars,
            max_media=prompt.media_limit,
            max_frames=prompt.frame_limit,
        )

    # -- evaluation -----------------------------------------------------------------------------------

    def evaluation(self, split: str) -> Evaluation:
        """Return how ``val`` or ``test`` is evaluated."""
        modes = self.val_modes if split == "val" else self.test_modes
        limited = split == "val" and self.limit_val_gallery is not None
        return Evaluation(modes is None or "generative" in modes, self._val_plan.left_out if limited else 0)

    @property
    def tests(self) -> bool:
        """Whether a test follows the training."""
        return self.test_modes != []

    @cached_property
    def _val_plan(self) -> EvalPlan:
        return val_plan(self.corpora, self.tasks, self.limit_val_queries, self.limit_val_gallery, self.seed)

    def query_tasks(self, split: str) -> set[str]:
        """Return the tasks that a split has queries of; none if the corpus lacks the split."""
        limit = self.limit_val_queries if split == "val" else None
        return query_tasks(self.corpora, split, self.tasks, limit)

    def val_dataloader(self) -> list[BatchLoader]:
        """Return two loaders: the queries of the val split and its gallery."""
        return self._eval_loaders("val", self._val_plan)

    def test_dataloader(self) -> list[BatchLoader]:
        """Return two loaders: the queries of the test and memory splits, and their galleries."""
        plan = test_plan(self.corpora, self.tasks, self.memory_splits, self.distractors)
        return self._eval_loaders("test", plan)

    def _eval_loaders(self, split: str, plan: EvalPlan) -> list[BatchLoader]:
        return [self._eval_loader(split, plan, "query"), self._eval_loader(split, plan, "target")]

    def _eval_loader(self, split: str, plan: EvalPlan, side: Side) -> BatchLoader:
        assert self.processor is not None, "setup() comes first"
        kinds, batches = plan.kinds(side), plan.batches(side, self.eval_batch_size, *self._rank())
        reader, cut = self._reader(plan.entries), self.too_long == "cut"
        generative = self.evaluation(split).generative
        return BatchLoader(
            EvalBatches(reader, self.processor, side, kinds, batches, cut, generative),
            len(batches),
            self._samples(split),
            self.num_workers,
            trainer=self.trainer,
        )

    # -- both -----------------------------------------------------------------------------------------

    def _rank(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes that read different data."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)
