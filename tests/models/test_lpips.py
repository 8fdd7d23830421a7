"""LPIPS against an independent transcription in float64, its file, and the published weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from etude.core.errors import UserError
from etude.models.lpips import LPIPS

PUBLISHED = Path(os.environ.get("ETUDE_DATA", "data")) / "lpips"


def pictures(count: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


def randomised(network: str) -> LPIPS:
    """Weights that keep activations alive through all stages, and uneven heads."""
    model = LPIPS(network)
    generator = torch.Generator().manual_seed(3)
    for conv in model.convs:
        spread = (2 / conv.weight[0].numel()) ** 0.5
        conv.weight.normal_(0.0, spread, generator=generator)
        conv.bias.normal_(0.0, 0.05, generator=generator)
    return model


def transcription(weights: dict[str, Tensor], network: str, x: Tensor, y: Tensor) -> Tensor:
    """Zhang et al. 2018, section 3 and its code's constants, over torchvision's two networks."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    prefix = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}[network]

    def conv(a: Tensor, i: int, **how: int) -> Tensor:
        name = f"{prefix}.Conv_{i}"
        return torch.clamp(F.conv2d(a, w[name + ".kernel"], w[name + ".bias"], **how), min=0)

    def stages(a: Tensor) -> list[Tensor]:
        mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        a = (a.double() - mean.double()[:, None, None]) / std.double()[:, None, None]
        found = []
        if network == "vgg16":
            i = 0
            for number, repeats in enumerate((2, 2, 3, 3, 3)):
                if number:
                    b, c, h, s = a.shape
                    a = a.reshape(b, c, h // 2, 2, s // 2, 2).amax((3, 5))
                for _ in range(repeats):
                    a, i = conv(a, i, padding=1), i + 1
                found.append(a)
            return found
        a = conv(a, 0, stride=4, padding=2)
        found.append(a)
        a = conv(F.max_pool2d(a, 3, 2), 1, padding=2)
        found.append(a)
        a = F.max_pool2d(a, 3, 2)
        for i in (2, 3, 4):
            a = conv(a, i, padding=1)
            found.append(a)
        return found

    total = torch.zeros(len(x), dtype=torch.float64)
    for i, (a, b) in enumerate(zip(stages(x), stages(y), strict=True)):
        a = a / ((a**2).sum(1, keepdim=True) ** 0.5 + 1e-10)
        b = b / ((b**2).sum(1, keepdim=True) ** 0.5 + 1e-10)
        total += F.conv2d((a - b) ** 2, w[f"NetLinLayer_{i}.Conv_0.kernel"]).mean((1, 2, 3))
    return total


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_distances_and_gradients_are_the_formula_s(network: str) -> None:
    model = randomised(network)
    x, y = pictures(2, 64, 0), pictures(2, 64, 1)
    ours, exact = x.clone().requires_grad_(), x.clone().double().requires_grad_()
    found, wanted = model(ours, y), transcription(model.to_file(), network, exact, y)
    assert found.dtype == torch.float32 and (wanted > 1e-3).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    found.sum().backward()
    wanted.sum().backward()
    error = (ours.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-4
    each = [torch.autograd.grad(model(ours, y)[0], ours)[0][i].abs().max() for i in (0, 1)]
    assert each[0] > 0 and each[1] == 0


def test_every_weight_counts() -> None:
    model = randomised("vgg16")
    x, y = pictures(1, 32, 0), pictures(1, 32, 1)
    before = transcription(model.to_file(), "vgg16", x, y)
    for name, tensor in model.to_file().items():
        kept = tensor.clone()
        tensor *= 1.5
        if name.endswith("bias"):
            tensor += 0.3
        changed = model(x, y).double()
        tensor.copy_(kept)
        assert abs(changed - before) > 1e-6 * before, name


def test_grey_pictures_and_the_smallest() -> None:
    for network, side in (("vgg16", 16), ("alexnet", 31)):
        model = randomised(network)
        grey = pictures(2, 32, 0)[:, :1, :side, :side]
        other = -grey
        found = model(grey, other)
        assert torch.equal(found, model(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))
        assert torch.isfinite(found).all() and (found > 0).all()
        assert torch.equal(model(grey, grey), torch.zeros(2))


def test_gradients_are_finite_where_no_channel_is_active() -> None:
    model = LPIPS("alexnet")
    for conv in model.convs:
        conv.weight.fill_(0.0)
        conv.bias.fill_(-1.0)
    x = pictures(1, 32, 0).requires_grad_()
    model(x, pictures(1, 32, 1)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_file_gives_the_same_distance_and_others_are_refused(tmp_path: Path) -> None:
    model = randomised("alexnet")
    x, y = pictures(1, 32, 0), pictures(1, 32, 1)
    save_file(model.to_file(), tmp_path / "own.safetensors")
    again = LPIPS.from_file(tmp_path / "own.safetensors")
    assert torch.equal(again(x, y), model(x, y)) and again.network == "alexnet"
    assert not again.known and len(again.weights_sha256) == 64
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match="type: etude data fetch lpips"):
        LPIPS.from_file(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="not a safetensors file"):
        LPIPS.from_file(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no LPIPS weights"):
        LPIPS.from_file(tmp_path / "other.safetensors")
    less = {n: t for n, t in model.to_file().items() if not n.startswith("NetLinLayer_4")}
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="is not LPIPS on alexnet"):
        LPIPS.from_file(tmp_path / "less.safetensors")


@pytest.mark.fetched("lpips")
@pytest.mark.parametrize(("network", "parameters"), [("vgg16", 14_716_160), ("alexnet", 2_470_848)])
def test_the_published_weights_are_known(network: str, parameters: int) -> None:
    model = LPIPS.from_file(PUBLISHED / f"{network}.safetensors")
    assert model.known and sum(p.numel() for p in model.parameters()) == parameters
    assert all((head >= 0).all() for head in model.heads)  # non-negative, as they were trained
    x, y = pictures(1, 64, 0), pictures(1, 64, 1)
    wanted = transcription(model.to_file(), network, x, y)
    torch.testing.assert_close(model(x, y).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.fetched("lpips")
def test_a_photograph_under_noise() -> None:
    """Distances that another program found with these weights; its resizing is not known."""
    data = pytest.importorskip("skimage.data", reason="the photograph is scikit-image's")
    from PIL import Image

    model = LPIPS.from_file(PUBLISHED / "vgg16.safetensors")
    small = Image.fromarray(data.astronaut()).resize((128, 128), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for spread, wanted in ((0.0, 0.0), (0.05, 0.103), (0.2, 0.389), (0.5, 0.635)):
        found = float(model((x + spread * noise).clamp(-1, 1), x))
        assert found == pytest.approx(wanted, rel=0.06, abs=1e-6)
