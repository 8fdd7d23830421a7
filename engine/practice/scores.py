"""How hard a picture is for a learner: numbers from logits; called by rounds.py and telemetry.py.

Larger is harder for every score. Entropy and the two confidence scores need no label; EL2N is
||softmax - onehot||_2 of Paul et al. 2021 (arXiv 2107.07075).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .pictures import Pictures, chunks, to_model


def entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Predictive entropy in nats, (B,) in [0, log K], of logits (B, K)."""
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def margin(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """1 - (p_first - p_second), (B,) in [0, 1], of logits (B, K) with K of at least 2."""
    top = torch.softmax(logits, dim=-1).topk(2, dim=-1).values
    return 1.0 - (top[:, 0] - top[:, 1])


def least_confidence(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """1 - p_first, (B,) in [0, 1 - 1/K], of logits (B, K)."""
    return 1.0 - torch.softmax(logits, dim=-1).amax(dim=-1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, (B,), of logits (B, K) and labels (B,) int64."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """||softmax - onehot||_2, (B,) in [0, sqrt 2], of logits (B, K) and labels (B,) int64."""
    onehot = torch.nn.functional.one_hot(labels, logits.shape[-1])
    return (torch.softmax(logits, dim=-1) - onehot).norm(dim=-1)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": entropy,
    "margin": margin,
    "least_confidence": least_confidence,
    "loss": loss,
    "el2n": el2n,
}


@torch.no_grad()
def predict(
    model: torch.nn.Module, pictures: Pictures, indices: np.ndarray | None = None, batch: int = 500
) -> tuple[Tensor, Tensor]:
    """Logits (n, K) float32 and labels (n,) int64, on the CPU, of `pictures` (all by default).

    The model is called as it is: put it into evaluation mode first.
    """
    device = next(model.parameters()).device
    indices = np.arange(len(pictures)) if indices is None else indices
    logits = [
        model(to_model(pictures.images(part), device)).float().cpu()
        for part in chunks(indices, batch)
    ]
    return torch.cat(logits), torch.from_numpy(pictures.labels(indices))


def correctness(model: torch.nn.Module, pictures: Pictures, batch: int = 500) -> np.ndarray:
    """Which pictures the model labels rightly, (n,) bool."""
    logits, labels = predict(model, pictures, batch=batch)
    return (logits.argmax(dim=-1) == labels).numpy()
