"""Weights files of other projects: what is read, which layout is found, what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from etude.convert.checkpoint import LAYOUTS, read_denoiser, read_file, write_denoiser
from etude.convert.layout import Entry, to_ours, to_theirs
from etude.core.errors import UserError
from etude.models.families import FAMILIES, build_denoiser

TEXT = {"semantic": "text", "text_tokens": 5, "text_width": 8}
MODELS = {
    "dit": dict(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    "mdt": dict(input_size=8, hidden_size=16, depth=4, decode_layer=2, num_heads=2, num_classes=3),
    "mmdit": dict(input_size=4, hidden_size=128, depth=2, conditioning=TEXT | {"pooled_width": 6}),
    "pixart": dict(input_size=4, hidden_size=16, depth=2, num_heads=2, conditioning=TEXT),
    "unet": dict(
        input_size=8,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_classes=3,
        attention_downsamplings=(2,),
    ),
}


def model(family: str) -> torch.nn.Module:
    """A small model of a family, none of whose weights is zero."""
    config = FAMILIES[family][0](family=family, **MODELS[family])
    network, generator = build_denoiser(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return network


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in MODELS for layout in {"original": 0, **LAYOUTS[family]}],
)
def test_a_layout_is_found_and_gives_the_same_weights(family: str, layout: str, tmp_path) -> None:
    network = model(family)
    state = network.state_dict()
    path = write_denoiser(state, network.config, tmp_path / "w.safetensors", layout=layout)
    found, name = read_denoiser(path, network.config)
    assert name == layout
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_pixart_without_our_null_text_has_zeros(tmp_path) -> None:
    network = model("pixart")
    path = write_denoiser(
        network.state_dict(), network.config, tmp_path / "w.safetensors", layout="diffusers"
    )
    theirs = read_file(path)
    assert theirs.pop("y_embedder.y_embedding").any()
    save_file(theirs, path)
    found, name = read_denoiser(path, network.config)
    assert name == "diffusers" and found["y_embedder.y_embedding"].shape == (5, 8)
    assert not found["y_embedder.y_embedding"].any()


@pytest.mark.parametrize("family", ["mmdit", "pixart"])
def test_diffusers_takes_no_other_mlp_ratio(family: str, tmp_path) -> None:
    config = FAMILIES[family][0](**MODELS[family], mlp_ratio=2.0)
    state, path = build_denoiser(config).state_dict(), tmp_path / "w.safetensors"
    sentence = f"diffusers' {family} has mlp_ratio 4: this model has 2; write layout: original"
    with pytest.raises(UserError, match=sentence):
        write_denoiser(state, config, path, layout="diffusers")
    assert read_denoiser(write_denoiser(state, config, path), config)[1] == "original"


def test_how_a_dit_starts_and_is_told_its_class_is_no_matter_of_layout(tmp_path) -> None:
    kind = FAMILIES["dit"][0]
    fields = MODELS["dit"] | {"modulation_start": "gaussian"}
    config = kind(**fields, conditioning={"semantic_path": "adaln"})
    state = build_denoiser(config).state_dict()
    path = write_denoiser(state, config, tmp_path / "w.safetensors", layout="diffusers")
    found, name = read_denoiser(path, config)
    assert name == "diffusers" and all(torch.equal(found[key], state[key]) for key in state)
    assert state["blocks.0.adaLN_modulation.1.weight"].std() > 0
    for change in ({"modulation_bottleneck": 2}, {"mlp_ratio": 2.0}, {"qk_norm": True}):
        other = kind(**fields | change)
        with pytest.raises(UserError, match="diffusers' DiT is the published one"):
            write_denoiser(state, other, tmp_path / "x.safetensors", layout="diffusers")


def test_stable_diffusion_3_is_found_inside_a_file_with_other_networks(tmp_path) -> None:
    network = model("mmdit")
    path = write_denoiser(network.state_dict(), network.config, tmp_path / "w.safetensors")
    inner = {f"model.diffusion_model.{k}": v for k, v in read_file(path).items()}
    save_file(inner | {"first_stage_model.w": torch.ones(2)}, tmp_path / "all.safetensors")
    found, name = read_denoiser(tmp_path / "all.safetensors", network.config)
    assert name == "original"
    assert torch.equal(found["context_embedder.weight"], network.context_embedder.weight)


@pytest.mark.parametrize("conditioning", [{}, TEXT | {"pooled_width": 6}], ids=["class", "text"])
def test_a_unet_is_found_inside_a_file_with_other_networks(conditioning: dict, tmp_path) -> None:
    config = FAMILIES["unet"][0](**MODELS["unet"], conditioning=conditioning)
    state = build_denoiser(config).state_dict()
    path = write_denoiser(state, config, tmp_path / "w.safetensors")
    assert "text_tokens.null" not in read_file(path)  # the published files have none
    more = {"first_stage_model.w": torch.ones(2), "model_ema.decay": torch.ones(1)}
    save_file(read_file(path) | more, tmp_path / "all.safetensors")
    found, name = read_denoiser(tmp_path / "all.safetensors", config)
    assert name == "original"
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("nest", [(), ("ema",), ("state_dict",), ("model", "module")])
def test_nested_pickles_are_opened(nest: tuple[str, ...], tmp_path) -> None:
    content: dict = {"a": torch.arange(3.0)}
    for name in reversed(nest):
        content = {name: content, "steps": 7}
    torch.save(content, tmp_path / "w.pt")
    assert torch.equal(read_file(tmp_path / "w.pt")["a"], torch.arange(3.0))


class Rude:
    def __reduce__(self):
        return (Path, ("anything",))


def test_what_is_no_weights_file_is_refused(tmp_path) -> None:
    def refusal(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_file(tmp_path / name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a weights file" in refusal("w.txt", b"hello")
    assert "copy it again" in refusal("w.safetensors", b"hello")
    assert "copy it again" in refusal("w.pt", b"hello")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_file(tmp_path / "none.pt")


def test_pickled_code_is_never_run(tmp_path) -> None:
    torch.save({"model": Rude()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="more than tensors"):
        read_file(tmp_path / "w.pt")


def test_what_does_not_fit_names_the_nearest(tmp_path) -> None:
    network = model("dit")
    state = dict(network.state_dict())
    state["blocks.1.attn.qvk.weight"] = state.pop("blocks.1.attn.qkv.weight")
    save_file(state, tmp_path / "w.safetensors")
    sentence = r"missing blocks.1.attn.qkv.weight \(nearest: blocks.1.attn.qvk.weight\)"
    with pytest.raises(UserError, match=sentence):
        read_denoiser(tmp_path / "w.safetensors", network.config)
    wider = network.config.model_copy(update={"num_classes": 4})
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"has shape \(4, 16\) where .* needs \(5, 16\)"):
        read_denoiser(tmp_path / "w.safetensors", wider)


def test_diffusers_takes_no_modern_dit(tmp_path) -> None:
    config = FAMILIES["dit"][0](**MODELS["dit"], norm="rmsnorm")
    state = build_denoiser(config).state_dict()
    with pytest.raises(UserError, match="write layout: original"):
        write_denoiser(state, config, tmp_path / "w.safetensors", layout="diffusers")
    with pytest.raises(UserError, match="no layout 'mine': give one of original, diffusers"):
        write_denoiser(state, config, tmp_path / "w.safetensors", layout="mine")


def test_every_way_of_an_entry() -> None:
    table = [
        Entry("a", ("x", "y"), "stack"),
        Entry("b", ("z", "w"), "copies"),
        Entry("c", ("v",), "swap"),
        Entry("d", ("u",), shape=(2, 1, 1)),
        Entry("", ("made",), make=lambda: torch.ones(1)),
        Entry("only", (), make=lambda: torch.zeros(2)),
    ]
    ours = {
        "a": torch.arange(4.0), "b": torch.arange(2.0), "c": torch.arange(4.0),
        "d": torch.arange(2.0), "only": torch.zeros(2),
    }  # fmt: skip
    theirs = to_theirs(ours, table)
    assert theirs["x"].tolist() == [0, 1] and theirs["y"].tolist() == [2, 3]
    assert theirs["v"].tolist() == [2, 3, 0, 1] and theirs["u"].shape == (2, 1, 1)
    shapes = {name: value.shape for name, value in ours.items()}
    back = to_ours(theirs, table, shapes)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    with pytest.raises(UserError, match="w differs from z, of which it is a copy"):
        to_ours(theirs | {"w": torch.ones(2)}, table, shapes)
    with pytest.raises(UserError, match="made is not what this model computes"):
        to_ours(theirs | {"made": torch.zeros(1)}, table, shapes)
