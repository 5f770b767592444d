"""The cross-entropy of the rewrite, computed only at the labelled positions.

Called by the modules. The divisor is the number of labels in the *global* batch and is known before the
forward, so the loss does not depend on how the batch is divided into chunks and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_cross_entropy(logprobs: Tensor, num_labels: int | Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the labels, divided by the global number of labels.

    In plain terms: the model learns to write the reference rewrite, token by token.

    ``CE = - sum_n log p(label_n) / num_labels``

    Args:
        logprobs: (N,) float, in nats: of N labelled tokens, from backbone/head.py.
        num_labels: Labels of the whole global batch (all ranks and chunks), >= N.

    Returns:
        Scalar, in nats per token. Its sum over chunks and ranks is the mean over the global batch.
        0 if there are no labels.

    Source: UME-R1, arXiv 2511.00405. Differences: the global divisor.

    Example:
        >>> token_cross_entropy(torch.tensor([-1.0, -3.0]), 4)
        tensor(1.)
    """
    divisor = torch.as_tensor(num_labels, device=logprobs.device).clamp(min=1)
    return -logprobs.sum() / divisor
