"""What guidance toward a learner's entropy costs beside plain sampling, at the published frequency.

Run by `make gpu`; by hand: `python -m benchmarks.guidance_cost --device cpu`.

30 DDIM steps under classifier-free guidance, every 5th pushed, then the pictures are decoded; a
denoiser, a decoder to eight times the latents' side, and a ViT, of random weights, since nothing
depends on them. The small settings keep the proportions of real ones. `small` has a DiT: its
decoder takes 2.8 times the operations of its denoiser (DiT-XL/2 with Stable Diffusion's decoder:
2.6), its learner 0.15 times (ViT-B/16: 0.15). `small U-Net` is Stable Diffusion 1.5 at 512 x 512,
asked by class: 3.1 times (3.13) and 0.04 times (0.044). With F, D and L the operations of a forward
of denoiser, decoder and learner for one picture, and as many for a backward by its input alone, the
prediction is

    plain            60 F + D
    full             60 F + D + 6 (F + 2 D + 2 L) + L
    stop_denoiser    60 F + D + 6 (2 D + 2 L) + L

where L stands for the telemetry, and bf16 halves D and L of the push. The U-Net recomputes its
activations, as that of a Stable Diffusion folder does, which adds 6 F to `full`; its push decodes
few rows at a time, as there, and `decoder recomputed` decodes the whole batch with the decoder's
activations recomputed, which adds 6 D. `before` is the way that this one replaced: the network is
evaluated once more under the condition, with a graph, for the gradient (6 F more), and the finished
samples are decoded twice (D more). `one by one` is a batch of 1, as the method's predecessor runs.
Providers take turns in every round; a row has the medians over the rounds, of the wall's time and,
on a CPU, of the process's, which other processes disturb less.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from benchmarks.end_to_end import synchronise
from etude import kernels
from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig, Pushed
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.external.diffusers import Autoencoder, AutoencoderConfig
from etude.models.dit import DiT, DiTConfig
from etude.models.unet import UNet, UNetConfig
from etude.models.vit import ViT, ViTConfig
from etude.stable_diffusion import PiecewiseAutoencoder

STEPS, EVERY, SCALE = 30, 5, 4.0
PUSHED = -(-STEPS // EVERY)
SETTINGS: dict[str, dict[str, Any]] = {
    "small": {
        "dit": {"hidden_size": 384, "depth": 12, "num_heads": 6, "input_size": 16},
        "decoder": {"block_out_channels": (32, 64, 96, 96), "norm_num_groups": 8},
        "tiny": {"decoder_block_out_channels": (16, 16, 16, 16)},
        "learner": {"hidden_size": 256, "depth": 4, "num_heads": 4, "input_size": 128},
    },
    "small U-Net": {
        "unet": {
            "model_channels": 64,
            "channel_mult": (1, 2, 4, 4),
            "head_channels": 0,
            "num_heads": 8,
            "context_width": 96,
            "conditioning": {"class_tokens": 77},
            "input_size": 16,
            "activation_checkpointing": True,
        },
        "decoder": {"block_out_channels": (32, 48, 80, 80), "norm_num_groups": 8},
        "tiny": {"decoder_block_out_channels": (16, 16, 16, 16)},
        "learner": {"hidden_size": 128, "depth": 2, "num_heads": 4, "input_size": 128},
    },
    "DiT-XL/2": {
        "dit": {"preset": "DiT-XL/2"},
        "decoder": {},
        "tiny": {},
        "learner": {"preset": "b"},
    },
}
# What is handed to GuidanceConfig, and how many pictures are drawn together (0: all).
PROVIDERS: dict[str, tuple[dict[str, Any] | None, int]] = {
    "plain": (None, 0),
    "full": ({}, 0),
    "full bf16": ({"decode_precision": "bf16"}, 0),
    "stop_denoiser": ({"path": "stop_denoiser"}, 0),
    "stop_denoiser bf16": ({"path": "stop_denoiser", "decode_precision": "bf16"}, 0),
    "stop_denoiser, tiny decoder": ({"path": "stop_denoiser", "decoder": "tiny"}, 0),
    "before": ({}, 0),
    "plain, one by one": (None, 1),
    "before, one by one": ({}, 1),
}
RECOMPUTED = "full, decoder recomputed"
UNET_PROVIDERS: dict[str, tuple[dict[str, Any] | None, int]] = {
    name: PROVIDERS[name] for name in ("plain", "full", "stop_denoiser")
} | {RECOMPUTED: ({}, 0)}


class Before(EntropyGuidance):
    """Evaluates the network once more for the gradient, and decodes the finished samples anew."""

    def __init__(self, denoiser: Callable[..., Tensor], *given: Any) -> None:
        super().__init__(*given)
        self.denoiser, self._within = denoiser, False

    @property
    def traces(self) -> bool:
        return self._within

    def push(
        self, objective: Objective, x: Tensor, output: Tensor, t: Tensor, condition: dict[str, Any]
    ) -> Pushed:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = self.denoiser(x, t, condition)
        self._within = True
        try:
            return super().push(objective, x, output, t, condition)
        finally:
            self._within = False


@dataclass(frozen=True)
class Parts:
    """The networks of a setting on a device, frozen, how many rows a push decodes at a time, and
    what is measured of them."""

    model: nn.Module
    decoder: nn.Module
    tiny: nn.Module
    learner: nn.Module
    device: torch.device
    rows: int
    providers: dict[str, tuple[dict[str, Any] | None, int]]

    @classmethod
    def of(cls, setting: dict[str, Any], device: torch.device) -> "Parts":
        import diffusers

        rows, providers = 16 if device.type == "cuda" else 0, PROVIDERS
        if "unet" in setting:
            model: nn.Module = UNet(UNetConfig(**setting["unet"]), seed=0)
            rows, providers = 2, UNET_PROVIDERS
        else:
            model = DiT(DiTConfig(**setting["dit"], learn_sigma=False), seed=0)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # the zero gates of a new DiT would hide its blocks
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        built = Autoencoder.build(AutoencoderConfig(**setting["decoder"]), seed=1)
        decoder = PiecewiseAutoencoder(built.network, built.config)
        learner = ViT(ViTConfig(**setting["learner"]), seed=2)
        parts = [model, decoder, diffusers.AutoencoderTiny(**setting["tiny"]), learner]
        parts = [part.to(device).eval().requires_grad_(False) for part in parts]
        if device.type == "cuda":
            parts[0].to(torch.bfloat16)
        return cls(*parts, device, rows, providers)

    def denoise(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.model(x, t * 1000.0, condition)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents)

    def decode_again(self, latents: Tensor) -> Tensor:
        return checkpoint(self.decode, latents, use_reentrant=False)

    def decode_tiny(self, latents: Tensor) -> Tensor:
        return self.tiny.decode(latents).sample

    def answer(self, pictures: Tensor) -> Tensor:
        """Logits of pictures of any size."""
        side = self.learner.config.input_size
        if pictures.shape[-1] != side:
            pictures = F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
        return self.learner(pictures)

    def guide(self, provider: str) -> EntropyGuidance | None:
        fields, _ = self.providers[provider]
        if fields is None:
            return None
        rows = 0 if provider == RECOMPUTED else self.rows
        config = GuidanceConfig(every=EVERY, decode_rows=rows, **fields)
        if provider == RECOMPUTED:
            return EntropyGuidance(config, self.answer, self.decode_again)
        if provider.startswith("before"):
            return Before(self.denoise, config, self.answer, self.decode)
        cheap = self.decode_tiny if config.decoder else None
        return EntropyGuidance(config, self.answer, self.decode, cheap_decode=cheap)

    def draw(self, provider: str, noise: Tensor) -> Tensor:
        """Pictures of noise (B, C, H, W)."""
        labels = torch.arange(len(noise), device=self.device) % 1000
        guide = self.guide(provider)
        sampler = SamplerConfig(
            steps=STEPS, guidance_scale=SCALE, guidance_convention="one_plus_lambda"
        )
        latents = sample(
            self.denoise, Objective(ObjectiveConfig()), sampler, noise, {"labels": labels},
            nulls=[{"labels": torch.full_like(labels, 1000)}], guide=guide,
        )  # fmt: skip
        if guide is not None and not provider.startswith("before"):
            assert guide.pictures is not None
            return guide.pictures
        with torch.no_grad():
            return self.decode(latents)

    def operations(self, noise: Tensor) -> dict[str, float]:
        """Floating-point operations of a forward of each part, for one picture."""
        one, t = noise[:1], torch.full((1,), 0.5, device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            picture = self.decode(one)
        calls = {
            "denoiser": lambda: self.denoise(one, t, {"labels": label}),
            "decoder": lambda: self.decode(one),
            "tiny decoder": lambda: self.decode_tiny(one),
            "learner": lambda: self.answer(picture),
        }
        found = {}
        with torch.no_grad():
            for name, call in calls.items():
                with FlopCounterMode(display=False) as counter:
                    call()
                found[name] = float(counter.get_total_flops())
        return found


def predicted(provider: str, parts: Parts, operations: dict[str, float]) -> float | None:
    """Times plain's operations; None for a batch of one, of which they say nothing."""
    fields, rows = parts.providers[provider]
    if rows:
        return None
    denoiser, decoder, learner = (operations[n] for n in ("denoiser", "decoder", "learner"))
    plain = 2 * STEPS * denoiser + decoder
    if fields is None:
        return 1.0
    pushed = 2 * (operations["tiny decoder"] if "decoder" in fields else decoder) + 2 * learner
    pushed /= 2 if fields.get("decode_precision") == "bf16" else 1
    if fields.get("path", "full") == "full":
        pushed += denoiser * (2 if parts.model.config.activation_checkpointing else 1)
    pushed += decoder if provider == RECOMPUTED else 0
    again = PUSHED * denoiser + decoder if provider.startswith("before") else 0
    return (plain + PUSHED * pushed + learner + again) / plain


def measure(parts: Parts, noise: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Each provider's row: medians of seconds per picture over the rounds, in turns."""
    wall: dict[str, list[float]] = {name: [] for name in parts.providers}
    own: dict[str, list[float]] = {name: [] for name in parts.providers}
    peak: dict[str, int] = {}
    cuda = parts.device.type == "cuda"
    for turn in range(rounds + cuda):  # on a GPU a first round chooses algorithms
        for name, (_, rows) in parts.providers.items():
            given = noise[: rows or len(noise)]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            synchronise(parts.device)
            begun, used = time.perf_counter(), time.process_time()
            parts.draw(name, given)
            synchronise(parts.device)
            if turn >= cuda:
                wall[name].append((time.perf_counter() - begun) / len(given))
                own[name].append((time.process_time() - used) / len(given))
            peak[name] = torch.cuda.max_memory_allocated() if cuda else 0
    found = {}
    for name in parts.providers:
        row = {"median_s": statistics.median(wall[name]), "min_s": min(wall[name])}
        row |= {"max_s": max(wall[name]), "rounds": rounds}
        row["times_plain"] = row["median_s"] / statistics.median(wall["plain"])
        if cuda:
            row["peak_bytes"] = peak[name]
        else:
            row["cpu_s"] = statistics.median(own[name])
            row["cpu_times_plain"] = row["cpu_s"] / statistics.median(own["plain"])
        found[name] = row
    return found


def sources() -> list[Path]:
    """What the rows depend on: sampling, denoisers, decoders and the learner."""
    engine = ROOT / "engine"
    models = [*(engine / "models").glob("unet*.py")]
    models += [engine / "models" / f"{name}.py" for name in ("blocks", "dit", "vit")]
    decoders = [engine / "external" / "diffusers.py", engine / "stable_diffusion.py"]
    return sorted([*(engine / "diffusion").glob("*.py"), *models, *decoders])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--setting", default="", choices=("", *SETTINGS), help="[small on a CPU]")
    parser.add_argument("--batch", type=int, default=0, help="pictures drawn together [64; CPU 8]")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    given = parser.parse_args(arguments)
    if given.batch < 0 or given.rounds < 1:
        parser.error("--batch must be at least 1 (or 0 for the default), --rounds at least 1")
    cuda = given.device == "cuda"
    setting = given.setting or ("DiT-XL/2" if cuda else "small")
    batch = given.batch or (64 if cuda else 8)
    parts = Parts.of(SETTINGS[setting], torch.device(given.device))
    config = parts.model.config
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(given.device)
    operations = parts.operations(noise)
    for name in parts.providers:
        print(f"predicted {name}: {predicted(name, parts, operations)}", flush=True)
    # The same pushes by two ways, but for rounding.
    other = RECOMPUTED if RECOMPUTED in parts.providers else "before"
    apart = parts.draw("full", noise[:2]) - parts.draw(other, noise[:2])
    if not apart.abs().max() < (0.2 if cuda else 1e-2):
        print(f"the two ways differ by {float(apart.abs().max())}: no row is written")
        return 1
    common = results.machine(given.device) | {"op": "guided_sample", "setting": setting}
    common |= {"device": given.device, "steps": STEPS, "every": EVERY, "operations": operations}
    common |= {"batch": batch, "decode_rows": parts.rows, "dtype": "bf16" if cuda else "fp32"}
    common["kernels"] = kernels.announce(given.device)
    common["source_hash"] = hash_of(*sources())
    for name, row in measure(parts, noise, given.rounds).items():
        row |= {"drawn_together": parts.providers[name][1] or batch}
        row["predicted_times_plain"] = predicted(name, parts, operations)
        results.append("guidance_cost", [common | {"provider": name} | row])
        print(name, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
