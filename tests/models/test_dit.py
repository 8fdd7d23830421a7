"""The DiT: published size and names, adaLN-Zero start, embeddings, recomputation, compilation."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etude.convert.dit import diffusers_table
from etude.core.errors import UserError
from etude.kernels import rope_2d
from etude.models.blocks import (
    PatchEmbed,
    TimestepEmbedder,
    positions_2d,
    rotary_2d,
    unpatchify,
)
from etude.models.dit import DiT, DiTConfig


def small(**changes) -> DiTConfig:
    shape = dict(input_size=8, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=5)
    return DiTConfig(**shape | changes)


def randomised(config: DiTConfig, dtype: torch.dtype = torch.float32) -> DiT:
    """A model none of whose weights is zero, so that every part shows in the output."""
    model = DiT(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def inputs(config: DiTConfig, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.tensor([0, 4, 5])[:batch]
    condition = {"labels": labels}
    if config.conditioning.control:
        columns = len(config.conditioning.control)
        condition["control"] = torch.rand(batch, columns, generator=generator) * 10.0
    return x, torch.tensor([3.0, 500.0, 998.0])[:batch], condition


def count(depth: int, D: int, patch: int, tokens: int) -> int:
    """Parameters of a DiT by hand: 4 channels, learned sigma, 1000 classes."""
    embedders = 4 * patch**2 * D + D + (256 * D + D) + (D * D + D) + 1001 * D + tokens * D
    attention, mlp, modulation = 4 * D * D + 4 * D, 8 * D * D + 5 * D, 6 * D * D + 6 * D
    final = 2 * D * D + 2 * D + (D + 1) * patch**2 * 8
    return embedders + depth * (attention + mlp + modulation) + final


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        ("DiT-XL/2", 32, 675_129_632),  # as published
        ("DiT-XL/2", 64, count(28, 1152, 2, 1024)),
        ("DiT-L/4", 32, count(24, 1024, 4, 64)),
        ("DiT-B/8", 32, count(12, 768, 8, 16)),
        ("DiT-S/2", 32, count(12, 384, 2, 256)),
    ],
)
def test_parameter_counts(preset: str, size: int, expected: int) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(preset=preset, input_size=size))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_state_dict_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = DiT(DiTConfig(preset="DiT-XL/2")).state_dict()
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    for n in range(28):
        for name, rows, columns in (
            ("attn.qkv", 3456, 1152),
            ("attn.proj", 1152, 1152),
            ("mlp.fc1", 4608, 1152),
            ("mlp.fc2", 1152, 4608),
            ("adaLN_modulation.1", 6912, 1152),
        ):
            expected[f"blocks.{n}.{name}.weight"] = (rows, columns)
            expected[f"blocks.{n}.{name}.bias"] = (rows,)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_presets_fill_sizes_and_refuse_contradictions() -> None:
    config = DiTConfig(preset="DiT-B/4")
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (
        12, 768, 12, 4,
    )  # fmt: skip
    assert DiTConfig(**config.model_dump()) == config
    with pytest.raises(ValidationError, match="depth=3 contradicts preset DiT-B/4"):
        DiTConfig(preset="DiT-B/4", depth=3)
    with pytest.raises(ValidationError, match="not a multiple of patch_size"):
        small(input_size=9)
    with pytest.raises(ValidationError, match="not a multiple of num_heads"):
        small(num_heads=5)
    with pytest.raises(ValidationError, match="turns channels by fours, but a head has 6"):
        small(hidden_size=24, num_heads=4, positions="rope")


def test_a_new_model_returns_zero_and_learns_first_in_its_last_layer() -> None:
    config = small()
    model = DiT(config)
    output = model(*inputs(config))
    assert torch.count_nonzero(output) == 0
    (output - 1.0).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            assert not parameter.any()
        elif name.endswith("weight"):
            assert parameter.std() > 0.005


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = DiT(small()), DiT(small()), DiT(small(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "blocks.1.attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_position_embedding_holds_the_column_first() -> None:
    grid, width = 3, 16
    table = positions_2d(width, grid).numpy()
    frequency = 1.0 / 10000.0 ** (np.arange(width // 4) / (width // 4))
    for row in range(grid):
        for column in range(grid):
            parts = [np.sin(column * frequency), np.cos(column * frequency)]
            parts += [np.sin(row * frequency), np.cos(row * frequency)]
            np.testing.assert_allclose(table[row * grid + column], np.concatenate(parts), atol=1e-7)


def test_positions_can_be_shifted_and_stretched() -> None:
    moved = positions_2d(8, 7, 0.5 * (torch.arange(7) - 2)).unflatten(0, (7, 7))
    plain = positions_2d(8, 3).unflatten(0, (3, 3))
    torch.testing.assert_close(moved[2::2, 2::2], plain, rtol=0, atol=1e-7)
    place = -2 * 0.5 * torch.tensor([1.0, 0.01])
    torch.testing.assert_close(moved[0, 0, :4], torch.cat((place.sin(), place.cos())))


def test_time_embedding_holds_the_cosines_first() -> None:
    embedder = TimestepEmbedder(8).double()
    t = np.array([0.0, 1.0, 731.25])
    angles = t[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
    waves = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    expected = embedder.mlp(waves)
    torch.testing.assert_close(embedder(torch.from_numpy(t)), expected, rtol=1e-12, atol=1e-12)


def test_patches_survive_the_way_through_tokens() -> None:
    """With a patch projection that copies pixels, `unpatchify` undoes `PatchEmbed`."""
    channels, patch = 3, 2
    embed = PatchEmbed(channels, patch, channels * patch * patch)
    order = torch.arange(channels * patch * patch).view(patch, patch, channels)
    with torch.no_grad():
        embed.proj.bias.zero_()
        embed.proj.weight.zero_()
        for i in range(patch):
            for j in range(patch):
                for c in range(channels):
                    embed.proj.weight[order[i, j, c], c, i, j] = 1.0
    x = torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(unpatchify(embed(x), channels, patch), x, rtol=0, atol=0)


def test_recomputation_changes_neither_output_nor_gradients() -> None:
    config = small()
    plain, recomputed = randomised(config), randomised(small(activation_checkpointing=True))
    outputs = [model(*inputs(config)) for model in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for first, second in zip(plain.parameters(), recomputed.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=1e-9)


def test_compiles_into_one_graph() -> None:
    config = small(depth=2)
    model = randomised(config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(config)), model(*inputs(config)))


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    config = small()
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, dtype=torch.float64)
    together = model(x, t, condition)
    others = {"labels": condition["labels"].flip(0)[[2, 0, 1]]}
    changed = model(torch.cat((x[:1], -x[1:])), t, others)
    assert not torch.allclose(together[1:], changed[1:])
    torch.testing.assert_close(together[0], changed[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("member", ["t", "labels", "x"])
def test_every_input_matters(member: str) -> None:
    config = small()
    model = randomised(config)
    x, t, condition = inputs(config)
    changed = {"x": x, "t": t, **condition}
    changed[member] = changed[member].roll(1, 0)
    other = model(changed["x"], changed["t"], {"labels": changed["labels"]})
    difference = (other - model(x, t, condition)).abs().flatten(1).amax(1)
    assert (difference > 1e-4).all()


def test_bfloat16_follows_float32() -> None:
    config = small()
    model = randomised(config)
    exact = model(*inputs(config))
    rounded = randomised(config).bfloat16()(*inputs(config))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03


def test_rotations_at_whole_places_are_those_of_the_operator() -> None:
    for d, grid in ((12, 5), (72, 16)):
        found = rotary_2d(d, grid, torch.arange(grid))
        for one, two in zip(found, rope_2d(grid, grid, d), strict=True):
            assert torch.equal(one, two)


def test_positions_of_another_range_are_not_diffusers_ones() -> None:
    assert DiT(small(position_base=4)).pos_embed.equal(DiT(small()).pos_embed)
    with pytest.raises(UserError, match="options of the modern variant"):
        diffusers_table(small(position_base=2))


MODERN = dict(norm="rmsnorm", mlp="swiglu", qk_norm=True, positions="rope")


def rms(v: torch.Tensor) -> torch.Tensor:
    return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(v: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, H, N, d): pairs as complex numbers, turned by row and column; later tokens stay."""
    place = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    speed = 10000.0 ** (-torch.arange(v.shape[-1] // 4, dtype=torch.float64) * 4 / v.shape[-1])
    angles = (place.flatten(1).T[:, :, None] * speed).flatten(1)
    angles = torch.cat((angles, angles.new_zeros(v.shape[2] - grid * grid, angles.shape[1])))
    pairs = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def by_formulas(model: DiT, x, t, vector, context=None, lengths=None) -> torch.Tensor:
    """One block of the modern variant in plain torch.

    vector: (B, D) that adaLN has beside the time; context: (B, L, D) tokens behind the picture's,
    of which the first `lengths` exist.
    """
    config, block, silu = model.config, model.blocks[0], torch.nn.functional.silu
    H, count = config.num_heads, config.grid**2
    d = config.hidden_size // H
    c = model.t_embedder(t) + vector
    tokens = model.x_embedder(x)
    if context is not None:
        tokens = torch.cat((tokens, context), 1)
    absent = torch.zeros(len(x), 1, 1, tokens.shape[1], dtype=torch.bool)
    for row, length in enumerate([] if lengths is None else lengths):
        absent[row, ..., count + length :] = True
    parts = block.adaLN_modulation[1](silu(c))[:, None].chunk(6, -1)
    y = rms(tokens) * (1 + parts[1]) + parts[0]
    q, k, v = block.attn.qkv(y).unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4)
    q = turned(rms(q) * block.attn.q_norm.weight, config.grid)
    k = turned(rms(k) * block.attn.k_norm.weight, config.grid)
    scores = (q @ k.mT / d**0.5).masked_fill(absent, -torch.inf).softmax(-1) @ v
    tokens = tokens + parts[2] * block.attn.proj(scores.transpose(1, 2).flatten(2))
    y = rms(tokens) * (1 + parts[4]) + parts[3]
    gate, value = block.mlp.w12(y).chunk(2, -1)
    tokens = (tokens + parts[5] * block.mlp.w3(silu(gate) * value))[:, :count]
    shift, scale = model.final_layer.adaLN_modulation[1](silu(c))[:, None].chunk(2, -1)
    return unpatchify(model.final_layer.linear(rms(tokens) * (1 + scale) + shift), 8, 2)


TEXT = {"semantic": "text", "text_tokens": 6, "text_width": 10}


@pytest.mark.parametrize("asked", [{}, {"semantic_path": "attention", "class_tokens": 3}, TEXT])
def test_the_modern_variant_is_its_formulas(asked: dict) -> None:
    """Content in adaLN, as tokens of a class, and as those of texts of several lengths."""
    config = small(depth=1, conditioning=asked, **MODERN)
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, dtype=torch.float64)
    if asked is TEXT:
        text = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(3)).double()
        condition = {"text": text, "text_lengths": torch.tensor([6, 2, 0])}
        content = (0, model.context_embedder(text), [6, 2, 0])
    elif asked:
        content = (0, model.class_embedder(condition["labels"]))
    else:
        content = (model.y_embedder(condition["labels"]),)
    expected, output = by_formulas(model, x, t, *content), model(x, t, condition)
    assert output.std() > 0.1
    # The rotary tables are float32.
    assert (output - expected).norm() / expected.norm() < 1e-6


def test_content_that_is_tokens_can_be_left_out_and_compiles() -> None:
    config = small(depth=2, conditioning=TEXT)
    model = randomised(config)
    x, t, _ = inputs(config)
    text = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(3))
    condition = {"text": text, "text_lengths": torch.tensor([6, 2, 4])}
    expected = model(x, t, condition)
    dropped = model(x, t, condition | {"drop_semantic": torch.tensor([True, False, False])})
    null = {"text": torch.zeros_like(text), "text_lengths": torch.full((3,), 6)}
    assert torch.allclose(dropped[0], model(x, t, null)[0], atol=1e-6)
    assert torch.allclose(dropped[1:], expected[1:], atol=1e-6)
    assert (dropped[0] - expected[0]).abs().max() > 1e-3
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, condition), expected)
    recomputed = randomised(small(depth=2, conditioning=TEXT, activation_checkpointing=True))
    assert torch.equal(recomputed(x, t, condition), expected)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"class_tokens": 3}, "class_tokens=3 has no effect where a dit's class enters adaLN"),
        (TEXT | {"semantic_path": "adaln"}, "semantic_path: adaln has no place for a text"),
        (TEXT | {"pooled_width": 4}, "no place for a pooled text"),
    ],
)
def test_content_without_a_place_is_refused(asked: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        small(conditioning=asked)


def test_the_modern_variant_compiles_and_recomputes() -> None:
    config = small(depth=2, **MODERN)
    model, recomputed = (
        randomised(config),
        randomised(small(depth=2, activation_checkpointing=True, **MODERN)),
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(*inputs(config))
    torch.testing.assert_close(compiled(*inputs(config)), expected)
    assert torch.equal(recomputed(*inputs(config)), expected)


def test_swiglu_keeps_the_number_of_parameters() -> None:
    with torch.device("meta"):
        models = [DiT(DiTConfig(preset="DiT-B/2", mlp=mlp)) for mlp in ("gelu", "swiglu")]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert abs(counts[1] / counts[0] - 1.0) < 1e-3


def test_bottleneck_has_the_published_size() -> None:
    """SE-adaLN-Zero: 676M become 582M (arXiv 2608.09438)."""
    with torch.device("meta"):
        model = DiT(DiTConfig(preset="DiT-XL/2", modulation_bottleneck=2))
    total = sum(p.numel() for p in model.parameters())
    D = 1152
    saved = 6 * D * D - (D * D // 2 + D // 2 + 3 * D * D)
    assert total == 675_129_632 - 28 * saved and round(total / 1e6) == 582


def test_gaussian_start_draws_the_modulation() -> None:
    model = DiT(small(depth=6, hidden_size=96, modulation_start="gaussian"))
    weights = [block.adaLN_modulation[1].weight.detach() for block in model.blocks]
    rows = torch.stack(weights).chunk(6, 1)
    found = [float(part.std()) for part in rows]
    expected = [8e-4, 1.2e-3, 8e-4] * 2
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert not any(block.adaLN_modulation[1].bias.any() for block in model.blocks)


def test_dropping_the_class_is_the_null_label() -> None:
    config = small()
    model = randomised(config)
    x, t, condition = inputs(config)
    dropped = model(x, t, condition | {"drop_semantic": torch.tensor([True, False, False])})
    null = model(x, t, {"labels": torch.tensor([5, 4, 5])})
    assert torch.equal(dropped, null)
