"""One rank of a job: `adversarial.py RECIPE ROOT NAME:OVERRIDE[,OVERRIDE] ...`."""

import sys
from pathlib import Path

from etude.core import distributed
from etude.core.recipe import load_recipe
from etude.jobs import run_recipe


def main() -> None:
    recipe, root, *runs = sys.argv[1:]
    world = distributed.start()
    for run in runs:
        name, _, overrides = run.partition(":")
        loaded = load_recipe(recipe, overrides.split(","))
        run_recipe(loaded, root=Path(root), name=name, quiet=True, world=world)
    Path(root, f"done-{world.rank}").touch()


if __name__ == "__main__":
    main()
