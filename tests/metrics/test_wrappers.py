"""Our metrics inside torchmetrics: values, one forward for all, reset, copies, and two ranks."""

from copy import deepcopy

import pytest
import torch

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from etude.metrics.extractors import Extractor  # noqa: E402
from etude.metrics.frechet import frechet_distance  # noqa: E402
from etude.metrics.kid import kid  # noqa: E402
from etude.metrics.prdc import prdc  # noqa: E402
from etude.metrics.wrappers.marginal import (  # noqa: E402
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
)

RANKS = """
import os, sys, torch
import torch.distributed as dist
from torchmetrics import MetricCollection
from etude.metrics.wrappers.marginal import FrechetDistance, KernelDistance, PrecisionRecall

class Flat:
    dim = 12
    def __call__(self, images):
        return images.flatten(1).float() / 255

dist.init_process_group("gloo")
rank = dist.get_rank()
flat = Flat()
made = [FrechetDistance(flat), KernelDistance(flat), PrecisionRecall(flat, k=3)]
metrics = MetricCollection(made)
pictures = torch.load(sys.argv[1])
for name, batch in pictures.items():
    mine = batch[: 31] if rank == 0 else batch[31 :]
    for part in mine.split(20):
        metrics.update(part, real=name == "real")
print({name: float(value) for name, value in metrics.compute().items()})
"""


class Counting(Extractor):
    """The pixels' extractor, which counts its batches."""

    calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(images)


class Flat:
    dim = 12

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255


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


def test_two_ranks_of_unequal_shares_are_one_set(tmp_path, serve) -> None:
    forks = serve("torchmetrics", "etude.metrics.wrappers.marginal")
    sides = {"real": pictures(90, 10), "generated": pictures(71, 11, 230)}
    torch.save(sides, tmp_path / "pictures.pt")
    ranks = forks.start_ranks(2, "-c", RANKS, tmp_path / "pictures.pt", cwd=tmp_path)
    x, y = (side.permute(0, 2, 3, 1).flatten(1).float() / 255 for side in sides.values())
    expected = {"FrechetDistance": frechet_distance(x, y), "KernelDistance": kid(x, y)}
    expected |= prdc(x, y, 3)
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert eval(out.strip().splitlines()[-1]) == pytest.approx(expected, rel=1e-6)
