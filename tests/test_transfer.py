"""Starts from other weights: tables resized, classes and controls by name, refusals, whole runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etude.core.checkpoint import latest_checkpoint, read_weights, verify_checkpoint
from etude.core.errors import UserError
from etude.core.recipe import load_recipe, recipe_from_dict
from etude.core.run import folder_name
from etude.estimate import needed_files
from etude.jobs import run_recipe
from etude.models.conditioning import ConditioningConfig, ControlConfig
from etude.models.families import FAMILIES, build_denoiser
from etude.training.origin import resolved
from etude.transfer import positioned, resize_bias, resize_positions, transfer

SHAPES = {
    "dit": dict(hidden_size=32, depth=2, num_heads=2),
    "mdt": dict(hidden_size=32, depth=4, decode_layer=2, num_heads=2),
    "pixart": dict(hidden_size=36, depth=2, num_heads=3),
    "mmdit": dict(hidden_size=32, depth=2, num_heads=2),
    "unet": dict(
        model_channels=32,
        channel_mult=(1, 2),
        attention_downsamplings=(1, 2),
        num_res_blocks=1,
        head_channels=16,
    ),
}


def config(family: str, **changes) -> object:
    shape = dict(input_size=8, in_channels=4, num_classes=3, learn_sigma=False)
    return FAMILIES[family][0](**shape | SHAPES[family] | changes)


def filled(made: object, seed: int = 1) -> nn.Module:
    """A model none of whose trained weights is zero."""
    model, generator = build_denoiser(made), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def moved(source: nn.Module, target: nn.Module, **options) -> object:
    return transfer(source.state_dict(), source.config, target, **options)


def output(model: nn.Module, x: Tensor, labels: list[int], **condition) -> Tensor:
    t = torch.full((len(x),), 400.0)
    with torch.no_grad():
        return model(x, t, {"labels": torch.tensor(labels)} | condition)


def controls(*names: str, **fields) -> ConditioningConfig:
    found = tuple(ControlConfig(name=name) for name in names)
    return ConditioningConfig(control=found, **fields)


# ---------------------------------------------------------------- tables


def keys_cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, written from the paper's two polynomials."""
    a, d = -0.75, np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def by_hand(plane: np.ndarray, side: int) -> np.ndarray:
    """A plane (n, n) resized by cubic convolution, pixel centres aligned, edges repeated."""
    n = len(plane)
    at = (np.arange(side) + 0.5) * n / side - 0.5
    weights = np.zeros((side, n))
    for row, where in enumerate(at):
        for tap in range(math.floor(where) - 1, math.floor(where) + 3):
            weights[row, min(max(tap, 0), n - 1)] += keys_cubic(np.array(where - tap))
    return weights @ plane @ weights.T


@pytest.mark.parametrize(("old", "new"), [(4, 8), (5, 8), (8, 4)])
def test_a_learned_table_is_resized_by_cubic_convolution(old: int, new: int) -> None:
    table = torch.randn(1, old * old, 6, generator=torch.Generator().manual_seed(0))
    found = resize_positions(table, new)
    assert found.shape == (1, new * new, 6)
    planes = table[0].T.reshape(6, old, old).double().numpy()
    expected = np.stack([by_hand(plane, new) for plane in planes]).reshape(6, -1).T
    assert found[0].numpy() == pytest.approx(expected, abs=1e-5)


def test_a_table_of_the_same_size_keeps_its_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(1, 25, 8, generator=generator)
    bias = torch.randn(9 * 9 + 3, 4, generator=generator)
    assert torch.equal(resize_positions(table, 5), table)
    assert torch.equal(resize_bias(bias, 5), bias)


def test_relative_offsets_keep_their_signs_and_the_rows_of_a_class_token() -> None:
    """Opposite offsets keep opposite (or equal) scores, and nearness stays nearness."""
    y, x = torch.meshgrid(torch.arange(-4.0, 5), torch.arange(-4.0, 5), indexing="ij")
    extra = torch.full((3, 3), 7.0) * torch.arange(1.0, 4.0)
    odd, even, row_only = x + 3 * y, -(x**2 + 2 * y**2), y
    planes = torch.stack([odd, even, row_only], -1).flatten(0, 1)
    found = resize_bias(torch.cat((planes, extra)), 9)
    assert torch.equal(found[-3:], extra) and len(found) == 17 * 17 + 3
    odd, even, row_only = found[:-3].T.reshape(3, 17, 17)
    assert torch.allclose(odd, -odd.flip(0, 1), atol=1e-5) and odd[8, 8].abs() < 1e-5
    assert torch.allclose(even, even.flip(0, 1), atol=1e-5)
    assert even.argmax() == 8 * 17 + 8
    assert torch.allclose(row_only, row_only[:, :1].expand(-1, 17), atol=1e-5)
    assert (row_only.diff(dim=0)[2:-2] > 0).all() and row_only[9, 0] > 0 > row_only[7, 0]


# ---------------------------------------------------------------- positions


FIXED = [("dit", {}), ("dit", {"positions": "rope"}), ("pixart", {}), ("mmdit", {})]
FIXED += [("mmdit", {"position_table": 20})]


@pytest.mark.parametrize(("family", "more"), FIXED)
def test_interpolated_positions_hold_the_old_ones_at_even_places(family: str, more: dict) -> None:
    small, large = config(family, **more), config(family, input_size=16, **more)
    tables = {}
    for how in ("interpolate", "extrapolate"):
        model = build_denoiser(positioned(large, small, how))
        tables[how] = grids(model, 8)
    old = grids(build_denoiser(small), 4)
    for name, table in old.items():
        assert torch.allclose(tables["interpolate"][name][::2, ::2], table, atol=1e-6)
        assert torch.allclose(tables["extrapolate"][name][:4, :4], table, atol=1e-6)
        assert not torch.allclose(tables["extrapolate"][name][::2, ::2], table, atol=1e-3)


def grids(model: nn.Module, side: int) -> dict[str, Tensor]:
    """Each fixed table of positions as (side, side, channels)."""
    found = {
        name: getattr(model, name) for name in ("rope_cos", "rope_sin") if hasattr(model, name)
    }
    if hasattr(model, "_cropped"):
        found["pos_embed"] = model._cropped()[0]
    elif hasattr(model, "pos_embed"):
        found["pos_embed"] = model.pos_embed[0]
    return {name: table.detach().unflatten(0, (side, side)) for name, table in found.items()}


@pytest.mark.parametrize(
    ("family", "chain"), [("dit", [8, 16, 32]), ("pixart", [8, 16, 32]), ("mmdit", [8, 16, 24])]
)
def test_a_chain_of_starts_goes_on_from_the_positions_before(family: str, chain: list[int]) -> None:
    first, *sizes = (config(family, input_size=size) for size in chain)
    for how, far in (("interpolate", 4.0), ("extrapolate", chain[-1] / 2)):
        last = first
        for size in sizes:
            last = positioned(size, last, how)
        direct = positioned(sizes[-1], first, how)
        side = chain[-1] // 2
        one, two = grids(build_denoiser(last), side), grids(build_denoiser(direct), side)
        assert torch.allclose(one["pos_embed"], two["pos_embed"], atol=1e-6)
        # The first channel is the sine of the column itself.
        position = torch.arange(side, dtype=torch.float64) * far / side
        assert torch.allclose(one["pos_embed"][0, :, 0].double(), position.sin(), atol=1e-5)


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_interpolated_positions_can_be_extrapolated_and_stretched_again(family: str) -> None:
    """Sides 4, 8, 16: a step of 1, then 1/2, then the same step or range."""
    small, middle, large = (config(family, input_size=size) for size in (8, 16, 32))
    middle = positioned(middle, small, "interpolate")
    place = torch.arange(16, dtype=torch.float64)
    for how, step in (("extrapolate", 0.5), ("interpolate", 0.25)):
        table = grids(build_denoiser(positioned(large, middle, how)), 16)["pos_embed"]
        assert torch.allclose(table[0, :, 0].double(), (place * step).sin(), atol=1e-5)


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_a_larger_model_says_what_the_small_one_says(family: str) -> None:
    """Every second token sees the same picture at the same place; the others lie between."""
    small = filled(config(family))
    large_config = config(family, input_size=16)
    large = build_denoiser(positioned(large_config, small.config, "interpolate"))
    extended = build_denoiser(positioned(large_config, small.config, "extrapolate"))
    for model in (large, extended):
        moved(small, model)
    x = torch.full((1, 4, 8, 8), 0.7)
    wanted = output(small, x, [1])
    x = torch.full((1, 4, 16, 16), 0.7)

    def error(model: nn.Module) -> float:
        tokens = output(model, x, [1]).unfold(2, 2, 2).unfold(3, 2, 2)[:, :, ::2, ::2]
        return float((tokens - wanted.unfold(2, 2, 2).unfold(3, 2, 2)).abs().max())

    assert wanted.std() > 1e-3
    assert error(large) < 0.35 * error(extended)


def test_learned_tables_of_mdt_are_resized_and_its_other_weights_kept() -> None:
    small, large = filled(config("mdt")), filled(config("mdt", input_size=16), 2)
    report = moved(small, large, allow_new=(), match="numbers")
    state = large.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(state[name], resize_positions(small.state_dict()[name], 8))
    bias = "de_blocks.1.attn.rel_pos_bias.relative_position_bias_table"
    assert torch.equal(state[bias], resize_bias(small.state_dict()[bias], 8))
    assert len(report.names("resized")) == 2 + 5 and report.names("new") == []
    for name in report.names("kept"):
        assert torch.equal(state[name], small.state_dict()[name])
    assert report.share == 1.0


# ---------------------------------------------------------------- equal models, channels, depth


@pytest.mark.parametrize("family", list(SHAPES))
def test_a_start_from_an_equal_model_is_that_model(family: str) -> None:
    source, target = filled(config(family)), filled(config(family), 2)
    report = moved(source, target, allow_new=(), source_classes=list("abc"), classes=list("abc"))
    assert report.names("kept") == list(target.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("family", list(SHAPES))
@pytest.mark.parametrize("grows", [True, False])
def test_variances_come_and_go_and_the_prediction_stays(family: str, grows: bool) -> None:
    source = filled(config(family, learn_sigma=not grows))
    target = build_denoiser(config(family, learn_sigma=grows))
    report = moved(source, target, allow_new=(), match="numbers")
    assert len(report.names("resized")) == 2
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    one, two = output(source, x, [0, 3]), output(target, x, [0, 3])
    assert torch.allclose(one[:, :4], two[:, :4], atol=1e-6) and one.std() > 1e-3
    if grows:
        assert two.shape[1] == 8 and not two[:, 4:].any()


@pytest.mark.parametrize("family", list(SHAPES))
def test_other_channels_have_new_ends(family: str) -> None:
    source = filled(config(family))
    target = filled(config(family, in_channels=16), 2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = moved(
        source, target, match="numbers", allow_new=("x_embedder", "final", "input", "out")
    )
    new = {name.rpartition(".")[0] for name in report.names("new")}
    unet = {"input_blocks.0.0", "out.2"}
    assert new == (unet if family == "unet" else {"x_embedder.proj", "final_layer.linear"})
    assert len(report.names("new")) == 4  # weights and biases
    for name in report.names("new"):
        assert torch.equal(target.state_dict()[name], before[name])
    assert {n.rpartition(".")[0] for n in report.names("unused")} == new


def test_equal_shapes_of_other_channels_are_not_taken() -> None:
    source = filled(config("dit", in_channels=4, learn_sigma=True))
    report = moved(source, build_denoiser(config("dit", in_channels=8)), match="numbers")
    assert "final_layer.linear.weight" in report.names("new")


def test_a_deeper_model_has_new_blocks_and_a_shallower_leaves_some_unused() -> None:
    source, deeper = filled(config("dit")), build_denoiser(config("dit", depth=3))
    report = moved(source, deeper, match="numbers", allow_new=("blocks.2.",))
    assert {name[:9] for name in report.names("new")} == {"blocks.2."}
    shallower = build_denoiser(config("dit", depth=1))
    report = moved(source, shallower, match="numbers", allow_new=())
    assert {name[:9] for name in report.names("unused")} == {"blocks.1."}
    assert report.elements("unused") * 2 == 2 * sum(
        p.numel() for p in source.blocks[1].parameters()
    )


# ---------------------------------------------------------------- conditions


TABLES = {
    "dit": ["y"],
    "mdt": ["y"],
    "pixart": ["class"],
    "mmdit": ["y", "class"],
    "unet": ["class"],
}


@pytest.mark.parametrize("family", list(SHAPES))
def test_classes_are_found_by_their_names(family: str) -> None:
    source, target = filled(config(family)), filled(config(family, num_classes=4), 2)
    names = [f"{kind}_embedder.embedding_table.weight" for kind in TABLES.get(family, ["y"])]
    before = {name: target.state_dict()[name].clone() for name in names}
    report = moved(source, target, source_classes=["a", "b", "c"], classes=["c", "x", "a", "b"])
    assert set(names) <= set(report.names("resized"))
    for name in names:
        here, there = target.state_dict()[name], source.state_dict()[name]
        assert torch.equal(here[[0, 2, 3, 4]], there[[2, 0, 1, 3]])  # 4 and 3: no class
        assert torch.equal(here[1], before[name][1])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    one, two = output(source, x, [2, 0, 3]), output(target, x, [0, 2, 4])
    assert torch.allclose(one, two, atol=1e-6)


def test_classes_without_names_are_new_or_taken_by_number() -> None:
    source, name = filled(config("dit")), "y_embedder.embedding_table.weight"
    target = build_denoiser(config("dit"))
    report = moved(source, target, classes=["a", "b", "c"])
    assert report.names("new") == [name]
    with pytest.raises(UserError, match="start.classes=numbers.*allow_new=.y_embedder"):
        moved(source, target, classes=["a", "b", "c"], allow_new=())
    moved(source, target, classes=["a", "b", "c"], match="numbers", allow_new=())
    assert torch.equal(target.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit", "unet"])
def test_from_classes_to_texts_the_embedders_are_new(family: str) -> None:
    text = ConditioningConfig(
        semantic="text",
        text_tokens=5,
        text_width=512,
        pooled_width=24 if family == "mmdit" else 0,
    )
    source, target = filled(config(family)), build_denoiser(config(family, conditioning=text))
    roots = {"pixart": {"y_embedder"}, "unet": {"text_tokens"}}
    roots["dit"] = {"text_tokens", "context_embedder"}
    expected = roots.get(family, {"text_tokens", "context_embedder", "y_embedder"})
    report = moved(source, target, allow_new=sorted(expected))
    assert {name.split(".")[0] for name in report.names("new")} == expected
    assert {name.split(".")[0] for name in report.names("unused")} <= {
        "class_embedder",
        "y_embedder",
    }


@pytest.mark.parametrize("family", list(SHAPES))
def test_new_control_changes_nothing_at_the_start(family: str) -> None:
    source = filled(config(family))
    target = build_denoiser(config(family, conditioning=controls("flip", "height")))
    with pytest.raises(UserError, match=r"start\.allow_new=\[control_embedder\]"):
        moved(source, target, match="numbers", allow_new=())
    report = moved(source, target, match="numbers", allow_new=("control_embedder",))
    assert len(report.names("new")) == 8
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    values = torch.tensor([[1.0, 300.0], [0.0, 20.0]])
    one = output(source, x, [0, 1])
    assert torch.allclose(one, output(target, x, [0, 1], control=values), atol=1e-6)


@pytest.mark.parametrize("family", ["dit", "unet"])
def test_controls_are_found_by_their_names(family: str) -> None:
    source = filled(config(family, conditioning=controls("flip", "height")))
    target = build_denoiser(config(family, conditioning=controls("height", "aspect", "flip")))
    report = moved(source, target, match="numbers", allow_new=("control_embedder",))
    assert {name[:24] for name in report.names("new")} == {"control_embedder.mlps.1."}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    one = output(source, x, [0, 1], control=torch.tensor([[1.0, 30.0], [0.0, 20.0]]))
    values = torch.tensor([[30.0, 2.0, 1.0], [20.0, 1.0, 0.0]])
    assert torch.allclose(one, output(target, x, [0, 1], control=values), atol=1e-6)


def test_a_joint_embedding_of_other_controls_is_new() -> None:
    joint = dict(control_embedding="concatenated")
    source = filled(config("dit", conditioning=controls("flip", "height", **joint)))
    target = build_denoiser(config("dit", conditioning=controls("height", "flip", **joint)))
    assert len(moved(source, target, match="numbers").names("new")) == 4


# ---------------------------------------------------------------- refusals


def refused(target: object, source: object | None = None, **options) -> str:
    model = build_denoiser(target)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        moved(filled(source or config("dit")), model, match="numbers", **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # nothing was written
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    assert "family dit do not fit a model of family pixart" in refused(config("pixart"))
    message = refused(config("dit", hidden_size=64), name="runs/small")
    assert "runs/small gives 0.0% of this model's parameters" in message
    assert "start.share=0.9" in refused(config("dit", depth=4), share=0.9)
    assert "attention heads 2, this model 4" in refused(config("dit", num_heads=4))
    assert "norm layernorm" in refused(config("dit", norm="rmsnorm"))
    message = refused(config("dit", depth=3), allow_new=())
    assert "nothing for blocks.2.attn.qkv" in message and "allow_new=[blocks]" in message
    with pytest.raises(UserError, match="12 positions are not those of a square"):
        resize_positions(torch.zeros(1, 12, 4), 4)


def test_positions_that_contradict_the_model_are_refused() -> None:
    small = config("dit")
    with pytest.raises(
        UserError, match=r"position_base=6 contradicts .* set model.position_base=4"
    ):
        positioned(config("dit", input_size=16, position_base=6), small, "interpolate")
    given = config("dit", input_size=16, position_base=6)
    assert positioned(given, small, "as_given") == given
    with pytest.raises(UserError, match="learns its positions"):
        positioned(config("mdt", input_size=16), config("mdt"), "extrapolate")
    stretched = config("mmdit", input_size=12, position_base=4)
    with pytest.raises(UserError, match="whole model.position_base, here 5.33"):
        positioned(config("mmdit", input_size=16), stretched, "extrapolate")


def test_the_report_adds_up() -> None:
    source, target = filled(config("dit")), build_denoiser(config("dit", input_size=16, depth=3))
    report = moved(source, target, match="numbers", name="runs/a")
    assert sum(report.elements(g) for g in ("kept", "resized", "new")) == sum(
        value.numel() for value in target.state_dict().values()
    )
    trained = sum(p.numel() for p in target.parameters() if p.requires_grad)
    assert report.share == pytest.approx(1 - report.elements("new") / trained)
    assert report.line.startswith(f"{report.share:.1%} of the parameters from runs/a: kept ")
    _, columns, rows = report.table()
    assert all(len(row) == len(columns) for row in rows)
    assert ["resized", "pos_embed", "computed", "1", "2,048"] in rows
    assert sum(int(row[3]) for row in rows) == len(report.moves)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def small_run(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source")
    return run_recipe(load_recipe(tiny.ldm, SHORT), root=root, name="small", quiet=True)[0]


SHORT = ["loop.images=64", "loop.evaluate_every=64", "loop.checkpoint.every_images=32"]
LARGER = ["data.augment.image_size=24", "model.input_size=24", "objective.shift=2.0", *SHORT]


def tensors(run: Path, profile: str = "raw") -> dict[str, Tensor]:
    return read_weights(latest_checkpoint(run / "checkpoints"), profile)


def test_a_run_starts_from_a_run_at_a_larger_size(tiny, small_run, tmp_path) -> None:
    recipe = load_recipe(tiny.ldm, [*LARGER, f"start.from={small_run}", "optim.lr=1e-30"])
    folder, _ = run_recipe(recipe, root=tmp_path, quiet=True)
    written = load_recipe(folder / "recipe.yaml")
    side = load_recipe(tiny.ldm).model
    assert written.model.position_base == side.input_size // side.patch_size
    assert folder.name == folder_name(resolved(recipe)) != folder_name(recipe)
    average = load_recipe(tiny.ldm).default_weights()
    source = tensors(small_run, average)
    for profile in ("raw", average):  # the averages start from the same weights
        for name, value in tensors(folder, profile).items():
            if name != "pos_embed":
                assert torch.allclose(value, source[name], atol=1e-7), name
    record = json.loads((folder / "transfer.json").read_text())
    assert record["sha256"] == written.start.sha256 and record["weights"] == average
    assert list(record["groups"]["resized"]["names"]) == ["pos_embed"]
    assert "of the parameters from small ema:" in (folder / "log.txt").read_text()


def test_a_resumed_run_goes_on_to_the_same_bits_without_its_source(
    tiny, small_run, tmp_path
) -> None:
    source = tmp_path / "gone"
    shutil.copytree(small_run, source)
    recipe = load_recipe(tiny.ldm, [*LARGER, f"start.from={source}"])
    straight, _ = run_recipe(recipe, root=tmp_path, name="straight", quiet=True)
    parted, _ = run_recipe(recipe, root=tmp_path, name="parted", quiet=True)
    newest = max((parted / "checkpoints").glob("step-*"))
    assert len(list((parted / "checkpoints").glob("step-*"))) > 1
    shutil.rmtree(newest)
    (parted / "result.json").unlink()
    shutil.rmtree(source)
    own = load_recipe(parted / "recipe.yaml")
    run_recipe(own, root=tmp_path, name="parted", quiet=True)
    one, two = (state(run) for run in (straight, parted))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UserError, match="there is no run"):
        run_recipe(recipe, root=tmp_path, name="other", quiet=True)
    with pytest.raises(UserError, match="there is no run"):
        run_recipe(own, root=tmp_path, name="other", quiet=True)


def state(run: Path) -> dict[tuple[str, str], Tensor]:
    with verify_checkpoint(max((run / "checkpoints").glob("step-*"))) as found:
        keys = [(t["name"], t["state"]) for t in found.manifest["tensors"]]
        return {k: found.read(*k, 0, math.prod(found.shape(*k))) for k in keys}


def test_two_ranks_of_zero_start_from_the_same_weights(
    tiny, small_run, tmp_path, run_ranks
) -> None:
    zero = ["strategy.kind=zero", "strategy.stage=3", "optim.lr=1e-30"]
    fields = [*LARGER, f"start.from={small_run}", *zero, "run=pair"]
    ended = run_ranks(2, "-m", "etude", "train", tiny.ldm, *fields, cwd=tmp_path)
    assert [one.returncode for one in ended] == [0, 0], "".join(one.stderr for one in ended)
    average = load_recipe(tiny.ldm).default_weights()
    source = tensors(small_run, average)
    for profile in ("raw", average):
        for name, value in tensors(tmp_path / "runs" / "pair", profile).items():
            if name != "pos_embed":
                assert torch.allclose(value, source[name], atol=1e-7), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["start.from=missing"], "there is no run `missing`"),
        (["start.from=missing.safetensors"], "does not exist: name a run"),
        (
            ["start.from={run}/checkpoints"],
            "checkpoints holds none where one weights file should be",
        ),
        (["start.from={run}", "start.weights=ema:0.5"], "set start.weights to one of raw, ema:"),
        (["start.from={run}", "start.model={hidden_size: 8}"], "leave out start.model"),
        (["start.from={run}", "start.sha256=abcd"], "than start.sha256=abcd"),
        (["start.from={run}", "model.depth=3"], "start.allow_new=[blocks]"),
    ],
)
def test_a_start_that_cannot_be_is_refused(tiny, small_run, tmp_path, more, said) -> None:
    overrides = [item.replace("{run}", str(small_run)) for item in more]
    with pytest.raises(UserError) as caught:
        run_recipe(load_recipe(tiny.ldm, overrides), root=tmp_path, name="r", quiet=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_start_without_a_source_has_no_other_field(tiny) -> None:
    with pytest.raises(UserError, match="no effect without start.from"):
        load_recipe(tiny.ldm, ["start.positions=extrapolate"])


def test_weights_of_a_file_say_or_are_told_their_model(tiny, small_run, tmp_path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"ema": tensors(small_run)}, file)
    overrides = [*LARGER, f"start.from={file}", "start.classes=numbers"]
    told = load_recipe(tiny.ldm, [*overrides, "start.model={input_size: 16}"])
    assert resolved(told).model.position_base == 4 and len(resolved(told).start.sha256) == 64
    with pytest.raises(UserError, match="start.model={input_size: 32}"):
        resolved(load_recipe(tiny.ldm, overrides))
    files = {item.field: item for item in needed_files(told)}
    assert files["start.from"].present and files["start.from"].digest
    folder, _ = run_recipe(told, root=tmp_path, quiet=True)
    assert (folder / "transfer.json").exists()
    missing = load_recipe(tiny.ldm, ["start.from=runs/none"])
    (item,) = (i for i in needed_files(missing) if i.field == "start.from")
    assert not item.present and "etude runs list" in item.command


def test_a_published_dit_of_another_size_is_known_by_its_shapes(tmp_path) -> None:
    small = config("dit", hidden_size=384, depth=12, num_heads=6, learn_sigma=True)
    file = tmp_path / "published.pt"
    torch.save(build_denoiser(small).state_dict(), file)
    recipe = load_recipe(
        "ldm/dit_xl2_imagenet512",
        [
            f"start.from={file}",
            "model.preset=DiT-S/2",
            "model.num_classes=3",
            "model.in_channels=4",
        ],
    )
    assert resolved(recipe).model.position_base == 4


def test_jobs_of_a_study_start_from_each_other(tiny, tmp_path) -> None:
    jobs = {
        "small": {"recipe": tiny.ldm, "set": {"loop.images": 32, "loop.evaluate_every": 32}},
        "large": {
            "recipe": tiny.ldm,
            "set": {
                "loop.images": 32,
                "loop.evaluate_every": 32,
                "data.augment.image_size": 24,
                "model.input_size": 24,
            },
            "grid": {"start.positions": ["interpolate", "extrapolate"]},
            "from": {"start.from": "small"},
        },
    }
    study = recipe_from_dict({"kind": "study", "jobs": jobs}, name="studies/starts")
    _, result = run_recipe(study, root=tmp_path, quiet=True)
    runs = [f"large[start.positions={how}]" for how in ("interpolate", "extrapolate")]
    folders = [Path(result["runs"][run]) for run in runs]
    assert len(set(folders)) == 2
    bases = [load_recipe(folder / "recipe.yaml").model.position_base for folder in folders]
    assert bases[0] == 4 and bases[1] == 0
    names = [json.loads((f / "transfer.json").read_text())["from"] for f in folders]
    assert names == [result["runs"]["small"]] * 2
