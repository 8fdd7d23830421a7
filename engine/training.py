"""Train an autoencoder or a latent diffusion model from a recipe: `etude train` ends up here.

`train` is one road for both kinds: open the data, build the model and its strategy, resume the
newest complete checkpoint, run the loop, write the result. What differs between the kinds is the
loss of a micro batch and what is looked at on the way; each kind is one class below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from etude.core import distributed, rng
from etude.core.checkpoint import disk_need, latest_checkpoint, load_checkpoint
from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.log import Log, read_metrics
from etude.core.loop import LoopConfig, run_loop
from etude.core.optim import OptimConfig
from etude.core.recipe import Recipe, fingerprint
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.core.strategy import Strategy, StrategyConfig, build_strategy
from etude.data.latents import LatentLoader, encode_latents, latents_plan
from etude.data.loader import Batch, DataConfig, Loader
from etude.data.shards import ShardSet
from etude.data.still import still_loader
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig
from etude.external.diffusers import Autoencoder, AutoencoderConfig, estimate_scaling
from etude.metrics.prdc import distances
from etude.models.dit import DiT, DiTConfig

from .page import Page
from .pictures import picture_grid, terminal_picture
from .sampling import Generator, balanced_labels, denoiser, open_autoencoder, to_uint8

HELD_OUT = 1 << 40  # positions of held-out samples: apart from every training position
HELD_OUT_PICTURES = 256
NEAREST_LIMIT = 20_000  # training pictures that a grid's nearest neighbours are looked up among
BINS = 8  # equal slices of time that the held-out loss is reported in


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


class LatentConfig(Config):
    """The cache of latents that training reads in place of pictures."""

    variants: int = option(1, "augmentations kept of each picture", gt=0)
    dtype: Literal["float32", "float16"] = option("float32", "type of the stored latents")
    folder: str = option(
        "data/latents", "where caches live, each under its key", affects_result=False
    )


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
    sampler: SamplerConfig = option(..., "how pictures are drawn")
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
    job = (_Autoencoder if recipe.kind == "autoencoder" else _LatentDiffusion)(
        recipe, run, look, world
    )
    loop = recipe.loop
    strategy = build_strategy(
        recipe.strategy, job.model, recipe.optim, world, loop.accumulation(world.size),
        loop.micro_batch,
    )
    start = _resume(run, strategy, loop, look.log, world)
    facts = {"recipe": fingerprint(recipe), "data": job.train_set.fingerprint, "start": str(start)}
    distributed.all_agree(world, distributed.local_facts(**facts), run.folder)
    _announce(job, look.log)

    outcome = run_loop(
        config=loop,
        optim=recipe.optim,
        strategy=strategy,
        batches=lambda position: job.loader.batches(
            position, loop.global_batch, loop.micro_batch, world.rank, world.size
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
    with strategy.weights(recipe.default_weights()) as model:
        result = job.finish(model) if world.rank == 0 else {}
    distributed.barrier(world, "the result")
    return {"images_seen": outcome.images_seen} | result


def _resume(
    run: Run, strategy: Strategy, loop: LoopConfig, log: Log, world: distributed.World
) -> int:
    found = latest_checkpoint(run.checkpoints) if world.rank == 0 else None
    name = distributed.exchange(world, "newest checkpoint", found and found.name)[0]
    if name is None:
        return 0
    # Rank 0 has just compared every hash.
    images_seen = load_checkpoint(run.checkpoints / name, strategy, verify=False)["images_seen"]
    log.rewind(images_seen + 1)
    log.info(f"resumed at {images_seen:,} of {loop.images:,} images")
    return images_seen


def _announce(job: "_Job", log: Log) -> None:
    recipe, world, loop = job.recipe, job.world, job.recipe.loop
    parameters = sum(p.numel() for p in job.model.parameters())
    strategy = recipe.strategy
    means = "plain torch" if strategy.kind == "local" else f"ZeRO stage {strategy.stage or 1}"
    log.info(
        f"{len(job.train_set):,} pictures, {parameters:,} parameters, {means} in "
        f"{strategy.precision}; global batch {loop.global_batch} = {world.size} rank(s) x "
        f"{loop.micro_batch} x {loop.accumulation(world.size)} accumulated"
    )
    log.info(job.loader_reason)
    log.info(disk_need(parameters, len(recipe.optim.ema), loop.checkpoint, loop.images).sentence)


class _Job:
    """One kind of training: its data, model, loss, and what is looked at on the way."""

    model: nn.Module

    def __init__(
        self, recipe: TrainRecipe, run: Run, look: Look, world: distributed.World
    ) -> None:
        self.recipe, self.run, self.look, self.world = recipe, run, look, world
        self.train_set = recipe.data.open()
        self.held_out_set = ShardSet(recipe.held_out)
        self.pictures = Loader(self.train_set, recipe.data, seed=recipe.seed, device=world.device)
        self.loader = self.pictures
        self.loader_reason = self.pictures.decoder_reason

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, strategy: Strategy, images_seen: int) -> None:
        raise NotImplementedError

    def finish(self, model: nn.Module) -> dict:
        raise NotImplementedError

    def extra(self) -> dict:
        """What a checkpoint carries beside the tensors, so that nobody repeats it by hand."""
        return {
            "fingerprint": fingerprint(self.recipe),
            "classes": self.train_set.classes,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def still(self, data: ShardSet, limit: int) -> Batch:
        """The first pictures of a set in stored order, not augmented, (n, C, H, W) in [-1, 1]."""
        loader = still_loader(data, self.recipe.data, device=self.world.device)
        try:
            return loader.fetch(np.arange(min(limit, len(data))))
        finally:
            loader.close()

    @property
    def profiles(self) -> list[str]:
        """The weights that are looked at: the raw ones and the longest average."""
        return list(dict.fromkeys(["raw", self.recipe.default_weights()]))

    def show_losses(self, id: str, title: str) -> None:
        """Loss curves from metrics.jsonl, so that a resumed page shows the whole run."""
        path = self.run.folder / "metrics.jsonl"
        rows = read_metrics(path, "train")
        series = {"training": ([r["images_seen"] for r in rows], [r["loss"] for r in rows])}
        rows = read_metrics(path, "held_out")
        for profile in self.profiles:
            values = [row[profile] for row in rows]
            series[f"held out, {profile}"] = ([row["images_seen"] for row in rows], values)
        self.look.page.curve(
            id, title, series, "images seen", "loss", log=True, order=self.look.order + 3
        )


class _Autoencoder(_Job):
    def __init__(
        self, recipe: AutoencoderRecipe, run: Run, look: Look, world: distributed.World
    ) -> None:
        super().__init__(recipe, run, look, world)
        self.model = Autoencoder.build(recipe.model, seed=recipe.seed)
        side = recipe.data.augment.image_size // self.model.downscale
        self.latent_shape = (recipe.model.latent_channels, side, side)
        if world.rank == 0:
            look.page.chapter(
                "autoencoder", "Autoencoder", "Pictures to latents and back.", order=look.order
            )

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        noise = rng.normal(
            self.recipe.seed, rng.Stream.POSTERIOR, batch.positions, self.latent_shape,
            self.world.device,
        )
        return forward(batch.images, noise)

    def evaluate(self, strategy: Strategy, images_seen: int) -> None:
        batch = self.still(self.held_out_set, HELD_OUT_PICTURES)
        found = {}
        for profile in self.profiles:
            with strategy.weights(profile) as model, torch.no_grad():
                if self.world.rank == 0:
                    found[profile] = float(self.losses(model, batch).mean())
                    rebuilt = model.decode(model.encode(batch.images[:20])[0])
        if self.world.rank != 0:
            return
        self.look.log.metrics("held_out", images_seen, **found)
        pairs = np.concatenate([to_uint8(batch.images[:20]), to_uint8(rebuilt)])
        self.look.page.grid(
            "reconstructions", "Held-out pictures and their reconstructions",
            picture_grid(pairs, columns=20),
            "Above: pictures never trained on. Below: the same after the autoencoder.",
            f"{images_seen:,} images", order=self.look.order + 1,
        )
        self.show_losses("autoencoder-loss", "Reconstruction loss")
        self.look.page.write()

    def finish(self, model: Autoencoder) -> dict:
        """Measure the latents' scale on training pictures and write diffusers' folder."""
        pictures = self.still(self.train_set, 1024).images
        held_out = self.still(self.held_out_set, HELD_OUT_PICTURES).images
        with torch.no_grad():
            scaling, shift = estimate_scaling(*model.encode(pictures))
            rebuilt = model.decode(model.encode(held_out)[0])
        model.set_scaling(scaling, shift)
        model.save(self.run.folder / "autoencoder")
        error = float((rebuilt - held_out).square().mean().sqrt()) * 127.5
        return {
            "held_out_rms_error_levels": round(error, 3),
            "scaling_factor": scaling,
            "shift_factor": shift,
        }


class _LatentDiffusion(_Job):
    def __init__(
        self, recipe: LatentDiffusionRecipe, run: Run, look: Look, world: distributed.World
    ) -> None:
        super().__init__(recipe, run, look, world)
        self.autoencoder, self.autoencoder_key = (
            open_autoencoder(recipe.autoencoder, world.device) if recipe.autoencoder else (None, "")
        )
        self._check_shapes()
        self.objective = Objective(recipe.objective)
        if self.autoencoder is not None:
            self.loader = self._latent_loader()
        self.model = DiT(recipe.model, seed=recipe.seed)
        self.judge = _open_judge(recipe.judge) if recipe.judge else None
        self._training_pictures: np.ndarray | None = None
        if world.rank == 0:
            look.page.chapter(
                "diffusion", "Diffusion model", recipe.description, order=look.order
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
            "num_classes": len(self.train_set.classes),
        }
        wrong = [f"model.{k}={v}" for k, v in wanted.items() if getattr(model, k) != v]
        if wrong:
            raise UserError(
                f"recipe {self.recipe.name} does not fit {self.recipe.data.shards}"
                f"{' and its autoencoder' if self.autoencoder else ''}: set {' '.join(wrong)}"
            )

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
        encode_latents(
            self.train_set, recipe.data, autoencoder.encode, folder, self.autoencoder_key,
            recipe.seed, self.look.log, **options,
            device=world.device, rank=world.rank, world=world.size,
        )
        distributed.barrier(world, "the cache of latents")
        self.loader_reason = f"latents from {folder}, encoded with: {self.loader_reason}"
        return LatentLoader(
            folder, seed=recipe.seed, plan=plan, order=recipe.data.order, device=world.device,
            prefetch=recipe.data.prefetch,
        )

    def clean(self, batch: Batch) -> Tensor:
        """The model's x0: cached latents, latents of a batch's pictures, or the pictures."""
        if batch.latents is not None:
            return batch.latents
        if self.autoencoder is None:
            return batch.images
        return self.autoencoder.scale(self.autoencoder.encode(batch.images)[0])

    def losses(self, forward: Callable, batch: Batch) -> Tensor:
        seed, positions, device = self.recipe.seed, batch.positions, self.world.device
        x0 = self.clean(batch)
        noise = rng.normal(seed, rng.Stream.NOISE, positions, tuple(x0.shape[1:]), device)
        times = self.objective.times(self._uniform(rng.Stream.TIMESTEP, positions))
        dropped = self._uniform(rng.Stream.DROP_SEMANTIC, positions) < self.recipe.drop_label
        condition = {"labels": torch.where(dropped, self.null_label, self._labels(batch))}
        return self.objective.losses(denoiser(forward), x0, noise, times, condition)

    @property
    def null_label(self) -> int:
        return self.recipe.model.num_classes

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.labels.to(self.world.device)
        return torch.where(labels < 0, self.null_label, labels)

    def _uniform(self, stream: rng.Stream, positions: np.ndarray) -> Tensor:
        values = rng.uniform(self.recipe.seed, stream, positions)[:, 0]
        return torch.as_tensor(values, dtype=torch.float32, device=self.world.device)

    def evaluate(self, strategy: Strategy, images_seen: int) -> None:
        losses = {}
        for profile in self.profiles:
            with strategy.weights(profile) as model, torch.no_grad():
                if self.world.rank == 0:
                    losses[profile] = self.held_out_losses(model)
                    if profile == self.recipe.default_weights():
                        samples, labels = self.draw_grid(model)
        if self.world.rank != 0:
            return
        means = {profile: float(np.mean(values)) for profile, values in losses.items()}
        self.look.log.metrics("held_out", images_seen, **means)
        self.show_grid(samples, labels, images_seen)
        self.show_losses("diffusion-loss", "Training and held-out loss")
        self.look.page.bars(
            "noise-levels", "Held-out loss per noise level",
            [f"{b / BINS:.2f}-{(b + 1) / BINS:.2f}" for b in range(BINS)], losses,
            "time (0 is data, 1 is noise)", "loss", order=self.look.order + 4,
        )
        self.look.page.write()

    def held_out_losses(self, model: Callable) -> list[float]:
        """Mean loss in each of `BINS` slices of time, labels given, noise fixed per sample."""
        batch = self.still(self.held_out_set, HELD_OUT_PICTURES)
        x0, positions = self.clean(batch), HELD_OUT + batch.positions
        noise = rng.normal(
            self.recipe.seed, rng.Stream.NOISE, positions, tuple(x0.shape[1:]), self.world.device
        )
        within = self._uniform(rng.Stream.TIMESTEP, positions)
        condition = {"labels": self._labels(batch)}
        means = []
        for slice_ in range(BINS):
            times = self.objective.schedule.snap((slice_ + within) / BINS)
            losses = self.objective.losses(denoiser(model), x0, noise, times, condition)
            means.append(float(losses.mean()))
        return means

    def draw_grid(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """The grid's pictures and labels, a class a column, the same noises every time."""
        recipe, grid = self.recipe, self.recipe.grid
        generator = Generator(
            model, self.objective, recipe.sampler, self.autoencoder, self.train_set.classes,
            (recipe.model.in_channels, recipe.model.input_size, recipe.model.input_size),
            device=self.world.device,
        )
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
            "samples", "Samples", picture_grid(samples, columns=columns),
            f"A class a column, weights {self.recipe.default_weights()}{agreement}.",
            f"{images_seen:,} images", order=self.look.order + 1,
        )
        first = samples[:columns]
        train = self.training_pictures()
        sides = [torch.from_numpy(side).flatten(1).double() for side in (first, train)]
        distance, row = distances(*sides).min(1)
        self.look.page.pairs(
            "nearest", "Samples and their nearest training pictures", first,
            train[row.numpy()], distance.tolist(), order=self.look.order + 2,
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
        result = {"held_out_loss": last[self.recipe.default_weights()]}
        grid = read_metrics(metrics, "grid")
        return result | ({"labelled_as_asked": grid[-1]["labelled_as_asked"]} if grid else {})


def _open_judge(source: str) -> Callable[[np.ndarray], np.ndarray]:
    """A frozen classifier: uint8 pictures (n, H, W, C) -> labels (n,) int64."""
    from etude.evaluation.judge import open_judge

    return open_judge(source).labels
