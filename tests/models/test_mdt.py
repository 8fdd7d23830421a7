"""MDTv2: published size and names, start, the masked pass, its gradients, conditions, layout."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etude.convert.layout import to_ours, to_theirs
from etude.convert.mdt import original_table
from etude.core.errors import UserError
from etude.models.blocks import positions_2d
from etude.models.mdt import MDT, MDTConfig, keep_indices
from etude.models.mdt_blocks import Kept, RelativePositionBias

KEEP = torch.tensor([[0, 1, 2, 4, 5, 7, 8, 9, 15], [1, 3, 6, 7, 8, 9, 10, 12, 14], [*range(9)]])
SIDE_ONLY = ("sideblocks", "mask_token")


def small(**changes) -> MDTConfig:
    shape = dict(input_size=8, in_channels=4, hidden_size=48, depth=6, decode_layer=2)
    return MDTConfig(**shape | dict(num_heads=4, num_classes=5) | changes)


def randomised(config: MDTConfig, dtype: torch.dtype = torch.float32) -> MDT:
    """A model none of whose weights is zero, so that every part shows in the output."""
    model = MDT(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model


def inputs(config: MDTConfig, dtype: torch.dtype = torch.float32, *, masked: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    condition = {"labels": torch.tensor([0, 4, 5])} | ({"keep": KEEP} if masked else {})
    if config.conditioning.control:
        columns = len(config.conditioning.control)
        condition["control"] = torch.rand(3, columns, generator=generator) * 10.0
    return x, torch.tensor([3.0, 500.0, 998.0]), condition


def count(depth: int, D: int, heads: int, decode: int, grid: int = 16) -> int:
    """Parameters of an MDTv2 by hand: 4 channels, patches of 2, learned sigma, 1000 classes."""
    tokens, table = grid * grid, ((2 * grid - 1) ** 2 + 3) * heads
    embedders = 16 * D + D + (256 * D + D) + (D * D + D) + 1001 * D + 2 * tokens * D + D
    attention, mlp, modulation = 4 * D * D + 4 * D + table, 8 * D * D + 5 * D, 6 * D * D + 6 * D
    skips = (depth - decode) // 2 + decode
    final = 2 * D * D + 2 * D + (D + 1) * 32
    blocks = (depth + 1) * (attention + mlp + modulation)
    return embedders + blocks + skips * (2 * D * D + D) + final


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        ("MDTv2-XL/2", 32, 742_263_904),  # the publication's 742M
        ("MDTv2-XL/2", 64, count(28, 1152, 16, 4, 32)),
        ("MDTv2-L/2", 32, count(24, 1024, 16, 4)),
        ("MDTv2-B/2", 32, count(12, 768, 12, 4)),
        ("MDTv2-S/2", 32, count(12, 384, 6, 6)),
    ],
)
def test_parameter_counts(preset: str, size: int, expected: int) -> None:
    assert count(28, 1152, 16, 4) == 742_263_904
    with torch.device("meta"):
        model = MDT(MDTConfig(preset=preset, input_size=size))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_state_dict_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = MDT(MDTConfig(preset="MDTv2-XL/2")).state_dict()
    expected = {
        "pos_embed": (1, 256, 1152),
        "decoder_pos_embed": (1, 256, 1152),
        "mask_token": (1, 1, 1152),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
    }
    layers = {"t_embedder.mlp.0": (1152, 256), "t_embedder.mlp.2": (1152, 1152)}
    layers |= {"final_layer.linear": (32, 1152), "final_layer.adaLN_modulation.1": (2304, 1152)}
    for group, blocks in (("en_in", 12), ("en_out", 12), ("de_", 4), ("side", 1)):
        for n in range(blocks):
            name = f"{group}blocks.{n}"
            expected[f"{name}.attn.rel_pos_bias.relative_position_bias_table"] = (964, 16)
            layers[f"{name}.attn.qkv"] = (3456, 1152)
            layers[f"{name}.attn.proj"] = (1152, 1152)
            layers[f"{name}.mlp.fc1"] = (4608, 1152)
            layers[f"{name}.mlp.fc2"] = (1152, 4608)
            layers[f"{name}.adaLN_modulation.1"] = (6912, 1152)
            if group in ("en_out", "de_"):
                layers[f"{name}.skip_linear"] = (1152, 2304)
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_presets_fill_sizes_and_errors_are_sentences() -> None:
    config = MDTConfig(preset="MDTv2-S/2")
    assert (config.depth, config.hidden_size, config.num_heads, config.decode_layer) == (
        12, 384, 6, 6,
    )  # fmt: skip
    assert MDTConfig(**config.model_dump()) == config
    assert MDTConfig(preset="MDTv2-B/2", decode_layer=6).decode_layer == 6
    text = {"semantic": "text", "text_tokens": 4, "text_width": 8}
    for match, changes in {
        "decode_layer=6 contradicts preset MDTv2-XL/2": dict(preset="MDTv2-XL/2", decode_layer=6),
        "not a multiple of patch_size": dict(input_size=9),
        "not a multiple of num_heads": dict(num_heads=5),
        "leave 3 blocks for the encoder: it needs an even number": dict(depth=5),
        "leave 0 blocks": dict(depth=2),
        "takes a class through adaLN: set family": dict(conditioning=text),
        "through adaLN": dict(conditioning={"semantic_path": "attention"}),
    }.items():
        with pytest.raises(ValidationError, match=match):
            MDTConfig(**changes) if "preset" in changes else small(**changes)


def test_a_new_model_returns_zero_and_starts_as_published() -> None:
    config = small(hidden_size=96)
    model = MDT(config)
    for masked in (False, True):
        output = model(*inputs(config, masked=masked))
        assert output.shape == (3, 8, 8, 8) and torch.count_nonzero(output) == 0
    (output - 1.0).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            assert torch.equal(parameter[0], positions_2d(96, 4))
        elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            assert not parameter.any(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif any(part in name for part in ("_table", "mask_token", "t_embedder")):
            assert 0.015 < parameter.std() < 0.025, name
        elif parameter.dim() == 2:  # Xavier, uniform
            bound = (6.0 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (MDT(small(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("mask_token", "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"):
        assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_keep_indices_are_the_ranks_of_their_numbers() -> None:
    uniforms = torch.rand(5, 256, generator=torch.Generator().manual_seed(5))
    for ratio, kept in ((0.3, 179), (0.5, 128), (0.0, 256), (0.996, 1)):
        found = keep_indices(uniforms, ratio)
        expected = np.sort(np.argsort(uniforms.numpy(), axis=1)[:, :kept], axis=1)
        np.testing.assert_array_equal(found.numpy(), expected)
    assert keep_indices(torch.zeros(1, 100), 0.34).tolist() == [list(range(66))]
    assert keep_indices(torch.tensor([[0.5, 0.1, 0.5, 0.5]]), 0.5).tolist() == [[0, 1]]
    for ratio in (-0.1, 0.9999, 1.0):
        with pytest.raises(ValueError, match="must be 0 or more and leave one"):
            keep_indices(uniforms, ratio)


def test_choices_of_tokens_are_what_indexing_gives_and_so_are_their_gradients() -> None:
    generator = torch.Generator().manual_seed(6)
    kept = Kept.of(KEEP, 3, 16)
    x = torch.randn(3, 16, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 16, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    few, between = kept.take(x), kept.bias(bias)
    many = kept.spread(few)
    for b, row in enumerate(KEEP.tolist()):
        assert torch.equal(few[b], x[b, row])
        assert torch.equal(between[b], bias[0][:, row][:, :, row])
        absent = [i for i in range(16) if i not in row]
        assert torch.equal(many[b, row], few[b]) and not many[b, absent].any()
        assert kept.absent[b].flatten().nonzero().flatten().tolist() == absent
    assert torch.autograd.gradcheck(lambda x: kept.spread(kept.take(x) ** 2), (x,))
    assert torch.autograd.gradcheck(kept.bias, (bias,))
    assert torch.autograd.gradgradcheck(lambda x: kept.take(x) ** 2, (x,))


def test_gradient_of_a_bfloat16_table_is_rounded_once() -> None:
    bias = RelativePositionBias(8, 2).bfloat16()
    weights = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    (bias(torch.bfloat16) * weights).sum().backward()
    exact = RelativePositionBias(8, 2).double()
    (exact(torch.float64) * weights.double()).sum().backward()
    tables = [b.relative_position_bias_table.grad for b in (bias, exact)]
    assert torch.equal(tables[0], tables[1].bfloat16())
    assert not tables[1][15 * 15 :].any() and tables[1][: 15 * 15].all()


def test_keeping_all_tokens_is_the_whole_picture() -> None:
    config = small()
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64)
    expected = model(x, t, condition)
    output = model(x, t, condition | {"keep": torch.arange(16).expand(3, 16)})
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.sum().backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) != name.startswith(SIDE_ONLY), name


def test_the_order_of_kept_tokens_does_not_matter() -> None:
    config = small()
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64, masked=True)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    output = model(x, t, condition | {"keep": KEEP[:, order]})
    torch.testing.assert_close(output, model(x, t, condition), rtol=1e-11, atol=1e-11)


def test_the_encoder_does_not_see_masked_tokens() -> None:
    """The decoder's skips do: with their weights at zero nothing of a masked token is left."""
    config = small()
    model = randomised(config)
    x, t, condition = inputs(config, masked=True)
    changed = {}
    for token in (3, 0):  # of the first picture, masked and kept
        changed[token] = x.clone()
        row, column = 2 * (token // 4), 2 * (token % 4)
        changed[token][0, :, row : row + 2, column : column + 2] += 3.0
    assert not torch.equal(model(changed[3], t, condition), model(x, t, condition))
    with torch.no_grad():
        for block in model.de_blocks:
            block.skip_linear.weight[:, 48:] = 0.0
    assert torch.equal(model(changed[3], t, condition), model(x, t, condition))
    assert not torch.equal(model(changed[0], t, condition), model(x, t, condition))


@pytest.mark.parametrize(
    "keep", [KEEP[:2], KEEP[0], KEEP.int(), torch.arange(17).expand(3, 17), KEEP[:, :0]]
)
def test_a_wrong_keep_is_refused(keep: torch.Tensor) -> None:
    x, t, condition = inputs(small())
    with pytest.raises(ValueError, match=r"keep must be \(3, 1 to 16\) of int64, got"):
        MDT(small())(x, t, condition | {"keep": keep})


@pytest.mark.parametrize("masked", [False, True])
def test_recomputation_changes_neither_output_nor_gradients(masked: bool) -> None:
    config = small()
    plain, recomputed = randomised(config), randomised(small(activation_checkpointing=True))
    outputs = [model(*inputs(config, masked=masked)) for model in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for (name, first), second in zip(
        plain.named_parameters(), recomputed.parameters(), strict=True
    ):
        if not masked and name.startswith(SIDE_ONLY):
            assert first.grad is None and second.grad is None
        else:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("backend", "recompute", "keeps"),
    [("eager", False, (None, KEEP, KEEP[:, :7], KEEP[:, :5])), ("aot_eager", True, (KEEP,))],
)
def test_compiles_into_one_graph(backend: str, recompute: bool, keeps: tuple) -> None:
    """Whole and masked, with gradients; a third number of kept tokens makes no third graph."""
    config = small(depth=3, decode_layer=1, activation_checkpointing=recompute)
    model = randomised(config)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, t, condition = inputs(config)
    for keep in keeps:
        more, found = {} if keep is None else {"keep": keep}, []
        for network in (model, compiled):
            model.zero_grad()
            third = len(keeps) > 1 and keep is keeps[-1]
            with torch.compiler.set_stance("fail_on_recompile" if third else "default"):
                output = network(x, t, condition | more)
            output.square().mean().backward()
            found.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1])
        for eager, graph in zip(*found, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_a_batch_do_not_influence_each_other(masked: bool) -> None:
    config = small()
    model = randomised(config, torch.float64)
    x, t, condition = inputs(config, torch.float64, masked=masked)
    together = model(x, t, condition)
    others = {"labels": condition["labels"].flip(0)[[2, 0, 1]]}
    if masked:
        others["keep"] = KEEP[[0, 2, 1]]
    changed = model(torch.cat((x[:1], -x[1:])), t, others)
    assert not torch.allclose(together[1:], changed[1:])
    torch.testing.assert_close(together[0], changed[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("member", ["t", "labels", "x", "keep"])
def test_every_input_matters(member: str) -> None:
    config = small()
    model = randomised(config)
    x, t, condition = inputs(config, masked=True)
    changed = {"x": x, "t": t, **condition}
    changed[member] = changed[member].roll(1, 0)
    other = model(changed.pop("x"), changed.pop("t"), changed)
    difference = (other - model(x, t, condition)).abs().flatten(1).amax(1)
    assert (difference > 1e-4).all()


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_follows_float32(masked: bool) -> None:
    config = small()
    exact = randomised(config)(*inputs(config, masked=masked))
    model = randomised(config).bfloat16()
    rounded = model(*inputs(config, masked=masked))
    rounded.float().square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        cast = randomised(config)(*inputs(config, masked=masked))
    for output in (rounded, cast):
        assert output.dtype == torch.bfloat16
        assert (output.float() - exact).norm() / exact.norm() < 0.03


def test_a_masked_step_has_the_same_bits_when_repeated() -> None:
    config = small()
    runs = []
    for _ in range(2):
        model = randomised(config)
        model(*inputs(config, masked=True)).square().mean().backward()
        runs.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_dropping_the_class_is_the_null_label() -> None:
    config = small()
    model = randomised(config)
    x, t, condition = inputs(config)
    dropped = model(x, t, condition | {"drop_semantic": torch.tensor([True, False, False])})
    null = model(x, t, {"labels": torch.tensor([5, 4, 5])})
    assert torch.equal(dropped, null) and not torch.equal(dropped, model(x, t, condition))


def test_the_published_layout_is_read_and_written() -> None:
    config = small()
    state = randomised(config).state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    table = original_table(config)
    theirs = to_theirs(state, table)
    index = "attn.rel_pos_bias.relative_position_index"
    assert {name for name in theirs if name not in state} == {
        f"{group}.{n}.{index}"
        for group, blocks in (("en_inblocks", 2), ("en_outblocks", 2), ("de_blocks", 2))
        for n in range(blocks)
    } | {f"sideblocks.0.{index}"}
    made = theirs[f"sideblocks.0.{index}"]
    expected = [
        [(i // 4 - j // 4 + 3) * 7 + i % 4 - j % 4 + 3 for j in range(16)] for i in range(16)
    ]
    assert made.dtype == torch.int64 and made.tolist() == expected
    # What the index says is what the model adds to the scores.
    attention = MDT(config).sideblocks[0].attn.rel_pos_bias
    rows = attention.relative_position_bias_table[made]
    assert torch.equal(attention(torch.float32)[0], rows.permute(2, 0, 1))
    back = to_ours(theirs, table, shapes)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    MDT(config).load_state_dict(back, strict=True)
    with pytest.raises(UserError, match="is not what this model computes"):
        to_ours(theirs | {f"sideblocks.0.{index}": made.T.contiguous()}, table, shapes)
    del theirs["mask_token"]
    with pytest.raises(UserError, match="missing mask_token"):
        to_ours(theirs, table, shapes)
