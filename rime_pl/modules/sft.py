"""Stage 1, SFT: learn to rewrite and to embed, jointly, from one forward of each side."""

from __future__ import annotations

from torch import Tensor

from rime_pl.losses.contrastive import info_nce
from rime_pl.modules.base import RimeModule
from rime_pl.types import Batch


class SFTModule(RimeModule):
    """``L = NCE(g_q, g_t) + NCE(d_q, d_t) + lambda_ce (CE_q + CE_t)``

    Source: arXiv 2511.00405 (the ancestor), very likely shared by RIME.
    """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        query, target = self.encode(batch.query), self.encode(batch.target)
        pairs = self.gather(query, target, batch)
        rewritten = pairs.with_rewrites()

        gen = info_nce(rewritten.query.gen, rewritten.target.gen, self.temperature, rewritten.contents)
        disc = info_nce(pairs.query.disc, pairs.target.disc, self.temperature, pairs.contents)
        ce = query.cross_entropy + target.cross_entropy

        loss = gen + disc + self.lambda_ce * ce
        self.log_losses(batch, total=loss, info_nce_gen=gen, info_nce_disc=disc, ce=ce)
        return loss
