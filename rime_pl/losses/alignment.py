"""Stage 2's two terms: the modes meet, and the rewrite stays decisive while they do.

Called by modules/cma.py. Alignment alone has a shortcut: <gen_emb> attends to <disc_emb>, so copying the
discriminative embedding solves it and the rewrite becomes decoration. The decisive term closes it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rime_pl.losses.contrastive import info_nce
from rime_pl.types import ModeEmbeddings


def cross_mode_alignment(
    queries: ModeEmbeddings,
    targets: ModeEmbeddings,
    temperature: float,
    contents: Tensor | None = None,
) -> Tensor:
    """Contrast across the modes, so that any mode retrieves any mode.

    ``L_CMA = NCE(g_q, d_t) + NCE(d_q, g_t)``

    Args:
        queries, targets: Both embeddings of B pairs, (B, D) float32, normalised.
        temperature: Divisor, > 0.
        contents: (B, 2) int64 content ids of query and target, see :func:`info_nce`.

    Returns:
        Scalar, in nats.

    Paper: its purpose is RIME's (arXiv 2604.22280); the formula is ours, the equations not being public.
    """
    return info_nce(queries.gen, targets.disc, temperature, contents) + info_nce(
        queries.disc, targets.gen, temperature, contents
    )


def decisive_rewrite(own: Tensor, wrong: Tensor, targets: ModeEmbeddings, temperature: float) -> Tensor:
    """A query with a wrong or empty rewrite must find its target worse than with its own.

    ``L_dec = mean_i sum_{x in {g_t, d_t}} softplus((g(q_i, wrong).x_i - g(q_i, own).x_i) / tau + 1)``

    Args:
        own: (B, D) generative embeddings of the queries with their own rewrites, normalised.
        wrong: (B, D) the same queries with wrong rewrites, normalised.
        targets: Both embeddings of the B targets.
        temperature: Divisor, > 0.

    Returns:
        Scalar.

    Paper: not in RIME; ours, against the shortcut through <disc_emb>.

    Example:
        >>> import torch
        >>> e = torch.eye(2)
        >>> round(decisive_rewrite(e, e, ModeEmbeddings(e, e), temperature=0.1).item(), 4)  # 2 softplus(1)
        2.6265
    """
    loss = own.new_zeros(())
    for target in (targets.gen, targets.disc):
        gap = ((wrong - own) * target).sum(-1) / temperature
        loss = loss + F.softplus(gap + 1).sum() / max(1, len(own))  # 0 without rows
    return loss
