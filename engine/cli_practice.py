"""The verb `practice` of the command: running its recipes, and what its pools are good for.

`etude practice RECIPE` runs; `rebuild` and `export` take a pool's folder. Nothing here is needed
before its word is typed, so what does the work is imported inside the functions.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from etude.cli_output import say
from etude.cli_recipe import DryRun, Overrides, RecipeName, RunName, run_command

_RUN = "run"


class _RecipeOrWord(TyperGroup):
    """A first word that names no command is a recipe."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args and args[0] in self.commands and args[0] != _RUN:
            return super().resolve_command(ctx, args)
        return _RUN, self.commands[_RUN], args


app = typer.Typer(
    cls=_RecipeOrWord,
    no_args_is_help=True,
    subcommand_metavar="RECIPE [FIELD=VALUE]... | COMMAND [ARGS]...",
    context_settings={"ignore_unknown_options": True},
    help="Train a classifier on pictures that a generator draws for it (Deliberate Practice).\n\n"
    "Example: etude practice practice/digits generator=runs/ldm-digits-0123456789\n\n"
    "Without any picture, what its theory says: etude practice practice/theory\n\n"
    "On several processes: torchrun --nproc-per-node 8 -m etude practice RECIPE",
)


@app.command(_RUN, hidden=True)
def run(
    recipe: RecipeName, overrides: Overrides = None, run: RunName = None, dry_run: DryRun = False
) -> None:
    """Train a classifier on pictures that a generator draws for it (Deliberate Practice).

    Example: etude practice practice/digits generator=runs/ldm-digits-0123456789
    """
    run_command(recipe, overrides, run, ("practice", "theory"), dry_run)


PoolFolder = Annotated[Path, typer.Argument(help="A pool's folder, such as RUN/pools/practice.")]


@app.command("rebuild")
def rebuild(
    pool: PoolFolder,
    to: Annotated[
        Path | None, typer.Option(help="Folder to draw into [default: POOL-rebuilt].")
    ] = None,
    generator: Annotated[
        str, typer.Option(help="Where the generator lies [default: where the pool says].")
    ] = "",
) -> None:
    """Draw a pool again from its manifest, and say how many pictures are identical.

    A pool may be sent without its shards: rsync --exclude '*.tar*'

    Example: etude practice rebuild runs/practice-digits-0123456789/pools/practice
    """
    from etude.core.log import Log
    from etude.core.signals import Stopper
    from etude.practising import rebuild_pool

    log, to = Log(None), to or pool.with_name(f"{pool.name}-rebuilt")
    with Stopper() as stopper:
        log.on_advance = stopper.check
        say(f"{rebuild_pool(pool, to, generator, log)}; in {to}")


@app.command("export")
def export(
    pool: PoolFolder,
    to: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write a pool as a folder of PNG files per class, with a table.

    Example: etude practice export runs/practice-digits-0123456789/pools/practice pictures
    """
    from etude.core.log import Log
    from etude.practice.rebuild import export as write

    say(f"{write(pool, to, Log(None)):,} pictures in {to}")
