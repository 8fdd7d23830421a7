"""Sampling a published DiT: one command, no flag, in both layouts; random weights stand in."""

import json
import sys

import numpy as np
import pytest
import torch

from etude import cli
from etude.core.errors import UserError
from etude.data.shards import ShardSet
from etude.exporting import export
from etude.external.diffusers import Autoencoder, AutoencoderConfig
from etude.models import dit
from etude.models.dit import DiT, DiTConfig
from etude.published import dit_config, is_published
from etude.sampling import open_generator

pytest.importorskip("diffusers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as somebody who downloaded the weights has it; a size of its own, to be quick."""
    monkeypatch.setitem(dit.SIZES, "tiny", (2, 32, 4))
    config = DiTConfig(input_size=4, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    model, generator = DiT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05, generator=generator)
    folder = tmp_path / "DiT-tiny-2"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "DiT-tiny-2-32x32.pt")
    shape = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    Autoencoder.build(AutoencoderConfig(**shape, scaling_factor=0.18215)).save(folder / "vae")
    return folder, model


def test_one_command_and_no_flag(folder, capsys, monkeypatch) -> None:
    where, _ = folder
    monkeypatch.setattr(sys, "argv", ["etude", "sample", str(where)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    drawn = next((where / "samples").iterdir())
    assert len(ShardSet(drawn)) == 100
    sampler = json.loads((drawn / "protocol.json").read_text())["sampler"]
    published = {"method": "ddpm", "steps": 250, "guidance_scale": 1.5, "guidance_channels": 3}
    assert published.items() <= sampler.items()
    assert (drawn / "contact-sheet.png").exists()
    assert str(drawn) in capsys.readouterr().out


def test_the_network_is_that_of_the_file(folder) -> None:
    where, model = folder
    generator = open_generator(where)
    assert generator.model.config == model.config
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 900.0])
    condition = {"labels": torch.tensor([0, 5])}
    assert torch.equal(generator.model(x, t, condition), model(x, t, condition))
    assert generator.conditions.image_size == 32 and generator.classes == list("01234")


def test_diffusers_layout_draws_the_same_pictures(folder, tmp_path) -> None:
    where, _ = folder
    first = open_generator(where)
    other = export(first, tmp_path / "pipeline", layout="diffusers")
    stated = open_generator(other)
    (other / "etude.json").unlink()  # as somebody else has it
    (other / "model_index.json").write_text(json.dumps({"id2label": {"0": "tench"}}))
    second = open_generator(other)
    assert second.name == stated.name == "pipeline (diffusers layout)"
    assert second.fingerprint == stated.fingerprint
    assert second.classes == ["tench", "1", "2", "3", "4"]
    few = first.sampler.model_copy(update={"steps": 3})
    pictures = []
    for generator in (first, second):
        generator.sampler = few
        pictures.append(generator.draw(np.arange(2), np.array([0, 4]), seed=1)[0])
    assert np.array_equal(*pictures) and pictures[0].std() > 1


def test_what_is_missing_is_one_sentence(folder, tmp_path) -> None:
    where, model = folder
    with pytest.raises(UserError, match="holds one set of weights: leave out --weights"):
        open_generator(where, weights="raw")
    (where / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no autoencoder: put one in diffusers' layout"):
        open_generator(where)
    torch.save(model.state_dict(), where / "again.pt")
    with pytest.raises(UserError, match=r"32x32\.pt, again\.pt where one weights"):
        open_generator(where)
    assert not is_published(tmp_path / "nowhere")
    (where / "transformer").mkdir()
    stated = {"_class_name": "DiTTransformer2DModel", "in_channels": 4, "patch_size": 2}
    (where / "transformer" / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match="states no num_attention_heads, attention_head_dim"):
        open_generator(where)
    with pytest.raises(UserError, match="is not a DiT in its repository's layout"):
        dit_config({"a": torch.ones(1)}, where)


def test_published_sizes_are_read_off_their_shapes() -> None:
    for preset, size in (("DiT-XL/2", 64), ("DiT-B/4", 32), ("DiT-S/8", 32)):
        config = DiTConfig(preset=preset, input_size=size)
        with torch.device("meta"):
            state = DiT(config).state_dict()
        found = dit_config(state, "a file")
        assert found == config.model_copy(update={"preset": ""})
