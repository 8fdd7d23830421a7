"""What is kept, against a brute-force choice, and properties that hold for any candidates."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from etude.core.errors import UserError
from etude.models.classifier import Classifier, ClassifierConfig
from etude.practice.pictures import Stored, to_model
from etude.practice.pruning import PruneConfig, candidate_scores, proxy_scores, select


def keep(scores, labels, count, config, *, seed=1, number=0, classes=3, ids=None) -> np.ndarray:
    scores, labels = np.asarray(scores, float), np.asarray(labels)
    return select(scores, labels, count, config, seed=seed, number=number, classes=classes, ids=ids)


def by_hand(scores, labels, count, config: PruneConfig, classes: int) -> list[set[int]]:
    """Every set that may be kept of candidates with different scores, one picture at a time."""
    groups = (
        [[i for i, label in enumerate(labels) if label == c] for c in range(classes)]
        if config.balanced
        else [list(range(len(labels)))]
    )
    chosen = []
    for group in groups:
        ranked = sorted(group, key=lambda i: -scores[i])
        for _ in range(int(config.upper_cut * len(group) + 1e-9)):
            ranked.pop(0)
        if config.keep == "easy":
            ranked.reverse()
        least = count // len(groups)
        chosen.append((set(ranked[:least]), set(ranked[: least + 1])))
    return chosen


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**31), st.integers(2, 4), st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5])
)
def test_select_is_the_brute_force_choice(seed: int, classes: int, balanced: bool, cut: float):
    chance = np.random.default_rng(seed)
    labels = chance.permutation(np.repeat(np.arange(classes), chance.integers(4, 9, classes)))
    scores = chance.permutation(len(labels)) + chance.random()
    easy = cut == 0.0 and bool(chance.integers(2))
    config = PruneConfig(
        upper_cut=cut, keep="easy" if easy else "hard", balanced=balanced, oversampling=9.0
    )
    sizes = np.bincount(labels) if balanced else np.array([len(labels)])
    left = min(size - int(cut * size) for size in sizes)
    count = int(chance.integers(0, left * len(sizes) + 1))
    found = keep(scores, labels, count, config, seed=seed % 97, classes=classes)
    assert found.dtype == np.int64 and len(found) == count
    assert (np.diff(found) > 0).all()
    groups = by_hand(scores, labels, count, config, classes)
    for label, (least, most) in enumerate(groups):
        kept = {i for i in found.tolist() if not balanced or labels[i] == label}
        assert kept in (least, most), "neither the least nor one picture more"
    if balanced:
        per_class = np.bincount(labels[found], minlength=classes)
        assert per_class.max() - per_class.min() == (count % classes > 0)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.sampled_from(["entropy", "random"]), st.booleans())
def test_what_is_kept_follows_the_pictures_and_not_their_places(
    seed: int, score: str, balanced: bool
) -> None:
    """With many equal scores, so that the random words decide."""
    chance = np.random.default_rng(seed)
    labels, ids = np.arange(30) % 3, chance.permutation(1000)[:30]
    scores = chance.integers(0, 4, 30)
    config = PruneConfig(score=score, balanced=balanced)
    order = chance.permutation(30)
    first = keep(scores, labels, 13, config, number=4, ids=ids)
    second = keep(scores[order], labels[order], 13, config, number=4, ids=ids[order])
    assert set(ids[first]) == set(ids[order][second])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 30), st.booleans())
def test_the_easy_ones_are_all_but_the_hard_ones(seed: int, count: int, balanced: bool) -> None:
    count = count // 3 * 3 if balanced else count
    scores = np.random.default_rng(seed).integers(0, 3, 30)  # equal scores throughout
    labels = np.arange(30) % 3
    hard = keep(scores, labels, count, PruneConfig(balanced=balanced), seed=seed % 89)
    easy = keep(
        scores, labels, 30 - count, PruneConfig(keep="easy", balanced=balanced), seed=seed % 89
    )
    assert sorted([*hard, *easy]) == list(range(30))
    if count not in (0, 30) and not balanced:
        assert scores[hard].min() >= scores[easy].max()


def test_hard_means_large_and_the_cut_takes_the_hardest_alone() -> None:
    scores, labels = np.arange(20.0), np.repeat([0, 1], 10)
    whole = PruneConfig(balanced=False)
    assert keep(scores, labels, 3, whole, classes=2).tolist() == [17, 18, 19]
    easy = PruneConfig(balanced=False, keep="easy")
    assert keep(scores, labels, 3, easy, classes=2).tolist() == [0, 1, 2]
    cut = PruneConfig(balanced=False, upper_cut=0.1)
    assert keep(scores, labels, 3, cut, classes=2).tolist() == [15, 16, 17]
    each = PruneConfig(upper_cut=0.2)  # two of the ten of each class
    assert keep(scores, labels, 4, each, classes=2).tolist() == [6, 7, 16, 17]
    everything = PruneConfig(upper_cut=0.2)
    assert keep(scores, labels, 16, everything, classes=2).tolist() == [*range(8), *range(10, 18)]


def test_ties_and_random_choices_are_even_and_differ_by_round_and_seed() -> None:
    for config in (PruneConfig(balanced=False), PruneConfig(score="random", balanced=False)):
        counts = np.zeros(12)
        kept = []
        for seed in range(40):
            for number in range(25):
                rows = keep(np.ones(12), np.zeros(12), 4, config, seed=seed, number=number)
                counts[rows] += 1
                kept.append(tuple(rows))
        # Hypergeometric: each count has mean 1000 / 3 and the twelve sum to 4000.
        statistic = float(((counts - 4000 / 12) ** 2).sum() / (4000 / 12) * 11 / 8)
        assert 2.0 < statistic < 29.0  # chi-square of 11 degrees: tails of 0.002
        assert len(set(kept)) > 400  # of 495 possible, 1000 draws leave about 66 out
    again = keep(np.ones(12), np.zeros(12), 4, config, seed=39, number=24)
    assert tuple(again) == kept[-1]


def test_the_classes_that_keep_one_more_change_from_round_to_round() -> None:
    scores, labels = np.zeros(30), np.arange(30) % 3
    counts = np.zeros(3)
    for number in range(300):
        kept = keep(scores, labels, 10, PruneConfig(), number=number)
        counts += np.bincount(labels[kept], minlength=3) - 3
    assert counts.sum() == 300 and ((counts - 100) ** 2 / 100).sum() < 13.8  # 2 degrees, 0.001


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 200),
    st.integers(1, 12),
    st.floats(1.0, 20.0),
    st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.9]),
)
def test_the_candidates_asked_for_always_suffice(count, classes, oversampling, cut) -> None:
    if oversampling * (1 - cut) < 1.0:
        oversampling = 1.0 / (1.0 - cut)
    config = PruneConfig(oversampling=oversampling, upper_cut=cut)
    drawn = config.candidates(count, classes)
    assert drawn % classes == 0
    assert count * oversampling - 1e-5 <= drawn < count * oversampling + classes + 1e-5
    labels = np.arange(drawn) % classes
    assert len(keep(np.zeros(drawn), labels, count, config, classes=classes)) == count


def test_too_few_candidates_and_scores_that_are_no_numbers_are_refused() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    with pytest.raises(UserError, match=r"class 1 in round 5 has 2 candidates.* keep 3: raise"):
        keep(np.arange(10), labels, 9, PruneConfig(), number=5)
    with pytest.raises(UserError, match="round 0 has 10 candidates, 5 after prune.upper_cut=0.5"):
        keep(np.arange(10), labels, 6, PruneConfig(balanced=False, upper_cut=0.5))
    scores = np.arange(10.0)
    scores[7] = np.nan
    with pytest.raises(UserError, match="entropy score of candidate 7 in round 0 is not finite"):
        keep(scores, labels, 3, PruneConfig())
    assert len(keep(scores, labels, 3, PruneConfig(score="random"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "random", "keep": "easy"}, "prune.keep has no effect"),
        ({"score": "random", "upper_cut": 0.1}, "prune.upper_cut has no effect"),
        ({"keep": "easy", "upper_cut": 0.1}, "prune.upper_cut has no effect"),
        ({"proxies": 2, "proxy_steps": 9}, "prune.proxies has no effect"),
        ({"score": "el2n", "proxy_steps": 9}, "prune.proxy_steps has no effect"),
        ({"score": "el2n", "proxies": 2, "proxy_steps": 9, "proxy_looks": 3}, "proxy_looks has no"),
        ({"score": "loss", "window": 3}, "prune.window has no effect"),
        ({"score": "forgetting"}, "set prune.proxies=1 or more"),
        ({"score": "forgetting", "proxies": 1, "proxy_steps": 9}, "at least prune.proxy_looks=10"),
        ({"score": "el2n", "proxies": 1}, "prune.proxy_steps=0 must be at least 1"),
        ({"score": "dyn_unc", "proxies": 1, "proxy_steps": 50, "window": 11}, "above prune.proxy_"),
        ({"upper_cut": 0.5, "oversampling": 1.5}, "prune.oversampling to at least 2"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**options)


def test_proxies_are_looked_at_at_the_end_or_all_along() -> None:
    assert PruneConfig().look_steps() == PruneConfig(score="random").look_steps() == []
    assert PruneConfig(score="grand", proxies=3, proxy_steps=50).look_steps() == [50]
    watched = {"score": "forgetting", "proxies": 1}
    assert PruneConfig(**watched, proxy_steps=10).look_steps() == list(range(1, 11))
    assert PruneConfig(**watched, proxy_steps=50, proxy_looks=4).look_steps() == [12, 25, 37, 50]


STEPS = [4, 8, 12, 16, 20]


def shapes(count: int, seed: int) -> Stored:
    """Upright and lying bars in noise."""
    chance = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = chance.normal(128, 45, (count, 8, 8, 1))
    for row, label in enumerate(labels):
        bar = chance.integers(0, 7)
        view = pixels[row] if label else pixels[row].transpose(1, 0, 2)
        view[bar] += 70
    return Stored(pixels.clip(0, 255).astype(np.uint8), labels, ["upright", "lying"])


def train_on(pictures: Stored, number: int):
    """A learner shown all pictures in every step; a frozen copy at each of STEPS."""
    config = ClassifierConfig(num_classes=2, channels=(8,), groups=4)
    model = Classifier(config, seed=number)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    images, labels = to_model(pictures.pixels), torch.from_numpy(pictures.classes)
    for step in range(1, STEPS[-1] + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step in STEPS:
            yield copy.deepcopy(model).eval().requires_grad_(False)


def test_proxy_scores_are_those_of_the_last_models_or_of_the_whole_way() -> None:
    pictures, options = shapes(60, 0), {"proxies": 2, "proxy_steps": 20}
    images = to_model(pictures.pixels)
    p = np.array(
        [
            [torch.softmax(model(images), 1).numpy() for model in train_on(pictures, number)]
            for number in range(2)
        ]
    ).astype(np.float64)  # (proxies, looks, pictures, classes)
    of_label = p[..., np.arange(60), pictures.classes]

    def train(number: int):
        return train_on(pictures, number)

    config = PruneConfig(score="el2n", **options)
    el2n = (np.sqrt(2.0) * (1.0 - of_label[:, -1])).mean(axis=0)
    assert proxy_scores(config, pictures, train) == pytest.approx(el2n, abs=1e-5)

    right = (p.argmax(axis=-1) == pictures.classes).transpose(0, 2, 1)  # (proxies, pictures, looks)
    falls = (right[..., :-1] & ~right[..., 1:]).sum(axis=-1).astype(float)
    for row, learned in zip(falls, right.any(axis=-1), strict=True):
        assert row.max() > 0  # the pictures are hard enough for the test to say something
        row[~learned] = row.max() + 1
    config = PruneConfig(score="forgetting", proxy_looks=5, **options)
    assert proxy_scores(config, pictures, train) == pytest.approx(falls.mean(axis=0))

    config = PruneConfig(score="dyn_unc", proxy_looks=5, window=5, **options)
    deviation = of_label.std(axis=1, ddof=1).mean(axis=0)
    assert proxy_scores(config, pictures, train) == pytest.approx(deviation, abs=1e-5)
    with pytest.raises(ValueError, match="yielded no model"):
        proxy_scores(PruneConfig(score="grand", **options), pictures, lambda number: iter(()))


def test_hard_candidates_are_those_a_learner_gets_wrong() -> None:
    """End to end: what is kept as hard is mislabelled more often than what is kept as easy."""
    train, candidates = shapes(80, 1), shapes(200, 2)
    *_, learner = train_on(train, 5)
    labels = candidates.classes
    with torch.no_grad():
        wrong = learner(to_model(candidates.pixels)).argmax(1).numpy() != labels
    for score in ("entropy", "margin", "least_confidence", "loss", "el2n", "grand"):
        shares = []
        for end in ("hard", "easy"):
            config = PruneConfig(score=score, keep=end)
            values = candidate_scores(config, candidates, learner, lambda number: iter(()))
            kept = keep(values, labels, 60, config, classes=2)
            assert np.bincount(labels[kept]).tolist() == [30, 30]
            shares.append(wrong[kept].mean())
        assert shares[0] > shares[1] + 0.15, (score, shares)
