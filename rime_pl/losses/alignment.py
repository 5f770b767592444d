"""The two terms that stage 2 adds: align the two modes, and keep the rewrite necessary.

Called by modules/cma.py. Alignment has a shortcut: <gen_emb> attends to <disc_emb>, so the model can copy the
discriminative embedding and ignore the rewrite. ``decisive_rewrite`` closes the shortcut.

Shape legend: B pairs, D embedding width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rime_pl.losses.contrastive import Further, Weighting, info_nce
from rime_pl.types import ModeEmbeddings


def cross_mode_alignment(
    queries: ModeEmbeddings,
    targets: ModeEmbeddings,
    temperature: float,
    contents: Tensor | None = None,
    further: tuple[Further, Further] | None = None,
    weighting: Weighting = Weighting(),
) -> Tensor:
    """Return the contrastive loss across the modes.

    In plain terms: a query in one mode must find its target in the other mode.

    ``L_CMA = NCE(g_q, d_t) + NCE(d_q, g_t)``; g generative, d discriminative, q query, t target

    Args:
        queries, targets: Both embeddings of B pairs, (B, D) float32, normalised.
        temperature: Divisor of the cosines, > 0.
        contents: (B, 2) int64 content ids of query and target, see :func:`info_nce`.
        further: Targets beside those of the batch, discriminative and generative.
        weighting: How negatives count.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: If the temperature is not positive.

    Source: the purpose is that of RIME, arXiv 2604.22280.
    Paper: the formula is ours. We worked from the paper's abstract, model card and its predecessor UME-R1
    (arXiv 2511.00405), without access to the equations in the paper's body.

    Example:
        >>> import torch
        >>> e = torch.eye(2)
        >>> both = ModeEmbeddings(e, e)
        >>> round(cross_mode_alignment(both, both, temperature=0.5).item(), 4)  # 2 log(1 + exp(-1 / 0.5))
        0.2539
    """
    disc, gen = further or (None, None)
    return info_nce(queries.gen, targets.disc, temperature, contents, disc, weighting) + info_nce(
        queries.disc, targets.gen, temperature, contents, gen, weighting
    )


def decisive_rewrite(
    own: Tensor, wrong: Tensor, targets: ModeEmbeddings, temperature: float, margin: float = 1.0
) -> Tensor:
    """Return the penalty on queries whose wrong rewrite does nearly as well as their own.

    In plain terms: with a wrong or empty rewrite, a query must be farther from its target.

    ``L_dec = mean_i sum_{x in {g_t, d_t}} softplus((g(q_i, wrong).x_i - g(q_i, own).x_i) / tau + m)``

    Args:
        own: (B, D) float32, generative embeddings of the queries with their own rewrites, normalised.
        wrong: (B, D) float32, the same queries with wrong rewrites, normalised.
        targets: Both embeddings of the B targets.
        temperature: Divisor tau, > 0.
        margin: m: how much nearer the own rewrite shall bring a query to its target, in units of tau.

    Returns:
        Scalar without unit; 0 if there are no rows.

    Paper: not in RIME; ours, against the shortcut through <disc_emb>.

    Source: ours.

    Example:
        >>> import torch
        >>> e = torch.eye(2)
        >>> round(decisive_rewrite(e, e, ModeEmbeddings(e, e), temperature=0.1).item(), 4)  # 2 softplus(1)
        2.6265
    """
    loss = own.new_zeros(())
    for target in (targets.gen, targets.disc):
        gap = ((wrong - own) * target).sum(-1) / temperature  # (B,)
        loss = loss + F.softplus(gap + margin).sum() / max(1, len(own))
    return loss
