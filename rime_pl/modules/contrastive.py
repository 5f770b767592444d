"""What SFT and CMA share: encode both sides of a batch, with or without micro-batches, and gather them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import MediaFeatures
from rime_pl.bounds import at_least, greater_than_0
from rime_pl.errors import RimeError
from rime_pl.losses.contrastive import mean_negatives
from rime_pl.losses.language_modeling import token_cross_entropy
from rime_pl.modules.base import RimeModule
from rime_pl.modules.settings import MicroBatchSettings, OptimizerSettings
from rime_pl.scaling.gather import all_gather_rows, all_reduce_max, all_reduce_sum, world_size
from rime_pl.scaling.gradient_cache import GradientCache, in_row_order
from rime_pl.scaling.micro_batches import micro_batches, split_to
from rime_pl.types import Batch, EncodedSide, ModeEmbeddings, Rows


@dataclass
class PairEmbeddings:
    """Both embeddings of both sides of the *global* batch of N pairs."""

    query: ModeEmbeddings  # (N, D) each
    target: ModeEmbeddings  # (N, D) each
    contents: Tensor  # (N, 2) int64: content of query and target
    annotated: Tensor  # (N,) bool: both sides have a rewrite

    def with_rewrites(self) -> PairEmbeddings:
        """Return only the annotated pairs: all that the generative terms learn from.

        A pair without a rewrite was encoded with an empty one. A contrastive loss on it would teach <gen_emb>
        to work without a rewrite.
        """
        rows = self.annotated
        query, target = (
            ModeEmbeddings(side.disc[rows], side.gen[rows]) for side in (self.query, self.target)
        )
        return PairEmbeddings(query, target, self.contents[rows], rows[rows])


class ContrastiveModule(RimeModule):
    """Base class of SFT and CMA.

    Args:
        backbone: Checkpoint, quantization, adapters and prompt layout.
        init_adapter_from: Adapter folder of an earlier stage to start from (default: a new adapter).
        temperature: Divisor of the cosines in the contrastive losses.
        lambda_ce: Weight of the rewrite's cross-entropy.
        optimizer: Learning rate, warm-up and weight decay.
        micro_batches: Micro-batches and gradient cache.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        temperature: float = 0.02,
        lambda_ce: float = 1.0,
        optimizer: OptimizerSettings = OptimizerSettings(),
        micro_batches: MicroBatchSettings = MicroBatchSettings(),
    ) -> None:
        super().__init__(backbone, init_adapter_from, optimizer)
        self.temperature = temperature
        self.lambda_ce = lambda_ce
        greater_than_0("model", self, "temperature")
        at_least(0, "model", self, "lambda_ce")
        self.micro_batches = micro_batches
        self.cache = GradientCache()
        self._negatives: list[tuple[float, float]] = []  # of each step: discriminative, generative

    def on_fit_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)  # None: a loader was handed over instead
        if data is not None and data.batch_size < 2:
            raise RimeError(
                "data.batch_size must be 2 or more, because a query needs the target of another pair as its "
                f"negative, but is {data.batch_size}."
            )

    @property
    def negatives_per_query(self) -> dict[str, float] | None:
        """Mean number of negatives of a query, by mode, over the steps since the start or the last resume."""
        if not self._negatives:
            return None
        disc, gen = (sum(values) / len(values) for values in zip(*self._negatives, strict=True))
        return {"discriminative": disc, "generative": gen}

    def encode(self, rows: Rows, num_labels: Tensor | None = None) -> EncodedSide:
        """Return both embeddings of one side and its share of the cross-entropy.

        With micro-batches the rows go through the model in groups, twice with the gradient cache.

        Args:
            rows: The side, or a part of it.
            num_labels: From :meth:`count_labels` of the whole side (default: ``rows`` are the whole side).
        """
        num_labels = self.count_labels(rows) if num_labels is None else num_labels
        settings = self.micro_batches
        if settings.whole_batch:
            return self.forward_rows(rows, num_labels)
        groups = micro_batches(rows.lengths().sum(1), settings.size, settings.tokens)
        groups = split_to(groups, all_reduce_max(len(groups), rows.annotated.device))
        if not settings.gradient_cache:
            return in_row_order([self.forward_rows(rows.select(g), num_labels) for g in groups], groups)
        features: dict[int, Any] = {}

        def run(number: int) -> EncodedSide:
            part = rows.select(groups[number])
            if settings.reuse_vision and number not in features:
                features[number] = self.model.encode_media(part.prompts)
            return self.forward_rows(part, num_labels, features.get(number))

        return self.cache.encode(run, groups, rows.annotated.device)

    def count_labels(self, side: Rows) -> Tensor:
        """Return the number of labels of one side in the whole global batch."""
        return all_reduce_sum((side.completions.mask * side.annotated.unsqueeze(1)).sum())

    def forward_rows(
        self, rows: Rows, num_labels: Tensor, features: MediaFeatures | None = None
    ) -> EncodedSide:
        """Return the same for any rows of one side, from one forward.

        Args:
            rows: Rows of one side.
            num_labels: From :meth:`count_labels`.
            features: From :meth:`Backbone.encode_media`; None to encode the media here.
        """
        out = self.model(rows.prompts, rows.completions, rows.labels, features, rows.wrong)
        # times world size, because DDP and FSDP average the gradients over the ranks
        cross_entropy = token_cross_entropy(out.logprobs, num_labels) * world_size()
        return EncodedSide(out.disc, out.gen, cross_entropy, out.alternative)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward for Lightning: into the weights, with micro-batches in a second pass."""
        loss.backward(*args, **kwargs)
        self.cache.replay(self.model)

    def gather(self, query: EncodedSide, target: EncodedSide, batch: Batch) -> PairEmbeddings:
        """Return the global batch: embeddings and contents of all ranks, in rank order."""
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

    def log_negatives(self, pairs: PairEmbeddings, rewritten: PairEmbeddings) -> None:
        """Log the negatives of a query in both modes: the generative losses see only annotated pairs."""
        disc, gen = mean_negatives(pairs.contents), mean_negatives(rewritten.contents)
        self._negatives.append((float(disc), float(gen)))
        for mode, value in (("disc", disc), ("gen", gen)):
            self.log(f"train/negatives_{mode}", value, sync_dist=world_size() > 1, batch_size=1)

    def log_losses(self, batch: Batch, **losses: Tensor) -> None:
        """Log each term of the loss as a mean over ranks; the total also in the progress bar."""
        for name, value in losses.items():
            key = "train/loss" if name == "total" else f"train/loss_{name}"
            self.log(
                key,
                value.detach(),
                prog_bar=name == "total",
                sync_dist=world_size() > 1,
                batch_size=len(batch),
            )
