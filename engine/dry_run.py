"""`--dry-run`: try a recipe on this machine without keeping anything.

Resolves the recipe, looks at its files, then runs one real step in a temporary folder: data, forward,
backward, optimizer, evaluation, checkpoint; the checkpoint is loaded again and, for a generator,
pictures are drawn from it. Jobs of a study that take runs from others are resolved only.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from etude.core.log import Log
from etude.core.recipe import Recipe, load_recipe
from etude.core.run import folder_name

from .fetching import ensure_inputs
from .jobs import run_recipe
from .sampling import balanced_labels, open_autoencoder, open_generator
from .study import StudyRecipe, instances, overrides


def dry_run(recipe: Recipe, *, print_line: Callable[[str], None]) -> None:
    """Print what was tried and how it went; raises `UserError` where the recipe cannot run here."""
    if isinstance(recipe, StudyRecipe):
        _dry_run_study(recipe, print_line)
        return
    ensure_inputs(recipe, Log(None, quiet=True))
    print_line(f"{recipe.name}: resolved; its run would be runs/{folder_name(recipe)}")
    small = shrink(recipe)
    with tempfile.TemporaryDirectory(prefix="etude-dry-run-") as root:
        began = time.monotonic()
        folder, result = run_recipe(small, root=Path(root), quiet=True)
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


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe cut down to its smallest real piece of work."""
    if recipe.kind in ("autoencoder", "ldm"):
        loop = recipe.loop
        step = {"images": loop.global_batch, "log_every": 1, "evaluate_every": 1}
        return recipe.model_copy(update={"loop": loop.model_copy(update=step)})
    return recipe.shrunk()


def _dry_run_study(study: StudyRecipe, print_line: Callable[[str], None]) -> None:
    placeholder: dict = {}
    for instance in instances(study):
        job = study.jobs[instance.job]
        placeholder[instance] = Path(f"<run of {instance.label}>")
        resolved = load_recipe(job.recipe, overrides(study, instance, placeholder))
        if job.takes:
            print_line(f"{instance.label}: resolved; takes runs from {', '.join(job.takes.values())}")
        else:
            dry_run(resolved, print_line=print_line)
