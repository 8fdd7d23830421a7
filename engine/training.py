"""Train an autoencoder or a latent diffusion model from a recipe: `etude train` ends up here.

`train` is one road for both kinds: open the data, build the model and its strategy, resume the
newest complete checkpoint, run the loop, write the result. What differs between the kinds is the
loss of a micro batch and what is looked at on the way; each kind is one class below.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from etude.core import distributed, rng
from etude.core.checkpoint import disk_need, latest_checkpoint, load_checkpoint, read_extra
from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.loop import LoopConfig, run_loop
from etude.core.optim import OptimConfig
from etude.core.recipe import Recipe, fingerprint
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.core.strategy import Strategy, StrategyConfig, build_strategy
from etude.data.latents import LatentConfig, LatentLoader, encode_latents
from etude.data.loader import Batch, DataConfig, Loader
from etude.data.shards import ShardSet
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.external.diffusers import Autoencoder, AutoencoderConfig
from etude.metrics.memorisation import nearest_training
from etude.models.dit import DiT, DiTConfig

from .page import Page, picture_grid, terminal_picture
from .sampling import Generator, balanced_labels, denoiser, open_autoencoder, to_uint8

HELD_OUT = 1 << 40  # positions of held-out samples: apart from every training position
NEAREST_LIMIT = 20_000  # training pictures that a grid's nearest neighbours are looked up among


class TrainRecipe(Recipe):
    """What the two kinds of training have in common."""

    data: DataConfig = option(..., "training pictures")
    held_out: str = option(..., "shards never trained on, for the held-out loss")
    optim: OptimConfig = option(OptimConfig(), "optimizer, learning rate and weight averages")
    strategy: StrategyConfig = option(
        StrategyConfig(), "DeepSpeed ZeRO or plain torch", affects_result=False
    )
    loop: LoopConfig = option(..., "length, batches and intervals")

    def default_weights(self) -> str:
        """The profile that pictures are drawn with: the longest average, or the raw weights."""
        return f"ema:{max(self.optim.ema)}" if self.optim.ema else "raw"


class AutoencoderRecipe(TrainRecipe):
    """Pictures to latents and back: diffusers' AutoencoderKL."""

    kind: Literal["autoencoder"]
    model: AutoencoderConfig = option(..., "the autoencoder")


class GridConfig(Config):
    """The sample grid of each evaluation."""

    per_class: int = option(4, "pictures per class", unit="pictures", gt=0, affects_result=False)
    max_classes: int = option(10, "classes shown", unit="classes", gt=0, affects_result=False)
    seed: int = option(0, "names the grid's initial noises", affects_result=False)


class LatentDiffusionRecipe(TrainRecipe):
    """A class-conditional diffusion transformer in an autoencoder's latents (or in pixels)."""

    kind: Literal["ldm"]
    autoencoder: str = option("", "an autoencoder's run or folder; empty trains in pixels")
    latents: LatentConfig = option(LatentConfig(), "the cache of latents")
    model: DiTConfig = option(..., "the diffusion transformer")
    objective: ObjectiveConfig = option(ObjectiveConfig(), "what is predicted, and when")
    drop_label: float = option(0.1, "share of samples trained without their label", ge=0, lt=1)
    sampler: SamplerConfig = option(SamplerConfig(), "how pictures are drawn")
    grid: GridConfig = option(GridConfig(), "the sample grid", affects_result=False)
    judge: str = option(
        "", "a frozen classifier's run; says which share of the grid it labels as asked",
        affects_result=False,
    )


@dataclass
class Look:
    """Where a job shows itself: log, page, and the job's place on a page shared by several."""

    log: Log
    page: Page
    order: int = 0


def train(
    recipe: TrainRecipe, run: Run, *, stopper: Stopper, look: Look, world: distributed.World
) -> dict:
    """Run the recipe to its end, or to a stop that a later call resumes.

    Returns:
        The result written to `result.json`; `{"stopped": reason}` when it was told to stop.
    """
    kind = _Autoencoder if recipe.kind == "autoencoder" else _LatentDiffusion
    job = kind(recipe, run, look, world)
    strategy = build_strategy(
        recipe.strategy, job.model, recipe.optim, world, recipe.loop.accumulation(world.size)
    )
    start = _resume(recipe, run, strategy, look.log, world)
    distributed.all_agree(
        world, {"recipe": fingerprint(recipe), "data": job.train_set.fingerprint, "start": start}
    )
    _announce(recipe, job, strategy, look.log, world)

    outcome = run_loop(
        config=recipe.loop,
        optim=recipe.optim,
        strategy=strategy,
        batches=lambda position: job.loader.batches(
            position, recipe.loop.global_batch, recipe.loop.micro_batch, world.rank, world.size
        ),
        losses=job.losses,
        world=world,
        log=look.log,
        checkpoints=run.checkpoints,
        stopper=stopper,
        start=start,
        extra=job.extra,
        evaluate=lambda images_seen: job.evaluate(strategy, images_seen),
    )
    if outcome.stopped:
        return {"stopped": outcome.stopped, "images_seen": outcome.images_seen}
    with strategy.weights(recipe.default_weights()):
        result = job.finish() if world.rank == 0 else {}
    return {"images_seen": outcome.images_seen} | result


def _resume(
    recipe: TrainRecipe, run: Run, strategy: Strategy, log: Log, world: distributed.World
) -> int:
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        return 0
    extra = load_checkpoint(checkpoint, strategy)
    log.rewind(extra["images_seen"])
    log.info(f"resumed at {extra['images_seen']:,} of {recipe.loop.images:,} images")
    return extra["images_seen"]


def _announce(
    recipe: TrainRecipe, job: "_Job", strategy: Strategy, log: Log, world: distributed.World
) -> None:
    loop, parameters = recipe.loop, sum(p.numel() for p in job.model.parameters())
    need = disk_need(parameters, len(recipe.optim.ema), loop.checkpoint, loop.images)
    log.info(
        f"{len(job.train_set):,} pictures, {parameters:,} parameters; global batch "
        f"{loop.global_batch} = {world.size} rank(s) x {loop.micro_batch} x "
        f"{loop.accumulation(world.size)} accumulated; {strategy.description}; checkpoints take "
        f"up to {need / 1e6:,.0f} MB"
    )


class _Job:
    """One kind of training: its data, model, loss, and what is looked at on the way."""

    model: nn.Module
    loader: object

    def __init__(
        self, recipe: TrainRecipe, run: Run, look: Look, world: distributed.World
    ) -> None:
        self.recipe, self.run, self.look, self.world = recipe, run, look, world
        self.train_set = ShardSet(recipe.data.shards)
        self.held_out_set = ShardSet(recipe.held_out)
        self.pictures = Loader(self.train_set, recipe.data, seed=recipe.seed)
        still = recipe.data.still()
        self.still_train = Loader(self.train_set, still, seed=recipe.seed)
        self.still_held_out = Loader(self.held_out_set, still, seed=recipe.seed)
        self.curves: dict[str, tuple[list[int], list[float]]] = {}

    def extra(self) -> dict:
        """What a checkpoint carries beside the tensors, so that nobody repeats it by hand."""
        return {
            "fingerprint": fingerprint(self.recipe),
            "classes": self.train_set.classes,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, strategy: Strategy, images_seen: int) -> None:
        raise NotImplementedError

    def finish(self) -> dict:
        raise NotImplementedError

    def held_out_images(self, limit: int) -> Batch:
        """The first held-out pictures in stored order, (n, C, H, W) in [-1, 1]."""
        return self.still_held_out.stored(np.arange(min(limit, len(self.held_out_set))))

    def profiles(self) -> list[str]:
        return ["raw"] + [self.recipe.default_weights()] * bool(self.recipe.optim.ema)

    def show_losses(self, title: str) -> None:
        """Training loss from metrics.jsonl, so that a resumed page shows the whole run."""
        rows = self.look.log.read_metrics("train")
        series = {"training": ([r["images_seen"] for r in rows], [r["loss"] for r in rows])}
        for name, label in (("held_out", "held out"),):
            rows = self.look.log.read_metrics(name)
            for profile in self.profiles():
                points = [(r["images_seen"], r[profile]) for r in rows if profile in r]
                if points:
                    series[f"{label}, {profile}"] = tuple(map(list, zip(*points)))
        self.look.page.curve(
            f"{self.recipe.kind}-loss", title, series, "images seen", "loss",
            order=self.look.order + 3, log=True,
        )


class _Autoencoder(_Job):
    def __init__(
        self, recipe: AutoencoderRecipe, run: Run, look: Look, world: distributed.World
    ) -> None:
        super().__init__(recipe, run, look, world)
        self.loader = self.pictures
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.model = Autoencoder.build(recipe.model)
        self.latent_shape = self.model.latent_shape(recipe.data.augment.image_size)

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        noise = rng.normal(
            self.recipe.seed, rng.Stream.POSTERIOR, batch.positions, self.latent_shape,
            self.world.device,
        )
        return forward(batch.images.to(self.world.device), noise)

    def evaluate(self, strategy: Strategy, images_seen: int) -> None:
        batch = self.held_out_images(256)
        found = {}
        for profile in self.profiles():
            with strategy.weights(profile) as model, torch.no_grad():
                if self.world.rank == 0:
                    found[profile] = float(self.losses(model, batch).mean())
                    mean, _ = model.encode(batch.images[:20].to(self.world.device))
                    rebuilt = model.decode(mean)
        if self.world.rank != 0:
            return
        self.look.log.metrics("held_out", images_seen, **found)
        pairs = np.concatenate([to_uint8(batch.images[:20]), to_uint8(rebuilt)])
        self.look.page.grid(
            "autoencoder-grid", "Held-out pictures and their reconstructions",
            picture_grid(pairs, columns=20, scale=2),
            "top: held-out pictures; below: the same through the autoencoder",
            f"{images_seen:,} images", order=self.look.order + 1,
        )
        self.show_losses("Autoencoder: reconstruction loss")
        self.look.page.write()

    def finish(self) -> dict:
        """Measure the latents' scale on training pictures and write diffusers' folder."""
        batch = self.still_train.stored(np.arange(min(1024, len(self.train_set))))
        with torch.no_grad():
            mean, std = self.model.encode(batch.images.to(self.world.device))
            scaled = self.model.with_scaling(*Autoencoder.estimate_scaling(mean, std))
            held_out = self.held_out_images(256).images.to(self.world.device)
            rebuilt = scaled.decode(scaled.encode(held_out)[0])
        scaled.save(self.run.folder / "autoencoder")
        error = float((rebuilt - held_out).square().mean().sqrt()) * 127.5
        return {
            "held_out_rms_error_levels": round(error, 3),
            "scaling_factor": scaled.config.scaling_factor,
            "shift_factor": scaled.config.shift_factor,
        }


class _LatentDiffusion(_Job):
    def __init__(
        self, recipe: LatentDiffusionRecipe, run: Run, look: Look, world: distributed.World
    ) -> None:
        super().__init__(recipe, run, look, world)
        self.autoencoder = (
            open_autoencoder(recipe.autoencoder, world.device) if recipe.autoencoder else None
        )
        self.objective = Objective(recipe.objective)
        self._check_shapes()
        self.loader = self._latent_loader() if self.autoencoder else self.pictures
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.model = DiT(recipe.model)
        self.judge = _open_judge(recipe.judge) if recipe.judge else None
        self._training_pictures: np.ndarray | None = None

    def _check_shapes(self) -> None:
        model, size = self.recipe.model, self.recipe.data.augment.image_size
        channels = self.recipe.data.augment.channels
        wanted = (
            self.autoencoder.latent_shape(size) if self.autoencoder else (channels, size, size)
        )
        if (model.in_channels, model.input_size, model.input_size) != tuple(wanted):
            raise UserError(
                f"the latents are {wanted[0]} x {wanted[1]} x {wanted[2]}: set model.in_channels="
                f"{wanted[0]} and model.input_size={wanted[1]} in recipe {self.recipe.name}"
            )
        if model.num_classes != len(self.train_set.classes):
            raise UserError(
                f"{self.recipe.data.shards} has {len(self.train_set.classes)} classes: set "
                f"model.num_classes={len(self.train_set.classes)} in recipe {self.recipe.name}"
            )

    def _latent_loader(self) -> LatentLoader:
        """The cache, written once by rank 0 and shared by every run with the same key."""
        recipe = self.recipe
        if self.world.rank == 0:
            encode_latents(
                self.pictures, recipe.latents, self.autoencoder, seed=recipe.seed,
                log=self.look.log,
            )
        distributed.barrier(self.world, "the cache of latents")
        return LatentLoader(self.pictures, recipe.latents, self.autoencoder, seed=recipe.seed)

    def clean(self, batch: Batch) -> Tensor:
        """The model's x0 of a batch: scaled latents, or pictures when there is no autoencoder."""
        if batch.latents is not None:
            return batch.latents.to(self.world.device)
        images = batch.images.to(self.world.device)
        if self.autoencoder is None:
            return images
        mean, _ = self.autoencoder.encode(images)
        return self.autoencoder.scale(mean)

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        seed, positions = self.recipe.seed, batch.positions
        x0 = self.clean(batch)
        noise = rng.normal(
            seed, rng.Stream.NOISE, positions, tuple(x0.shape[1:]), self.world.device
        )
        times = self.objective.times(self._uniform(rng.Stream.TIMESTEP, positions))
        dropped = self._uniform(rng.Stream.DROP_SEMANTIC, positions) < self.recipe.drop_label
        labels = torch.where(
            dropped | (batch.labels.to(dropped.device) < 0),
            self.recipe.model.num_classes,
            batch.labels.to(dropped.device),
        )
        return self.objective.losses(denoiser(forward), x0, noise, times, {"labels": labels})

    def _uniform(self, stream: rng.Stream, positions: np.ndarray) -> Tensor:
        values = rng.uniform(self.recipe.seed, stream, positions)[:, 0]
        return torch.as_tensor(values, dtype=torch.float32, device=self.world.device)

    def evaluate(self, strategy: Strategy, images_seen: int) -> None:
        by_profile = {}
        for profile in self.profiles():
            with strategy.weights(profile) as model, torch.no_grad():
                if self.world.rank == 0:
                    by_profile[profile] = self.held_out_losses(model)
                    generator = self.generator(model, f"{profile} at {images_seen:,} images")
                    samples = self.draw_grid(generator)
        if self.world.rank != 0:
            return
        means = {profile: float(np.mean(losses)) for profile, losses in by_profile.items()}
        self.look.log.metrics("held_out", images_seen, **means)
        self.show_grid(*samples, images_seen)
        self.show_losses("Diffusion: training and held-out loss")
        edges = [f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}" for b in range(BINS)]
        self.look.page.bars(
            "noise-levels", "Held-out loss per noise level",
            edges, by_profile, "time (0 is data, 1 is noise)", "loss", order=self.look.order + 4,
        )
        self.look.page.write()

    def held_out_losses(self, model: Callable) -> list[float]:
        """Mean loss in `BINS` equal slices of time, labels given, noise fixed per sample."""
        batch = self.held_out_images(256)
        x0 = self.clean(batch)
        positions = HELD_OUT + batch.positions
        noise = rng.normal(
            self.recipe.seed, rng.Stream.NOISE, positions, tuple(x0.shape[1:]), self.world.device
        )
        within = self._uniform(rng.Stream.TIMESTEP, positions)
        labels = batch.labels.to(self.world.device)
        labels = torch.where(labels < 0, self.recipe.model.num_classes, labels)
        return [
            float(
                self.objective.losses(
                    denoiser(model), x0, noise, (b + within) / BINS, {"labels": labels}
                ).mean()
            )
            for b in range(BINS)
        ]

    def generator(self, model: nn.Module, name: str) -> Generator:
        recipe = self.recipe
        size = recipe.model.input_size
        return Generator(
            model, self.objective, recipe.sampler, self.autoencoder, self.train_set.classes,
            (recipe.model.in_channels, size, size), name=name, device=self.world.device,
        )

    def draw_grid(self, generator: Generator) -> tuple[np.ndarray, np.ndarray]:
        grid = self.recipe.grid
        columns = min(max(generator.num_classes, 1), grid.max_classes)
        indices = np.arange(columns * grid.per_class)
        labels = balanced_labels(indices, columns)
        return generator.draw(indices, labels, seed=grid.seed)[0], labels

    def show_grid(self, samples: np.ndarray, labels: np.ndarray, images_seen: int) -> None:
        """The grid over time, each sample's nearest training picture, and a terminal preview."""
        columns = int(labels.max()) + 1
        agreement = ""
        if self.judge is not None:
            share = float((self.judge(samples) == labels).mean())
            self.look.log.metrics("grid", images_seen, labelled_as_asked=share)
            agreement = f"; the judge labels {share:.0%} as asked"
        self.look.page.grid(
            "samples", "Samples", picture_grid(samples, columns=columns, scale=4),
            f"one class a column{agreement}", f"{images_seen:,} images", order=self.look.order + 1,
        )
        nearest, distances = nearest_training(samples, self.training_pictures())
        self.look.page.pairs(
            "nearest", "Each sample beside its nearest training picture", samples[:columns],
            self.training_pictures()[nearest[:columns]], distances[:columns],
            order=self.look.order + 2,
        )
        self.look.log.info(f"{images_seen:,} images{agreement}")
        self.look.log.picture(terminal_picture(np.concatenate(list(samples[:columns]), axis=1)))

    def training_pictures(self) -> np.ndarray:
        """Training pictures as stored, un-augmented, (n, H, W, C) uint8."""
        if self._training_pictures is None:
            count = min(NEAREST_LIMIT, len(self.train_set))
            self._training_pictures = to_uint8(self.still_train.stored(np.arange(count)).images)
        return self._training_pictures

    def finish(self) -> dict:
        held_out = self.look.log.read_metrics("held_out")[-1]
        grid = self.look.log.read_metrics("grid")
        result = {"held_out_loss": held_out[self.recipe.default_weights()]}
        return result | ({"labelled_as_asked": grid[-1]["labelled_as_asked"]} if grid else {})


BINS = 8  # slices of time that the held-out loss is reported in


def _open_judge(source: str) -> Callable[[np.ndarray], np.ndarray]:
    """A frozen classifier: uint8 pictures (n, H, W, C) -> labels (n,) int64."""
    from etude.evaluation.judge import open_judge

    return open_judge(source).labels
