"""The U-Net: published sizes and names, zero start, conditions, recomputation, compilation."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from etude.convert.layout import to_ours, to_theirs
from etude.convert.unet import PUBLISHED, original_table
from etude.core.errors import UserError
from etude.models.conditioning import ConditioningConfig, ControlConfig
from etude.models.unet import UNet
from etude.models.unet_blocks import GroupNorm, LayerNorm
from etude.models.unet_config import UNetConfig

SEPARATE = (ControlConfig(name="height", exponent=4.0), ControlConfig(name="flip", exponent=0.0))
CONSTANT = (ControlConfig(name="height", exponent=0.0), ControlConfig(name="flip", exponent=0.0))
GATED = (ControlConfig(name="height", exponent=1.0),)
TEXT: dict[str, Any] = dict(semantic="text", text_tokens=4, text_width=16)
SIZES = ("height", "width", "crop_top", "crop_left", "target_height", "target_width")
SDXL: dict[str, Any] = dict(
    control=[ControlConfig(name=name, exponent=0.0) for name in SIZES],
    control_embedding="concatenated",
    control_zero=False,
)
# What the presets were published with beside their shape.
CONDITIONING = {
    "ldm4": ConditioningConfig(),
    "cin-f8": ConditioningConfig(),
    "imagenet-f8": ConditioningConfig(**SDXL | {"control": SDXL["control"][:4]}),
    "sdxl": ConditioningConfig(
        semantic="text", text_tokens=77, text_width=2048, pooled_width=1280, **SDXL
    ),
}


def small(**changes) -> UNetConfig:
    shape = dict(
        input_size=8,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_downsamplings=(2,),
        head_channels=32,
        context_width=24,
        num_classes=5,
    )
    return UNetConfig(**shape | changes)


def asked(**fields) -> UNetConfig:
    return small(conditioning=ConditioningConfig(**fields))


def randomised(config: UNetConfig, dtype: torch.dtype = torch.float32) -> UNet:
    """A model none of whose weights is zero, so that every part shows in the output."""
    model = UNet(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(noise + (parameter.dim() == 1 and "norm" in name))
    return model.to(dtype)


def inputs(config: UNetConfig, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    wanted, condition = config.conditioning, {"labels": torch.tensor([0, 4, 2])[:batch]}
    if wanted.semantic == "text":
        shape = (batch, wanted.text_tokens, wanted.text_width)
        condition = {"text": torch.randn(shape, generator=generator)}
        condition["pooled"] = torch.randn(batch, wanted.pooled_width, generator=generator)
    if wanted.control:
        columns = len(wanted.control)
        condition["control"] = torch.rand(batch, columns, generator=generator) * 10.0
    return x, torch.tensor([3.0, 500.0, 930.0])[:batch], condition


def apart(first: Tensor, second: Tensor) -> float:
    """The smallest difference of a row, as a share of the output's norm."""
    difference = (first - second).flatten(1).norm(dim=1).min()
    return (difference / second.flatten(1).norm(dim=1).mean()).item()


def count(
    channels: int, model: int, mults: tuple, depths: tuple, context: int, vector: int = 0
) -> int:
    """Parameters of a U-Net by hand, its classes apart; depths: 0 for a level without attention."""
    time = 4 * model

    def conv(a: int, b: int, size: int = 3) -> int:
        return size * size * a * b + b

    def residual(a: int, b: int) -> int:
        return 2 * a + conv(a, b) + (time * b + b) + 2 * b + conv(b, b) + (a != b) * conv(a, b, 1)

    def transformer(c: int, depth: int) -> int:
        inside = 4 * c * c + c  # attention to itself
        inside += 2 * c * c + 2 * context * c + c  # to the context
        inside += (8 * c * c + 8 * c) + (4 * c * c + c) + 6 * c  # feed-forward, three norms
        return 2 * c + 2 * (c * c + c) + depth * inside if depth else 0

    total = (model * time + time) + (time * time + time) + conv(channels, model)
    total += bool(vector) * ((vector * time + time) + (time * time + time))
    total += 2 * model + conv(model, channels)
    skips, width = [model], model
    for level, (mult, depth) in enumerate(zip(mults, depths, strict=True)):
        for _ in range(2):
            total += residual(width, model * mult) + transformer(model * mult, depth)
            width = model * mult
            skips.append(width)
        if level < len(mults) - 1:
            total += conv(width, width)
            skips.append(width)
    total += 2 * residual(width, width) + transformer(width, depths[-1])
    for level in range(len(mults) - 1, -1, -1):
        for _ in range(3):
            out = model * mults[level]
            total += residual(width + skips.pop(), out) + transformer(out, depths[level])
            width = out
        total += conv(width, width) if level else 0
    return total


@pytest.mark.parametrize(
    ("preset", "channels", "published", "expected"),
    [
        ("ldm4", 3, 400.92, count(3, 192, (1, 2, 3, 5), (0, 1, 1, 1), 512)),
        ("cin-f8", 4, 395, count(4, 256, (1, 2, 4), (1, 1, 1), 512)),
        ("imagenet-f8", 4, 407, count(4, 256, (1, 2, 4), (1, 1, 1), 1024, vector=1024)),
        ("sdxl", 4, 2567.46, count(4, 320, (1, 2, 4), (0, 2, 10), 2048, vector=2816)),
    ],
)
def test_parameter_counts(preset: str, channels: int, published: float, expected: int) -> None:
    config = UNetConfig(
        preset=preset, in_channels=channels, input_size=64, conditioning=CONDITIONING[preset]
    )
    with torch.device("meta"):
        model = UNet(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    table = sizes.pop("class_embedder.embedding_table.weight", 0)
    assert sum(sizes.values()) == expected
    digits = len(str(published).partition(".")[2])
    assert round(expected / 1e6, digits) == published
    assert table == (0 if preset == "sdxl" else 1001 * config.context_width)


def test_state_dict_has_the_published_names() -> None:
    with torch.device("meta"):
        state = UNet(UNetConfig(preset="ldm4", in_channels=3, input_size=64)).state_dict()
    expected = {
        "time_embed.2.bias": (768,),
        "input_blocks.0.0.weight": (192, 3, 3, 3),
        "input_blocks.3.0.op.weight": (192, 192, 3, 3),
        "input_blocks.4.0.in_layers.2.weight": (384, 192, 3, 3),
        "input_blocks.4.0.emb_layers.1.weight": (384, 768),
        "input_blocks.4.0.out_layers.3.bias": (384,),
        "input_blocks.4.0.skip_connection.weight": (384, 192, 1, 1),
        "input_blocks.4.1.proj_in.weight": (384, 384, 1, 1),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (960, 512),
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (7680, 960),
        "middle_block.2.out_layers.0.weight": (960,),
        "output_blocks.2.2.conv.weight": (960, 960, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (192, 384, 1, 1),
        "out.0.weight": (192,),
        "out.2.weight": (3, 192, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert "input_blocks.1.1.norm.weight" not in state  # no attention at the first size


def test_a_published_checkpoint_goes_there_and_back() -> None:
    config = small()
    state, table = randomised(config).state_dict(), original_table(config)
    theirs = to_theirs(state, table)
    assert "model.diffusion_model.middle_block.1.norm.weight" in theirs
    assert "cond_stage_model.embedding.weight" in theirs
    assert all(name.startswith(PUBLISHED) for name in theirs)
    back = to_ours(theirs, table, {name: value.shape for name, value in state.items()})
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(UserError, match="attend to a context"):
        original_table(asked(semantic_path="adaln"))


def test_presets_fill_shapes_and_refuse_contradictions() -> None:
    config = UNetConfig(preset="sdxl", conditioning=CONDITIONING["sdxl"])
    assert (config.depth(0), config.depth(1), config.heads(2), config.vector_width) == (
        0,
        2,
        20,
        2816,
    )
    assert UNetConfig(**config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError, match="model_channels=64 contradicts preset ldm4"):
        UNetConfig(preset="ldm4", model_channels=64)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(input_size=7), "input_size=7 is not a multiple of 2"),
        (dict(channel_mult=()), "channel_mult needs a number"),
        (dict(transformer_depth=(1, 2, 3)), "transformer_depth=.* one for each of 2 levels"),
        (dict(attention_downsamplings=(4,)), "attention_downsamplings=4 is not a size"),
        (dict(head_channels=48), "head_channels=48 does not divide the 128 channels"),
        (dict(head_channels=0, num_heads=3), "num_heads=3 does not divide the 128 channels"),
        (dict(conditioning=dict(TEXT, semantic_path="adaln")), "takes a text through attention"),
        (
            dict(conditioning=dict(pooled_width=8)),
            "pooled_width has no effect with semantic: class",
        ),
        (
            dict(conditioning=dict(TEXT, semantic_path="attention", pooled_width=8)),
            "pooled_width has no effect with semantic_path: attention",
        ),
    ],
)
def test_errors_are_one_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence) as caught:
        small(**fields)
    assert len(caught.value.errors()) == 1


def test_a_new_model_returns_zero_and_learns_first_in_its_last_layer() -> None:
    config = asked(control=SEPARATE)
    model = UNet(config)
    output = model(*inputs(config))
    assert output.shape == (3, 4, 8, 8) and torch.count_nonzero(output) == 0
    (output - 1.0).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"out.2.weight", "out.2.bias"}
    norms = [n for n, m in model.named_modules() if isinstance(m, (GroupNorm, LayerNorm))]
    zero = {f"{name}.bias" for name in norms}
    for name, _ in model.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")):
            zero |= {f"{name}.weight", f"{name}.bias"}
    for k in range(2):
        mlp = f"control_embedder.mlps.{k}"
        zero |= {f"{mlp}.0.bias", f"{mlp}.2.weight", f"{mlp}.2.bias"}
    assert {n for n, p in model.named_parameters() if not p.any()} == zero


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = UNet(small()), UNet(small()), UNet(small(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


CONTROLS = {
    "separate": dict(control=SEPARATE),
    "gated": dict(control=GATED, control_embedding="concatenated"),
    "sdxl": dict(control=CONSTANT, control_embedding="concatenated"),
    "text": dict(TEXT, pooled_width=8, control=CONSTANT, control_embedding="concatenated"),
}


@pytest.mark.parametrize("kind", CONTROLS)
def test_control_starts_without_effect_and_then_has_one(kind: str) -> None:
    config = asked(**CONTROLS[kind])
    model = randomised(config)
    last = model.label_emb[0][2] if config.sdxl_control else None
    assert hasattr(model, "control_embedder") != hasattr(model, "label_emb")
    last = [last] if last is not None else [mlp[2] for mlp in model.control_embedder.mlps]
    new = UNet(config)
    assert not any(p.any() for n, p in new.named_parameters() if n.startswith("label_emb.0.2"))
    x, t, condition = inputs(config)
    changed = condition | {"control": condition["control"].flip(0)[[2, 0, 1]] + 1.0}
    assert apart(model(x, t, changed), model(x, t, condition)) > 1e-5
    with torch.no_grad():
        for layer in last:
            layer.weight.zero_()
            layer.bias.zero_()
    assert torch.equal(model(x, t, changed), model(x, t, condition))


@pytest.mark.parametrize("kind", CONTROLS)
def test_dropped_control_is_no_control(kind: str) -> None:
    config = asked(**CONTROLS[kind])
    model = randomised(config)
    x, t, condition = inputs(config)
    dropped = condition | {"drop_control": torch.tensor([True, False, True])}
    output, kept = model(x, t, dropped), model(x, t, condition)
    torch.testing.assert_close(output[1], kept[1])
    assert apart(output[[0, 2]], kept[[0, 2]]) > 1e-5
    if config.sdxl_control:  # zeros instead of sines, as in SDXL
        other = dropped | {"control": condition["control"] + torch.tensor([[1.0], [0.0], [2.0]])}
        assert torch.equal(model(x, t, other), output)
        return
    without = randomised(small())
    state = model.state_dict()
    without.load_state_dict({k: v for k, v in state.items() if "control_embedder" not in k})
    torch.testing.assert_close(output[[0, 2]], without(x, t, condition)[[0, 2]])


def test_control_comes_in_as_its_schedule_says() -> None:
    """Pure noise has none of a control with an exponent, and all of one without."""
    x, _, condition = inputs(small())
    t = torch.full((3,), 1000.0)
    for controls, differs in ((SEPARATE[:1], False), (CONSTANT[:1], True)):
        model = randomised(asked(control=controls))
        values = [condition | {"control": torch.full((3, 1), v)} for v in (1.0, 7.0)]
        first, second = (model(x, t, value) for value in values)
        assert torch.equal(first, second) != differs


@pytest.mark.parametrize("path", ["published", "adaln", "attention"])
def test_a_dropped_class_is_the_empty_one(path: str) -> None:
    config = asked(semantic_path=path, class_tokens=1 if path == "adaln" else 2)
    model = randomised(config)
    assert any("attn2" in name for name in model.state_dict()) == (path != "adaln")
    x, t, condition = inputs(config)
    dropped = model(x, t, condition | {"drop_semantic": torch.tensor([True, False, True])})
    empty = model(x, t, {"labels": torch.tensor([5, 4, 5])})
    assert torch.equal(dropped, empty)
    assert apart(dropped[[0, 2]], model(x, t, condition)[[0, 2]]) > 1e-4


def test_a_text_enters_as_tokens_and_as_one_vector() -> None:
    config = asked(**TEXT, pooled_width=8)
    model = randomised(config)
    x, t, condition = inputs(config)
    output = model(x, t, condition)
    for name in ("text", "pooled"):
        other = condition | {name: condition[name].roll(1, 0)}
        assert apart(model(x, t, other), output) > 1e-5
    none = {name: torch.zeros_like(value) for name, value in condition.items()}
    dropped = condition | {"drop_semantic": torch.tensor([True, True, True])}
    assert torch.equal(model(x, t, dropped), model(x, t, none))
    lengths = torch.tensor([1, 4, 2])
    short = condition | {"text_lengths": lengths}
    behind = torch.arange(4) >= lengths[:, None]
    garbled = short | {"text": condition["text"].masked_fill(behind[:, :, None], 99.0)}
    assert torch.equal(model(x, t, garbled), model(x, t, short))
    assert apart(model(x, t, short)[[0, 2]], output[[0, 2]]) > 1e-5
    # Padding that is attended to is not the same as none.
    zeros = randomised(asked(**TEXT, pooled_width=8, text_padding="zeros"))
    assert apart(zeros(x, t, short)[[0, 2]], model(x, t, short)[[0, 2]]) > 1e-5


@pytest.mark.parametrize("size", [6, 10])
def test_any_size_that_the_levels_divide(size: int) -> None:
    config = small(input_size=size, learn_sigma=True)
    assert randomised(config)(*inputs(config)).shape == (3, 8, size, size)


def test_the_memory_format_does_not_change_the_values() -> None:
    # Two tokens: over one the scores have no gradient but rounding.
    tokens = ConditioningConfig(class_tokens=2)
    config = small(attention_downsamplings=(1, 2), conditioning=tokens)
    last, first = randomised(config), randomised(config.model_copy(update={"channels_last": False}))
    seen = []
    for model in (last, first):
        kept = model.middle_block.register_forward_hook(lambda m, i, out: seen.append(out))
        output = model(*inputs(config))
        output.square().sum().backward()
        kept.remove()
    assert [out.is_contiguous() for out in seen] == [False, True]
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(last.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max())


def test_recomputation_changes_neither_output_nor_gradients() -> None:
    config = asked(control=SEPARATE)
    again = config.model_copy(update={"activation_checkpointing": True})
    plain, recomputed = randomised(config), randomised(again)
    outputs = [model(*inputs(config)) for model in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for first, second in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=1e-9)


def test_compiles_into_one_graph() -> None:
    """With checkpoints around its blocks, whose bodies the plain network traces without them."""
    config = small(
        channel_mult=(1,),
        attention_downsamplings=(1,),
        activation_checkpointing=True,
        conditioning=ConditioningConfig(**CONTROLS["text"]),
    )
    model = randomised(config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, t, condition = inputs(config)
    condition["text_lengths"] = torch.tensor([1, 4, 0])
    torch.testing.assert_close(compiled(x, t, condition), model(x, t, condition))


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    config = asked(control=SEPARATE)
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, dtype=torch.float64)
    together = model(x, t, condition)
    other = {name: torch.cat((value[:1], value[1:].flip(0))) for name, value in condition.items()}
    changed = model(torch.cat((x[:1], -x[1:])), t, other)
    assert not torch.allclose(together[1:], changed[1:])
    torch.testing.assert_close(together[0], changed[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("member", ["x", "t", "labels", "control"])
def test_every_input_matters(member: str) -> None:
    config = asked(control=SEPARATE)
    model = randomised(config)
    x, t, condition = inputs(config)
    given = {"x": x, "t": t} | condition
    given[member] = given[member].roll(1, 0)
    changed = model(given.pop("x"), given.pop("t"), given)
    assert apart(changed, model(x, t, condition)) > 1e-5


def test_bfloat16_follows_float32() -> None:
    config = asked(**CONTROLS["text"])
    exact = randomised(config)(*inputs(config))
    rounded = randomised(config, torch.bfloat16)(*inputs(config))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05
