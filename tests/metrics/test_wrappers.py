"""Our metrics inside torchmetrics: values, one forward for all, reset, copies, and two ranks."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from etude.core.errors import UserError  # noqa: E402
from etude.metrics.extractors import Backbone, Extractor, extractor  # noqa: E402
from etude.metrics.frechet import frechet_distance  # noqa: E402
from etude.metrics.kid import kid  # noqa: E402
from etude.metrics.prdc import prdc  # noqa: E402
from etude.metrics.wrappers.torchmetrics import (  # noqa: E402
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
)

RANKS = """
import os, sys, torch
import torch.distributed as dist
from torchmetrics import MetricCollection
from etude.metrics.wrappers.torchmetrics import FrechetDistance, KernelDistance, PrecisionRecall

class Flat:
    dim = 12
    def __call__(self, images):
        return images.flatten(1).float() / 255

dist.init_process_group("gloo")
rank = dist.get_rank()
flat = Flat()
pictures = torch.load(sys.argv[1])
for shares in eval(sys.argv[2]):  # pictures of each side that rank 0 has
    made = [FrechetDistance(flat), KernelDistance(flat), PrecisionRecall(flat, k=3)]
    metrics = MetricCollection(made)
    for (name, batch), share in zip(pictures.items(), shares):
        mine = batch[:share] if rank == 0 else batch[share:]
        for part in mine.split(20) if len(mine) else ():
            metrics.update(part, real=name == "real")
    for again in range(2):  # and that a rank keeps its own part
        print({name: float(value) for name, value in metrics.compute().items()})
        metrics = metrics.clone()
        for one in metrics.values():
            one._computed = None
"""


class Counting(Extractor):
    """The pixels' extractor, which counts its batches."""

    calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(images)


@extractor("scaled pixels")
class Scaled(Backbone):
    """Pictures of 2 by 2 pixels times a weight."""

    version, input_size, resize, taps = "1", 2, "none", {"pixels": 12}
    needs_weights = False

    def __init__(self, weights: None) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return images.flatten(1).to(dtype)

    def forward(self, x: torch.Tensor, taps) -> dict[str, torch.Tensor]:
        return {"pixels": x * self.scale / 255}


class Flat:
    dim, scale = 12, 1.0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() * self.scale / 255


def pictures(count: int, seed: int, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 3, 2, 2), generator=generator, dtype=torch.uint8)


def test_a_collection_gives_our_values_with_one_forward_per_batch() -> None:
    extractor = Counting("pixels", input_size=2, channels=3)
    made = [FrechetDistance(extractor), KernelDistance(extractor), PrecisionRecall(extractor, k=3)]
    metrics = torchmetrics.MetricCollection(made)
    real, generated = pictures(90, 0), pictures(70, 1, 220)
    for name, side in (("real", real), ("generated", generated)):
        for batch in side.split(32):
            metrics.update(batch, real=name == "real")
    assert extractor.calls == 6
    x, y = (extractor(side.permute(0, 2, 3, 1)) for side in (real, generated))
    found = metrics.compute()
    assert float(found["FrechetDistance"]) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert float(found["KernelDistance"]) == pytest.approx(kid(x, y), rel=1e-9)
    for name, value in prdc(x, y, 3).items():
        assert float(found[name]) == pytest.approx(value)


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
@pytest.mark.parametrize("inference", [False, True])
def test_a_buffer_that_is_filled_again_gives_every_batch(kind: type, inference: bool) -> None:
    extractor = Counting("pixels", input_size=2, channels=3)
    buffer = np.zeros((20, 3, 2, 2), np.uint8)
    images, sides = torch.from_numpy(buffer), (pictures(60, 40), pictures(60, 41, 200))
    metrics = torchmetrics.MetricCollection({name: kind(extractor) for name in "ab"})
    for side, real in zip(sides, (True, False), strict=True):
        for batch in side.split(20):
            buffer[:] = batch.numpy()
            with torch.inference_mode(inference):
                metrics.update(images, real=real)
    assert extractor.calls == 6
    of = {FrechetDistance: frechet_distance, KernelDistance: kid}[kind]
    expected = of(*(flat(side.permute(0, 2, 3, 1)) for side in sides))
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == pytest.approx(dict.fromkeys("ab", expected), rel=1e-6)


def test_a_convention_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="PrecisionRecall.convention: .* got 'torch_fidelity'$"):
        PrecisionRecall(Flat(), convention="torch_fidelity")
    with pytest.raises(UserError, match="PrecisionRecall.k: .* got 0$"):
        PrecisionRecall(Flat(), k=0)


def test_channels_may_come_last() -> None:
    real, generated = pictures(40, 2), pictures(40, 3, 200)
    found = []
    for last in (False, True):
        metric = FrechetDistance(Flat(), channels_last=last)
        for side, is_real in ((real, True), (generated, False)):
            metric.update(side.permute(0, 2, 3, 1) if last else side, real=is_real)
        found.append(float(metric.compute()))
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    with pytest.raises(ValueError, match="uint8"):
        FrechetDistance(Flat()).update(real.float(), real=True)


@pytest.mark.parametrize("keeps", [False, True])
def test_reset_forgets_and_may_keep_the_real_side(keeps: bool) -> None:
    real, generated = pictures(50, 4), pictures(50, 5, 180)
    for kind in (FrechetDistance, KernelDistance):
        metric = kind(Flat(), reset_real_features=not keeps)
        metric.update(real, real=True)
        metric.update(pictures(30, 6, 90), real=False)
        metric.reset()
        if not keeps:
            metric.update(real, real=True)
        metric.update(generated, real=False)
        fresh = kind(Flat())
        fresh.update(real, real=True)
        fresh.update(generated, real=False)
        assert float(metric.compute()) == pytest.approx(float(fresh.compute()), rel=1e-12)


def test_a_copy_goes_its_own_way_with_the_same_extractor() -> None:
    extractor = Flat()
    metric = FrechetDistance(extractor)
    metric.update(pictures(50, 7), real=True)
    metric.update(pictures(50, 8, 150), real=False)
    copy = deepcopy(metric)
    before = float(metric.compute())
    copy.update(pictures(50, 9, 30), real=False)
    assert float(copy.compute()) != before and copy._extractor[0] is extractor
    metric._computed = None
    assert float(metric.compute()) == before


def distance(metric: torch.nn.Module, *batches: tuple[torch.Tensor, bool]) -> float:
    for batch, real in batches:
        metric.update(batch, real=real)
    return float(metric.compute())


def flat(images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return images.flatten(1).float() * scale / 255


@pytest.mark.parametrize("how", ["in place", "loaded", "moved"])
def test_weights_that_change_give_features_anew(how: str) -> None:
    """Between epochs, of pictures that stay; with and without a reset."""
    real, generated = pictures(40, 20), pictures(40, 21, 150)
    scaled = Extractor("scaled pixels")
    x, y = real.permute(0, 2, 3, 1), generated.permute(0, 2, 3, 1)
    metric = KernelDistance(scaled)
    assert distance(metric, (real, True), (generated, False)) == pytest.approx(
        kid(flat(x), flat(y))
    )
    network = scaled.backbone
    if how == "in place":
        network.scale.mul_(3)  # frozen: no gradient is asked for
    elif how == "loaded":
        network.load_state_dict({"scale": torch.tensor(3.0)})
    else:
        network.scale.data = torch.tensor(3.0)
    found = distance(KernelDistance(scaled), (real, True), (generated, False))
    assert found == pytest.approx(kid(flat(x, 3), flat(y, 3)), rel=1e-6)
    metric.reset()
    assert distance(metric, (real, True), (generated, False)) == pytest.approx(found)


def test_an_extractor_that_is_gone_leaves_nothing_to_the_next() -> None:
    """Python gives its id to another, here to one of another number of channels."""
    images, metric, ids = pictures(4, 22), KernelDistance(Flat()), set()
    for channels in (1, 3) * 10:
        metric._extractor = ()  # all that held the one before
        metric._extractor = (Extractor("pixels", input_size=2, channels=channels),)
        ids.add(id(metric._extractor[0]))
        expected = metric._extractor[0](images.permute(0, 2, 3, 1))
        assert torch.equal(metric.features(images), expected)
    assert len(ids) < 20


def test_a_function_is_asked_by_every_metric_and_every_time() -> None:
    real, generated, learner = pictures(40, 24), pictures(40, 25, 150), Flat()
    x, y = (side.permute(0, 2, 3, 1) for side in (real, generated))
    for learner.scale in (1.0, 2.0):  # trained meanwhile
        found = distance(KernelDistance(learner), (real, True), (generated, False))
        assert found == pytest.approx(kid(flat(x, learner.scale), flat(y, learner.scale)))


@pytest.mark.parametrize("size", [1, 16, 700, 2500])
def test_the_fréchet_distance_does_not_depend_on_how_batches_are_cut(size: int) -> None:
    real, generated = pictures(2500, 26), pictures(1100, 27, 200)
    metric = FrechetDistance(Flat())
    for side, is_real in ((real, True), (generated, False)):
        for batch in side.split(size):
            metric.update(batch, real=is_real)
    x, y = (flat(side.permute(0, 2, 3, 1)).double() for side in (real, generated))
    assert float(metric.compute()) == pytest.approx(frechet_distance(x, y), rel=1e-11)
    count, _, mean, scatter = metric.real.split([1, 1, 12, 144])
    assert count == 2500
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scatter.view(12, 12) / 2499, np.cov(x.numpy().T), atol=1e-14)


def persisted(metric: FrechetDistance) -> FrechetDistance:
    other = FrechetDistance(metric._extractor[0])
    other.update(pictures(9, 1), real=True)  # goes when the state comes
    for one in (metric, other):
        one.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1
    return other


def merged(metric: FrechetDistance) -> FrechetDistance:
    other = FrechetDistance(metric._extractor[0])
    other.update(pictures(1, 1), real=True)
    other.reset()
    other.merge_state(metric)
    return other


@pytest.mark.parametrize(
    "through",
    [
        deepcopy,
        lambda one: pickle.loads(pickle.dumps(one)),
        persisted,
        merged,
        lambda one: one.cpu(),
    ],
    ids=["deepcopy", "pickle", "state_dict", "merge_state", "cpu"],
)
def test_rows_that_wait_go_wherever_the_state_goes(through) -> None:
    extractor = Extractor("pixels", input_size=2, channels=3)
    real, generated, more = pictures(50, 28), pictures(40, 29, 200), pictures(30, 30, 100)
    metric = FrechetDistance(extractor)
    with torch.inference_mode():  # as validation often is
        metric.update(real, real=True)
    metric.update(generated, real=False)
    other = through(metric)
    x, y = (extractor(side.permute(0, 2, 3, 1)) for side in (real, torch.cat([generated, more])))
    assert distance(other, (more, False)) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    if other is not metric:
        expected = frechet_distance(x, y[:40])
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-9)


def test_metrics_of_one_compute_group_share_rows_that_wait() -> None:
    real, generated = pictures(50, 31), pictures(40, 32, 200)
    metrics = torchmetrics.MetricCollection({name: FrechetDistance(Flat()) for name in "ab"})
    for side, is_real in ((real, True), (generated, False)):
        for batch in side.split(20):
            metrics.update(batch, real=is_real)
    assert metrics.compute_groups == {0: ["a", "b"]}
    x, y = (flat(side.permute(0, 2, 3, 1)) for side in (real, generated))
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == pytest.approx(dict.fromkeys("ab", frechet_distance(x, y)), rel=1e-9)


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_forward_gives_the_batch_and_keeps_the_whole(kind: type) -> None:
    """The real side, which `reset` keeps, counts once."""
    of = {FrechetDistance: frechet_distance, KernelDistance: kid}[kind]
    metric = kind(Flat(), reset_real_features=False)
    real, generated = pictures(50, 33), pictures(40, 34, 200)
    x, y = (flat(side.permute(0, 2, 3, 1)) for side in (real, generated))
    metric.update(real, real=True)
    for batch, rows in zip(generated.split(20), y.split(20), strict=True):
        assert float(metric(batch, real=False)) == pytest.approx(of(x, rows), rel=1e-9)
    assert float(metric.compute()) == pytest.approx(of(x, y), rel=1e-9)


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, PrecisionRecall])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_side_without_pictures_is_named(kind: type) -> None:
    metric, least = kind(Flat()), 6 if kind is PrecisionRecall else 2
    said = f"{kind.__name__} needs {least} or more real pictures and has 0; call update.*real=True"
    with pytest.raises(UserError, match=said):
        metric.compute()
    metric.update(pictures(8, 35), real=True)
    metric.update(pictures(1, 36), real=False)
    with pytest.raises(UserError, match=rf"{least} or more generated .* has 1; .* real=False\)"):
        metric.compute()


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, PrecisionRecall])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_with_their_number(kind: type, bad) -> None:
    class Overflowing(Flat):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__(images).where(images.flatten(1) < 250, bad)

    real, generated = pictures(60, 37, 240), pictures(1500, 38)
    metric = kind(Overflowing())
    metric.update(real, real=True)
    for batch in generated.split(500):
        metric.update(batch, real=False)
    count = int((generated.flatten(1) >= 250).any(1).sum())
    with pytest.raises(UserError, match=f"features of {count} of 1500 generated pictures are not"):
        metric.compute()


def test_pictures_in_the_other_order_are_reported_as_given() -> None:
    given = pictures(4, 39).permute(0, 2, 3, 1)
    for taken in (Flat(), Extractor("pixels", input_size=2, channels=3)):
        with pytest.raises(UserError) as said:
            KernelDistance(taken).update(given, real=True)
        assert str(said.value) == (
            "pictures must be uint8 (B, C, H, W) with 1 or 3 channels, got torch.uint8 "
            "(4, 2, 2, 3); for (B, H, W, C) set channels_last=True"
        )
    with pytest.raises(UserError, match=r"\(4, 3, 2, 2\); for .* set channels_last=False"):
        KernelDistance(Flat(), channels_last=True).update(pictures(4, 39), real=True)


def test_ranks_of_unequal_shares_are_one_set(tmp_path, serve) -> None:
    """Also where one has no pictures of a side, or none at all."""
    forks = serve("torchmetrics", "etude.metrics.wrappers.torchmetrics")
    sides = {"real": pictures(90, 10), "generated": pictures(71, 11, 230)}
    torch.save(sides, tmp_path / "pictures.pt")
    shares = "(31, 31), (31, 71), (0, 31), (0, 71), (90, 71)"
    ranks = forks.start_ranks(2, "-c", RANKS, tmp_path / "pictures.pt", shares, cwd=tmp_path)
    x, y = (side.permute(0, 2, 3, 1).flatten(1).float() / 255 for side in sides.values())
    expected = {"FrechetDistance": frechet_distance(x, y), "KernelDistance": kid(x, y)}
    expected |= prdc(x, y, 3)
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        found = [eval(line) for line in out.splitlines() if line.startswith("{")]
        assert found == [pytest.approx(expected, rel=1e-6)] * 10
