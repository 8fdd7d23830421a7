"""Training a latent diffusion model: its loss, and the grids and held-out losses on the way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from etude.conditions import DERIVED, GEOMETRY, Conditions
from etude.core import distributed, rng
from etude.core.errors import UserError
from etude.core.log import read_metrics
from etude.core.run import Run
from etude.core.signals import Stopper, StopRequested
from etude.core.strategy import Strategy
from etude.data.latents import LatentLoader, encode_latents, latents_plan
from etude.data.loader import Batch
from etude.diffusion.objectives import Noise, Objective
from etude.kernels import nearest_neighbours
from etude.models.families import build_denoiser
from etude.models.mdt import keep_indices
from etude.pictures import picture_grid, terminal_picture
from etude.sampling import Generator, balanced_labels, denoiser, open_autoencoder, to_uint8
from etude.texts import TextFeatures, captions_of, first_captions

from .job import HELD_OUT_PICTURES, Job, Look
from .origin import begin
from .recipe import LatentDiffusionRecipe

HELD_OUT = 1 << 40  # positions of held-out samples: apart from every training position
NEAREST_LIMIT = 20_000  # training pictures that a grid's nearest neighbours are looked up among
BINS = 8  # equal slices of time that the held-out loss is reported in


class DiffusionJob(Job):
    def __init__(
        self,
        recipe: LatentDiffusionRecipe,
        run: Run,
        look: Look,
        world: distributed.World,
        stopper: Stopper,
    ) -> None:
        super().__init__(recipe, run, look, world, stopper)
        self.autoencoder, self.autoencoder_key = (
            open_autoencoder(recipe.autoencoder, world.device) if recipe.autoencoder else (None, "")
        )
        self._check_shapes()
        self._check_nulls()
        self.prompts, self.features = self._texts()
        self.conditions = Conditions(
            recipe.model.conditioning,
            recipe.model.num_classes,
            recipe.data.augment.image_size,
            world.device,
            self.features,
            self._scalars(),
        )
        self.objective = Objective(recipe.objective)
        if self.autoencoder is not None and recipe.latents.variants:
            self.loader = self._latent_loader()
        if recipe.text.ahead:  # from files: no encoder runs beside the training step
            self.loader.features = self.features
        self.model = build_denoiser(recipe.model, seed=recipe.seed)
        self.judge = _open_judge(recipe.judge) if recipe.judge else None
        self._training_pictures: np.ndarray | None = None
        if world.rank == 0:
            look.page.chapter(
                look.id("diffusion"),
                look.title("Diffusion model"),
                recipe.description,
                order=look.order,
            )

    def _check_shapes(self) -> None:
        """The model must fit the latents and the classes; says which fields to set."""
        model, augment = self.recipe.model, self.recipe.data.augment
        side, channels = augment.image_size, augment.channels
        if self.autoencoder is not None:
            side //= self.autoencoder.downscale
            channels = self.autoencoder.config.latent_channels
        wanted = {
            "in_channels": channels,
            "input_size": side,
        }
        if model.conditioning.semantic == "class":
            wanted["num_classes"] = len(self.train_set.classes)
        wrong = [f"model.{k}={v}" for k, v in wanted.items() if getattr(model, k) != v]
        if wrong:
            latents = " and its autoencoder" if self.autoencoder else " without an autoencoder"
            raise UserError(
                f"recipe {self.recipe.name} does not fit {self.recipe.data.shards}{latents}: "
                f"{'' if self.autoencoder else 'add autoencoder=RUN (`etude runs list`), or '}"
                f"set {' '.join(wrong)}"
            )

    def _check_nulls(self) -> None:
        """Guidance contrasts with what was dropped, which training must show, here or before."""
        recipe = self.recipe
        if recipe.start.source:
            return
        scales = {"drop_semantic": "guidance_scale", "drop_control": "control_scale"}
        for name, scale in list(scales.items())[: len(recipe.sampler.guidance_weights)]:
            if getattr(recipe, name) == 0:
                raise UserError(
                    f"{name}=0 never trains what sampler.{scale} contrasts with: set {name}=0.1, or"
                    f" leave out sampler.{scale}"
                )

    def _texts(self) -> tuple[list[str], TextFeatures | None]:
        """The grid's prompts, and the captions' features: encoded by all ranks, or found."""
        recipe, world, log = self.recipe, self.world, self.look.log
        if recipe.model.conditioning.semantic == "class":
            return [], None
        for data in (self.train_set, self.held_out_set):
            if not data.captioned:
                raise UserError(
                    f"{data.folder} has no captions: add a .txt to each picture, or set"
                    " model.conditioning.semantic=class"
                )
        features = TextFeatures(recipe.text, world.device)
        features.check(recipe.model.conditioning, recipe.name)
        prompts = recipe.grid.prompts or first_captions(self.held_out_set, recipe.grid.max_classes)
        if not recipe.text.ahead:
            return prompts, features
        captions = [*captions_of(self.train_set), *captions_of(self.held_out_set), *prompts]
        stopped = None
        try:
            features.prepare(
                captions, log=log, rank=world.rank, world=world.size, check=self.stopper.check
            )
        except StopRequested as reason:
            stopped = str(reason)
        found = distributed.exchange(world, "the captions", [features.key, stopped])
        if len({key for key, _ in found}) > 1:
            raise UserError("the ranks' text encoders differ: copy the same folders to every host")
        if any(reason for _, reason in found):
            raise StopRequested(next(reason for _, reason in found if reason))
        count = features.complete(captions)
        log.info(f"features of {count:,} different captions from {features.folder}")
        return prompts, features

    def _scalars(self) -> dict[str, float]:
        """Mean over the training pictures of each stored number that is a control."""
        asked = {control.name for control in self.recipe.model.conditioning.control}
        for data in (self.train_set, self.held_out_set):
            if asked - {*GEOMETRY, *DERIVED} and data.index.scalars is None:
                raise UserError(
                    f"{data.folder} was indexed before the numbers in its .json were looked for:"
                    " delete its index.json to index it anew"
                )
        known = sorted(asked & set(self.train_set.scalars) - {*GEOMETRY, *DERIVED})
        lacking = next((name for name in known if name not in self.held_out_set.scalars), None)
        if lacking is not None:
            raise UserError(
                f"not every picture of {self.recipe.held_out} has the number {lacking!r} in its"
                " .json, as those of data.shards have: store it there too"
            )
        return {name: float(self.train_set.scalar(name).mean()) for name in known}

    def extra(self) -> dict:
        return super().extra() | {"scalars": dict(self.conditions.scalars)}

    def begin(self) -> None:
        """Take the weights that the recipe starts from, if any."""
        begin(self.recipe, self.model, self.train_set.classes, self.run, self.look.log)

    def _latent_loader(self) -> LatentLoader:
        """The cache of latents: written by all ranks together, or found under its key."""
        recipe, world, autoencoder = self.recipe, self.world, self.autoencoder
        options = {
            "variants": recipe.latents.variants,
            "dtype": getattr(torch, recipe.latents.dtype),
            "scaling_factor": autoencoder.config.scaling_factor,
            "shift_factor": autoencoder.config.shift_factor,
        }
        plan = latents_plan(
            self.train_set, recipe.data, self.autoencoder_key, recipe.seed, **options
        )
        folder = Path(recipe.latents.folder) / plan["key"][:16]
        stopped = None
        try:
            encode_latents(
                self.train_set,
                recipe.data,
                self._encode,
                folder,
                self.autoencoder_key,
                recipe.seed,
                self.look.log,
                **options,
                device=world.device,
                rank=world.rank,
                world=world.size,
            )
        except StopRequested as reason:
            stopped = str(reason)
        stops = distributed.exchange(world, "the cache of latents", stopped)
        if any(stops):
            raise StopRequested(next(reason for reason in stops if reason))
        self.loader_reason = f"latents from {folder}, encoded with: {self.loader_reason}"
        return LatentLoader(
            folder,
            seed=recipe.seed,
            plan=plan,
            order=recipe.data.order,
            device=world.device,
            prefetch=recipe.data.prefetch,
        )

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.stopper.check()  # shards that are done stay, so encoding goes on where it was
        return self.autoencoder.encode(images)

    def inputs(self) -> dict[str, str]:
        found = super().inputs()
        found |= {"autoencoder": self.autoencoder_key} if self.autoencoder is not None else {}
        return found | ({"text": self.features.key} if self.features is not None else {})

    def clean(self, batch: Batch) -> Tensor:
        """The model's x0: cached latents, latents of a batch's pictures, or the pictures."""
        if batch.latents is not None:
            return batch.latents
        if self.autoencoder is None:
            return batch.images
        with torch.no_grad():
            mean, std = self.autoencoder.encode(batch.images)
        noise = rng.normal(
            self.recipe.seed,
            rng.Stream.POSTERIOR,
            batch.positions,
            tuple(mean.shape[1:]),
            self.world.device,
        )
        return self.autoencoder.scale(mean + std * noise)

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        seed, positions, device = self.recipe.seed, batch.positions, self.world.device
        x0 = self.clean(batch)
        where = torch.as_tensor(positions, dtype=torch.int64, device=device)
        noise = Noise(where, seed, int(rng.Stream.NOISE))
        times = self.objective.times(self._uniform(rng.Stream.TIMESTEP, positions))
        condition = self.conditions.of_batch(batch)
        condition |= self.conditions.noise(condition, seed, positions)
        condition |= self.conditions.dropped(
            seed, positions, self.recipe.drop_semantic, self.recipe.drop_control
        )
        losses = self.objective.losses(denoiser(forward), x0, noise, times, condition)
        if getattr(self.recipe.model, "mask_ratio", None) is None:
            return losses
        # MDTv2's second pass: the same latents and times, another noise, some tokens left out.
        noise = Noise(where, seed, int(rng.Stream.SECOND_NOISE))
        condition |= self.conditions.dropped(
            seed, positions, self.recipe.drop_semantic, self.recipe.drop_control, turn=1
        )
        condition["keep"] = self._kept(positions)
        return losses + self.objective.losses(denoiser(forward), x0, noise, times, condition)

    def _kept(self, positions: np.ndarray) -> Tensor:
        """The tokens that a masked pass keeps, (B, K) int64, for one share per step."""
        model, seed = self.recipe.model, self.recipe.seed
        step = positions[:1] // self.recipe.loop.global_batch
        low, high = model.mask_ratio
        ratio = low + (high - low) * float(rng.uniform(seed, rng.Stream.MASK_RATIO, step)[0, 0])
        tokens = model.grid**2
        uniforms = rng.uniform(seed, rng.Stream.MASK, positions, tokens)
        return keep_indices(torch.as_tensor(uniforms, device=self.world.device), ratio)

    def _uniform(self, stream: rng.Stream, positions: np.ndarray) -> Tensor:
        values = rng.uniform(self.recipe.seed, stream, positions)[:, 0]
        return torch.as_tensor(values, dtype=torch.float32, device=self.world.device)

    def evaluate(self, strategy: Strategy, images_seen: int) -> float | None:
        losses = {}
        for profile in self.profiles:
            with strategy.weights(profile) as model, torch.no_grad():
                if self.world.rank == 0:
                    losses[profile] = self.held_out_losses(model)
                    if profile == self.recipe.default_weights():
                        samples, labels = self.draw_grid(model)
        if self.world.rank != 0:
            return None
        means = {profile: float(np.mean(values)) for profile, values in losses.items()}
        self.look.log.metrics("held_out", images_seen, **means)
        self.show_grid(samples, labels, images_seen)
        self.show_losses("diffusion-loss", "Training and held-out loss")
        self.look.page.bars(
            self.look.id("noise-levels"),
            "Held-out loss per noise level",
            [f"{(b + 0.5) / BINS:.2f}" for b in range(BINS)],
            losses,
            "time (0 is data, 1 is noise)",
            "loss",
            order=self.look.order + 4,
        )
        self.show_progress(images_seen)
        return means[self.recipe.default_weights()]

    def held_out(self) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
        """Held-out x0 and noise (n, C, h, w), times (n,) in each of `BINS` slices, condition."""
        batch = self.still(self.held_out_set, HELD_OUT_PICTURES)
        batch.positions = positions = HELD_OUT + batch.positions
        x0 = self.clean(batch)
        noise = rng.normal(
            self.recipe.seed, rng.Stream.NOISE, positions, tuple(x0.shape[1:]), self.world.device
        )
        within = self._uniform(rng.Stream.TIMESTEP, positions)
        times = [self.objective.schedule.snap((b + within) / BINS) for b in range(BINS)]
        return x0, noise, times, self.conditions.of_batch(batch)

    def held_out_losses(self, model: Callable) -> list[float]:
        """Mean loss in each slice of time, nothing dropped, noise fixed per sample."""
        x0, noise, times, condition = self.held_out()
        losses = [self.objective.losses(denoiser(model), x0, noise, t, condition) for t in times]
        return [float(values.mean()) for values in losses]

    def constant_loss(self) -> float:
        """The held-out loss of the best constant prediction, for scale: the targets' variance."""
        x0, noise, times, _ = self.held_out()
        targets = [self.objective.target(x0, noise, t) for t in times]
        return float(np.mean([float((t - t.mean(0)).square().mean()) for t in targets]))

    def draw_grid(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """The grid's pictures and labels, a class or prompt a column, always the same noises."""
        recipe, grid = self.recipe, self.recipe.grid
        generator = Generator(
            model,
            self.objective,
            recipe.sampler,
            self.autoencoder,
            self.train_set.classes,
            (recipe.model.in_channels, recipe.model.input_size, recipe.model.input_size),
            self.conditions,
            device=self.world.device,
        )
        columns = len(self.prompts) or min(max(generator.num_classes, 1), grid.max_classes)
        indices = np.arange(columns * grid.per_class)
        labels = balanced_labels(indices, columns)
        captions = [self.prompts[label] for label in labels] if self.prompts else None
        return generator.draw(indices, labels, seed=grid.seed, captions=captions)[0], labels

    def show_grid(self, samples: np.ndarray, labels: np.ndarray, images_seen: int) -> None:
        """The grid over time, each sample's nearest training picture, and a terminal preview."""
        columns = int(labels.max()) + 1
        agreement, shown = "", "A class a column"
        if self.prompts:
            shown = f"From left to right: {'; '.join(self.prompts)}"
        if self.judge is not None:
            share = float((self.judge(samples) == labels).mean())
            self.look.log.metrics("grid", images_seen, labelled_as_asked=share)
            agreement = f"; the judge labels {share:.0%} as asked"
        self.look.page.grid(
            self.look.id("samples"),
            "Samples",
            picture_grid(samples, columns=columns),
            f"{shown}, weights {self.recipe.default_weights()}{agreement}.",
            f"{images_seen:,} images",
            order=self.look.order + 1,
        )
        first = samples[:columns]
        train = self.training_pictures()
        sides = [torch.from_numpy(side).flatten(1).float() for side in (first, train)]
        distance, row = (found[:, 0] for found in nearest_neighbours(*sides))
        self.look.page.pairs(
            self.look.id("nearest"),
            "Samples and their nearest training pictures",
            first,
            train[row.numpy()],
            distance.tolist(),
            order=self.look.order + 2,
        )
        self.look.log.info(f"grid at {images_seen:,} images{agreement}")
        self.look.log.info(terminal_picture(np.concatenate(list(first[:10]), axis=1), width=100))

    def training_pictures(self) -> np.ndarray:
        """Training pictures as stored, not augmented, (n, H, W, C) uint8."""
        if self._training_pictures is None:
            self._training_pictures = to_uint8(self.still(self.train_set, NEAREST_LIMIT).images)
        return self._training_pictures

    def finish(self, model: nn.Module) -> dict:
        metrics = self.run.folder / "metrics.jsonl"
        last = read_metrics(metrics, "held_out")[-1]
        result = {
            "held_out_loss": last[self.recipe.default_weights()],
            "constant_predictor_loss": self.constant_loss(),
        }
        grid = read_metrics(metrics, "grid")
        return result | ({"labelled_as_asked": grid[-1]["labelled_as_asked"]} if grid else {})


def _open_judge(source: str) -> Callable[[np.ndarray], np.ndarray]:
    """A frozen classifier: uint8 pictures (n, H, W, C) -> labels (n,) int64."""
    from etude.evaluation.judge import open_judge

    return open_judge(source).labels
