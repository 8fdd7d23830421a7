"""Scores against autograd, closed forms and counts made one picture at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from etude.models.classifier import Classifier, ClassifierConfig
from etude.practice import scores
from etude.practice.pictures import Stored, to_model
from etude.practice.scores import (
    NEEDS,
    SCORES,
    DynUnc,
    Forgetting,
    averaged,
    grand,
    score_pictures,
)

ONE_LOOK = sorted(name for name, needs in NEEDS.items() if not needs.history)


class Brightness(nn.Module):
    """Two classes whose logits are -+ (gain times the mean of a picture, plus a bias of 0)."""

    def __init__(self, gain: float = 4.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.gain * x.mean(dim=(1, 2, 3)) + self.bias
        return torch.stack([-mean, mean], dim=1)


class Cube(torch.autograd.Function):
    """x^3 without a rule for vmap."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, upper: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * upper


class Cubed(nn.Module):
    """A linear classifier of cubed pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + Cube.apply(self.head(x.flatten(1)))


def classifier(seed: int = 1) -> Classifier:
    config = ClassifierConfig(num_classes=3, channels=(8, 16), groups=4)
    return Classifier(config, seed=seed).double().eval()


def batch(count: int, size: int = 8) -> tuple[Tensor, Tensor]:
    chance = np.random.default_rng(count)
    images = torch.from_numpy(chance.uniform(-1, 1, (count, 1, size, size)))
    return images, torch.from_numpy(chance.integers(0, 3, count))


def by_loop(model: nn.Module, images: Tensor, labels: Tensor, weights: list[Tensor]) -> list[float]:
    lengths = []
    for image, label in zip(images, labels, strict=True):
        log_p = torch.log_softmax(model(image[None])[0], dim=0)
        gradients = torch.autograd.grad(-log_p[label], weights, allow_unused=True)
        lengths.append(math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None)))
    return lengths


def test_grand_is_a_loop_of_autograd_done_in_batches(monkeypatch) -> None:
    model, (images, labels) = classifier(), batch(7)
    expected = by_loop(model, images, labels, list(model.parameters()))
    monkeypatch.setattr(scores, "_square_alone", None)  # a batched network never needs it
    assert grand(model, images, labels).tolist() == pytest.approx(expected, rel=1e-9)
    two_at_a_time = 2 * sum(tensor.nbytes for tensor in model.parameters())
    for memory in (1, two_at_a_time):
        found = grand(model, images, labels, memory=memory)
        assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_grand_of_a_frozen_copy_and_of_what_is_trained_alone() -> None:
    model, (images, labels) = classifier(), batch(4)
    expected = by_loop(model, images, labels, list(model.parameters()))
    frozen = classifier().requires_grad_(False)
    assert grand(frozen, images, labels).tolist() == pytest.approx(expected, rel=1e-9)
    head = by_loop(model, images, labels, list(model.head.parameters()))
    frozen.head.requires_grad_(True)
    assert grand(frozen, images, labels).tolist() == pytest.approx(head, rel=1e-9)
    assert max(head) < min(expected)
    with torch.no_grad():
        assert grand(frozen, images, labels).tolist() == pytest.approx(head, rel=1e-9)


def test_grand_of_a_linear_classifier_in_closed_form() -> None:
    images, labels = batch(5, size=4)
    head = nn.Linear(16, 3).double()
    model = nn.Sequential(nn.Flatten(), head).eval()
    p = torch.softmax(model(images), dim=1)
    error = (p - torch.eye(3, dtype=torch.float64)[labels]).norm(dim=1)  # d loss / d logits
    expected = error * (images.flatten(1).square().sum(1) + 1).sqrt()  # times (x, 1)
    assert grand(model, images, labels).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_grand_of_a_network_that_vmap_cannot_batch() -> None:
    model, (images, labels) = Cubed().double().eval(), batch(5, size=4)
    expected = by_loop(model, images, labels, list(model.parameters()))
    assert grand(model, images, labels).tolist() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="evaluation mode"):
        grand(model.train(), images, labels)


def levels(values: list[int], classes: list[int]) -> Stored:
    """Even pictures of these levels: Brightness is unsure near 127.5."""
    pixels = np.broadcast_to(np.array(values)[:, None, None, None], (len(values), 4, 4, 1))
    return Stored(pixels.astype(np.uint8), np.array(classes), ["dark", "light"])


@pytest.mark.parametrize("name", ONE_LOOK)
def test_larger_is_harder(name: str) -> None:
    """Sure and right, less sure and right; labels matter to the scores that say so, alone."""
    model = Brightness().eval()
    right = score_pictures(name, model, levels([255, 0, 170, 85, 134, 121], [1, 0, 1, 0, 1, 0]))
    assert right[0] < right[2] < right[4] and right[1] < right[3] < right[5]
    wrong = score_pictures(name, model, levels([255, 0, 170, 85, 134, 121], [0, 1, 0, 1, 0, 1]))
    if NEEDS[name].labels:
        assert (wrong > right).all()
    else:
        assert np.array_equal(wrong, right)


def test_one_score_is_the_same_in_any_batches_and_order() -> None:
    chance = np.random.default_rng(3)
    pixels = chance.integers(0, 256, (11, 8, 8, 1), dtype=np.uint8)
    pictures = Stored(pixels, chance.integers(0, 3, 11), ["a", "b", "c"])
    model = Classifier(ClassifierConfig(num_classes=3, channels=(8,), groups=4), seed=2).eval()
    rows = np.array([4, 0, 10, 7])
    images, labels = to_model(pixels[rows]), torch.from_numpy(pictures.classes[rows])
    for name in ONE_LOOK:
        with torch.no_grad():
            whole = (
                grand(model, images, labels)
                if name == "grand"
                else SCORES[name](model(images), labels)
            )
        found = score_pictures(name, model, pictures, rows, batch=3)
        assert found.tolist() == pytest.approx(whole.tolist(), rel=1e-5), name
    with pytest.raises(ValueError, match="several looks"):
        score_pictures("forgetting", model, pictures)


def test_averages_over_models_are_means_of_scores() -> None:
    pictures = levels([10, 100, 140, 250], [0, 0, 1, 0])
    shown = np.array([10, 100, 140, 250]) / 127.5 - 1.0
    signs = np.array([-1, -1, 1, -1])
    expected = np.zeros(4)
    for gain in (1.0, 2.0, 5.0):
        p_label = 1.0 / (1.0 + np.exp(-2.0 * gain * shown * signs))
        expected += math.sqrt(2) * (1.0 - p_label) / 3  # two classes: both entries are 1 - p
    models = (Brightness(gain).eval() for gain in (1.0, 2.0, 5.0))
    assert averaged("el2n", models, pictures).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="no models"):
        averaged("el2n", [], pictures)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 12))
def test_forgetting_counts_falls_from_right_to_wrong(seed: int, count: int, looks: int) -> None:
    chance = np.random.default_rng(seed)
    tracker, seen = Forgetting(count), [[] for _ in range(count)]
    for _ in range(looks):
        indices = chance.permutation(count)[: chance.integers(0, count + 1)]
        correct = chance.random(len(indices)) < 0.6
        tracker.observe(indices, correct)
        for index, right in zip(indices, correct, strict=True):
            seen[index].append(bool(right))
    falls = [
        sum(a and not b for a, b in zip(row, row[1:], strict=False)) if any(row) else None
        for row in seen
    ]
    most = max((fall for fall in falls if fall is not None), default=0)
    assert tracker.values().tolist() == [most + 1 if fall is None else fall for fall in falls]


def test_what_is_forgotten_is_harder_than_what_stays_and_easier_than_what_never_came() -> None:
    tracker = Forgetting(3)
    for look in ([1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]):
        tracker.observe(np.arange(3), np.array(look))
    assert tracker.values().tolist() == [0.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="a picture once"):
        tracker.observe(np.array([1, 1]), np.array([True, False]))


@pytest.mark.parametrize(("looks", "window"), [(2, 2), (7, 3), (7, 7), (23, 5)])
def test_dyn_unc_is_the_mean_deviation_over_sliding_windows(looks: int, window: int) -> None:
    history = np.random.default_rng(looks).random((looks, 4))
    tracker = DynUnc(4, window)
    for row in history:
        tracker.observe(row)
    for picture, value in enumerate(tracker.values()):
        deviations = []
        for start in range(looks - window + 1):
            part = history[start : start + window, picture].tolist()
            mean = sum(part) / window
            deviations.append(math.sqrt(sum((p - mean) ** 2 for p in part) / (window - 1)))
        assert value == pytest.approx(sum(deviations) / len(deviations), rel=1e-12)


def test_dyn_unc_of_what_moves_is_above_what_is_sure() -> None:
    tracker = DynUnc(2, 2)
    for probability in ([0.9, 0.9], [0.1, 0.9], [0.8, 0.95]):
        tracker.observe(np.array(probability))
    moves, sure = tracker.values()
    assert moves > sure > 0
    with pytest.raises(ValueError, match="do not fill"):
        DynUnc(2, 2).values()
