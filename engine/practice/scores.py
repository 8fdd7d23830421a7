"""How hard pictures are for a learner; called by pruning.py, telemetry.py and flips.py.

Larger is harder for every score. Entropy and the two confidence scores need no label; EL2N is
||softmax - onehot||_2 and GraNd the length of the loss's gradient by all trained weights (Paul et
al. 2021, arXiv 2107.07075). Two scores watch a learner while it learns: forgetting counts how often
a picture was right and then wrong (Toneva et al. 2019, arXiv 1812.05159), Dyn-Unc how much the
probability of the label moves (He et al. 2024, arXiv 2306.05175).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

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


@dataclass(frozen=True)
class Needs:
    """What a score takes beside the pictures.

    Attributes:
        labels: the classes asked for.
        proxies: it is noisy for one learner and meant as a mean over several, looked at early.
        history: several looks at a learner while it learns, where the others take one look.
    """

    labels: bool = False
    proxies: bool = False
    history: bool = False


NEEDS: dict[str, Needs] = {
    "entropy": Needs(),
    "margin": Needs(),
    "least_confidence": Needs(),
    "loss": Needs(labels=True),
    "el2n": Needs(labels=True, proxies=True),
    "grand": Needs(labels=True, proxies=True),
    "forgetting": Needs(labels=True, history=True),
    "dyn_unc": Needs(labels=True, history=True),
}


def grand(model: nn.Module, images: Tensor, labels: Tensor, *, memory: int = 1 << 29) -> Tensor:
    """Length of each picture's own gradient of the cross-entropy, (B,) float64, at least 0.

    The gradient is by all weights that take one, or by all weights when none does (a frozen copy).
    It is exact: `torch.func` differentiates pictures side by side, or, where an operation of the
    network cannot be batched so, autograd one after the other.

    Args:
        model: in evaluation mode, so that pictures of a batch do not touch each other.
        images: (B, C, S, S) float32 in [-1, 1].
        labels: (B,) int64.
        memory: bytes that the gradients held at one time may take; never less than one picture's.
    """
    if model.training:
        raise ValueError("grand needs a model in evaluation mode: call eval() on it first")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    weights = {name: tensors[name] for name in trained or tensors}
    fixed = {name: tensor for name, tensor in tensors.items() if name not in weights}
    fixed |= {name: tensor.detach() for name, tensor in model.named_buffers()}

    def loss_of(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**weights, **fixed}, (image[None],))
        wide = torch.promote_types(logits.dtype, torch.float32)
        return loss(logits.to(wide), label[None])[0]

    def square(image: Tensor, label: Tensor) -> Tensor:
        gradients = grad(loss_of)(weights, image, label)
        return sum(gradient.double().square().sum() for gradient in gradients.values())

    rows = max(1, memory // sum(tensor.nbytes for tensor in weights.values()))
    squares: list[Tensor] = []
    try:
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            squares.append(vmap(square)(images[part], labels[part]))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # an operation without a rule for vmap
        pairs = zip(images, labels, strict=True)
        squares = [_square_alone(loss_of, weights, *pair) for pair in pairs]
    return torch.cat([value.reshape(-1) for value in squares]).sqrt()


def _square_alone(
    loss_of: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor],
    weights: dict[str, Tensor],
    image: Tensor,
    label: Tensor,
) -> Tensor:
    with torch.enable_grad():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        value = loss_of(leaves, image, label)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return sum(gradient.double().square().sum() for gradient in found if gradient is not None)


def score_pictures(
    name: str,
    model: nn.Module,
    pictures: Pictures,
    indices: np.ndarray | None = None,
    batch: int = 500,
) -> np.ndarray:
    """A score of `pictures` (all by default) under one model, (n,) float64, larger is harder.

    Args:
        name: one of `NEEDS` that takes one look.
        model: pictures (B, C, S, S) in [-1, 1] to logits (B, K), in evaluation mode.
    """
    if NEEDS[name].history:
        raise ValueError(f"{name} needs several looks at a learner: use Forgetting or DynUnc")
    device = device_of(model)
    indices = np.arange(len(pictures)) if indices is None else indices
    values = [np.zeros(0)]
    for part in chunks(indices, batch):
        images = to_model(pictures.images(part), device)
        labels = torch.from_numpy(pictures.labels(part)).to(device)
        if name == "grand":
            found = grand(model, images, labels)
        else:
            with torch.no_grad():
                found = SCORES[name](model(images).float(), labels)
        values.append(found.double().cpu().numpy())
    return np.concatenate(values)


def averaged(
    name: str, models: Iterable[nn.Module], pictures: Pictures, batch: int = 500
) -> np.ndarray:
    """Mean of a score over several models, (n,) float64; one model is held at a time."""
    total, count = np.zeros(len(pictures)), 0
    for model in models:
        total += score_pictures(name, model, pictures, batch=batch)
        count += 1
    if not count:
        raise ValueError(f"{name} cannot be averaged over no models")
    return total / count


class Forgetting:
    """Counts how often each picture was labelled rightly and, when looked at next, wrongly.

    A picture that was never right is harder than any that was: it counts as forgotten once more
    often than the most forgotten one (infinitely often in the paper).

    Args:
        count: pictures, numbered from 0.
    """

    def __init__(self, count: int) -> None:
        self._times = np.zeros(count, np.int64)
        self._was_right = np.zeros(count, bool)
        self._learned = np.zeros(count, bool)

    def observe(self, indices: np.ndarray, correct: np.ndarray) -> None:
        """One look: pictures `indices` (n,) int64, each once, and whether they are right (n,)."""
        indices, correct = np.asarray(indices), np.asarray(correct, dtype=bool)
        if len(np.unique(indices)) != len(indices):
            raise ValueError("one look shows a picture once: split the indices into several looks")
        self._times[indices] += self._was_right[indices] & ~correct
        self._was_right[indices] = correct
        self._learned[indices] |= correct

    def values(self) -> np.ndarray:
        """Times forgotten, (count,) float64; never-right pictures hold the largest count plus 1."""
        return np.where(self._learned, self._times, self._times.max(initial=0) + 1).astype(float)


class DynUnc:
    """How much the probability of the label moves: its deviation over a window of looks.

    The sample standard deviation over `window` consecutive looks, averaged over all such windows.

    Args:
        count: pictures, numbered from 0.
        window: looks in a window, at least 2.
    """

    def __init__(self, count: int, window: int) -> None:
        if window < 2:
            raise ValueError(f"a deviation needs a window of at least 2 looks, not {window}")
        self._recent = np.zeros((window, count))
        self._total = np.zeros(count)
        self._looks = 0

    def observe(self, probability: np.ndarray) -> None:
        """One look at all pictures: the probability of each one's label, (count,) in [0, 1]."""
        window = len(self._recent)
        self._recent[self._looks % window] = probability
        self._looks += 1
        if self._looks >= window:
            self._total += self._recent.std(axis=0, ddof=1)

    def values(self) -> np.ndarray:
        """The mean deviation, (count,) float64 in [0, 1]."""
        windows = self._looks - len(self._recent) + 1
        if windows < 1:
            raise ValueError(f"{self._looks} looks do not fill a window of {len(self._recent)}")
        return self._total / windows


def device_of(model: Callable[[Tensor], Tensor]) -> torch.device:
    """Where a model takes its pictures: the device of its weights, the CPU when it has none."""
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((tensor.device for tensor in weights), torch.device("cpu"))


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor],
    pictures: Pictures,
    indices: np.ndarray | None = None,
    batch: int = 500,
) -> tuple[Tensor, Tensor]:
    """Logits (n, K) float32 and labels (n,) int64, on the CPU, of `pictures` (all by default).

    The model is called as it is: put it into evaluation mode first.
    """
    device = device_of(model)
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
