"""What SFT and CMA share: encode both sides of a batch, with or without micro-batches, and gather them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import MediaFeatures
from rime_pl.bounds import at_least, greater_than_0
from rime_pl.errors import RimeError
from rime_pl.losses.contrastive import Further, Weighting, info_nce, mean_negatives
from rime_pl.losses.language_modeling import token_cross_entropy
from rime_pl.modules.base import RimeModule
from rime_pl.modules.settings import MicroBatchSettings, NegativeSettings, OptimizerSettings
from rime_pl.scaling.gather import all_gather_rows, all_reduce_max, all_reduce_sum, rank, world_size
from rime_pl.scaling.gradient_cache import GradientCache, in_row_order
from rime_pl.scaling.micro_batches import micro_batches, split_to
from rime_pl.types import Batch, EncodedSide, FurtherRows, ModeEmbeddings, Rows


@dataclass
class FurtherTargets:
    """Both embeddings of the K further targets of the global batch."""

    embeddings: ModeEmbeddings  # (K, D) each
    owner: Tensor  # (K,) int64: row of the global batch
    content: Tensor  # (K,) int64
    positive: Tensor  # (K,) bool
    rewritten: Tensor  # (K,) bool

    def of(self, mode: str) -> Further:
        """Return them as the loss takes them; ``mode`` is "disc" or "gen"."""
        return Further(getattr(self.embeddings, mode), self.owner, self.content, self.positive)

    def select(self, rows: Tensor, owner: Tensor) -> FurtherTargets:
        """Return some of them, (K,) bool, with other rows as owners, (K,) int64."""
        embeddings = ModeEmbeddings(self.embeddings.disc[rows], self.embeddings.gen[rows])
        return FurtherTargets(
            embeddings, owner[rows], self.content[rows], self.positive[rows], self.rewritten[rows]
        )


@dataclass
class PairEmbeddings:
    """Both embeddings of both sides of the *global* batch of N pairs."""

    query: ModeEmbeddings  # (N, D) each
    target: ModeEmbeddings  # (N, D) each
    contents: Tensor  # (N, 2) int64: content of query and target
    annotated: Tensor  # (N,) bool: both sides have a rewrite
    further: FurtherTargets | None = None

    def with_rewrites(self) -> PairEmbeddings:
        """Return only the annotated pairs: all that the generative terms learn from.

        A pair without a rewrite was encoded with an empty one. A contrastive loss on it would teach <gen_emb>
        to work without a rewrite.
        """
        rows = self.annotated
        query, target = (
            ModeEmbeddings(side.disc[rows], side.gen[rows]) for side in (self.query, self.target)
        )
        further = self.further
        if further is not None:
            kept = further.rewritten & rows[further.owner]
            further = further.select(kept, rows.cumsum(0)[further.owner] - 1)
        return PairEmbeddings(query, target, self.contents[rows], rows[rows], further)

    def cut(self, size: int) -> PairEmbeddings:
        """Return the pairs with the first ``size`` numbers of each embedding, normalised again."""
        further = self.further
        if further is not None:
            further = replace(further, embeddings=first_numbers(further.embeddings, size))
        query, target = (first_numbers(side, size) for side in (self.query, self.target))
        return replace(self, query=query, target=target, further=further)


def first_numbers(side: ModeEmbeddings, size: int) -> ModeEmbeddings:
    """Return the first ``size`` numbers of both embeddings, normalised again.

    Source: Matryoshka representation learning, arXiv 2205.13147.
    """
    return ModeEmbeddings(*(F.normalize(one[:, :size], dim=-1) for one in (side.disc, side.gen)))


class ContrastiveModule(RimeModule):
    """Base class of SFT and CMA.

    Args:
        backbone: Checkpoint, quantization, adapters and prompt layout.
        init_adapter_from: Adapter folder of an earlier stage to start from (default: a new adapter).
        temperature: Divisor of the cosines in the contrastive losses.
        lambda_ce: Weight of the rewrite's cross-entropy.
        dimensions: Further lengths at which embeddings are to be useful, such as [64, 128]: all contrastive
            terms are means over them and the whole length (Matryoshka).
        optimizer: Learning rate, warm-up and weight decay.
        micro_batches: Micro-batches and gradient cache.
        negatives: How negatives count in the contrastive losses.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        temperature: float = 0.02,
        lambda_ce: float = 1.0,
        dimensions: list[int] | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),
        micro_batches: MicroBatchSettings = MicroBatchSettings(),
        negatives: NegativeSettings = NegativeSettings(),
    ) -> None:
        super().__init__(backbone, init_adapter_from, optimizer)
        self.temperature = temperature
        self.lambda_ce = lambda_ce
        self.dimensions = sorted(set(dimensions or []))
        if self.dimensions and self.dimensions[0] < 1:
            raise RimeError(f"model.dimensions must be 1 or more, but has {self.dimensions[0]}.")
        self.weighting = Weighting(negatives.hardness, negatives.false_negative_margin)
        greater_than_0("model", self, "temperature")
        at_least(0, "model", self, "lambda_ce")
        if lambda_ce and backbone.prompt.num_latent_tokens:
            raise RimeError(
                "model.lambda_ce must be 0 with model.backbone.prompt.num_latent_tokens, because latent "
                f"tokens are never written, but is {lambda_ce}."
            )
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
        groups = self.groups_of(rows)
        groups = split_to(groups, all_reduce_max(len(groups), rows.annotated.device))
        if not settings.gradient_cache:
            return in_row_order([self.forward_rows(rows.select(g), num_labels) for g in groups], groups)
        # features of a tower that trains are a part of the graph, so each pass needs its own
        reuse = settings.reuse_vision and not self.config.trains_tower
        features: dict[int, Any] = {}

        def run(number: int) -> EncodedSide:
            part = rows.select(groups[number])
            if reuse and number not in features:
                features[number] = self.model.encode_media(part.prompts)
            return self.forward_rows(part, num_labels, features.get(number))

        return self.cache.encode(run, groups, rows.annotated.device)

    def groups_of(self, rows: Rows) -> list[Tensor]:
        """Return the micro-batches of rows on this rank."""
        return micro_batches(rows.lengths().sum(1), self.micro_batches.size, self.micro_batches.tokens)

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
        self._refuse_long_dimensions(query.disc.shape[1])
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
            None if batch.further is None else self.gather_further(batch.further, len(batch)),
        )

    def gather_further(self, further: FurtherRows, rows: int) -> FurtherTargets:
        """Encode the further targets of this rank, and return those of all ranks, in rank order.

        Args:
            further: Of this rank, at least one.
            rows: Pairs of each rank.
        """
        if (
            not self.micro_batches.whole_batch
        ):  # each rank runs as many micro-batches, so it needs rows for them
            count = all_reduce_max(len(self.groups_of(further.rows)), further.owner.device)
            further = further.at_least(count)
        side = self.encode(further.rows)
        flags = torch.stack([further.positive, further.rewritten, further.used], dim=1).long()
        about = torch.cat([further.owner[:, None] + rank() * rows, further.content[:, None], flags], dim=1)
        missing = all_reduce_max(len(further), about.device) - len(further)  # ranks hold as many rows
        local = torch.cat([side.disc, side.gen], dim=1)
        vectors, known = (all_gather_rows(F.pad(part, (0, 0, 0, missing))) for part in (local, about))
        used = known[:, 4].bool()
        disc, gen = vectors[used].chunk(2, dim=1)
        known = known[used]
        return FurtherTargets(
            ModeEmbeddings(disc, gen), known[:, 0], known[:, 1], known[:, 2].bool(), known[:, 3].bool()
        )

    def nce(self, pairs: PairEmbeddings, mode: str) -> Tensor:
        """Return the contrastive loss of one mode, "disc" or "gen", on both sides."""
        return info_nce(
            getattr(pairs.query, mode),
            getattr(pairs.target, mode),
            self.temperature,
            pairs.contents,
            None if pairs.further is None else pairs.further.of(mode),
            self.weighting,
        )

    def over_dimensions(
        self, pairs: PairEmbeddings, terms: Callable[[PairEmbeddings], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the means of contrastive terms over ``dimensions`` and the whole length."""
        found = [terms(pairs), *(terms(pairs.cut(size)) for size in self.dimensions)]
        return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}

    def _refuse_long_dimensions(self, width: int) -> None:
        if self.dimensions and self.dimensions[-1] >= width:
            raise RimeError(
                f"model.dimensions must be less than the {width} numbers of an embedding, but has "
                f"{self.dimensions[-1]}. The whole length is always trained."
            )

    def log_negatives(self, pairs: PairEmbeddings, rewritten: PairEmbeddings) -> None:
        """Log the negatives of a query in both modes: the generative losses see only annotated pairs."""
        disc, gen = (
            mean_negatives(one.contents, None if one.further is None else one.further.of("disc"))
            for one in (pairs, rewritten)
        )
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
