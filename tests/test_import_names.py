"""The checkout's folder `kernels/` must not harm other people's software.

Hugging Face publishes a package of that name, and transformers looks for it when a model class is
first used. Where the checkout's root is on sys.path (`python -m` there, torchrun, and deepspeed's
runner, which puts it on PYTHONPATH) Python finds our folder instead.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(200)
ROOT = Path(__file__).resolve().parent.parent
MODELS = """
import sys, torch
root = sys.argv[1]
from transformers import CLIPTextConfig, CLIPTextModel
from diffusers import AutoencoderKL
torch.manual_seed(0)
text = CLIPTextModel(CLIPTextConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=8, eos_token_id=99,
)).eval()
pictures = AutoencoderKL(
    block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8,
).eval()
with torch.no_grad():
    tokens = torch.arange(16).view(2, 8)
    states = text(tokens).last_hidden_state
    again = text(tokens.flip(0)).last_hidden_state
    latents = pictures.encode(torch.ones(1, 3, 8, 8)).latent_dist.mean
    decoded = pictures.decode(latents).sample
assert states.shape == (2, 8, 32) and torch.allclose(states, again.flip(0), atol=1e-5)
assert not torch.allclose(states[0], states[1], atol=1e-2)
assert latents.shape == (1, 2, 8, 8) and decoded.shape == (1, 3, 8, 8)
assert torch.isfinite(decoded).all() and float(decoded.std()) > 0
import kernels
assert kernels.__file__ == root + "/kernels/__init__.py", kernels.__file__
import etude.kernels
one = torch.ones(1, 2, 8)
modulated = etude.kernels.adaln_modulate(one, *torch.ones(2, 1, 8))
assert torch.equal(modulated, one) and "etude" in sys.modules
print("models work")
"""


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    return made.stdout


def test_the_command_line_starts_in_the_checkout() -> None:
    shown = run(sys.executable, "-m", "etude", "--help")
    assert "Usage" in shown and "practice" in shown


def test_models_of_transformers_and_diffusers_under_torchrun(tmp_path: Path) -> None:
    """In one process: what a script started by Python alone sees, and what torchrun adds."""
    script = tmp_path / "models.py"
    script.write_text(MODELS)
    launcher = (str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=1")
    assert run(*launcher, str(script), str(ROOT)).strip() == "models work"


def test_the_folder_stays_out_of_transformers_window() -> None:
    """transformers imports names from a `kernels` whose version lies in [0.18.2, 0.19)."""
    code = "import kernels, packaging.version as v; print(v.Version(kernels.__version__))"
    major, minor, *_ = (int(part) for part in run(sys.executable, "-c", code).split("."))
    assert (major, minor) < (0, 18)
