"""Every family trains: the losses of ZeRO stages 0 to 3 on two ranks are those of plain torch."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from etude.core.errors import UserError
from etude.core.recipe import load_recipe
from etude.models.dit import DiTConfig
from etude.models.families import FAMILIES, ModelConfig, build_denoiser

SMALL = dict(input_size=8, in_channels=4, depth=2, num_classes=5)
SHAPES = {
    "dit": SMALL | dict(hidden_size=48, num_heads=4),
    "mdt": SMALL | dict(hidden_size=48, num_heads=4, depth=4, decode_layer=2),
    "mmdit": SMALL | dict(hidden_size=48, num_heads=3),
    "pixart": SMALL | dict(hidden_size=48, num_heads=4),
    "unet": dict(
        input_size=8, in_channels=4, num_classes=5, model_channels=64, channel_mult=(1, 2),
        num_res_blocks=1, attention_downsamplings=(2,), head_channels=32, context_width=24,
    ),
}  # fmt: skip
WORKER = Path(__file__).parent / "workers" / "families.py"


@pytest.fixture(scope="module")
def losses(run_ranks, tmp_path_factory) -> dict[str, list[float]]:
    """Two ranks' losses by "family strategy", and one rank's with plain torch by "family".

    ZeRO of one rank is left to tests/core/test_strategies.py: there it shards nothing, and what a
    family could break is how its own modules and gradients are gathered from several.
    """
    folder, found = tmp_path_factory.mktemp("families"), {}
    for ranks in (1, 2):
        done = run_ranks(ranks, WORKER, folder / f"{ranks}")
        assert (folder / f"{ranks}").exists(), "".join(d.stderr[-4000:] for d in done)
        found |= torch.load(folder / f"{ranks}", weights_only=True)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "mdt-unmasked"])
def test_losses_do_not_depend_on_the_strategy(losses, family: str) -> None:
    expected = torch.tensor(losses[family])
    assert (expected[0] - expected[-1]).abs() > 1e-3  # other data and other weights
    runs = {name: v for name, v in losses.items() if name.split()[0] == family and name != family}
    assert len(runs) == 5
    for name, found in runs.items():
        torch.testing.assert_close(torch.tensor(found), expected, rtol=2e-5, atol=0, msg=name)


@pytest.mark.parametrize("embedding", ["separate", "concatenated", "micro"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_control_starts_without_effect_and_then_has_one(family: str, embedding: str) -> None:
    height, flip = (4.0, 1.0) if embedding == "separate" else (1.0, 1.0)
    control = [{"name": "height", "exponent": height}, {"name": "flip", "exponent": flip}]
    section, build = SHAPES[family] | {"family": family}, FAMILIES[family][0]
    plain = build_denoiser(build(**section))
    conditioning = {"control": control, "control_embedding": embedding}
    model = build_denoiser(build(**section, conditioning=conditioning))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("control_embedder.") for name in missing)

    x = torch.randn(3, 4, 8, 8, generator=generator)
    t = torch.tensor([3.0, 500.0, 998.0])
    condition = {
        "labels": torch.tensor([0, 4, 5]),
        "control": torch.rand(3, 2, generator=generator) * 10.0,
    }
    if family == "mdt":  # the masked pass, which every part takes a share in
        condition["keep"] = torch.arange(1, 13).expand(3, -1)
    expected = plain(x, t, condition)
    assert torch.equal(model(x, t, condition), expected)
    with torch.no_grad():
        for mlp in model.control_embedder.mlps:
            mlp[2].weight.normal_(std=0.1, generator=generator)
    # What is phased in cannot act on pure noise.
    moved = (model(x, t, condition) - expected).flatten(1).norm(dim=1)
    assert moved[0] > 1e-3 and moved[1] > 1e-3 and moved[2] < 1e-4 * moved[0]
    dropped = condition | {"drop_control": torch.tensor([True, False, True])}
    output = model(x, t, dropped)
    torch.testing.assert_close(output[::2], expected[::2])
    torch.testing.assert_close(output[1], model(x, t, condition)[1])


def test_a_section_says_its_family_or_is_a_dit() -> None:
    read = TypeAdapter(ModelConfig).validate_python
    assert read({"hidden_size": 32, "num_heads": 2}) == DiTConfig(hidden_size=32, num_heads=2)
    for family, (config, network) in FAMILIES.items():
        found = read({"family": family})
        assert type(found) is config
        with torch.device("meta"):
            assert type(build_denoiser(found)) is network
    for name, hint in (("gan", "give one of dit, mdt, mmdit, pixart, unet"), ("mmdot", "mmdit?")):
        with pytest.raises(UserError, match=re.escape(hint)):
            load_recipe("ldm/cifar10_small", [f"model.family={name}"])
