"""What the stages share: building the backbone, gathering pairs, evaluating, optimising.

Each stage adds a ``training_step`` and nothing else. Reading order: this file, then sft.py, then cma.py.
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
from rime_pl.backbone.mllm import Backbone, BackboneOutput
from rime_pl.backbone.quantization import describe
from rime_pl.distributed.gather import all_gather_rows, all_reduce_sum, world_size
from rime_pl.distributed.sharding import shard_backbone
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.losses.contrastive import same_content
from rime_pl.losses.language_modeling import token_cross_entropy
from rime_pl.processing import RimeProcessor
from rime_pl.types import (
    Batch,
    Completions,
    EvalBatch,
    EvalOutput,
    ModeEmbeddings,
    RewriteChange,
    RimeError,
    Rows,
)


@dataclass
class PairEmbeddings:
    """Both embeddings of both sides of the *global* batch of N pairs."""

    query: ModeEmbeddings  # (N, D) each
    target: ModeEmbeddings  # (N, D) each
    false_negatives: Tensor  # (N, N) bool
    annotated: Tensor  # (N,) bool: both sides have a rewrite

    def with_rewrites(self) -> PairEmbeddings:
        """The annotated pairs alone: all that the generative terms learn from.

        A pair without a rewrite has read an empty one; contrast on it would teach <gen_emb> to do without.
        """
        rows = self.annotated
        query, target = (
            ModeEmbeddings(side.disc[rows], side.gen[rows]) for side in (self.query, self.target)
        )
        return PairEmbeddings(query, target, self.false_negatives[rows][:, rows], rows[rows])


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
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        temperature: float = 0.02,
        lambda_ce: float = 1.0,
        learning_rate: float = 1e-4,
        warmup_steps: int = 20,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise RimeError(f"model.temperature={temperature} must be > 0; it divides the cosines.")
        self.config = backbone
        self.init_adapter_from = init_adapter_from
        self.temperature = temperature
        self.lambda_ce = lambda_ce
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        # Lightning's checkpoints hold what trains; the frozen base is remade from its own folder.
        self.strict_loading = False
        self.backbone: Backbone | None = None

    # -- building -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the backbone on this rank's device, and shard it when the strategy asks for that."""
        if self.backbone is not None:
            return
        processor = RimeProcessor.from_pretrained(self.config.name_or_path, self.config.prompt)
        # LoRA's random start depends on the seed alone, not on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # not self.device, which is still the CPU here
            backbone = Backbone(self.config, processor, self.trainer.strategy.root_device)
        if self.init_adapter_from:
            load_adapter_weights(backbone.peft, self.init_adapter_from, processor, backbone.base_hash)
        if self.trainer.is_global_zero:
            print(describe(backbone), flush=True)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
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

    # -- training -------------------------------------------------------------------------------------

    def encode(self, rows: Rows) -> BackboneOutput:
        """One forward of one side: both embeddings, and logits where there is a rewrite to learn."""
        return self.model(rows.prompts, rows.completions, label_mask=rows.annotated)

    def gather(self, query: BackboneOutput, target: BackboneOutput, batch: Batch) -> PairEmbeddings:
        """The global batch from this rank's rows; the one place where training communicates."""
        assert query.gen is not None and target.gen is not None, "encode() reads both modes"
        local = torch.cat([query.disc, query.gen, target.disc, target.gen], dim=1)
        annotated = batch.query.annotated & batch.target.annotated
        known = torch.stack([batch.query_content, batch.target_content, annotated.long()], dim=1)
        q_disc, q_gen, t_disc, t_gen = all_gather_rows(local).chunk(4, dim=1)
        known = all_gather_rows(known)
        return PairEmbeddings(
            ModeEmbeddings(q_disc, q_gen),
            ModeEmbeddings(t_disc, t_gen),
            same_content(known[:, 0], known[:, 1]),
            known[:, 2].bool(),
        )

    def rewrite_cross_entropy(self, side: BackboneOutput) -> Tensor:
        """This rank's share of one side's cross-entropy; the mean over ranks is that of the global batch."""
        assert side.logits is not None and side.labels is not None, "encode() labels the rewrites"
        total = all_reduce_sum(torch.tensor(len(side.labels), device=side.labels.device))
        # times world size: DDP and FSDP take the mean of the ranks' gradients
        return token_cross_entropy(side.logits, side.labels, total) * world_size()

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
        disc = self.model(batch.prompts).disc
        after_disc = time.perf_counter()
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        own = write_rewrites(self.model, batch.prompts, synced=sharded)
        gen = self.model(batch.prompts, own.completions).gen
        after_gen = time.perf_counter()
        return EvalOutput(
            embeddings=ModeEmbeddings(disc, gen),
            traces=self.trace_probe(batch, own.completions) if batch.side == "query" else {},
            rewrites=self.model.processor.decode(own.completions),
            rewrite_lengths=own.lengths,
            well_formed=own.well_formed,
            seconds={"discriminative": after_disc - start, "generative": after_gen - after_disc},
        )

    def rewrite_changes(self) -> list[RewriteChange]:
        """Queries with rewrites before and after, to look at; only Refine-RL has a before."""
        return []

    def trace_probe(self, batch: EvalBatch, own: Completions) -> dict[str, Tensor]:
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
        images = self.model.encode_images(batch.prompts)
        return {name: self.model(batch.prompts, c, image_features=images).gen for name, c in rewrites.items()}


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
