"""Stage 2, Cross-Mode Alignment (CMA): both spaces meet, and the rewrite stays in use while they do.

We worked from the paper's abstract, model card and its predecessor UME-R1 (arXiv 2511.00405), without access
to the equations in the paper's body. UME-R1 has no such stage. Deliberate differences:

- Paper: the purpose is the paper's: any mode retrieves any mode. The formula of the alignment is ours.
- Paper: the decisive term is ours. <gen_emb> attends to <disc_emb>, so plain alignment can be solved by
  copying the discriminative embedding, and the rewrite becomes decoration. A query with a wrong rewrite must
  therefore find the target worse than with its own.
- Paper: SFT's terms stay in the loss, so that the model keeps writing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.backbone.config import BackboneConfig
from rime_pl.bounds import at_least
from rime_pl.errors import RimeError
from rime_pl.losses.alignment import cross_mode_alignment, decisive_rewrite
from rime_pl.metrics.derangement import derange
from rime_pl.modules.contrastive import ContrastiveModule, PairEmbeddings
from rime_pl.modules.settings import MicroBatchSettings, NegativeSettings, OptimizerSettings
from rime_pl.modules.wrong_rewrites import empty_completions
from rime_pl.scaling.gather import all_gather_completions, all_gather_rows, rank, world_size
from rime_pl.scaling.gradient_cache import in_row_order
from rime_pl.types import Batch, Completions, EncodedSide, ModeEmbeddings


class CMAModule(ContrastiveModule):
    """``L = L_SFT + lambda_cma (NCE(g_q, d_t) + NCE(d_q, g_t)) + lambda_dec L_dec``

    Args:
        backbone: Checkpoint, quantization, adapters and prompt layout.
        init_adapter_from: Adapter folder of stage 1 to start from (default: a new adapter).
        temperature: Divisor of the cosines in the contrastive losses.
        lambda_ce: Weight of the rewrite's cross-entropy.
        dimensions: Further lengths at which embeddings are to be useful (Matryoshka).
        lambda_cma: Weight of the alignment; 0 is the control, further SFT steps.
        lambda_dec: Weight of the decisive term; 0 is plain alignment, which may ignore the rewrite.
        margin_dec: How much nearer its own rewrite shall bring a query to its target than a wrong one, in
            units of the temperature.
        wrong_share: Share of the queries that are also encoded with a wrong rewrite, in the same pass. Below
            1 each process picks its own queries, so several processes match a single one only at 1.
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
        lambda_cma: float = 1.0,
        lambda_dec: float = 1.0,
        margin_dec: float = 1.0,
        wrong_share: float = 1.0,
        optimizer: OptimizerSettings = OptimizerSettings(),
        micro_batches: MicroBatchSettings = MicroBatchSettings(),
        negatives: NegativeSettings = NegativeSettings(),
    ) -> None:
        super().__init__(
            backbone=backbone,
            init_adapter_from=init_adapter_from,
            temperature=temperature,
            lambda_ce=lambda_ce,
            dimensions=dimensions,
            optimizer=optimizer,
            micro_batches=micro_batches,
            negatives=negatives,
        )
        if not 0 < wrong_share <= 1:
            raise RimeError(
                f"model.wrong_share must be greater than 0 and at most 1, but is {wrong_share}. Set "
                "model.lambda_dec to 0 to turn the decisive term off."
            )
        self.lambda_cma = lambda_cma
        self.lambda_dec = lambda_dec
        self.margin_dec = margin_dec
        self.wrong_share = wrong_share
        at_least(0, "model", self, "lambda_cma", "lambda_dec", "margin_dec")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        query, target = self.encode_queries(batch), self.encode(batch.target)
        pairs = self.gather(query, target, batch)
        self.log_negatives(pairs, pairs.with_rewrites())
        terms = self.over_dimensions(pairs, lambda cut: self.terms(cut, query.wrong))
        ce = query.cross_entropy + target.cross_entropy
        weights = {"cma": self.lambda_cma, "decisive": self.lambda_dec}

        loss = sum(weights.get(name, 1.0) * term for name, term in terms.items()) + self.lambda_ce * ce
        self.log_losses(batch, total=loss, **terms, ce=ce)
        return loss

    def terms(self, pairs: PairEmbeddings, wrong: Tensor | None) -> dict[str, Tensor]:
        """Return the contrastive terms, those across the modes and the decisive one.

        Args:
            pairs: The global batch, at one length of the embeddings.
            wrong: See :meth:`decisive_term`; None without the term.
        """
        rewritten = pairs.with_rewrites()
        both = rewritten.further
        further = None if both is None else (both.of("disc"), both.of("gen"))
        sides = rewritten.query, rewritten.target
        cma = cross_mode_alignment(*sides, self.temperature, rewritten.contents, further, self.weighting)
        return {
            "info_nce_gen": self.nce(rewritten, "gen"),
            "info_nce_disc": self.nce(pairs, "disc"),
            "cma": cma,
            "decisive": torch.zeros_like(cma) if wrong is None else self.decisive_term(wrong, pairs),
        }

    def encode_queries(self, batch: Batch) -> EncodedSide:
        """Encode the queries, the first ``wrong_share`` of them with a wrong rewrite beside their own."""
        if not self.lambda_dec:
            return self.encode(batch.query)
        num_labels = self.count_labels(batch.query)
        rows = torch.arange(len(batch), device=self.device)
        count = max(1, round(self.wrong_share * len(batch)))
        wrong = self.wrong_rewrites(batch, rank() * len(batch) + rows[:count])
        if count == len(batch):
            return self.encode(replace(batch.query, wrong=wrong), num_labels)
        # two passes on each process alike, because under FSDP a forward is a collective
        parts = [rows[:count], rows[count:]]
        both = replace(batch.query.select(parts[0]), wrong=wrong), batch.query.select(parts[1])
        return in_row_order([self.encode(queries, num_labels) for queries in both], parts)

    def decisive_term(self, wrong: Tensor, pairs: PairEmbeddings) -> Tensor:
        """Return the decisive term.

        Args:
            wrong: (K, D) generative embeddings of this rank's first K queries, with wrong rewrites.
            pairs: The global batch; its embeddings may be shorter.
        """
        size = pairs.query.gen.shape[1]
        if size < wrong.shape[1]:
            wrong = F.normalize(wrong[:, :size], dim=-1)
        rows = len(pairs.annotated) // world_size()  # of each rank
        chosen = torch.arange(len(wrong), device=wrong.device)
        wrong = all_gather_rows(wrong)
        index = torch.cat([r * rows + chosen for r in range(world_size())])
        wrong, index = wrong[pairs.annotated[index]], index[pairs.annotated[index]]
        targets = ModeEmbeddings(pairs.target.disc[index], pairs.target.gen[index])
        own = pairs.query.gen[index]
        return decisive_rewrite(own, wrong, targets, self.temperature, self.margin_dec)

    def wrong_rewrites(self, batch: Batch, rows: Tensor) -> Completions:
        """Return for rows of the global batch the next query's rewrite of other content, or none, in turn."""
        content, annotated = (
            all_gather_rows(batch.target_content),
            all_gather_rows(batch.query.annotated.long()).bool(),
        )
        theirs = all_gather_completions(batch.query.completions)
        partner = derange(content, annotated)[rows]
        empty = empty_completions(len(rows), theirs.ids.shape[1], self.model.processor, self.device)
        blank = ((rows % 2 == 1) | (partner == rows)).unsqueeze(1)
        picked = theirs.select(partner)
        return Completions(
            torch.where(blank, empty.ids, picked.ids), torch.where(blank, empty.mask, picked.mask)
        )
