"""The autoencoder around diffusers' AutoencoderKL: values, losses, folders, and no network."""

import json
import os
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from etude.core.errors import UserError
from etude.core.recipe import load_recipe
from etude.external.diffusers import Autoencoder, AutoencoderConfig, estimate_scaling

AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL

CONFIG = AutoencoderConfig(
    in_channels=1,
    latent_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    kl_weight=0.25,
)


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder.build(CONFIG)


def test_encode_and_decode_are_the_library_s(autoencoder: Autoencoder) -> None:
    assert isinstance(autoencoder.network, AutoencoderKL)
    assert autoencoder.downscale == 2
    mean, std = autoencoder.encode(pictures())
    assert mean.shape == std.shape == latents().shape
    hidden = autoencoder.network.quant_conv(autoencoder.network.encoder(pictures()))
    expected_mean, log_variance = hidden.chunk(2, dim=1)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(std, torch.exp(0.5 * log_variance))
    network = autoencoder.network
    expected = network.decoder(network.post_quant_conv(latents()))
    torch.testing.assert_close(autoencoder.decode(latents()), expected)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_reconstruction_loss(autoencoder: Autoencoder, loss: str) -> None:
    model = Autoencoder(autoencoder.network, CONFIG.model_copy(update={"loss": loss}))
    mean, std = model.encode(pictures())
    error = model.decode(mean + std * latents()) - pictures()
    error = error.abs() if loss == "l1" else error**2
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0))
    expected = error.mean((1, 2, 3)) + 0.25 * divergence.mean((1, 2, 3))
    got = model(pictures(), latents())
    assert got.shape == (3,)
    torch.testing.assert_close(got, expected)
    assert (divergence.mean((1, 2, 3)) > 1e-3).all()


def test_float32_pictures_through_a_bfloat16_network() -> None:
    exact = Autoencoder.build(CONFIG)(pictures(), latents())
    rounded = Autoencoder.build(CONFIG).bfloat16()(pictures(), latents())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.0)


def test_a_folder_gives_back_the_same_autoencoder(tmp_path: Path) -> None:
    model = Autoencoder.build(CONFIG, seed=3)
    model.set_scaling(0.7, 0.2)
    folder = model.save(tmp_path / "autoencoder")
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    again = Autoencoder.from_folder(folder)
    assert (again.config.scaling_factor, again.config.shift_factor) == (0.7, 0.2)
    assert again.config.block_out_channels == CONFIG.block_out_channels
    with torch.no_grad():
        first, second = model.eval().encode(pictures()), again.eval().encode(pictures())
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    peer = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
    assert peer.config.scaling_factor == 0.7
    Autoencoder.build(CONFIG, seed=4).save(folder)  # replaces
    assert Autoencoder.from_folder(folder).config.scaling_factor == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["autoencoder"]


def test_scaling_of_stable_diffusion_3() -> None:
    config = CONFIG.model_copy(update={"scaling_factor": 1.5305, "shift_factor": 0.0609})
    model = Autoencoder.build(config)
    z = latents()
    torch.testing.assert_close(model.scale(z), (z - 0.0609) * 1.5305)
    torch.testing.assert_close(model.unscale(model.scale(z)), z)


def test_estimated_scaling_gives_zero_mean_and_unit_variance() -> None:
    mean, std = 3.0 + 2.0 * latents(500), torch.full((500, 3, 4, 4), 0.5)
    scaling, shift = estimate_scaling(mean, std)
    scaled = (mean + std * latents(500, seed=2) - shift) * scaling
    assert float(scaled.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(scaled.std()) == pytest.approx(1.0, abs=0.01)


def test_any_local_folder_loads_and_nothing_reaches_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    network = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, scaling_factor=0.13025,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    model = Autoencoder.from_folder(tmp_path / "pickled")
    assert model.config.scaling_factor == 0.13025
    assert model.config.in_channels == 3 and model.config.latent_channels == 4
    for name in ("stabilityai/sd-vae-ft-mse", tmp_path / "absent"):
        with pytest.raises(UserError, match="config.json does not exist"):
            Autoencoder.from_folder(name)


def test_broken_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = Autoencoder.build(CONFIG).save(tmp_path / "whole")
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="could not be read"):
        Autoencoder.from_folder(folder)
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        Autoencoder.from_folder(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="describes UNet2DModel"):
        Autoencoder.from_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Autoencoder.from_folder(folder)


def test_the_published_size_of_kl_f8() -> None:
    """83,653,863 parameters, as of the autoencoder of Stable Diffusion."""
    with torch.device("meta"):
        model = Autoencoder.build(load_recipe("autoencoder/kl_f8").model)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert model.downscale == 8
