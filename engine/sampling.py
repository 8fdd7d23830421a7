"""Pictures from a trained run: what training grids, practice and evaluation draw with.

A `Generator` holds a denoiser, its objective, its autoencoder and a sampler. Picture `index` of a
seed has one initial noise and, for stochastic samplers, one noise per step, so which picture it is
never depends on how many are drawn, in which order or on which rank. Pictures are made in fixed
blocks of `BLOCK` consecutive indices, padded where only some are wanted, because the rounding of a
matrix product depends on its batch: the same block shape, device and threads give the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.core import rng
from etude.core.checkpoint import latest_checkpoint, read_weights, verify_checkpoint
from etude.core.errors import UserError
from etude.core.files import file_sha256
from etude.core.run import load_run
from etude.data.shards import ShardSet
from etude.diffusion.captured import CapturedSteps
from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig
from etude.diffusion.objectives import Objective
from etude.diffusion.samplers import SamplerConfig, sample
from etude.external.diffusers import WEIGHTS, Autoencoder, Decoder
from etude.kernels import solver
from etude.models.families import build_denoiser

from .conditions import Conditions, check_guidance
from .published import is_published, published_parts
from .stable_diffusion import PROMPT, is_stable_diffusion, stable_diffusion_parts
from .texts import captions_of, open_features

BLOCK = 64


def to_uint8(images: Tensor) -> np.ndarray:
    """Pictures (B, C, H, W) in [-1, 1] to (B, H, W, C) uint8, rounded half to even and clamped."""
    return solver.to_uint8(images).cpu().numpy()


def denoiser(model: Callable) -> Callable[[Tensor, Tensor, dict], Tensor]:
    """A model called with time in [0, 1000) as the (x, t in [0, 1], condition) callable."""
    return lambda x, t, condition: model(x, t * 1000.0, condition)


@dataclass
class Generator:
    """Draws pictures by index; see `open_generator` for one made from a run.

    Attributes:
        prompts: what a model asked by text draws when nobody says what, in turn.
        decode_rows: pictures that a push of guidance may decode at a time, for what they keep in
            memory; 0: a whole block.
        captured: keeps the sampler's steps from block to block, on a GPU as CUDA graphs; pays for a
            model whose weights stay where they are.
    """

    model: nn.Module
    objective: Objective
    sampler: SamplerConfig
    autoencoder: Autoencoder | None
    classes: list[str]
    latent_shape: tuple[int, int, int]
    conditions: Conditions
    name: str = "generator"
    fingerprint: str = ""
    profile: str = "raw"
    training_shards: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dict[str, float] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    decode_rows: int = 0
    captured: CapturedSteps | None = None
    _called: int = field(default=0, init=False, repr=False)
    _gradients: int = field(default=0, init=False, repr=False)
    _decoders: dict[str, Decoder] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_guidance(self.sampler, self.conditions.config)

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has predicted so far, padding and guidance included."""
        return self._called + (self.captured.replayed if self.captured else 0)

    @property
    def gradients(self) -> int:
        """Rows that guidance has taken the denoiser's gradient of so far, padding included."""
        return self._gradients

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Pixels along a side of what it draws."""
        return self.latent_shape[1] * (self.autoencoder.downscale if self.autoencoder else 1)

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def protocol(self) -> dict:
        """What fixes the pictures' distribution, for an evaluation's protocol."""
        return {
            "generator": self.fingerprint,
            "sampler": self.sampler.model_dump(mode="json"),
            "profile": self.profile,
            "rounding": "half to even",
        } | self._asked()

    def _asked(self) -> dict:
        control = {"control": self.control} if self.control else {}
        return control | ({"prompts": stated_prompts(self.prompts)} if self.asked_by_text else {})

    def decode(self, latents: Tensor) -> Tensor:
        """Model-space latents (B, C, h, w) to pictures (B, C, H, W) in [-1, 1], differentiable."""
        if self.autoencoder is None:
            return latents
        return self.autoencoder.decode(self.autoencoder.unscale(latents))

    def cheap_decoder(self, guidance: GuidanceConfig) -> Decoder | None:
        """The decoder that a push goes through in place of `decode`, if `guidance` names one.

        Raises:
            UserError: it is none of this generator's latents, or they are pictures already.
        """
        folder = guidance.decoder
        if not folder:
            return None
        if self.autoencoder is None:
            raise UserError(
                f"guidance.decoder={folder} has no effect: {self.name} draws pixels; leave it out"
            )
        if folder not in self._decoders:
            decoder = Decoder.from_folder(folder).to(self.device).eval().requires_grad_(False)
            sides = (decoder.latent_channels, decoder.channels)
            own = (self.latent_shape[0], self.autoencoder.config.in_channels)
            if sides != own:
                raise UserError(
                    f"guidance.decoder={folder} makes {sides[1]} channels of latents with"
                    f" {sides[0]}, but {self.name} needs {own[1]} of {own[0]}: name a decoder of"
                    " its latents, or leave it out"
                )
            self._decoders[folder] = decoder
        return self._decoders[folder]

    def draw(
        self,
        indices: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        learner: nn.Module | None = None,
        guidance: GuidanceConfig | None = None,
        captions: Sequence[str] | None = None,
        positions: np.ndarray | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pictures of `indices` (n,) int64 and `labels` (n,) int64, in any order.

        Args:
            seed: names the sequence of pictures.
            learner: pictures (B, C, H, W) in [-1, 1] -> logits (B, classes), with `guidance` how
                the reverse process is pushed toward what it finds hard.
            captions: n texts, for a model asked by text, which ignores the labels; its `prompts`
                in turn where there are none.
            positions: (n,) int64 in [0, 2^39), where each picture's noise lies in its stream; by
                default its index. What is asked for then keeps its noise wherever it stands.
            advance: called with the number of pictures after each block.

        Returns:
            uint8 (n, H, W, C), and arrays (n,) float32: the telemetry of `EntropyGuidance`.

        Raises:
            UserError: no index, captions for a model asked by class, or none for one asked by text.
        """
        indices, labels = np.asarray(indices, np.int64), np.asarray(labels, np.int64)
        places = indices if positions is None else np.asarray(positions, np.int64)
        texts = self._captions(indices, captions)
        images: np.ndarray | None = None
        telemetry: dict[str, np.ndarray] = {}
        for block in np.unique(indices // BLOCK):
            rows = np.flatnonzero(indices // BLOCK == block)
            lanes = indices[rows] % BLOCK
            block_labels = np.full(BLOCK, self.null_label, np.int64)
            block_labels[lanes] = labels[rows]
            block_places = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.int64)
            block_places[lanes] = places[rows]
            block_texts = [texts[rows[0]]] * BLOCK if texts else []
            if texts:
                for row, lane in zip(rows, lanes, strict=True):
                    block_texts[lane] = texts[row]
            guide = None
            if guidance is not None and learner is not None and guidance.omega > 0:
                guide = EntropyGuidance(
                    guidance,
                    learner,
                    self.decode,
                    cheap_decode=self.cheap_decoder(guidance),
                    most_rows=self.decode_rows,
                )
            pictures = to_uint8(self._block(block_places, block_labels, block_texts, seed, guide))
            if images is None:
                images = np.empty((len(indices), *pictures.shape[1:]), np.uint8)
            images[rows] = pictures[lanes]
            for name, values in (guide.telemetry() if guide else {}).items():
                telemetry.setdefault(name, np.zeros(len(indices), np.float32))[rows] = values[lanes]
            advance(len(rows))
        if images is None:
            raise UserError("no picture was asked for: pass at least one index")
        return images, telemetry

    @property
    def asked_by_text(self) -> bool:
        return self.conditions.config.semantic == "text"

    def _captions(self, indices: np.ndarray, captions: Sequence[str] | None) -> list[str]:
        """A text for each index, or none for a model asked by class."""
        if not self.asked_by_text:
            if captions is not None:
                raise UserError(f"{self.name} is asked by class, not by text: give labels")
            return []
        if captions is None and not self.prompts:
            raise UserError(f"{self.name} is asked by text: give prompts")
        if captions is None:
            return [self.prompts[index % len(self.prompts)] for index in indices]
        if len(captions) != len(indices):
            raise ValueError(f"{len(captions)} captions for {len(indices)} pictures")
        return list(captions)

    def _block(
        self,
        positions: np.ndarray,
        labels: np.ndarray,
        captions: Sequence[str],
        seed: int,
        guide: EntropyGuidance | None,
    ) -> Tensor:
        def field_of(stream: int, step: int) -> Tensor:
            # A position has 2^24 sampler steps of its own, so steps never share a counter.
            where = positions * (1 << 24) + step
            return rng.normal(seed, stream, where, self.latent_shape, self.device)

        def predict(x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
            self._called += len(x)
            return denoiser(self.model)(x, t, condition)

        if self.captured is not None:
            self.captured.model = self.model
        condition = self.conditions.asked(labels, captions, control=self.control)
        latents = sample(
            predict,
            self.objective,
            self.sampler,
            field_of(rng.Stream.SAMPLE_NOISE, 0),
            condition,
            nulls=self.conditions.nulls(condition),
            guide=guide,
            step_noise=lambda step: field_of(rng.Stream.SAMPLE_STEP, step),
            captured=self.captured,
        )
        if guide is not None and guide.pictures is not None:
            self._gradients += guide.passes * BLOCK
            return guide.pictures
        with torch.no_grad():
            return self.decode(latents)


def balanced_labels(indices: np.ndarray, num_classes: int) -> np.ndarray:
    """Label of each index, (n,) int64: classes in turn, so any whole round is balanced."""
    return np.asarray(indices, np.int64) % max(num_classes, 1)


def open_generator(
    run: str | Path,
    *,
    weights: str = "",
    sampler: SamplerConfig | None = None,
    device: torch.device | str = "cpu",
    classes: Sequence[str] = (),
    prompt: str = PROMPT,
    at: int | None = None,
) -> Generator:
    """The generator of a latent-diffusion run, or of a published checkpoint's folder.

    Args:
        run: the run's folder, or its name under `runs/`: its newest complete checkpoint is taken;
            or a folder as `published.py` or `stable_diffusion.py` describes it.
        weights: "raw" or "ema:<decay>"; by default the longest average that the run kept. Of a
            Stable Diffusion what its U-Net computes in, such as "bfloat16".
        sampler: replaces the sampler that the run's recipe names.
        classes, prompt: of a Stable Diffusion the names of classes in index order, and how a name
            becomes a prompt; everything else has classes of its own.
        at: images seen of the checkpoint to take, of a run.

    Raises:
        UserError: there is no such run, checkpoint or profile, or an option has no effect on it.
    """
    diffusion = is_stable_diffusion(run)
    if at is not None and (diffusion or is_published(run)):
        raise UserError(f"{run} is one set of weights without checkpoints: leave out at={at}")
    if not diffusion and (classes or prompt != PROMPT):
        raise UserError(
            f"classes and prompt have no effect on {run}, which is no Stable Diffusion folder:"
            " leave them out"
        )
    if diffusion or is_published(run):
        where = torch.device(device)
        if diffusion:
            options = {"classes": classes, "template": prompt, "precision": weights}
            parts = stable_diffusion_parts(run, where, **options)
        elif weights:
            raise UserError(f"{run} holds one set of weights: leave out --weights")
        else:
            parts = published_parts(run, where)
        generator = Generator(**parts | ({"sampler": sampler} if sampler else {}))
        generator.captured = CapturedSteps(generator.model)
        return generator
    recipe, folder = load_run(run)
    if recipe.kind != "ldm":
        raise UserError(f"{folder} is a run of kind {recipe.kind!r}: name one of kind 'ldm'")
    checkpoint = _checkpoint(folder, at)
    with verify_checkpoint(checkpoint, hashes=False) as opened:
        extra, images_seen = opened.manifest["extra"], opened.images_seen
    weights = weights or recipe.default_weights()
    model = build_denoiser(recipe.model)
    model.load_state_dict(read_weights(checkpoint, weights, hashes=False))
    model.to(device).eval().requires_grad_(False)
    autoencoder, autoencoder_key = (
        open_autoencoder(recipe.autoencoder, device) if recipe.autoencoder else (None, "")
    )
    size = recipe.model.input_size
    device = torch.device(device)
    features = None
    if recipe.model.conditioning.semantic == "text":
        features = open_features(recipe.text, extra["text"], device)
    parts = [extra["fingerprint"], images_seen, weights, autoencoder_key]
    identity = json.dumps([*parts, features.key] if features else parts)
    return Generator(
        model=model,
        conditions=Conditions(
            recipe.model.conditioning,
            recipe.model.num_classes,
            recipe.data.augment.image_size,
            device,
            features,
            extra.get("scalars", {}),
        ),
        objective=Objective(recipe.objective),
        sampler=sampler or recipe.sampler,
        autoencoder=autoencoder,
        classes=[] if features else list(extra["classes"]),
        latent_shape=(recipe.model.in_channels, size, size),
        name=f"{folder.name} {weights} at {images_seen:,} images",
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
        profile=weights,
        training_shards=recipe.data.shards,
        device=device,
        prompts=_prompts(recipe) if features else [],
        captured=CapturedSteps(model),
    )


def checkpoints_of(run: str | Path) -> list[int]:
    """Images seen of the complete checkpoints that a run keeps, ascending."""
    found = {}
    for path in (load_run(run)[1] / "checkpoints").glob("step-*"):
        try:
            found[verify_checkpoint(path, hashes=False).images_seen] = path
        except UserError:  # being written, or broken: it is not there yet
            continue
    return sorted(found)


def _checkpoint(folder: Path, at: int | None) -> Path:
    """The newest complete checkpoint of a run, or the one after `at` images."""
    if at is None:
        newest = latest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise UserError(
                f"{folder} has no complete checkpoint yet: type the command that trains it again"
            )
        return newest
    path = folder / "checkpoints" / f"step-{at:012d}"
    if not path.is_dir():
        kept = ", ".join(str(seen) for seen in checkpoints_of(folder)) or "none"
        raise UserError(f"{folder} keeps no checkpoint at {at} images; it keeps {kept}")
    return path


def _prompts(recipe: Any) -> list[str]:
    """The different held-out captions in stored order; the grid's prompts where they are gone."""
    if not Path(recipe.held_out).is_dir():
        return list(recipe.grid.prompts)
    return list(dict.fromkeys(captions_of(ShardSet(recipe.held_out))))


def open_autoencoder(
    source: str | Path, device: torch.device | str = "cpu"
) -> tuple[Autoencoder, str]:
    """An autoencoder from a run of kind 'autoencoder' or from a folder in diffusers' layout.

    Returns:
        The frozen autoencoder, and the sha256 of its weights, which caches are keyed by.
    """
    folder = Path(source)
    if not (folder / "config.json").exists():
        recipe, run = load_run(source)
        folder = run / "autoencoder"
        if not folder.exists():
            raise UserError(
                f"{run} has no finished autoencoder yet: type the command that trains it again"
            )
    autoencoder = Autoencoder.from_folder(folder).to(device).eval().requires_grad_(False)
    weights = next(folder / name for name in WEIGHTS if (folder / name).exists())
    return autoencoder, file_sha256(weights)


def stated_prompts(prompts: Sequence[str]) -> list[str] | dict:
    """Prompts as a protocol states them: word for word, or many of them by their sha256."""
    if len(prompts) <= BLOCK:
        return list(prompts)
    text = json.dumps(list(prompts))
    return {"count": len(prompts), "sha256": hashlib.sha256(text.encode()).hexdigest()}
