"""The mmDiT: sizes and names, its start, conditions and how they enter, recomputation."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from etude.models.blocks import positions_2d
from etude.models.conditioning import ConditioningConfig, ControlConfig, content_tokens
from etude.models.mmdit import MMDiT, MMDiTConfig

SD3_TEXT = ConditioningConfig(semantic="text", text_tokens=154, text_width=4096, pooled_width=2048)
TEXT = {"semantic": "text", "text_tokens": 6, "text_width": 10, "pooled_width": 12}
TOKENS = TEXT | {"pooled_width": 0, "semantic_path": "attention"}
CONTROL = (ControlConfig(name="crop_top", exponent=2.0), ControlConfig(name="flip", scale=100.0))


def small(conditioning: dict | None = None, **changes) -> MMDiTConfig:
    shape = dict(input_size=8, hidden_size=48, depth=3, num_heads=4, num_classes=5)
    return MMDiTConfig(conditioning=ConditioningConfig(**conditioning or {}), **shape | changes)


def modern(conditioning: dict | None = None, **changes) -> MMDiTConfig:
    return small(conditioning, **{"qk_norm": "rms", "dual_attention_layers": 1} | changes)


def randomised(config: MMDiTConfig, dtype: torch.dtype = torch.float32) -> MMDiT:
    """A model none of whose weights is zero, so that every part shows in the output."""
    model = MMDiT(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (1.0 if ".ln_" in name else 0.0))
        if config.conditioning.semantic == "text":
            null = model.text_tokens.null
            null.copy_(torch.randn(null.shape, generator=generator))
    return model


def inputs(config: MMDiTConfig, dtype: torch.dtype = torch.float32) -> tuple:
    """Three pictures; everything that a model of this configuration may read."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    wanted = config.conditioning
    x = normal(3, config.in_channels, config.input_size, config.input_size)
    condition = {"labels": torch.tensor([0, 4, 5])}
    if wanted.semantic == "text":
        condition = {"text": normal(3, wanted.text_tokens, wanted.text_width)}
        if wanted.pooled_width:
            condition["pooled"] = normal(3, wanted.pooled_width)
    if wanted.control:
        condition["control"] = normal(3, len(wanted.control)).float()
    return x, torch.tensor([3.0, 500.0, 998.0]), condition


def parameters(config: MMDiTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MMDiT(config).parameters())


def by_hand(
    depth: int, D: int, channels: int, *, head: int = 0, dual: int = 0, semantic: int
) -> int:
    """Parameters of an mmDiT with patches of 2; head: channels of one where it is normalised."""
    patches, time = 4 * channels * D + D, (256 * D + D) + (D * D + D)
    attention, mlp = (3 * D * D + 3 * D) + (D * D + D) + 2 * head, 8 * D * D + 5 * D
    stream = attention + mlp + 6 * (D * D + D)
    last = (3 * D * D + 3 * D) + 2 * head + 2 * (D * D + D)
    second = attention + 3 * (D * D + D)
    final = 2 * D * D + 2 * D + (D + 1) * 4 * channels
    blocks = (2 * depth - 1) * stream + last + dual * second
    return patches + time + blocks + final + semantic


def text_by_hand(D: int) -> int:
    return (4096 * D + D) + (2048 * D + D) + (D * D + D)


XL = {"hidden_size": 1152, "patch_size": 2}


@pytest.mark.parametrize(
    ("changes", "expected", "hand"),
    [
        ({"preset": "sd3-medium", "conditioning": SD3_TEXT}, 2_028_328_000,
         by_hand(24, 1536, 16, semantic=text_by_hand(1536))),
        ({"preset": "sd3.5-medium", "conditioning": SD3_TEXT}, 2_243_171_520,
         by_hand(24, 1536, 16, head=64, dual=13, semantic=text_by_hand(1536))),
        ({"preset": "sd3.5-large", "conditioning": SD3_TEXT}, 8_056_627_520,
         by_hand(38, 2432, 16, head=64, semantic=text_by_hand(2432))),
        ({"preset": "mmDiT-XL-18/2", "in_channels": 16, "conditioning": SD3_TEXT}, 856_159_552,
         by_hand(18, 1152, 16, semantic=text_by_hand(1152))),
        ({"preset": "mmDiT-XL-28/2", "conditioning": SD3_TEXT}, 1_334_151_952,
         by_hand(28, 1152, 4, semantic=text_by_hand(1152))),
        # Class alone: 1,325,743,504 and a table for the tokens, with the vector another.
        ({"preset": "mmDiT-XL-28/2",
          "conditioning": ConditioningConfig(semantic_path="attention")}, 1_326_896_656,
         by_hand(28, 1152, 4, semantic=1001 * 1152)),
        ({"preset": "mmDiT-XL-28/2"}, 1_328_049_808,
         by_hand(28, 1152, 4, semantic=2 * 1001 * 1152)),
        ({"preset": "mmDiT-XL-28/2", "num_heads": 16}, 1_328_049_808,
         by_hand(28, 1152, 4, semantic=2 * 1001 * 1152)),
    ],
)  # fmt: skip
def test_parameter_counts(changes: dict, expected: int, hand: int) -> None:
    assert parameters(MMDiTConfig(input_size=64, **changes)) == expected == hand


def test_state_dict_has_the_published_names_and_shapes() -> None:
    config = MMDiTConfig(preset="sd3.5-medium", input_size=128, conditioning=SD3_TEXT)
    with torch.device("meta"):
        state = MMDiT(config).state_dict()
    D = 1536

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    expected = {"x_embedder.proj.weight": (D, 16, 2, 2), "x_embedder.proj.bias": (D,)}
    expected |= {"pos_embed": (1, 384 * 384, D), "text_tokens.null": (154, 4096)}
    expected |= linear("t_embedder.mlp.0", D, 256) | linear("t_embedder.mlp.2", D, D)
    expected |= linear("y_embedder.mlp.0", D, 2048) | linear("y_embedder.mlp.2", D, D)
    expected |= linear("context_embedder", D, 4096) | linear("final_layer.linear", 64, D)
    expected |= linear("final_layer.adaLN_modulation.1", 2 * D, D)
    for n in range(24):
        for stream in ("x_block", "context_block"):
            block, last = f"joint_blocks.{n}.{stream}", n == 23 and stream == "context_block"
            dual = n < 13 and stream == "x_block"
            expected |= linear(f"{block}.attn.qkv", 3 * D, D)
            expected |= {f"{block}.attn.ln_{letter}.weight": (64,) for letter in "qk"}
            rows = (2 if last else 9 if dual else 6) * D
            expected |= linear(f"{block}.adaLN_modulation.1", rows, D)
            if not last:
                expected |= linear(f"{block}.attn.proj", D, D)
                expected |= linear(f"{block}.mlp.fc1", 4 * D, D)
                expected |= linear(f"{block}.mlp.fc2", D, 4 * D)
            if dual:
                expected |= linear(f"{block}.attn2.qkv", 3 * D, D)
                expected |= linear(f"{block}.attn2.proj", D, D)
                expected |= {f"{block}.attn2.ln_{letter}.weight": (64,) for letter in "qk"}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_presets_fill_sizes_and_refuse_contradictions() -> None:
    config = MMDiTConfig(preset="sd3.5-large")
    assert (config.depth, config.hidden_size, config.heads, config.qk_norm) == (38, 2432, 38, "rms")
    assert MMDiTConfig(**config.model_dump()) == config
    assert MMDiTConfig(preset="mmDiT-XL-28/2").heads == 18
    assert MMDiTConfig(preset="mmDiT-XL-28/2", num_heads=16).heads == 16
    with pytest.raises(ValidationError, match="depth=3 contradicts preset sd3-medium"):
        MMDiTConfig(preset="sd3-medium", depth=3)


@pytest.mark.parametrize(
    ("conditioning", "changes", "message"),
    [
        ({}, {"input_size": 9}, "input_size=9 is not a multiple of patch_size=2"),
        ({}, {"num_heads": 5}, "hidden_size=48 is not a multiple of num_heads=5"),
        ({}, {"num_heads": 0}, "hidden_size=48 is not a multiple of 64: set num_heads"),
        ({}, {"dual_attention_layers": 4}, "dual_attention_layers=4 is more than depth=3"),
        ({}, {"position_table": 3}, "position_table=3 is smaller than the picture's 4 tokens"),
        (TEXT | {"semantic_path": "adaln"}, {}, "would leave mmdit's text stream without a text"),
        ({"semantic_path": "adaln"}, {}, "without a text or a class"),
        (TOKENS | {"pooled_width": 3}, {}, "pooled_width has no effect with semantic_path: atten"),
        (TEXT | {"pooled_width": 0}, {}, "set pooled_width .2048 as published., or semantic_path"),
    ],
)
def test_what_cannot_be_gets_one_sentence(conditioning: dict, changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small(conditioning, **changes)


@pytest.mark.parametrize("conditioning", [{}, TEXT, {"control": CONTROL}], ids=str)
def test_a_new_model_returns_zero_and_learns_first_in_its_last_layer(conditioning: dict) -> None:
    config = modern(conditioning)
    model = MMDiT(config)
    output = model(*inputs(config))
    assert torch.count_nonzero(output) == 0
    (output - 1.0).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}
    control = {f"control_embedder.mlps.{k}.2.weight" for k in range(2)}
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name in control:
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1.0).all(), name
        elif name.endswith("weight"):
            assert parameter.std() > 0.005, name


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = MMDiT(small()), MMDiT(small()), MMDiT(small(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("joint_blocks.1.context_block.mlp.fc1.weight", "x_embedder.proj.weight"):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_positions_are_the_centre_of_the_table() -> None:
    """Esser et al. 2024: position p of the table lies at (p - (table - grid) / 2) base / grid."""
    config = small(input_size=16, position_table=12, position_base=4)
    model = MMDiT(config)
    assert model.pos_embed.shape == (1, 144, 48)
    stretched = model._cropped()[0].view(8, 8, 48)
    plain = positions_2d(48, 4).view(4, 4, 48)
    torch.testing.assert_close(stretched[::2, ::2], plain, rtol=0, atol=1e-6)
    unstretched = MMDiT(small(input_size=16, position_table=12))
    torch.testing.assert_close(unstretched._cropped()[0], positions_2d(48, 8), rtol=0, atol=1e-6)
    assert torch.equal(MMDiT(small(input_size=16)).pos_embed[0], positions_2d(48, 8))


@pytest.mark.parametrize("conditioning", [{}, TEXT], ids=["class", "text"])
def test_recomputation_changes_neither_output_nor_gradients(conditioning: dict) -> None:
    config = modern(conditioning)
    plain = randomised(config)
    recomputed = randomised(modern(conditioning, activation_checkpointing=True))
    outputs = [model(*inputs(config)) for model in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for (name, first), second in zip(
        plain.named_parameters(), recomputed.parameters(), strict=True
    ):
        assert first.grad is not None, name
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("conditioning", [{"control": CONTROL}, TEXT], ids=["control", "text"])
def test_compiles_into_one_graph(conditioning: dict) -> None:
    config = modern(conditioning, depth=2)
    model = randomised(config)
    x, t, condition = inputs(config)
    condition["drop_semantic"] = torch.tensor([False, True, False])
    if "text" in condition:
        condition["text_lengths"] = torch.tensor([6, 2, 0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, condition), model(x, t, condition))


@pytest.mark.parametrize("conditioning", [{}, TEXT], ids=["class", "text"])
def test_samples_of_a_batch_do_not_influence_each_other(conditioning: dict) -> None:
    config = modern(conditioning)
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64)
    if "text" in condition:
        condition["text_lengths"] = torch.tensor([3, 6, 1])
    together = model(x, t, condition)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in condition.items()}
        expected = model(x[row : row + 1], t[row : row + 1], alone)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("path", "kind", "member"),
    [
        ("published", "class", "x"), ("published", "class", "t"), ("published", "class", "labels"),
        ("attention", "class", "labels"),
        ("published", "text", "text"), ("published", "text", "pooled"),
        ("attention", "text", "text"), ("published", "class", "control"),
    ],
)  # fmt: skip
def test_every_input_matters(path: str, kind: str, member: str) -> None:
    text = TEXT if path == "published" else TOKENS
    config = small((text if kind == "text" else {"semantic_path": path}) | {"control": CONTROL})
    model = randomised(config)
    x, t, condition = inputs(config)
    t = t / 2  # control has no effect on noise alone
    before = model(x, t, condition)
    changed = {"x": x, "t": t} | condition
    changed[member] = changed[member].roll(1, 0)
    after = model(changed.pop("x"), changed.pop("t"), changed)
    assert ((after - before).abs().flatten(1).amax(1) > 1e-4).all()


def test_the_attention_path_leaves_the_semantic_vector_out() -> None:
    names = set(MMDiT(small({"semantic_path": "attention"})).state_dict())
    assert not any(name.startswith("y_embedder") for name in names)
    config = small(TOKENS)
    model = randomised(config)
    x, t, condition = inputs(config)
    assert model(x, t, condition).std() > 0.01
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    assert set(MMDiT(small()).state_dict()) - names == {"y_embedder.embedding_table.weight"}


def test_a_class_is_as_many_tokens_as_asked_for() -> None:
    config = small({"class_tokens": 3})
    model = randomised(config)
    x, t, condition = inputs(config)
    context, lengths = content_tokens(model, condition)
    assert context.shape == (3, 3, 48) and lengths is None
    before = model(x, t, condition)
    change = torch.randn(3, 48, generator=torch.Generator().manual_seed(3))
    for k in range(3):
        with torch.no_grad():
            model.class_embedder.embedding_table.weight.view(6, 3, 48)[:, k] += change[k]
        after = model(x, t, condition)
        assert (after - before).abs().amax() > 1e-4
        before = after


@pytest.mark.parametrize("conditioning", [{}, {"semantic_path": "attention"}], ids=str)
def test_a_dropped_class_is_the_null_class(conditioning: dict) -> None:
    config = small(conditioning)
    model = randomised(config)
    x, t, condition = inputs(config)
    dropped = condition | {"drop_semantic": torch.tensor([True, False, False])}
    expected = model(x, t, {"labels": torch.tensor([5, 4, 5])})
    assert torch.equal(model(x, t, dropped), expected)
    assert not torch.allclose(model(x, t, condition)[0], expected[0])


@pytest.mark.parametrize("conditioning", [TEXT, TOKENS], ids=["published", "attention"])
@pytest.mark.parametrize("lengths", [None, [2, 6, 3]], ids=str)
def test_a_dropped_text_is_the_null_text(conditioning: dict, lengths: list[int] | None) -> None:
    config = small(conditioning)
    model = randomised(config)
    x, t, condition = inputs(config)
    given = condition | ({} if lengths is None else {"text_lengths": torch.tensor(lengths)})
    output = model(x, t, given | {"drop_semantic": torch.tensor([True, False, True])})
    null = {"text": model.text_tokens.null.expand(3, -1, -1), "pooled": torch.zeros(3, 12)}
    torch.testing.assert_close(output[::2], model(x, t, null)[::2])
    torch.testing.assert_close(output[1], model(x, t, given)[1])
    assert not torch.allclose(output[0], model(x, t, given)[0])


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_a_masked_text_is_the_shorter_text(qk_norm: str) -> None:
    config = small(TEXT, qk_norm=qk_norm, dual_attention_layers=1)
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64)
    output = model(x, t, condition | {"text_lengths": torch.tensor([1, 4, 6])})
    for row, length in enumerate((1, 4, 6)):
        short = {"text": condition["text"][row : row + 1, :length]}
        short |= {"pooled": condition["pooled"][row : row + 1]}
        expected = model(x[row : row + 1], t[row : row + 1], short)
        torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-9, atol=1e-11)
    garbage = condition["text"].clone()
    garbage[0, 1:] = 1e3
    same = condition | {"text": garbage, "text_lengths": torch.tensor([1, 4, 6])}
    torch.testing.assert_close(model(x, t, same), output)
    assert not torch.allclose(model(x, t, condition)[0], output[0])


@pytest.mark.parametrize("kind", ["zeros", "learned", "replicate", "noisy_replicate"])
def test_other_paddings_are_attended_to(kind: str) -> None:
    config = small(TEXT | {"text_padding": kind})
    model = randomised(config)
    x, t, condition = inputs(config)
    given = condition | {"text_lengths": torch.tensor([2, 5, 6])}
    text = condition["text"].clone()
    if kind == "learned":
        text[0, 2:] = model.text_tokens.padding
    else:
        text[0, 2:] = 0.0 if kind == "zeros" else text[0, :2].repeat(2, 1)
    expected = model(x[:1], t[:1], {"text": text[:1], "pooled": condition["pooled"][:1]})
    plain = model(x, t, given)
    torch.testing.assert_close(plain[:1], expected)
    noise = {"text_noise": torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(3))}
    assert torch.equal(model(x, t, given | noise), plain) == (kind != "noisy_replicate")


@pytest.mark.parametrize("conditioning", [{"control": CONTROL}, TEXT], ids=["class", "text"])
def test_bfloat16_follows_float32(conditioning: dict) -> None:
    config = modern(conditioning)
    x, t, condition = inputs(config)
    if "text" in condition:
        condition["text_lengths"] = torch.tensor([6, 2, 4])
    exact = randomised(config)(x, t, condition)
    rounded = randomised(config).bfloat16()(x, t, condition)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_a_variance_can_be_asked_for() -> None:
    config = small(learn_sigma=True)
    assert randomised(config)(*inputs(config)).shape == (3, 8, 8, 8)
    assert not MMDiTConfig().learn_sigma
