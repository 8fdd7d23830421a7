"""How far a picture moves under its control: known answers for known cuts, and for none."""

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import control_moves
from benchmarks.control_moves import CUTS, STORED, WHOLE
from etude.conditions import Conditions
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.models.conditioning import ConditioningConfig, ControlConfig
from etude.models.dit import DiT, DiTConfig
from etude.models.lpips import LPIPS
from etude.sampling import Generator

SIDE = 16


def blobs(window: tuple[float, float, float], count: int = 6, seed: int = 0) -> Tensor:
    """Pictures (count, 1, SIDE, SIDE) in [0, 1] of smooth blobs, seen through a window.

    Each is a formula of the place, so a window of it is exact without any interpolation.
    """
    random = np.random.default_rng(seed)
    top, left, side = window
    middles = (np.arange(SIDE) + 0.5) / SIDE * side
    y, x = (top + middles)[:, None], (left + middles)[None, :]
    pictures = np.zeros((count, SIDE, SIDE))
    for picture in pictures:
        for cy, cx in random.uniform(2.5, STORED - 2.5, (3, 2)):
            picture += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 1.2)
    return torch.from_numpy(np.tanh(pictures)).float()[:, None]


def as_bytes(images: Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def by_centre(images: np.ndarray) -> np.ndarray:
    """A judge by one pixel; equal pictures have equal labels."""
    return images[:, SIDE // 2, SIDE // 2, 0].astype(np.int64)


@pytest.fixture(scope="module")
def distance() -> LPIPS:
    return LPIPS("alexnet")


def test_a_cut_is_the_picture_seen_through_the_window() -> None:
    whole = blobs(WHOLE)
    windows = [WHOLE, (0.0, 2.0, 6.0), (1.5, 0.5, 5.5)]
    cuts = control_moves.cut(whole, windows)
    for found, window in zip(cuts.unbind(1), windows, strict=True):
        assert (found - blobs(window)).abs().max() < 0.03, window
    assert (cuts[:, 0] - blobs((0.0, 0.0, 6.0))).abs().max() > 0.2


def test_known_cuts_are_found_obeyed_and_leave_nothing(distance: LPIPS) -> None:
    """Pictures cut as asked: the windows are exact and no content is left over."""
    base, moved = blobs(WHOLE), torch.stack([blobs(cut) for cut in CUTS])
    windows, explained = control_moves.fitted(base, moved, batch=4)
    assert torch.equal(windows, torch.tensor(CUTS)[:, None].expand(-1, len(base), -1).float())
    assert (explained - moved).abs().max() < 0.03
    found = control_moves.moves(
        as_bytes(base), np.stack([as_bytes(m) for m in moved]), list(CUTS), by_centre, distance
    )
    assert np.allclose(found["place"], 1) and np.allclose(found["side"], 1)
    assert np.allclose(found["content"], found["as_asked"])  # the best window is the asked one
    assert (found["content"] < 0.2 * found["change"]).all()

    others = np.stack([as_bytes(blobs(cut, seed=1)) for cut in CUTS])
    strange = control_moves.moves(as_bytes(base), others, list(CUTS), by_centre, distance)
    assert (strange["content"] > 3 * found["content"]).all()


def test_a_control_asked_for_in_part_is_obeyed_in_part() -> None:
    """Half the zoom, none of the place: cuts of side 7 about the middle for side 6 anywhere."""
    asked = [(0.0, 0.0, 6.0), (2.0, 2.0, 6.0)]
    windows, _ = control_moves.fitted(blobs(WHOLE), torch.stack([blobs((0.5, 0.5, 7.0))] * 2))
    place, side = control_moves.obedience(windows, asked)
    assert np.allclose(place, 0) and np.allclose(side, 0.5)


def generator(exponent: float, learned: bool) -> Generator:
    """Pixels of an untrained DiT whose weights are not zero, but for its control's last layers."""
    names = ("crop_top", "crop_left", "crop_height")
    control = [ControlConfig(name=name, scale=16.0, exponent=exponent) for name in names]
    config = DiTConfig(
        input_size=SIDE, in_channels=1, patch_size=4, hidden_size=16, depth=1, num_heads=2,
        num_classes=10, learn_sigma=False, conditioning=ConditioningConfig(control=control),
    )  # fmt: skip
    model = DiT(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if learned or not name.startswith("control_embedder"):
            torch.nn.init.normal_(parameter, std=0.2)
    return Generator(
        model=model.eval().requires_grad_(False),
        objective=Objective(ObjectiveConfig(prediction="flow", schedule="flow")),
        sampler=SamplerConfig(method="ddim", steps=3, guidance_convention="one_plus_lambda"),
        autoencoder=None,
        classes=[str(n) for n in range(10)],
        latent_shape=(1, SIDE, SIDE),
        conditions=Conditions(config.conditioning, 10, SIDE, torch.device("cpu")),
        fingerprint=f"{exponent} {learned}",
    )


def test_the_same_pictures_do_not_move_and_are_kept(distance: LPIPS, tmp_path) -> None:
    """Control without weight moves nothing, exactly; control with weight moves the pictures."""
    still, moving = generator(0.0, learned=False), generator(0.0, learned=True)
    pictures = control_moves.drawn(still, [WHOLE, *CUTS[:2]], count=8, folder=tmp_path)
    assert pictures.shape == (3, 8, SIDE, SIDE, 1) and pictures[0].std() > 10
    found = control_moves.moves(pictures[0], pictures[1:], list(CUTS[:2]), by_centre, distance)
    assert not any(found[name].any() for name in ("change", "content", "place", "side"))
    assert found["same_label"].all() and found["as_asked"].any()
    again = control_moves.drawn(still, [WHOLE, *CUTS[:2]], count=8, folder=tmp_path)
    assert np.array_equal(again, pictures) and len(list(tmp_path.iterdir())) == 1

    pictures = control_moves.drawn(moving, [WHOLE, *CUTS[:2]], count=8, folder=tmp_path)
    assert (pictures[0] != pictures[1]).any() and len(list(tmp_path.iterdir())) == 2
    found = control_moves.moves(pictures[0], pictures[1:], list(CUTS[:2]), by_centre, distance)
    assert found["change"].min() > 0


def test_intervals_cover_seeds_and_pictures() -> None:
    """Of one row, the normal interval; of several, none narrower than that of their means."""
    random = np.random.default_rng(0)
    values = random.normal(0.3, 0.1, 400)
    one = control_moves.mean(values)
    assert np.isclose(one.value, values.mean())
    assert np.isclose(one.high - one.low, 2 * 1.96 * values.std(ddof=1) / 20)
    spread = values[None] + np.array([[-0.05], [0.0], [0.05]])
    several = control_moves.mean(spread)
    assert np.isclose(several.value, values.mean())
    # Student's t of two degrees of freedom over three means that lie 0.05 apart
    assert several.high - several.low > 0.9 * 2 * 4.303 * 0.05 / 3**0.5
