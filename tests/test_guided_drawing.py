"""Guided pictures from a generator: what they cost, what their rows share, and cheap decoders."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from etude.conditions import Conditions
from etude.core.errors import UserError
from etude.diffusion.criteria import entropy
from etude.diffusion.guidance import GuidanceConfig
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.external.diffusers import Autoencoder, AutoencoderConfig, Decoder
from etude.models.classifier import Classifier, ClassifierConfig
from etude.models.conditioning import ConditioningConfig
from etude.models.dit import DiT, DiTConfig
from etude.sampling import BLOCK, Generator

CLASSES = [str(n) for n in range(4)]
AUTOENCODER = AutoencoderConfig(
    latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    mid_block_attention=False, scaling_factor=0.5, shift_factor=0.1,
)  # fmt: skip


def away_from_zero(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def tiny_folder(folder: Path, **fields) -> Path:
    """A distilled decoder of random weights, as the diffusers library writes it."""
    shape = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    shape |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 2}
    network = diffusers.AutoencoderTiny(**shape | fields)
    away_from_zero(network, 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learner() -> nn.Module:
    config = ClassifierConfig(in_channels=3, channels=(8, 8), groups=4, num_classes=4)
    return away_from_zero(Classifier(config), 1)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder.build(AUTOENCODER, seed=2).eval().requires_grad_(False)


@pytest.fixture
def generator(autoencoder) -> Generator:
    shape = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": 4, "in_channels": 2}
    model = away_from_zero(DiT(DiTConfig(**shape, num_classes=4, learn_sigma=False)), 0)
    device = torch.device("cpu")
    return Generator(
        model=model,
        objective=Objective(ObjectiveConfig()),
        sampler=SamplerConfig(steps=6, guidance_scale=2.0, guidance_convention="one_plus_lambda"),
        autoencoder=autoencoder,
        classes=CLASSES,
        latent_shape=(2, 4, 4),
        conditions=Conditions(ConditioningConfig(), 4, 8, device),
    )


def drawn(generator: Generator, learner: nn.Module, indices: list[int], **fields) -> np.ndarray:
    where = np.array(indices)
    config = GuidanceConfig(omega=0.5, every=3, **fields)
    return generator.draw(where, where % 4, seed=0, learner=learner, guidance=config)[0]


@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
def test_a_guided_block_takes_as_many_evaluations_as_a_plain_one(
    generator, learner, path: str
) -> None:
    """Six steps under classifier-free guidance, two of them pushed."""
    drawn(generator, learner, [1, 2], path=path)
    assert generator.evaluations == 6 * 2 * BLOCK
    assert generator.gradients == (2 * BLOCK if path == "full" else 0)


@pytest.mark.parametrize("fields", [{}, {"criterion": "loss"}, {"criterion": "entropy_label"}])
def test_a_guided_picture_does_not_depend_on_its_neighbours(
    generator, learner, fields: dict
) -> None:
    """The other rows of the padded block are asked for without a class, which has no loss."""
    few, many = (drawn(generator, learner, rows, **fields) for rows in ([3, 9], range(12)))
    apart = np.abs(few.astype(int) - many[[3, 9]].astype(int))
    assert apart.max() <= 2 and (apart > 0).mean() <= 0.01
    plain, _ = generator.draw(np.array([3, 9]), np.array([3, 1]), seed=0)
    assert np.abs(few.astype(int) - plain.astype(int)).max() > 5


def test_telemetry_is_that_of_the_pictures(generator, learner) -> None:
    indices = np.arange(5)
    images, told = generator.draw(
        indices, indices % 4, seed=0, learner=learner, guidance=GuidanceConfig(omega=0.5, every=3)
    )
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad():
        logits = learner(pictures)
    # Of rounded and clamped pictures, where the telemetry is of those before rounding.
    np.testing.assert_allclose(told["entropy"], entropy(logits).numpy(), atol=0.05)
    assert told["agreement"].tolist() == (logits.argmax(1).numpy() == indices % 4).tolist()


def test_a_tiny_decoder_takes_the_denoisers_latents(tmp_path) -> None:
    """Against the library's network and the layers that its paper names: a soft clamp to 3 units,
    convolutions, and pictures in [0, 1] brought to [-1, 1]."""
    folder = tiny_folder(tmp_path / "tiny", scaling_factor=2.0, shift_factor=0.25)
    decoder = Decoder.from_folder(folder)
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    network = diffusers.AutoencoderTiny.from_pretrained(folder)
    raw = latents / 2.0 + 0.25
    torch.testing.assert_close(decoder(latents), network.decode(raw).sample)
    layers = network.decoder.layers(3.0 * torch.tanh(raw / 3.0))
    torch.testing.assert_close(decoder(latents), 2.0 * layers - 1.0)
    assert decoder(latents).shape == (2, 3, 8, 8)


def test_another_autoencoder_decodes_at_its_own_scale(autoencoder, tmp_path) -> None:
    folder = autoencoder.save(tmp_path / "kl")
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = autoencoder.network.decode(latents / 0.5 + 0.1).sample
    torch.testing.assert_close(Decoder.from_folder(folder)(latents), expected)


def test_the_push_goes_through_the_decoder_that_is_named(
    generator, learner, autoencoder, tmp_path
) -> None:
    rows = [0, 5, 6]
    own = drawn(generator, learner, rows)
    same = drawn(generator, learner, rows, decoder=str(autoencoder.save(tmp_path / "kl")))
    assert np.array_equal(own, same)
    folder = str(tiny_folder(tmp_path / "tiny"))
    other = drawn(generator, learner, rows, decoder=folder)
    assert np.abs(own.astype(int) - other.astype(int)).max() > 5
    plain = {"decoder": folder, "path": "stop_denoiser", "decode_precision": "bf16"}
    assert not np.array_equal(drawn(generator, learner, rows, **plain), other)


def test_a_decoder_that_does_not_fit_is_refused(generator, learner, tmp_path) -> None:
    wide = str(tiny_folder(tmp_path / "wide", latent_channels=4))
    with pytest.raises(UserError, match=r"wide makes 3 channels of latents with 4.* 3 of 2"):
        drawn(generator, learner, [0], decoder=wide)
    grey = str(tiny_folder(tmp_path / "grey", in_channels=1, out_channels=1))
    with pytest.raises(UserError, match=r"grey makes 1 channels of latents with 2.* 3 of 2"):
        drawn(generator, learner, [0], decoder=grey)
    with pytest.raises(UserError, match="does not exist"):
        drawn(generator, learner, [0], decoder=str(tmp_path / "absent"))
    generator.autoencoder = None
    with pytest.raises(UserError, match="draws pixels; leave it out"):
        drawn(generator, learner, [0], decoder=grey)
