"""What guidance raises, sample by sample, in a learner's logits; called by `guidance.py`.

With p the softmax of the logits, p1 and p2 its two largest entries and y the label asked for:

    entropy         H = -sum p log p                in nats, at most log K
    loss            L = -log p_y                    in nats, without a largest value
    margin          1 - (p1 - p2)                   at most 1, where two classes are tied
    entropy_label   H - eta L                       raises H only as far as y stays likely

H - eta L pulls at log p_y with eta against what H pulls: between two classes it is largest where
log(p_y / (1 - p_y)) = eta / p_y, so that y is the answer there for every eta above 0 (eta = 0.5:
p_y = 0.68; eta = 1: 0.78).
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

CriterionName = Literal["entropy", "loss", "margin", "entropy_label"]
LABEL_AWARE = ("loss", "entropy_label")


def entropy(logits: Tensor) -> Tensor:
    """Entropy (B,) in nats of the softmax of logits (B, classes)."""
    log_probability = F.log_softmax(logits, dim=1)
    return -(log_probability.exp() * log_probability).sum(1)


def margin(logits: Tensor) -> Tensor:
    """1 - (p1 - p2), (B,) in [0, 1], of logits (B, classes)."""
    first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(1)
    return 1.0 - (first - second)


def criterion(
    name: CriterionName, logits: Tensor, labels: Tensor | None, label_weight: float
) -> Tensor:
    """What is raised, (B,), of logits (B, K).

    Args:
        labels: (B,) int64 in [0, K); read by the label-aware ones alone.
        label_weight: eta of `entropy_label`.
    """
    if name == "margin":
        return margin(logits)
    if name == "entropy":
        return entropy(logits)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return loss if name == "loss" else entropy(logits) - label_weight * loss


def hardness(name: CriterionName, logits: Tensor, labels: Tensor | None) -> Tensor:
    """How far a sample is pushed already, (B,): 0 where the learner is sure, 1 for even odds.

    Entropy over log K (of `entropy_label` too), loss over log K, which alone can pass 1, or margin.
    """
    if name == "margin":
        return margin(logits)
    own = "loss" if name == "loss" else "entropy"
    return criterion(own, logits, labels, 0.0) / math.log(logits.shape[1])
