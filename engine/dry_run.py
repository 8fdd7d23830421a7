"""`--dry-run`: try a recipe on this machine without keeping anything.

Resolves the recipe, looks at its files, then runs one real step in a temporary folder: data,
forward, backward, optimizer, evaluation, checkpoint; the checkpoint is loaded again and, for a
generator, pictures are drawn from it. Latents are encoded for that step alone. Jobs of a study that
take runs from others are resolved only.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import Recipe, load_recipe
from etude.core.run import folder_name
from etude.evaluation.planned.folders import check_folders

from .fetching import ensure_inputs
from .jobs import run_recipe
from .sampling import balanced_labels, open_autoencoder, open_generator
from .study import StudyRecipe, instances, overrides
from .training.origin import resolved


def dry_run(recipe: Recipe, *, print_line: Callable[[str], None]) -> None:
    """Print what was tried and how it went; raises `UserError` where the recipe cannot run here."""
    if isinstance(recipe, StudyRecipe):
        _dry_run_study(recipe, print_line)
        return
    ensure_inputs(recipe, Log(None, quiet=True))
    recipe = resolved(recipe)
    if recipe.kind == "plan":
        check_folders(recipe)  # below it asks for fewer pictures
    print_line(f"{recipe.name}: resolved; its run would be runs/{folder_name(recipe)}")
    with tempfile.TemporaryDirectory(prefix="etude-dry-run-") as root:
        began = time.monotonic()
        folder, result = run_recipe(shrink(recipe, Path(root)), root=Path(root), quiet=True)
        if "stopped" in result:
            raise UserError(f"the dry run was stopped ({result['stopped']})")
        numbers = {k: v for k, v in result.items() if isinstance(v, (int, float))}
        print_line(f"one step, evaluated and saved in {time.monotonic() - began:.1f} s: {numbers}")
        if recipe.kind == "autoencoder":
            open_autoencoder(folder)
            print_line("the autoencoder was loaded again")
        elif recipe.kind == "ldm":
            generator = open_generator(folder)
            indices = np.arange(4)
            labels = balanced_labels(indices, generator.num_classes)
            images, _ = generator.draw(indices, labels, seed=recipe.seed)
            print_line(f"the checkpoint was loaded and {len(images)} pictures were drawn from it")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    print_line(f"peak memory of this process {peak:.2f} GB; nothing was kept")


def shrink(recipe: Recipe, root: Path) -> Recipe:
    """The same recipe cut down to its smallest real piece of work, writing below `root` only."""
    if recipe.kind in ("autoencoder", "ldm"):
        step = {"images": recipe.loop.global_batch, "log_every": 1, "evaluate_every": 1}
        changes = {"loop": recipe.loop.model_copy(update=step)}
        if recipe.kind == "ldm":
            changes["latents"] = recipe.latents.model_copy(update={"variants": 0})
            changes["text"] = recipe.text.model_copy(update={"ahead": False})
        elif recipe.adversarial:  # the step is one that the discriminator takes part in
            changes["adversarial"] = recipe.adversarial.model_copy(update={"start_images": 0})
    elif recipe.kind == "judge":
        changes = {"judge": recipe.judge.model_copy(update={"images": recipe.judge.batch_size})}
    elif recipe.kind == "practice":
        few = recipe.learner.model.num_classes
        changes = {
            "schedule": recipe.schedule.model_copy(update={"steps": 4}),
            "trigger": recipe.trigger.model_copy(update={"evaluate_every": 1, "patience": 1.0}),
            "start_samples": few,
            "round_samples": few,
            "max_rounds": 1,
            "max_samples": 0,
            "probe_samples": few,
        }
    elif recipe.kind == "theory":
        check = {"dimensions": 20, "least": 4, "most": 4}
        changes = {
            "check": recipe.check.model_copy(update=check),
            "toy": recipe.toy.model_copy(update={"seeds": 2}),
        }
    else:  # the figures need some pictures more than neighbours and halves
        changes = {"samples": min(recipe.samples, 128), "store": str(root / "features")}
        if recipe.kind == "plan":
            changes |= {"table": "", "watch_minutes": None}
            if recipe.screen is not None:
                few = {"samples": min(recipe.screen.samples, 32)}
                changes["screen"] = recipe.screen.model_copy(update=few)
    return recipe.model_copy(update=changes)


def _dry_run_study(study: StudyRecipe, print_line: Callable[[str], None]) -> None:
    placeholder: dict = {}
    for instance in instances(study):
        job = study.jobs[instance.job]
        placeholder[instance] = Path(f"<run of {instance.label}>")
        recipe = load_recipe(job.recipe, overrides(study, instance, placeholder))
        if job.takes:
            sources = ", ".join(job.takes.values())
            print_line(f"{instance.label}: resolved; takes runs from {sources}")
        else:
            dry_run(recipe, print_line=print_line)
