"""The cross-entropy of the rewrite, computed only at the labelled positions.

Called by the modules. The divisor is the number of labels in the *global* batch and is known before the
forward, so the loss does not depend on how the batch is divided into chunks and ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits: Tensor, labels: Tensor, num_labels: int | Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the labels, divided by the global number of labels.

    In plain terms: the model learns to write the reference rewrite, token by token.

    ``CE = - sum_n log softmax(logits_n)[labels_n] / num_labels``

    Args:
        logits: (N, V), any float type; computed in float32. N labelled tokens, V vocabulary.
        labels: (N,) int64.
        num_labels: Labels of the whole global batch (all ranks and chunks), >= N.

    Returns:
        Scalar float32, in nats per token. Its sum over chunks and ranks is the mean over the global batch.
        0 if there are no labels.

    Source: UME-R1, arXiv 2511.00405. Differences: the global divisor.

    Example:
        >>> round(token_cross_entropy(torch.zeros(3, 10), torch.tensor([1, 2, 3]), 3).item(), 4)  # log 10
        2.3026
    """
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    divisor = torch.as_tensor(num_labels, device=total.device).clamp(min=1)
    return total / divisor
