"""PixArt: published size and names, start, conditions, recomputation, compilation."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from etude.convert.layout import to_ours, to_theirs
from etude.convert.pixart import diffusers_table
from etude.core.errors import UserError
from etude.models.pixart import PixArt, PixArtConfig, positions

TEXT = {"semantic": "text", "text_tokens": 6, "text_width": 20}
T5 = {"semantic": "text", "text_tokens": 120, "text_width": 4096}
MICRO = [{"name": n, "exponent": 0.0} for n in ("height", "width", "aspect")]


def small(conditioning: dict | None = None, **changes) -> PixArtConfig:
    shape = dict(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=5)
    return PixArtConfig(
        **shape | changes, conditioning=TEXT if conditioning is None else conditioning
    )


def randomised(config: PixArtConfig, dtype: torch.dtype = torch.float32) -> PixArt:
    """A model none of whose weights is zero, so that every part shows in the output."""
    model = PixArt(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(config: PixArtConfig, dtype: torch.dtype = torch.float32) -> tuple:
    """Three rows of everything that the configuration asks for, texts of 4, 1 and 6 tokens."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = config.conditioning
    x = normal(3, config.in_channels, config.input_size, config.input_size)
    condition = {"control": 40.0 * torch.rand(3, len(given.control), generator=generator)}
    if given.semantic == "text":
        condition["text"] = normal(3, given.text_tokens, given.text_width)
        condition["text_lengths"] = torch.tensor([4, 1, 6])
    else:
        condition["labels"] = torch.tensor([0, 4, 5])
    return x, torch.tensor([3.0, 500.0, 998.0]), condition


def count(config: PixArtConfig) -> int:
    """Parameters by hand: text of 4096 channels, 4 channels of latents, learned sigma."""
    D, P = config.hidden_size, config.patch_size
    outside = (4 * P * P * D + D) + (256 * D + D) + (D * D + D) + 6 * (D * D + D)
    outside += (4096 * D + D) + (D * D + D)
    each = 4 * (D * D + D)
    block = 6 * D + each + each + (4 * D * D + 4 * D) + (4 * D * D + D)
    final = 2 * D + (D + 1) * P * P * 8
    third = D // 3
    micro = 2 * (256 * third + third + third * third + third) if config.micro_conditions else 0
    return outside + config.depth * block + final + micro


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        ("PixArt-XL/2", 32, 610_856_096),  # published: 610.86 million at 256 and 512
        ("PixArt-XL/2", 64, 610_856_096),
        ("PixArt-XL/2-MS", 128, 611_349_152),  # published: 611.35 million
    ],
)
def test_parameter_counts(preset: str, size: int, expected: int) -> None:
    conditioning = T5 | {"control": MICRO if preset.endswith("MS") else []}
    config = PixArtConfig(preset=preset, input_size=size, conditioning=conditioning)
    with torch.device("meta"):
        model = PixArt(config)
    assert sum(p.numel() for p in model.parameters()) == expected == count(config)


def test_state_dict_has_the_published_names_and_shapes() -> None:
    config = PixArtConfig(preset="PixArt-XL/2-MS", conditioning=T5 | {"control": MICRO})
    with torch.device("meta"):
        state = PixArt(config).state_dict()
    linear = {
        "t_embedder.mlp.0": (1152, 256),
        "t_embedder.mlp.2": (1152, 1152),
        "t_block.1": (6912, 1152),
        "y_embedder.y_proj.fc1": (1152, 4096),
        "y_embedder.y_proj.fc2": (1152, 1152),
        "csize_embedder.mlp.0": (384, 256),
        "csize_embedder.mlp.2": (384, 384),
        "ar_embedder.mlp.0": (384, 256),
        "ar_embedder.mlp.2": (384, 384),
        "final_layer.linear": (32, 1152),
        "x_embedder.proj": (1152, 4, 2, 2),
    }
    expected = {
        "pos_embed": (1, 256, 1152),
        "y_embedder.y_embedding": (120, 4096),
        "final_layer.scale_shift_table": (2, 1152),
    }
    for n in range(28):
        expected[f"blocks.{n}.scale_shift_table"] = (6, 1152)
        linear |= {
            f"blocks.{n}.attn.qkv": (3456, 1152),
            f"blocks.{n}.attn.proj": (1152, 1152),
            f"blocks.{n}.cross_attn.q_linear": (1152, 1152),
            f"blocks.{n}.cross_attn.kv_linear": (2304, 1152),
            f"blocks.{n}.cross_attn.proj": (1152, 1152),
            f"blocks.{n}.mlp.fc1": (4608, 1152),
            f"blocks.{n}.mlp.fc2": (1152, 4608),
        }
    for name, shape in linear.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "PixArt-XL/2", "depth": 3}, "depth=3 contradicts preset PixArt-XL/2"),
        ({"input_size": 9}, "not a multiple of patch_size"),
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"conditioning": TEXT | {"semantic_path": "adaln"}}, "without tokens"),
        ({"conditioning": TEXT | {"pooled_width": 8}}, "takes no pooled text"),
        ({"micro_conditions": True}, "needs height, width, aspect in"),
        (
            {
                "micro_conditions": True,
                "hidden_size": 40,
                "conditioning": TEXT | {"control": MICRO},
            },
            "not a multiple of 3",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, sentence: str) -> None:
    shape = dict(hidden_size=48, num_heads=4) if "preset" not in changes else {}
    with pytest.raises(ValidationError, match=sentence):
        PixArtConfig(**{"conditioning": TEXT} | shape | changes)


def test_presets_are_read_back() -> None:
    config = PixArtConfig(preset="PixArt-XL/2", conditioning=TEXT)
    assert (config.depth, config.hidden_size, config.num_heads) == (28, 1152, 16)
    assert PixArtConfig(**config.model_dump()) == config


def test_a_new_model_starts_as_published() -> None:
    config = small(
        TEXT | {"control": [*MICRO, {"name": "flip"}]}, micro_conditions=True, hidden_size=96
    )
    model = PixArt(config)
    x, t, condition = inputs(config)
    output = model(x, t, condition)
    assert torch.count_nonzero(output) == 0
    (output - 1.0).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}
    zero = {f"blocks.{n}.cross_attn.proj.weight" for n in range(2)} | {
        "final_layer.linear.weight",
        "csize_embedder.mlp.2.weight",
        "ar_embedder.mlp.2.weight",
        "control_embedder.mlps.0.2.weight",
    }
    for name, parameter in model.named_parameters():
        if name in zero:
            assert not parameter.any(), name
        elif name.endswith("scale_shift_table"):
            assert parameter.std().item() == pytest.approx(96**-0.5, rel=0.15)
        elif name.endswith("weight"):
            assert parameter.std() > 0.005, name
        elif name != "x_embedder.proj.bias":  # drawn as published
            assert not parameter.any(), name
    null = model.y_embedder.y_embedding
    assert null.std().item() == pytest.approx(20**-0.5, rel=0.25)
    published = small(TEXT | {"control": MICRO, "control_zero": False}, micro_conditions=True)
    assert PixArt(published).csize_embedder.mlp[2].weight.std().item() == pytest.approx(
        0.02, rel=0.2
    )


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = PixArt(small()), PixArt(small()), PixArt(small(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("blocks.1.scale_shift_table", "y_embedder.y_embedding", "x_embedder.proj.bias"):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(("base", "scale"), [(0, 1.0), (4, 1.0), (16, 2.0)])
def test_positions_are_stretched_over_the_base(base: int, scale: float) -> None:
    config = small(input_size=16, hidden_size=16, base_size=base, interpolation_scale=scale)
    table, grid = positions(config)[0].numpy(), 8
    frequency = 1.0 / 10000.0 ** (np.arange(4) / 4)
    at = np.arange(grid) / (grid / (base or grid)) / scale
    for row in range(grid):
        for column in range(grid):
            angles = at[column] * frequency, at[row] * frequency
            parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
            np.testing.assert_allclose(table[row * grid + column], np.concatenate(parts), atol=1e-6)


def test_what_stands_behind_a_text_does_not_exist() -> None:
    """With masked padding a row's output is that of its own tokens alone, whatever follows them."""
    config = small()
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64)
    together = model(x, t, condition)
    filled = condition["text"].clone()
    filled[0, 4:], filled[1, 1:] = 1e6, float("nan")
    assert torch.equal(model(x, t, condition | {"text": filled}), together)
    alone = {"text": condition["text"][:1, :4]}
    torch.testing.assert_close(model(x[:1], t[:1], alone), together[:1], rtol=1e-11, atol=1e-11)
    longer = model(x, t, condition | {"text_lengths": torch.tensor([5, 1, 6])})
    assert not torch.allclose(longer[0], together[0], atol=1e-4)


def test_a_text_without_tokens_is_finite() -> None:
    config = small()
    model = randomised(config)
    x, t, condition = inputs(config)
    output = model(x, t, condition | {"text_lengths": torch.tensor([0, 1, 6])})
    output.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert output.isfinite().all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("padding", ["zeros", "learned", "replicate", "noisy_replicate"])
def test_other_paddings_are_attended_to(padding: str) -> None:
    config = small(TEXT | {"text_padding": padding})
    model = randomised(config)
    x, t, condition = inputs(config)
    output = model(x, t, condition)
    text = condition["text"].clone()
    if padding == "learned":
        text[0, 4:], text[1, 1:] = (model.y_embedder.padding.detach(),) * 2
    elif padding == "zeros":
        text[0, 4:], text[1, 1:] = 0.0, 0.0
    else:  # without noise, as in sampling, both replicate
        text[0, 4:], text[1, 1:] = text[0, :2], text[1, :1]
    torch.testing.assert_close(output, model(x, t, {"text": text}), rtol=0, atol=1e-6)
    if padding == "noisy_replicate":
        noisy = model(x, t, condition | {"text_noise": 50.0 * torch.ones_like(text)})
        changed = (noisy - output).abs().flatten(1).amax(1)
        assert changed[0] > 1e-5 and changed[2] == 0  # the last text has no padding


def test_a_class_is_a_text_of_its_own_tokens() -> None:
    for tokens in (1, 3):
        config = small({"semantic": "class", "class_tokens": tokens})
        model = randomised(config)
        x, t, condition = inputs(config)
        assert not hasattr(model, "y_embedder")
        assert model.class_embedder.embedding_table.weight.shape == (6, tokens * 48)
        output = model(x, t, condition)
        other = model(x, t, {"labels": torch.tensor([0, 3, 5])})
        assert torch.equal(output[0], other[0]) and not torch.allclose(output[1], other[1])


@pytest.mark.parametrize("conditioning", [TEXT, {"semantic": "class"}])
def test_a_dropped_content_is_the_null_one(conditioning: dict) -> None:
    config = small(conditioning)
    model = randomised(config)
    x, t, condition = inputs(config)
    dropped = torch.tensor([False, True, True])
    if conditioning is TEXT:
        text = condition["text"].clone()
        text[1:] = model.y_embedder.y_embedding
        null = {"text": text, "text_lengths": torch.tensor([4, 6, 6])}
    else:
        null = {"labels": torch.tensor([0, 5, 5])}
    output = model(x, t, condition | {"drop_semantic": dropped})
    torch.testing.assert_close(output, model(x, t, null), rtol=0, atol=1e-6)
    assert not torch.allclose(output[1], model(x, t, condition)[1], atol=1e-4)


@pytest.mark.parametrize("micro", [False, True])
def test_control_starts_without_effect_and_can_be_dropped(micro: bool) -> None:
    # One of the micro-conditions' order is not that of the columns, and one column is not theirs.
    control = [MICRO[2], {"name": "flip", "exponent": 2.0}, MICRO[0], MICRO[1]]
    conditioning = TEXT | {"control": control}
    config = small(conditioning, micro_conditions=micro)
    model = PixArt(config)
    bare = randomised(small())
    with torch.no_grad():
        for name, value in bare.named_parameters():
            model.get_parameter(name).copy_(value)
        model.y_embedder.y_embedding.copy_(bare.y_embedder.y_embedding)
    x, t, condition = inputs(config)
    plain = bare(x, t, condition)
    torch.testing.assert_close(model(x, t, condition), plain, rtol=0, atol=0)
    added = [p for n, p in model.named_parameters() if n not in dict(bare.named_parameters())]
    with torch.no_grad():
        for p in added:
            p.add_(0.1)
    dropped = torch.tensor([True, False, False])
    output = model(x, t, condition | {"drop_control": dropped})
    torch.testing.assert_close(output[0], plain[0], rtol=0, atol=1e-6)
    # exponent 0 is there at t = 998, where a gate with an exponent of its own is all but closed
    assert ((output - plain).abs().flatten(1).amax(1)[1:] > 1e-4).all()
    for k in range(4):
        moved = condition | {"control": condition["control"] + 7.0 * torch.eye(4)[k]}
        change = (model(x, t, moved) - model(x, t, condition)).abs().flatten(1).amax(1)
        assert (change[:2] > 1e-5).all(), k


def test_other_control_keeps_its_order_beside_the_micro_conditions() -> None:
    names = ("aspect", "flip", "height", "crop", "width")
    control = [{"name": name, "exponent": k} for k, name in enumerate(names)]
    config = small(TEXT | {"control": control}, micro_conditions=True)
    model = randomised(config)
    for module in (model.csize_embedder, model.ar_embedder):
        torch.nn.init.zeros_(module.mlp[2].weight)
        torch.nn.init.zeros_(module.mlp[2].bias)
    _, t, condition = inputs(config)
    own = model.control_embedder(t, condition["control"][:, [1, 3]])
    assert model.control_embedder.exponents == [1, 3]
    expected = model.t_embedder(t) + own
    torch.testing.assert_close(model._vector(t, condition), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exponents", [(0, 0, 0), (0.5, 1, 3)])
def test_micro_conditions_are_those_of_the_paper(exponents: tuple[float, ...]) -> None:
    """Height and width by one embedder, aspect by another, a third of c each, from any time on."""
    control = [
        {"name": name, "exponent": exponent, "scale": scale}
        for name, exponent, scale in zip(
            ("aspect", "height", "width"), exponents, (1.0, 0.5, 0.25), strict=True
        )
    ]
    config = small(TEXT | {"control": control}, micro_conditions=True)
    model = randomised(config, torch.float64)
    t = torch.tensor([3.0, 500.0, 998.0], dtype=torch.float64)
    values = torch.tensor([[0.5, 256.0, 512.0], [1.0, 64.0, 64.0], [2.0, 128.0, 64.0]]).double()
    made = model._vector(t, {"control": values})

    def embedded(module: torch.nn.Module, at: Tensor) -> Tensor:
        angles = at.numpy()[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
        return module.mlp(torch.from_numpy(np.concatenate((np.cos(angles), np.sin(angles)), 1)))

    gates = [0.5 - 0.5 * torch.cos(torch.pi * (1 - t / 1000) ** p)[:, None] for p in exponents]
    parts = (
        gates[1] * embedded(model.csize_embedder, 0.5 * values[:, 1]),
        gates[2] * embedded(model.csize_embedder, 0.25 * values[:, 2]),
        gates[0] * embedded(model.ar_embedder, values[:, 0]),
    )
    expected = embedded(model.t_embedder, t) + torch.cat(parts, 1)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conditioning", [TEXT | {"control": MICRO}, {"semantic": "class"}])
def test_recomputation_changes_neither_output_nor_gradients(conditioning: dict) -> None:
    config = small(conditioning)
    again = small(conditioning, activation_checkpointing=True)
    models = [randomised(config), randomised(again)]
    outputs = [model(*inputs(config)) for model in models]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("semantic", ["text", "class"])
def test_compiles_into_one_graph(semantic: str) -> None:
    conditioning = (TEXT if semantic == "text" else {}) | {"control": MICRO}
    config = small(conditioning, micro_conditions=True)
    model = randomised(config)
    x, t, condition = inputs(config)
    dropped = torch.tensor([False, True, False])
    condition |= {"drop_semantic": dropped, "drop_control": dropped.roll(1)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, condition), model(x, t, condition))


@pytest.mark.parametrize("member", ["x", "t", "text", "text_lengths", "control"])
def test_rows_depend_on_their_own_inputs_alone(member: str) -> None:
    config = small(TEXT | {"control": MICRO}, micro_conditions=True)
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64)
    given = {"x": x, "t": t} | condition
    changed = given[member].clone()
    changed[1] = changed[2] - (1 if member == "text_lengths" else 0)

    def output(values: dict[str, Tensor]) -> Tensor:
        rest = {k: v for k, v in values.items() if k not in ("x", "t")}
        return model(values["x"], values["t"], rest)

    difference = (output(given | {member: changed}) - output(given)).abs().flatten(1).amax(1)
    assert difference[1] > 1e-4 and difference[[0, 2]].max() < 1e-12


def test_bfloat16_follows_float32() -> None:
    config = small(TEXT | {"control": MICRO}, micro_conditions=True)
    exact = randomised(config)(*inputs(config))
    rounded = randomised(config).bfloat16()(*inputs(config))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.04


def test_without_sigma_the_output_has_the_latents_channels() -> None:
    config = small(learn_sigma=False)
    assert randomised(config)(*inputs(config)).shape == (3, 4, 8, 8)


def test_conversion_is_exact_both_ways_and_strict() -> None:
    config = small(TEXT | {"control": MICRO}, micro_conditions=True)
    state = randomised(config).state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    table = diffusers_table(config, null=state["y_embedder.y_embedding"])
    theirs = to_theirs(state, table)
    assert "transformer_blocks.1.attn2.to_v.bias" in theirs
    back = to_ours(theirs, table, shapes)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert not to_ours(theirs, diffusers_table(config), shapes)["y_embedder.y_embedding"].any()
    theirs["proj_out.weights"] = theirs.pop("proj_out.weight")
    with pytest.raises(UserError, match=r"missing proj_out.weight \(nearest: proj_out.weights\)"):
        to_ours(theirs, table, shapes)
    with pytest.raises(UserError, match="this model has classes"):
        diffusers_table(small({"semantic": "class"}))
