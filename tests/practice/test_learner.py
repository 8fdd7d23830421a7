"""The learner: its step against textbook loops, its averages, its preprocessing, several ranks."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from etude.core.checkpoint import load_checkpoint, save_checkpoint
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.rng import Stream, bits
from etude.core.strategy import StrategyConfig
from etude.core.strategy_local import LocalStrategy
from etude.data.cropping import erase_boxes
from etude.data.mixing import draw_mix
from etude.metrics.extractors.classifier import save_classifier
from etude.models.classifier import Classifier, ClassifierConfig
from etude.practice.augmenting import augment
from etude.practice.learner import Learner, LearnerConfig, weights_hash
from etude.practice.running import normalise_over_ranks

WORKER = Path(__file__).parent / "workers" / "learners.py"


def load_worker():
    spec = importlib.util.spec_from_file_location("learners_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()
HERE = World(0, 1, 0, torch.device("cpu"))
RESNET = worker.RECIPE | {"model": worker.RESNET, "shift": 0, "flip": False}


def new(fields: dict, seed: int = 3, precision: str = "fp32") -> Learner:
    config = StrategyConfig(kind="local", precision=precision)
    return Learner(LearnerConfig(**fields), seed, HERE, config)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("flip", [False, True])
def test_a_plain_learner_is_the_plain_loop_to_the_bit(flip: bool) -> None:
    """Shift, mirror, smoothed cross-entropy and AdamW in so many words, in float from the start."""
    fields = {"model": worker.SMALL, "batch": 16, "shift": 2, "flip": flip}
    learner, config = new(fields), LearnerConfig(**fields)
    net = Classifier(config.model, seed=3)
    plain = LocalStrategy(StrategyConfig(kind="local"), net, config.optim(), HERE)
    for step in range(12):
        positions = np.arange(16) + 16 * step
        images, labels = worker.fetch(positions)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        padded = F.pad(x, (2, 2, 2, 2), value=-1.0)
        moves = bits(3, Stream.CROP, positions, 2).astype(np.int64) * 5 >> 32
        x = torch.stack(
            [p[:, t : t + 16, s : s + 16] for p, (t, s) in zip(padded, moves, strict=True)]
        )
        if flip:
            turned = torch.from_numpy(bits(3, Stream.FLIP, positions, 1)[:, 0] & 1).bool()
            x = torch.where(turned[:, None, None, None], x.flip(-1), x)
        loss = F.cross_entropy(plain(x), torch.from_numpy(labels), label_smoothing=0.1)
        plain.backward(loss)
        plain.step(config.lr * (1.0 - step / 20))
        assert torch.equal(learner.step(worker.fetch, step, 1.0 - step / 20), loss.detach())
    for mine, theirs in (("raw", "raw"), ("ema", "ema:0.99")):
        with plain.weights(theirs) as module:
            assert same(state(learner.frozen(mine).network), state(module))


def test_equal_seeds_give_equal_learners_and_other_seeds_others() -> None:
    one, two, other = (state(new({}, seed).frozen("ema")) for seed in (3, 3, 4))
    assert same(one, two) and not same(one, other)


def test_averages_follow_their_rule_for_weights_and_running_statistics() -> None:
    learner = new(RESNET)
    average = {n: t.double() for n, t in state(learner.frozen("raw").network).items()}
    for step in range(6):
        learner.step(worker.fetch, step, 1.0)
        raw = state(learner.frozen("raw").network)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in raw.items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    found, checked = state(learner.frozen("ema").network), 0
    assert found.keys() == raw.keys()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
            checked += name.endswith("running_var") and not torch.allclose(value, raw[name])
    assert checked == 20  # every running variance moved on from its average


def test_a_refused_step_changes_nothing() -> None:
    learner = new(RESNET)
    learner.step(worker.fetch, 0, 1.0)
    before = [state(learner.frozen(weights).network) for weights in ("raw", "ema")]
    learner.strategy.refuse(torch.tensor(True))
    learner.step(worker.fetch, 1, 1.0)
    for old, weights in zip(before, ("raw", "ema"), strict=True):
        now = state(learner.frozen(weights).network)
        for name, value in old.items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(now[name], value), name
    with pytest.raises(UserError, match="not finite by step 2: lower learner.lr"):
        learner.refuse_nonfinite(2)
    learner.step(worker.fetch, 1, 1.0)
    assert not torch.equal(
        learner.frozen("ema").network.bn1.running_mean, before[1]["bn1.running_mean"]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_learner_goes_on_as_if_it_had_never_stopped(precision, tmp_path) -> None:
    straight, stopped, resumed = (new(RESNET, precision=precision) for _ in range(3))
    for step in range(6):
        straight.step(worker.fetch, step, 1.0)
        if step < 3:
            stopped.step(worker.fetch, step, 1.0)
    resumed.step(worker.fetch, 7, 1.0)  # a state that loading must replace
    load_checkpoint(save_checkpoint(tmp_path, 3, stopped.strategy, {}, HERE), resumed.strategy)
    for step in range(3, 6):
        resumed.step(worker.fetch, step, 1.0)
    for weights in ("raw", "ema"):
        found = resumed.frozen(weights)
        assert same(state(found), state(straight.frozen(weights)))
        assert weights_hash(found) == weights_hash(straight.frozen(weights))
        assert found.network.bn1.running_var.dtype == torch.float32
    assert weights_hash(resumed.frozen("raw")) != weights_hash(resumed.frozen("ema"))


def test_hashes_name_the_network_whatever_it_stands_behind() -> None:
    frozen = new({"model": worker.SMALL, "mean": (0.5,), "std": (0.2,)}).frozen("raw")
    assert weights_hash(frozen) == weights_hash(
        Classifier(ClassifierConfig(**worker.SMALL), seed=3)
    )


def test_frozen_resizes_and_normalises_and_lets_gradients_through() -> None:
    """Against Pillow's resize of float pictures, and finite differences of the whole."""
    fields = {"model": worker.VIT, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    frozen = new(fields).frozen("ema")
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    x = torch.rand(2, 3, 37, 29, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = frozen.prepare(x)
    for picture, out in zip(x, seen, strict=True):
        for channel in range(3):
            small = Image.fromarray(picture[channel].numpy(), mode="F")
            small = np.asarray(small.resize((16, 16), Image.Resampling.BILINEAR))
            mean, std = fields["mean"][channel], fields["std"][channel]
            expected = ((small + 1) / 2 - mean) / std
            np.testing.assert_allclose(out[channel].numpy(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(frozen(x), frozen.network(seen))
    frozen.double()
    x = x.double().requires_grad_()
    gradient = torch.autograd.grad(frozen.network(frozen.prepare(x)).square().sum(), x)[0]
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-5
    ends = [frozen.network(frozen.prepare(x + s * step)).square().sum() for s in (1, -1)]
    torch.testing.assert_close((gradient * step).sum() * 2, ends[0] - ends[1], rtol=1e-5, atol=0)


def test_a_size_or_none_of_its_own() -> None:
    plain = new({"model": worker.SMALL}).frozen("raw")
    x = torch.rand(1, 3, 20, 20)
    assert torch.equal(plain(x), plain.network(x))
    sized = new({"model": worker.SMALL, "input_size": 12}).frozen("raw")
    small = F.interpolate(x, (12, 12), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(sized(x), sized.network(small))
    assert not torch.allclose(sized(x), sized.network(x))


@pytest.mark.parametrize("alphas", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_mixed_losses_are_those_of_both_labels(alphas: dict) -> None:
    fields = {"model": worker.SMALL, "batch": 8, "shift": 0, "label_smoothing": 0.2} | alphas
    learner = new(fields)
    for step in range(6):
        frozen = learner.frozen("raw")  # group normalisation: training sees the same
        images, labels = worker.fetch(np.arange(8) + 8 * step)
        x, y = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)
        mix = draw_mix(3, step, alphas.get("mixup", 0), alphas.get("cutmix", 0), (16, 16))
        after = x[[1, 2, 3, 4, 5, 6, 7, 0]]
        if mix.box is None:
            x = mix.share * x + (1 - mix.share) * after
        else:
            inside = torch.zeros(16, 16, dtype=torch.bool)
            inside[mix.box[0] : mix.box[2], mix.box[1] : mix.box[3]] = True
            x = torch.where(inside, after, x)
        with torch.no_grad():
            own, other = (
                F.cross_entropy(frozen(x), target, label_smoothing=0.2)
                for target in (y, y[[1, 2, 3, 4, 5, 6, 7, 0]])
            )
        expected = mix.share * own + (1 - mix.share) * other
        torch.testing.assert_close(learner.step(worker.fetch, step, 1.0), expected)


def test_what_the_network_sees_is_cropped_changed_normalised_and_then_erased() -> None:
    fields = worker.STRONG | {"model": worker.SMALL, "mixup": 0.0, "cutmix": 0.0, "erase": 1.0}
    learner, kept = new(fields | {"input_size": 24}), []
    learner.strategy.module.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    learner.step(worker.fetch, 2, 1.0)
    positions = np.arange(8) + 16
    images = torch.from_numpy(worker.fetch(positions)[0]).permute(0, 3, 1, 2)
    levels = augment(images, positions, learner.config, 3, side=24) / 255.0
    mean, std = (torch.tensor(fields[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = (levels - mean) / std
    assert expected.shape == (8, 3, 24, 24)
    boxes = erase_boxes(positions, 3, (24, 24), 1.0)
    assert (boxes.height > 0).all()
    for row, (top, left, height, width) in enumerate(zip(*vars(boxes).values(), strict=True)):
        expected[row, :, top : top + height, left : left + width] = 0.0
    torch.testing.assert_close(kept[0], expected, rtol=0, atol=1e-5)


def test_a_probe_learns_its_head_alone(tmp_path) -> None:
    judge = Classifier(ClassifierConfig(**worker.SMALL), seed=9)
    save_classifier(tmp_path, judge, 16, list("abcd"))
    fields = RESNET | {"model": {"family": "probe", "weights": str(tmp_path), "num_classes": 4}}
    learner = new(fields | {"lr": 0.05})
    losses = [float(learner.step(worker.fetch, step, 1.0)) for step in range(12)]
    for weights in ("raw", "ema"):
        network = learner.frozen(weights).network
        assert same(state(network.backbone), state(judge))
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory) -> list[dict]:
    """What one and two ranks report; one retry, because DeepSpeed at times aborts at exit."""
    folder, reports = tmp_path_factory.mktemp("learners"), []
    for ranks in (1, 2):
        for _ in range(2):
            done = run_ranks(ranks, WORKER, folder / f"{ranks}")
            if (folder / f"{ranks}").exists():
                break
        assert (folder / f"{ranks}").exists(), "".join(d.stderr[-4000:] for d in done)
        reports.append(torch.load(folder / f"{ranks}", weights_only=True))
    return reports


def test_two_ranks_take_the_steps_of_one(found) -> None:
    """Mean losses within 1e-6, with every augmentation, mixing and batch statistics."""
    one, two = found
    assert len(two) == 9
    for name, report in two.items():
        family, precision = name.partition(" local")[0].partition(" zero")[0], name[-4:]
        expected = one[f"{family} local None" + (" bf16" if precision == "bf16" else "")]
        tolerance = 3e-2 if precision == "bf16" else 1e-6
        assert report["losses"] == pytest.approx(expected["losses"], rel=tolerance), name
        assert report["ranks"][0] == report["ranks"][1] and report["wide"], name
        for weights in ("raw", "ema"):
            for tensor, value in expected["ranks"][0][weights].items():
                if precision != "bf16" and ("running" in tensor or tensor == "logits"):
                    mine = report["ranks"][0][weights][tensor]
                    assert mine == pytest.approx(value, rel=1e-4, abs=1e-3), (name, tensor)


def test_batches_and_networks_that_ranks_cannot_share_are_refused() -> None:
    three = World(0, 3, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="learner.batch=64 cannot be shared by 3 processes"):
        Learner(LearnerConfig(), 0, three)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match="1 is a BatchNorm2d that would see one rank's pictures"):
        normalise_over_ranks(network, three)
    normalise_over_ranks(network, HERE)
    normalise_over_ranks(network.eval(), three)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_scale": (0.5, 1.0)}, "shift=1 moves pictures that crop_scale cuts anyway"),
        ({"crop_ratio": (0.5, 1.0)}, "crop_ratio has no effect without crop_scale"),
        ({"crop_scale": (0.5, 1.5), "shift": 0}, "0 < min <= max <= 1"),
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"mean": (0.5, 0.4), "std": (1.0,)}, "mean has 2 values for 1 channels"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be positive"),
        ({"randaugment": {"magnitude": 5}}, "no effect with num_ops=0"),
        ({"model": worker.VIT, "input_size": 32}, "input_size=32 but model.input_size=16"),
        ({"model": {"family": "gan"}}, "'small', 'vit', 'resnet', 'probe', 'imported'"),
    ],
)
def test_sections_without_sense_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerConfig(**fields)
