"""Cross-entropy of the rewrite, at labelled positions only.

Called by the modules. The divisor is the label count of the *global* batch, known before the forward, so
that chunks and ranks change nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits: Tensor, labels: Tensor, num_labels: int | Tensor) -> Tensor:
    """Summed negative log-likelihood of the labels over the global number of labels.

    ``CE = - sum_n log softmax(logits_n)[labels_n] / num_labels``

    Args:
        logits: (N, V), any float type; computed in float32.
        labels: (N,) int64.
        num_labels: Labels of the whole global batch (all ranks and chunks), >= N.

    Returns:
        Scalar, nats per token; summed over chunks and ranks it is the mean of the global batch.
        0 without labels.

    Source: arXiv 2511.00405. Differences: the global divisor.

    Example:
        >>> round(token_cross_entropy(torch.zeros(3, 10), torch.tensor([1, 2, 3]), 3).item(), 4)  # log 10
        2.3026
    """
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    divisor = torch.as_tensor(num_labels, device=total.device).clamp(min=1)
    return total / divisor
