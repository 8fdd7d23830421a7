"""An autoencoder's training with a perceptual distance and a discriminator, on real digits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from etude.core import distributed
from etude.core.checkpoint import verify_checkpoint
from etude.core.errors import UserError
from etude.core.log import read_metrics
from etude.core.recipe import load_recipe
from etude.dry_run import dry_run
from etude.estimate import needed_files
from etude.external.diffusers import Autoencoder
from etude.jobs import run_recipe
from etude.models.discriminator import PatchDiscriminator
from etude.models.lpips import LPIPS
from etude.training.critics import Critics

ALONE = distributed.World(0, 1, 0, torch.device("cpu"), ("here:cpu",))
WORKER = Path(__file__).parent / "workers" / "adversarial.py"
SHARDED = ["local", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def recipe_file(tiny, tmp_path_factory) -> str:
    """The tiny autoencoder at 32 pixels with both judges; the discriminator from step 2 on."""
    folder = tmp_path_factory.mktemp("adversarial")
    distance = LPIPS("alexnet", seed=5)
    generator = torch.Generator().manual_seed(3)
    for conv in distance.convs:
        conv.weight.normal_(0.0, (2 / conv.weight[0].numel()) ** 0.5, generator=generator)
    save_file(distance.to_file(), folder / "alexnet.safetensors")
    text = Path(tiny.autoencoder).read_text().replace("image_size: 16", "image_size: 32")
    text = text.replace("images: 320", "images: 80").replace(
        "every_images: 160", "every_images: 48"
    )
    text += f"""
perceptual: {{weights: {folder}/alexnet.safetensors, weight: 0.5}}
adversarial:
  weight: 0.5
  start_images: 32
  lr: 2.0e-3
  discriminator: {{channels: 8, layers: 2, groups: 4}}
"""
    (folder / "autoencoder.yaml").write_text(text)
    return str(folder / "autoencoder.yaml")


def run(recipe_file: str, root: Path, name: str, *overrides: str) -> Path:
    return run_recipe(load_recipe(recipe_file, overrides), root=root, name=name, quiet=True)[0]


@pytest.fixture(scope="module")
def alone(recipe_file, tmp_path_factory) -> Path:
    return run(recipe_file, tmp_path_factory.mktemp("alone"), "alone")


def state(folder: Path, images: int = 80) -> dict[tuple[str, str], Tensor]:
    with verify_checkpoint(folder / "checkpoints" / f"step-{images:012d}") as found:
        keys = [(t["name"], t["state"]) for t in found.manifest["tensors"]]
        return {k: found.read(*k, 0, int(np.prod(found.shape(*k)))) for k in keys}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl", "train")]


@pytest.mark.parametrize(
    ("adaptive", "reduction"), [(True, "mean"), (False, "mean"), (True, "sum")]
)
def test_the_gradient_is_that_of_the_published_loss(recipe_file, adaptive, reduction) -> None:
    given = [f"adversarial.adaptive={adaptive}", f"model.reduction={reduction}"]
    given += ["adversarial.adaptive_images=2"] if adaptive else []
    recipe = load_recipe(recipe_file, given)
    model = Autoencoder.build(recipe.model, seed=1)
    critics = Critics(recipe, model, ALONE)
    critics.discriminator.layers[-1].weight.data *= 5.0  # a ratio far from one
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 32, 32, generator=generator) * 2 - 1
    eps = torch.randn(4, 2, 16, 16, generator=generator)

    loss, rebuilt, last_input = model(images, eps, parts=True)
    ours = loss + critics.added(images, rebuilt, last_input, playing=True)
    ours.mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(p.grad is None for p in critics.discriminator.parameters())

    # as in the code of Esser et al. and Rombach et al., by plain automatic differentiation
    model.zero_grad()
    mean, std = model.encode(images)
    rebuilt = model.decode(mean + std * eps)
    distance = LPIPS.from_file(recipe.perceptual.weights)(rebuilt, images)
    error = (images - rebuilt).abs() + 0.5 * distance.view(-1, 1, 1, 1)
    divergence = 0.5 * (mean**2 + std**2 - 1 - torch.log(std**2))
    sides = [values.sum((1, 2, 3)) for values in (error, divergence)]
    if reduction == "mean":
        sides = [sides[0] / images[0].numel(), sides[1] / mean[0].numel()]
    game = -critics.discriminator(rebuilt).mean((1, 2, 3))
    last = model.network.decoder.conv_out.weight
    weights = []
    for two in (slice(0, 2), slice(2, 4)):
        norms = [
            torch.autograd.grad(value[two].mean(), last, retain_graph=True)[0].norm()
            for value in (sides[0], game)
        ]
        ratio = norms[0] / (norms[1] + 1e-4)
        assert not 0.5 < ratio < 2.0
        weights += [0.5 * ratio.clamp(0, 1e4) if adaptive else torch.tensor(0.5)] * 2
        assert weights[-1] * norms[1] > 0.1 * norms[0]
    assert not adaptive or (weights[0] / weights[2] - 1).abs() > 0.01
    wanted = sides[0] + 1e-4 * sides[1] + torch.stack(weights) * game
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    wanted.mean().backward()
    whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for name, parameter in model.named_parameters():
        error = (found[name] - parameter.grad).norm()
        # softmax does not see the keys' bias: its gradient is rounding
        assert error < 1e-4 * parameter.grad.norm() + 1e-6 * whole, name


def test_the_ratio_is_limited(recipe_file) -> None:
    grads, limited = [], ["adversarial.adaptive_limit=0.001", "adversarial.adaptive_images=2"]
    for given in (limited, ["adversarial.adaptive=false"]):
        recipe = load_recipe(recipe_file, [*given, "adversarial.weight=0.25"])
        critics = Critics(recipe, Autoencoder.build(recipe.model, seed=1), ALONE)
        critics.perceptual = None
        features = torch.rand(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
        rebuilt = torch.linspace(-1, 1, 2048).view(2, 1, 32, 32).requires_grad_()
        added = critics.added(-rebuilt.detach(), rebuilt, features, playing=True)
        grads.append(torch.autograd.grad(added.sum(), rebuilt)[0])
    torch.testing.assert_close(grads[0], 0.001 * grads[1], rtol=1e-4, atol=1e-9)


def test_the_discriminator_joins_where_it_is_told_and_learns(alone, recipe_file) -> None:
    before, after = state(alone, 48), state(alone)
    recipe = load_recipe(recipe_file)
    fresh = PatchDiscriminator(recipe.adversarial.discriminator, 1, seed=recipe.seed)
    names = {f"discriminator.{name}" for name, _ in fresh.named_parameters()}
    assert {n for n, _ in after if n.startswith("discriminator.")} == names
    assert {s for n, s in after if n in names} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert {float(before[n, "step"]) for n in names} == {1.0}  # of the steps 0, 1 and 2
    assert {float(after[n, "step"]) for n in names} == {3.0}
    assert float(after["network.decoder.conv_out.weight", "step"]) == 5.0
    for name, parameter in fresh.named_parameters():
        moved = after[f"discriminator.{name}", "weight"].view_as(parameter) - parameter.detach()
        assert 0 < moved.abs().max() < 4 * 2e-3  # about its learning rate a step
    row = read_metrics(alone / "metrics.jsonl", "discriminator")[-1]
    assert row["images_seen"] == 80 and row["real"] != row["fake"]
    held = read_metrics(alone / "metrics.jsonl", "held_out")[-1]
    assert held["raw"] > 0


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(alone, recipe_file, tmp_path) -> None:
    parted = tmp_path / "parted"
    shutil.copytree(alone, parted)
    shutil.rmtree(parted / "checkpoints" / "step-000000000080")
    (parted / "result.json").unlink()
    run(recipe_file, tmp_path, "parted")
    one, two = state(alone), state(parted)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert losses(alone) == losses(parted) and len(losses(alone)) == 5


def test_a_run_does_not_go_on_with_another_distance(
    alone, recipe_file, tmp_path, monkeypatch
) -> None:
    shutil.copytree(alone, tmp_path / "parted")
    (tmp_path / "parted" / "result.json").unlink()
    monkeypatch.setattr("etude.models.lpips._sha256", lambda tensors: "other")
    with pytest.raises(UserError, match="perceptual.weights names other weights than"):
        run(recipe_file, tmp_path, "parted")


def test_a_dry_run_tries_the_discriminator(recipe_file, monkeypatch) -> None:
    played = []
    whole = Critics.added
    monkeypatch.setattr(
        Critics, "added", lambda self, *given: played.append(given[-1]) or whole(self, *given)
    )
    lines = []
    dry_run(load_recipe(recipe_file), print_line=lines.append)
    assert any(played) and "the autoencoder was loaded again" in lines


def test_the_weights_of_the_distance_are_a_needed_file(recipe_file) -> None:
    recipe = load_recipe(recipe_file)
    found = {file.field: file for file in needed_files(recipe)}
    assert found["perceptual.weights"].path == recipe.perceptual.weights
    assert found["perceptual.weights"].present


@pytest.fixture(scope="module")
def pair(recipe_file, run_ranks, tmp_path_factory) -> Path:
    """Two ranks under every strategy; one retry, because DeepSpeed at times aborts at exit."""
    root = tmp_path_factory.mktemp("pair")
    kinds = {"local": "strategy.kind=local"}
    kinds |= {f"zero{stage}": f"strategy.kind=zero,strategy.stage={stage}" for stage in (1, 2, 3)}
    runs = [f"{name}:{kind},loop.micro_batch=4" for name, kind in kinds.items()]
    for _ in range(2):
        ended = run_ranks(2, WORKER, recipe_file, root, *runs)
        if all((root / f"done-{rank}").exists() for rank in (0, 1)):
            return root
    raise AssertionError("".join(one.stdout[-1000:] + one.stderr[-4000:] for one in ended))


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_end_where_one_does(alone, pair, name: str) -> None:
    assert losses(pair / name) == pytest.approx(losses(alone), rel=1e-4)
    one, two = state(alone), state(pair / name)
    assert one.keys() == two.keys()
    for key in one:
        spread = 1e-3 * one[key].float().abs().max() + 1e-5
        # Adam's first steps turn rounding of tiny gradients into steps of the learning rate
        assert (one[key] - two[key]).float().abs().mean() < spread, key


def test_what_cannot_be_is_one_sentence(recipe_file) -> None:
    def build(*overrides: str) -> None:
        recipe = load_recipe(recipe_file, overrides)
        Critics(recipe, Autoencoder.build(recipe.model), ALONE)

    with pytest.raises(UserError, match="layers=4 needs pictures of at least 48 pixels, not 32"):
        build("adversarial.discriminator.layers=4")
    with pytest.raises(UserError, match="alexnet needs pictures of 1 or 3 channels and at"):
        build("data.augment.image_size=16")
    with pytest.raises(UserError, match="etude data fetch lpips"):
        build("perceptual.weights=nowhere.safetensors")
    for override, match in (
        ("adversarial.start_images=80", "start_images=80 is not before loop.images=80"),
        ("adversarial.adaptive_limit=2", "adaptive_limit has no effect with adaptive: false"),
        ("adversarial.discriminator.norm=batch", "groups has no effect with norm: batch"),
    ):
        with pytest.raises(UserError, match=match):
            build("adversarial.adaptive=false", override)
    with pytest.raises(UserError, match="micro_batch=2 is not a multiple of adversarial.adaptive_"):
        build("loop.micro_batch=2")
