"""What every verb that runs a recipe shares: its arguments, and from them to the job.

Called by cli.py and cli_practice.py.
"""

from pathlib import Path
from typing import Annotated

import typer

from etude.cli_output import print_result, say
from etude.core.errors import UserError
from etude.core.signals import EXIT_REQUEUE

RecipeName = Annotated[
    str, typer.Argument(help="A shipped recipe such as ldm/digits, or the path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields to change, dotted: optim.lr=1e-4 loop.images=50000."),
]
RunName = Annotated[
    str | None,
    typer.Option("--run", help="The run folder's name under runs/ [default: from the recipe]."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        help="Resolve, check data and files, take one step, save, load, sample; keeps nothing."
    ),
]

# What to type for a recipe of a kind.
VERBS = dict.fromkeys(("autoencoder", "ldm", "judge", "study"), "train")
VERBS |= {"theory": "practice", "plan": "evaluate"}
VERBS |= {kind: kind for kind in ("practice", "extract", "evaluate")}


def run_command(
    recipe: str,
    overrides: list[str] | None,
    run: str | None,
    kinds: tuple[str, ...],
    dry_run: bool = False,
) -> None:
    """Run a recipe of one of these kinds, or try it out, and print its result."""
    from etude.core.recipe import load_recipe

    place, fields = _place_of_run(overrides or [])
    loaded = load_recipe(recipe, fields)
    if loaded.kind not in kinds:
        raise UserError(
            f"recipe {recipe} is of kind {loaded.kind!r}: type "
            f"`etude {VERBS[loaded.kind]} {recipe}`"
        )
    if dry_run:
        from etude.dry_run import dry_run as try_out

        try_out(loaded, print_line=say)
        return
    from etude.core import distributed
    from etude.jobs import run_recipe

    if run and "name" in place:
        raise UserError(f"--run {run} and run={place['name']} name two runs: give one of them")
    world = distributed.start()
    folder, result = run_recipe(loaded, world=world, **({"name": run} | place))
    if world.rank == 0:
        print_result(folder, result)
    if world.size > 1:
        distributed.stop(world, result.get("lost", ()))
    if "stopped" in result:
        raise typer.Exit(EXIT_REQUEUE)


def _place_of_run(overrides: list[str]) -> tuple[dict, list[str]]:
    """`run=`, `root=` and `resume_with_changes=` are about the folder; the rest is the recipe's."""
    place: dict = {}
    fields = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "run":
            place["name"] = value
        elif name == "root":
            place["root"] = Path(value)
        elif name == "resume_with_changes":
            if value not in ("true", "false"):
                raise UserError(f"resume_with_changes={value}: type true or false")
            place["resume_with_changes"] = value == "true"
        else:
            fields.append(override)
    return place, fields
