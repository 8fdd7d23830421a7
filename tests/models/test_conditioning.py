"""Conditions: the power-cosine schedule, control embedders, text padding and what is dropped."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etude.models.conditioning import (
    ClassTokens,
    ConditioningConfig,
    ControlEmbedder,
    TextTokens,
    labels_of,
    pad_text,
    power_cosine,
)

TEXT = {"semantic": "text", "text_tokens": 5, "text_width": 4}


def test_power_cosine_starts_at_noise_and_comes_in_where_it_should() -> None:
    """Half of the way at t = 1 - 2^(-1/p); 0 at noise, 1 at data; p = 0 is always 1."""
    for p in (1.0, 2.0, 4.0, 8.0):
        t = torch.tensor([0.0, 1.0 - 2.0 ** (-1.0 / p), 1.0], dtype=torch.float64)
        np.testing.assert_allclose(power_cosine(t, p).numpy(), [1.0, 0.5, 0.0], atol=1e-12)
    assert torch.equal(power_cosine(torch.linspace(0, 1, 5), 0.0), torch.ones(5))


def values(batch: int = 3, columns: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.0, 400.0, 1000.0], dtype=torch.float64)[:batch]
    return t, torch.rand(batch, columns, generator=generator, dtype=torch.float64) * 300.0


@pytest.mark.parametrize("kind", ["separate", "concatenated", "micro"])
def test_control_embedders_are_their_formulas(kind: str) -> None:
    exponents = (1.0, 4.0) if kind == "separate" else (2.0, 2.0)
    control = [
        {"name": "flip", "exponent": exponents[0], "scale": 100.0},
        {"name": "height", "exponent": exponents[1]},
    ]
    config = ConditioningConfig(control=control, control_embedding=kind)
    embedder = ControlEmbedder(24, config).double()
    with torch.no_grad():
        for p in embedder.parameters():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    t, v = values()
    frequency = 10000.0 ** (-np.arange(128) / 128)
    angles = (v.numpy() * [100.0, 1.0])[:, :, None] * frequency
    waves = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], -1))
    gamma = [0.5 * (1.0 - np.cos(np.pi * (1.0 - t.numpy() / 1000.0) ** p)) for p in exponents]
    gamma = torch.from_numpy(np.stack(gamma))[:, :, None]
    if kind == "separate":
        expected = sum(gamma[k] * embedder.mlps[k](waves[:, k]) for k in range(2))
    elif kind == "concatenated":
        expected = gamma[0] * embedder.mlps[0](torch.cat((waves[:, 0], waves[:, 1]), 1))
    else:
        rows = [embedder.mlps[k](waves[:, k]) for k in range(2)]
        expected = gamma[0] * torch.cat(rows, 1)
    found = embedder(t, v)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    kept = embedder(t, v, torch.tensor([False, True, False]))
    assert not kept[1].any() and torch.equal(kept[0], found[0])


@pytest.mark.parametrize("kind", ["separate", "concatenated"])
def test_bfloat16_does_not_round_the_scales(kind: str) -> None:
    control = [{"name": "height", "exponent": 0, "scale": 0.3}]
    config = ConditioningConfig(control=control, control_embedding=kind, control_zero=False)
    embedder = ControlEmbedder(64, config)
    embedder.initialise(zero=False)
    t, sizes = torch.tensor([500.0]), torch.tensor([[512.0]])
    expected = embedder(t, sizes)
    found = embedder.bfloat16()(t, sizes).float()
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_control_that_starts_at_zero_has_gradients() -> None:
    config = ConditioningConfig(control=[{"name": "flip"}])
    embedder = ControlEmbedder(8, config).double()
    embedder.initialise(True)
    out = embedder(*values(columns=1))
    assert not out.any()
    out.sum().backward()
    assert embedder.mlps[0][2].weight.grad.any()


def padded(kind: str, **options) -> tuple[np.ndarray, np.ndarray]:
    text = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = torch.tensor([3, 7, 0])
    return text.numpy(), pad_text(text, lengths, kind, **options).numpy()


def test_padding_repeats_the_text_in_turn() -> None:
    text, found = padded("replicate")
    np.testing.assert_array_equal(found[0], text[0][[0, 1, 2, 0, 1, 2, 0]])
    np.testing.assert_array_equal(found[1], text[1])
    assert not found[2].any()


def test_noisy_padding_keeps_the_text_and_its_spread() -> None:
    noise = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    text, found = padded("noisy_replicate", noise=noise, strength=0.1)
    np.testing.assert_array_equal(found[0, :3], text[0, :3])
    np.testing.assert_array_equal(found[1], text[1])
    spread = text[0, :3].std(axis=0)
    expected = text[0][[0, 1, 2, 0]] + 0.1 * spread * noise[0, 3:].numpy()
    np.testing.assert_allclose(found[0, 3:], expected, rtol=1e-12)
    assert not found[2].any()


def test_zero_and_learned_padding() -> None:
    text, found = padded("zeros")
    assert not found[0, 3:].any() and np.array_equal(found[0, :3], text[0, :3])
    _, found = padded("learned", padding=torch.arange(4.0))
    np.testing.assert_array_equal(found[2], np.tile(np.arange(4.0), (7, 1)))


@pytest.mark.parametrize("kind", ["mask", "zeros", "learned", "replicate", "noisy_replicate"])
def test_text_that_is_dropped_leaks_no_length(kind: str) -> None:
    config = ConditioningConfig(**TEXT, text_padding=kind)
    tokens = TextTokens(config)
    text = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3))
    condition = {"text": text, "text_lengths": torch.tensor([2, 5, 3])}
    condition["drop_semantic"] = torch.tensor([True, True, False])
    found, lengths = tokens(condition)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], tokens.null)
    assert torch.equal(found[2, :3], text[2, :3])
    assert (lengths.tolist() == [5, 5, 3]) if kind == "mask" else lengths is None


def test_null_text_and_class_tokens() -> None:
    tokens = ClassTokens(4, 3, 6)
    found = tokens(torch.tensor([4, 0]))
    assert found.shape == (2, 3, 6)
    assert torch.equal(found[0].flatten(), tokens.embedding_table.weight[4])
    labels = {"labels": torch.tensor([1, 2]), "drop_semantic": torch.tensor([False, True])}
    assert labels_of(labels, 4).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"semantic": "text"}, "semantic: text needs text_tokens and text_width"),
        ({"control": [{"name": "flip"}, {"name": "flip"}]}, "'flip' is named twice"),
        (
            {
                "control": [{"name": "flip"}, {"name": "height", "exponent": 4.0}],
                "control_embedding": "micro",
            },
            "has one exponent for all",
        ),
        ({"text_padding": "zeros"}, "text_padding has no effect with semantic: class"),
        ({"pooled_width": 5}, "pooled_width has no effect with semantic: class"),
        (TEXT | {"class_tokens": 2}, "class_tokens has no effect with semantic: text"),
        ({"semantic_path": "adaln", "class_tokens": 2}, "has no effect with semantic_path: adaln"),
        (TEXT | {"padding_noise": 0.1}, "padding_noise has no effect with text_padding: mask"),
        ({"control_embedding": "micro"}, "control_embedding has no effect with control: .."),
        ({"control_zero": False}, "control_zero has no effect with control: .."),
    ],
)
def test_contradictions_are_one_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ConditioningConfig(**fields)


def test_a_larger_exponent_comes_later() -> None:
    t = torch.linspace(0.01, 0.99, 50)
    assert (power_cosine(t, 2.0) > power_cosine(t, 4.0)).all()
    assert math.isclose(float(power_cosine(torch.tensor(0.29289), 2.0)), 0.5, abs_tol=1e-4)
