"""What the stages share: building the backbone, gathering pairs, evaluating, optimising.

SFT and CMA add a ``training_step`` and nothing else; Refine-RL also draws and rewards rewrites. Reading
order: this file, then sft.py, cma.py, refine_rl.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from rime_pl.backbone.adapters import load_adapter_weights
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.precision import check_precision
from rime_pl.backbone.quantization import describe
from rime_pl.errors import RimeError
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.losses.language_modeling import token_cross_entropy
from rime_pl.processing import RimeProcessor
from rime_pl.scaling.gather import all_gather_rows, all_reduce_max, all_reduce_sum, world_size
from rime_pl.scaling.gradient_cache import GradientCache, in_row_order
from rime_pl.scaling.micro_batches import micro_batches, split_to
from rime_pl.scaling.sharding import shard_backbone
from rime_pl.types import (
    Batch,
    Completions,
    EncodedSide,
    EvalBatch,
    EvalOutput,
    ModeEmbeddings,
    RewriteChange,
    Rows,
)


@dataclass
class PairEmbeddings:
    """Both embeddings of both sides of the *global* batch of N pairs."""

    query: ModeEmbeddings  # (N, D) each
    target: ModeEmbeddings  # (N, D) each
    contents: Tensor  # (N, 2) int64: content of query and target
    annotated: Tensor  # (N,) bool: both sides have a rewrite

    def with_rewrites(self) -> PairEmbeddings:
        """The annotated pairs alone: all that the generative terms learn from.

        A pair without a rewrite has read an empty one; contrast on it would teach <gen_emb> to do without.
        """
        rows = self.annotated
        query, target = (
            ModeEmbeddings(side.disc[rows], side.gen[rows]) for side in (self.query, self.target)
        )
        return PairEmbeddings(query, target, self.contents[rows], rows[rows])


class RimeModule(L.LightningModule):
    """Base of the stages.

    Args:
        backbone: Checkpoint, bits, adapters and prompt layout.
        init_adapter_from: Adapter folder of an earlier stage to start from; ``--ckpt_path`` is for resuming.
        temperature: Divisor of the cosines in the contrastive losses.
        lambda_ce: Weight of the rewrite's cross-entropy.
        learning_rate: Peak, reached after ``warmup_steps`` and decayed to 0 by a cosine.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of the adapter matrices.
        micro_batch_size: Rows that go through the model together on each process; null for all at once.
            Batch, negatives and gradients stay the same (gradient cache, docs/how-to/large-batches.md).
        micro_batch_tokens: The same by tokens, padding counted, in place of rows.
        gradient_cache: Micro-batches run twice and keep nothing between. False: they run once and keep their
            activations, which saves only the padding of rows of unlike length, and time.
        reuse_vision: Keep the images' features between the two passes of the gradient cache: faster, for
            memory that grows with the batch.
    """

    may_diverge = False  # whether the stage watches for that, and stops with a DivergedError

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        temperature: float = 0.02,
        lambda_ce: float = 1.0,
        learning_rate: float = 1e-4,
        warmup_steps: int = 20,
        weight_decay: float = 0.0,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        gradient_cache: bool = True,
        reuse_vision: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise RimeError(f"model.temperature={temperature} must be > 0; it divides the cosines.")
        _check_micro_batches(micro_batch_size, micro_batch_tokens)
        self.config = backbone
        self.init_adapter_from = init_adapter_from
        self.temperature = temperature
        self.lambda_ce = lambda_ce
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.gradient_cache = gradient_cache
        self.reuse_vision = reuse_vision
        self.cache = GradientCache()
        # Lightning's checkpoints hold what trains; the frozen base is remade from its own folder.
        self.strict_loading = False
        self.backbone: Backbone | None = None

    # -- building -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the backbone on this rank's device, and shard it when the strategy asks for that."""
        if self.backbone is not None:
            return
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy)
        check_precision(self.trainer.precision, sharded, self.config.load_in_4bit)
        processor = RimeProcessor.from_pretrained(self.config.name_or_path, self.config.prompt)
        # LoRA's random start depends on the seed alone, not on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # not self.device, which is still the CPU here
            backbone = Backbone(self.config, processor, strategy.root_device)
        if self.init_adapter_from:
            load_adapter_weights(backbone.peft, self.init_adapter_from, processor, backbone.base_hash)
        if self.trainer.is_global_zero:
            print(describe(backbone), flush=True)
        if isinstance(strategy, ModelParallelStrategy):
            if strategy._save_distributed_checkpoint:
                raise RimeError(
                    "trainer.strategy.init_args.save_distributed_checkpoint=true: checkpoints hold what "
                    "trains, in one file for any number of processes. Set it to false."
                )
            assert self.device_mesh is not None, "ModelParallelStrategy sets it before configure_model"
            shard_backbone(backbone, self.device_mesh["data_parallel"])
        self.backbone = backbone

    @property
    def model(self) -> Backbone:
        """The backbone, once ``configure_model`` has run."""
        if self.backbone is None:
            raise RimeError("the backbone is built in configure_model(); it is not there yet.")
        return self.backbone

    def configure_optimizers(self) -> Any:
        matrices = [p for n, p in self.named_parameters() if p.requires_grad and "lora" in n]
        rows = [p for n, p in self.named_parameters() if p.requires_grad and "lora" not in n]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": rows, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, min(self.warmup_steps, steps // 2), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains: the base would make each checkpoint as large as the model."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["base_hash"] = self.model.base_hash
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):  # which numbers them so by itself
            states = zip(self.trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False)
            checkpoint["optimizer_states"] = [_by_place(self, *both) for both in states]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another base: the frozen weights are not in the checkpoint.

        Raises:
            RimeError: If the base under model.backbone.name_or_path has changed.
        """
        if checkpoint["base_hash"] != self.model.base_hash:
            raise RimeError(
                f"model.backbone.name_or_path={self.config.name_or_path} is another base than the one this "
                "run was started with. Give the old base, or start a new run folder."
            )

    def on_train_start(self) -> None:
        """What is typed counts: a resumed optimiser brings its old learning rate and weight decay along."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        schedule.base_lrs = [self.learning_rate] * len(optimizer.param_groups)
        decays = (self.weight_decay, 0.0)
        for group, decay, share in zip(optimizer.param_groups, decays, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["weight_decay"] = self.learning_rate, decay
            group["lr"] = self.learning_rate * share(schedule.last_epoch)

    # -- training -------------------------------------------------------------------------------------

    def encode(self, rows: Rows) -> EncodedSide:
        """Both embeddings of one side and its share of the cross-entropy: one forward, or micro-batches."""
        num_labels = all_reduce_sum((rows.completions.mask * rows.annotated.unsqueeze(1)).sum())
        if self.micro_batch_size is None and self.micro_batch_tokens is None:
            return self.forward_rows(rows, num_labels)
        groups = micro_batches(rows.lengths(), self.micro_batch_size, self.micro_batch_tokens)
        groups = split_to(groups, all_reduce_max(len(groups), rows.annotated.device))
        if not self.gradient_cache:
            return in_row_order([self.forward_rows(rows.select(g), num_labels) for g in groups], groups)
        features: dict[int, Any] = {}

        def run(number: int) -> EncodedSide:
            part = rows.select(groups[number])
            if self.reuse_vision and number not in features:
                features[number] = self.model.encode_images(part.prompts)
            return self.forward_rows(part, num_labels, features.get(number))

        return self.cache.encode(run, groups, rows.annotated.device)

    def forward_rows(self, rows: Rows, num_labels: Tensor, image_features: Any | None = None) -> EncodedSide:
        """One forward.

        Args:
            rows: Any part of one side.
            num_labels: Labels of that side in the whole global batch.
            image_features: See :meth:`Backbone.encode_images`.
        """
        out = self.model(rows.prompts, rows.completions, rows.annotated, image_features)
        # times world size: DDP and FSDP take the mean of the ranks' gradients
        cross_entropy = token_cross_entropy(out.logits, out.labels, num_labels) * world_size()
        return EncodedSide(out.disc, out.gen, cross_entropy)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning with the loss: into the weights, or to the embeddings and, from there, on."""
        loss.backward(*args, **kwargs)
        self.cache.replay(self.model)

    def gather(self, query: EncodedSide, target: EncodedSide, batch: Batch) -> PairEmbeddings:
        """The global batch from this rank's rows: embeddings and contents of all ranks."""
        local = torch.cat([query.disc, query.gen, target.disc, target.gen], dim=1)
        annotated = batch.query.annotated & batch.target.annotated
        known = torch.stack([batch.query_content, batch.target_content, annotated.long()], dim=1)
        q_disc, q_gen, t_disc, t_gen = all_gather_rows(local).chunk(4, dim=1)
        known = all_gather_rows(known)
        return PairEmbeddings(
            ModeEmbeddings(q_disc, q_gen),
            ModeEmbeddings(t_disc, t_gen),
            known[:, :2],
            known[:, 2].bool(),
        )

    def log_losses(self, batch: Batch, **losses: Tensor) -> None:
        """Each part of the loss by itself, as means over ranks; ``loss`` also in the progress bar."""
        for name, value in losses.items():
            key = "train/loss" if name == "total" else f"train/loss_{name}"
            self.log(
                key,
                value.detach(),
                prog_bar=name == "total",
                sync_dist=world_size() > 1,
                batch_size=len(batch),
            )

    # -- evaluation -----------------------------------------------------------------------------------

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> EvalOutput:  # type: ignore[override]
        """Embed items in both modes; queries also with the trace probe's rewrites."""
        return self.evaluate(batch)

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> EvalOutput:  # type: ignore[override]
        return self.evaluate(batch)

    @torch.no_grad()
    def evaluate(self, batch: EvalBatch) -> EvalOutput:
        """See :class:`EvalOutput`; the seconds are those of each mode by itself, from tokens to embedding."""
        start = time.perf_counter()
        images = self.model.encode_images(batch.prompts)
        disc = self.model(batch.prompts, image_features=images).disc
        after_disc = time.perf_counter()
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        own = write_rewrites(self.model, batch.prompts, synced=sharded)  # looks at the images itself
        gen = self.model(batch.prompts, own.completions, image_features=images).gen
        after_gen = time.perf_counter()
        return EvalOutput(
            embeddings=ModeEmbeddings(disc, gen),
            completions=own.completions,
            ablation=self.trace_probe(batch, own.completions, images) if batch.side == "query" else {},
            rewrites=self.model.processor.decode(own.completions),
            rewrite_lengths=own.lengths,
            well_formed=own.well_formed,
            seconds={"discriminative": after_disc - start, "generative": after_gen - after_disc},
        )

    def rewrite_changes(self) -> list[RewriteChange]:
        """Queries with rewrites before and after, to look at; only Refine-RL has a before."""
        return []

    def trace_probe(self, batch: EvalBatch, own: Completions, images: Any | None) -> dict[str, Tensor]:
        """Generative embeddings of the queries with rewrites that are not their own.

        Returns:
            "reference": the annotated rewrite; "shuffled": another query's own one, of different content;
            "empty": none. (R, D) each.
        """
        others = derange(batch.relevant_ids)
        rewrites = {
            "reference": batch.completions,
            "shuffled": own.select(others),
            "empty": empty_completions(len(own), 2, self.model.processor, self.device),
        }
        return {name: self.model(batch.prompts, c, image_features=images).gen for name, c in rewrites.items()}


def _by_place(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """An optimiser's state with each parameter called by its place in the module, not in the optimiser.

    So Lightning reads it into a sharded run; a run on one process goes by the order of the groups alone.
    """
    place = {id(parameter): number for number, parameter in enumerate(module.parameters())}
    name = {
        old: place[id(parameter)]
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, old in zip(group["params"], saved["params"], strict=True)
    }
    return {
        "state": {name[old]: value for old, value in state["state"].items()},
        "param_groups": [
            {**saved, "params": [name[old] for old in saved["params"]]} for saved in state["param_groups"]
        ],
    }


def _check_micro_batches(size: int | None, tokens: int | None) -> None:
    if size is not None and tokens is not None:
        raise RimeError(
            f"model.micro_batch_size={size} and model.micro_batch_tokens={tokens}: give one of the two."
        )
    for name, value in (("size", size), ("tokens", tokens)):
        if value is not None and value < 1:
            raise RimeError(
                f"model.micro_batch_{name}={value} must be 1 or more; null takes the whole batch at once."
            )


def derange(content: Tensor, allowed: Tensor | None = None) -> Tensor:
    """For each row the nearest following row (cyclically) of other content; itself when there is none.

    Args:
        content: (R,) int64 content ids.
        allowed: (R,) bool, rows that may be picked; None for all.

    Example:
        >>> derange(torch.tensor([4, 4, 5, 6])).tolist()
        [2, 2, 3, 0]
    """
    rows = len(content)
    index = torch.arange(rows, device=content.device)
    step = (index.unsqueeze(1) + 1 + index) % rows  # (R, R): row i, then its followers in order
    differs = content[step] != content.unsqueeze(1)
    if allowed is not None:
        differs &= allowed[step]
    return step[index, differs.int().argmax(dim=1)].where(differs.any(dim=1), index)


def empty_completions(rows: int, width: int, processor: RimeProcessor, device: torch.device) -> Completions:
    """Empty rewrites, <gen_emb> and end of turn alone, padded to ``width`` >= 2 tokens."""
    ids = torch.full((rows, width), processor.pad_id, device=device)
    ids[:, 0], ids[:, 1] = processor.gen_id, processor.turn_end_id
    mask = torch.zeros_like(ids)
    mask[:, :2] = 1
    return Completions(ids, mask)
