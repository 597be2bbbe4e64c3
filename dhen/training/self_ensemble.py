"""The self-ensemble loss: two passes with dropout learn to agree with their mean (QNN, arXiv 2505.17999)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def self_ensemble_loss(logits_PB: Tensor, labels_B: Tensor, weights_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """BCE(p, y) + sum over passes of BCE(p_i, p), summed over examples, with p = mean of p_i = sigmoid(logit_i).

    weights_B: of the examples; None: 1. The second part has no gradient through its target p. Everything is computed
    from logits, so that a confident prediction keeps its digits. Returns the loss and the logits_B of p.

    >>> loss, logits_B = self_ensemble_loss(torch.tensor([[0.0], [0.0]]), torch.tensor([1.0]))
    >>> round(loss.item(), 4), logits_B.item()
    (2.0794, 0.0)
    """
    logits_B = torch.logsumexp(logsigmoid(logits_PB), 0) - torch.logsumexp(logsigmoid(-logits_PB), 0)
    loss = binary_cross_entropy_with_logits(logits_B, labels_B, weights_B, reduction="sum")
    targets_PB = logits_B.detach().sigmoid().expand_as(logits_PB)
    agreement = binary_cross_entropy_with_logits(logits_PB, targets_PB, weights_B, reduction="sum")
    return loss + agreement, logits_B
