"""Stage 1, SFT: learn to rewrite and to embed, jointly, from one forward of each side.

We worked from the paper's abstract, model card and its predecessor UME-R1 (arXiv 2511.00405), without access
to the equations in the paper's body. Deliberate differences:

- Paper: the form of the loss is UME-R1's, which RIME very likely shares. A rewrite replaces UME-R1's chain of
  thought, as the paper says.
- Paper: the cross-entropy is divided by the number of labels in the global batch, so that micro-batches and
  processes change nothing.
- Paper: items of equal content are not negatives of each other.
- Paper: LoRA on a 4-bit base model and the two rows of the mode tokens train, not the whole model.
- Paper: a pair without a rewrite takes part in the discriminative term only.
"""

from __future__ import annotations

from torch import Tensor

from rime_pl.modules.contrastive import ContrastiveModule
from rime_pl.types import Batch


class SFTModule(ContrastiveModule):
    """``L = NCE(g_q, g_t) + NCE(d_q, d_t) + lambda_ce (CE_q + CE_t)``"""

    takes_latent_tokens = True  # a control, see prompts.completion

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        query, target = self.encode(batch.query), self.encode(batch.target)
        pairs = self.gather(query, target, batch)
        self.log_negatives(pairs, pairs.with_rewrites())

        terms = self.over_dimensions(
            pairs,
            lambda cut: {
                "info_nce_gen": self.nce(cut.with_rewrites(), "gen"),
                "info_nce_disc": self.nce(cut, "disc"),
            },
        )
        ce = query.cross_entropy + target.cross_entropy

        loss = sum(terms.values()) + self.lambda_ce * ce
        self.log_losses(batch, total=loss, **terms, ce=ce)
        return loss
