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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_losses_do_not_depend_on_the_strategy(losses, family: str) -> None:
    expected = torch.tensor(losses[family])
    assert (expected[0] - expected[-1]).abs() > 1e-3  # other data and other weights
    runs = {name: v for name, v in losses.items() if name.split()[0] == family and name != family}
    assert len(runs) == 5
    for name, found in runs.items():
        torch.testing.assert_close(torch.tensor(found), expected, rtol=2e-5, atol=0, msg=name)


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
