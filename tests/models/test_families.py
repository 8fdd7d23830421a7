"""Every family trains: the losses of ZeRO stages 0 to 3 on two ranks are those of plain torch."""

import os
import re
import subprocess
import sys
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
def losses(tmp_path_factory) -> dict[str, list[float]]:
    """One rank's and two ranks' losses by "ranks family strategy"."""
    folder, found = tmp_path_factory.mktemp("families"), {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for ranks in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(ranks), str(WORKER), str(folder / f"{ranks}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert (folder / f"{ranks}").exists(), done.stdout[-2000:] + done.stderr[-6000:]
        rows = torch.load(folder / f"{ranks}", weights_only=True)
        found |= {f"{ranks} {name}": values for name, values in rows.items()}
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_losses_do_not_depend_on_the_strategy(losses, family: str) -> None:
    expected = torch.tensor(losses[f"1 {family} local None"])
    assert (expected[0] - expected[-1]).abs() > 1e-3  # other data and other weights
    runs = {name: torch.tensor(v) for name, v in losses.items() if name.split()[1] == family}
    assert len(runs) == 10
    for name, found in runs.items():
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0, msg=name)


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
