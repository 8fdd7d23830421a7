"""Plans on real runs: checkpoints and guidance, watching, the page, prompts and their pictures."""

import base64
import csv
import importlib.util
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from etude import cli
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.diffusion.samplers import SamplerConfig
from etude.evaluation.datasets import Prompt, Prompts, open_data_set
from etude.evaluation.generators import Wanted
from etude.evaluation.picture_set import Stages
from etude.evaluation.planned import running
from etude.evaluation.planned.drawing import (
    BLOCK,
    DrawnPictures,
    class_prompts,
    mixed,
    noise_position,
)
from etude.evaluation.table import read_table
from etude.generators import PromptedGenerator, run_generator
from etude.jobs import run_recipe
from etude.page_vote import rounds, vote_html
from etude.pictures import enlarge
from etude.sampling import open_generator

DIGITS = [str(n) for n in range(10)]
QUIET = Log(None, quiet=True)

# Draws flat grey pictures, larger than those of the runs.
FLAT = """
import numpy as np
from etude.evaluation.generators import generator

class Flat:
    asked_by_text, classes, name = False, [str(n) for n in range(10)], "flat"
    fingerprint, protocol = "flat", {"rounding": "none"}

    def draw(self, indices, labels, *, seed, captions, positions):
        return np.broadcast_to(labels[:, None, None, None] * 20, (len(labels), 24, 24, 1)).astype(
            np.uint8
        )

@generator("flat")
def flat(wanted):
    return Flat()
"""


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, and two runs of diffusion in its latents that keep three checkpoints each."""
    root = tmp_path_factory.mktemp("planning")
    short = ["loop.images=144", "loop.evaluate_every=144"]

    def run(name: str, recipe: str, *overrides: str) -> None:
        loaded = load_recipe(recipe, [*short, *overrides])
        run_recipe(loaded, root=root, name=name, quiet=True)

    run("ae", tiny.autoencoder)
    latent = [f"autoencoder={root}/ae", f"latents.folder={root}/cache", "model.in_channels=2"]
    latent += ["model.input_size=8", "model.patch_size=2", "optim.lr=5e-3"]
    latent += ["loop.checkpoint.every_images=48", "loop.checkpoint.keep_last=9"]
    run("small", tiny.ldm, *latent)
    run("other", tiny.ldm, *latent, "seed=1")
    return root


def close(one: np.ndarray, two: np.ndarray) -> bool:
    """At most 2 levels apart, in at most 1% of the pixels."""
    apart = np.abs(one.astype(int) - two.astype(int))
    return apart.max() <= 2 and (apart > 0).mean() <= 0.01


@pytest.fixture
def etude(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Call the command in this process and an empty folder: (status, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["etude", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def write_plan(path: Path, tiny, models: dict, **changes) -> Path:
    fields = {
        "kind": "plan",
        "models": models,
        "data_sets": {
            "digits": {"kind": "shards", "folder": str(tiny.folder / "train"), "prompts": 10}
        },
        "metrics": ["frechet@pixels"],
        "extractors": {"pixels": {"options": {"input_size": 8}}},
        "samples": 40,
        "channels": 1,
        "interval": {"replicates": 10},
        "by_group": False,
        "shown": 3,
        "store": str(path.parent / "store"),
    }
    path.write_text(yaml.safe_dump(fields | changes, sort_keys=False))
    return path


class Votes(HTMLParser):
    """The JSON of a page's votes, and every element's name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.names, self._inside = [], [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.names.append(tag)
        self._inside = ("class", "votes") in attributes
        if self._inside:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += data


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


def test_a_plan_on_real_runs(tiny, runs, etude, tmp_path) -> None:
    """Two checkpoints and two scales of one run, another run and a generator of another size."""
    (tmp_path / "flat.py").write_text(FLAT)
    two_steps = {"options": {"steps": 2, "method": "ddim"}}
    models = {
        "small": {"source": str(runs / "small"), "checkpoints": [144, 48], **two_steps},
        "other": {"source": str(runs / "other"), **two_steps},
        "flat": {"kind": "flat", "source": ""},
    }
    path = write_plan(
        tmp_path / "plan.yaml", tiny, models, guidance=[1.0, 4.0], files=[str(tmp_path / "flat.py")]
    )
    status, out, err = etude("evaluate", path, "--run", "plan")
    assert status == 0, err
    run = tmp_path / "runs/plan"
    result = json.loads((run / "result.json").read_text())
    titles = [
        f"{name}, guidance {scale}"
        for name in ("small, at 48 images", "small, at 144 images", "other, at 144 images", "flat")
        for scale in (1, 4)
    ]
    assert result["candidates"] == titles
    rows = read_table(run).rows
    found = {(r.model, r.images_seen, r.guidance): r.value for r in rows}
    expected = {("small", s, g) for s in (48, 144) for g in (1.0, 4.0)}
    expected |= {("other", 144, g) for g in (1.0, 4.0)} | {("flat", None, g) for g in (1.0, 4.0)}
    assert found.keys() == expected and len(rows) == 8
    assert len(set(found.values())) == 7
    written = list(csv.DictReader((run / "results/results.csv").open()))
    assert {float(row["value"]) for row in written} == set(found.values())

    # What the run draws at this checkpoint and scale, asked in person.
    generator = open_generator(runs / "small", at=48)
    settings = generator.sampler.model_dump()
    settings |= {"guidance_scale": 4.0, "steps": 2, "method": "ddim"}
    generator.sampler = SamplerConfig(**settings)
    prompts = opened_prompts(tiny)
    places = np.array([noise_position(prompts[i % 10].id, i // 10) for i in range(BLOCK)])
    labels = np.array([prompts[i % 10].label for i in range(BLOCK)])
    drawn = generator.draw(np.arange(BLOCK), labels, seed=0, positions=places)[0]
    kept = [np.load(p) for p in sorted((run / "pictures").glob("*/*.npy"))]
    assert sum(np.array_equal(block, drawn) for block in kept) == 1
    assert len(kept) == 7  # guidance changes no flat picture: they are drawn once

    page = (run / "page.html").read_text()
    parsed = Votes(page)
    (text,) = parsed.found
    votes = json.loads(text)
    assert votes["makers"] == titles and len(votes["prompts"]) == 3
    sides = {decoded(uri).shape for of_maker in votes["pictures"] for uri in of_maker}
    assert sides == {(72, 72, 3)}  # 24 enlarged thrice, and 16 four times to 64, then to 72
    place = titles.index("flat, guidance 4")
    flat = [decoded(uri) for uri in votes["pictures"][place]]
    assert [set(image.ravel().tolist()) for image in flat] == [{20 * n} for n in labels[:3]]
    mine = decoded(votes["pictures"][titles.index("small, at 48 images, guidance 4")][1])
    shown = Image.fromarray(enlarge(np.repeat(drawn[1], 3, 2), 4)).resize((72, 72))
    assert np.array_equal(mine, np.asarray(shown))
    for figure in ("Fréchet distance", "blind vote", "the same prompts and seeds"):
        assert figure in page
    assert "verdicts" in result and all(line in out + err for line in result["verdicts"])


def opened_prompts(tiny) -> list[Prompt]:
    return list(mixed(open_data_set("shards", tiny.folder / "train").prompts(), 10).prompts)


def test_the_votes_of_a_page() -> None:
    """Every pair of every prompt once, sides fair, whatever the prompts say."""
    found = rounds(10, 4)
    assert len(found) == 60 == len({(p, *sorted(pair)) for p, *pair in found})
    assert all(left != right for _, left, right in found)
    assert 18 <= sum(left < right for _, left, right in found) <= 42  # 60 tosses: 3.1 sigma
    assert found == rounds(10, 4) and found != sorted(found)
    assert rounds(20, 4)[:60] == rounds(20, 4)
    evil = "</script><!--<script>alert('1')</script> & \"quotes\""
    page = vote_html('a"b', [evil], ["one", "<b>two"], [["x"], ["y"]], lambda name: f"data:{name}")
    parsed = Votes(page)
    assert parsed.names.count("script") == 1 and "b" not in parsed.names
    assert json.loads(parsed.found[0]) == {
        "prompts": [evil],
        "makers": ["one", "<b>two"],
        "pictures": [["data:x"], ["data:y"]],
        "rounds": [list(one) for one in rounds(1, 2)],
    }


def copied(runs: Path, to: Path, *checkpoints: int) -> Path:
    """A run of its own with some checkpoints of `small`."""
    shutil.copytree(runs / "small", to, ignore=shutil.ignore_patterns("checkpoints"))
    (to / "checkpoints").mkdir()
    for seen in checkpoints:
        keep(runs, to, seen)
    return to


def keep(runs: Path, run: Path, seen: int) -> None:
    name = f"step-{seen:012d}"
    shutil.copytree(runs / "small/checkpoints" / name, run / "checkpoints" / name)


class Clock:
    """Time that passes in `sleep` alone; something happens at some times."""

    def __init__(self, events: dict[float, Callable[[], None]]) -> None:
        self.now, self.events = 0.0, events

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [time for time in self.events if time <= self.now]:
            self.events.pop(due)()


def test_watching_takes_checkpoints_as_they_come(tiny, runs, etude, tmp_path, monkeypatch) -> None:
    """None yet, then one, then another in place of the first; then the same command again."""
    source = copied(runs, tmp_path / "training")
    model = {"m": {"source": str(source), "checkpoints": "all", "options": {"steps": 1}}}
    path = write_plan(tmp_path / "plan.yaml", tiny, model)
    status, _, err = etude("evaluate", path, "--run", "plan")
    assert status == 2 and "training has no complete checkpoint yet" in err
    table = tmp_path / "runs/plan/results"
    seen: list[int] = []

    def evaluated() -> list[int]:
        return sorted(row.images_seen for row in read_table(table).rows)

    def second() -> None:
        seen.extend(evaluated())
        keep(runs, source, 96)

    clock = Clock({40.0: lambda: keep(runs, source, 48), 130.0: second})
    monkeypatch.setattr(running, "time", clock)
    status, _, err = etude("evaluate", path, "--run", "plan", "--watch", "2")
    assert status == 0, err
    assert seen == [48] and evaluated() == [48, 96]
    # Found in the look after 130 s, at 150; then two minutes without another, and one look more.
    assert clock.now == 300.0 and not clock.events
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/plan/pictures").rglob("*.npy")}
    assert len(made) == 2

    rows = {p: p.stat().st_mtime_ns for p in Path(table).rglob("rows/*.json")}
    assert etude("evaluate", path, "--run", "plan")[0] == 0
    assert rows == {p: p.stat().st_mtime_ns for p in Path(table).rglob("rows/*.json")}
    keep(runs, source, 144)
    assert etude("evaluate", path, "--run", "plan")[0] == 0
    assert evaluated() == [48, 96, 144]
    assert {p: p.stat().st_mtime_ns for p in made} == made


def test_a_checkpoint_that_its_run_drops_is_left_out(
    tiny, runs, etude, tmp_path, monkeypatch
) -> None:
    source = copied(runs, tmp_path / "training", 48, 96)
    model = {"m": {"source": str(source), "checkpoints": "all", "options": {"steps": 1}}}
    path = write_plan(tmp_path / "plan.yaml", tiny, model)
    evaluate = running.Plan._evaluate

    def dropping(self, candidate, *rest, **options):
        shutil.rmtree(source / "checkpoints/step-000000000096", ignore_errors=True)
        return evaluate(self, candidate, *rest, **options)

    monkeypatch.setattr(running.Plan, "_evaluate", dropping)
    monkeypatch.setattr(running, "time", Clock({}))
    status, _, err = etude("evaluate", path, "--run", "plan", "--watch", "1")
    assert status == 0 and "m, at 96 images is left out" in err
    assert [row.images_seen for row in read_table(tmp_path / "runs/plan").rows] == [48]


def test_one_name_for_two_sources_on_a_shared_table(tiny, runs, etude, tmp_path) -> None:
    """Another source, or other options, under a name that the table knows: nothing is lost."""
    values = {}
    for place, (source, steps, shared, words) in enumerate(
        [
            ("small", 1, "own", ""),
            ("small", 1, "table", ""),
            (
                "other",
                1,
                "table",
                r"the table has m from .*small .* and from .*other .*; give each",
            ),
            (
                "small",
                2,
                "table",
                r'the table has m from .*"steps": 1} and from .*"steps": 2}',
            ),
            ("small", 1, "table", ""),
        ]
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        model = {"m": {"source": str(runs / source), "options": {"steps": steps}}}
        path = write_plan(
            folder / "plan.yaml",
            tiny,
            model,
            table=str(tmp_path / shared),
            store=str(tmp_path / "store"),
        )
        status, _, err = etude("evaluate", path)
        assert (status == 2) == bool(words) and re.search(words, err)
        (row,) = read_table(tmp_path / shared).rows
        values[shared, place] = row.value
    assert len(set(values.values())) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stpes": 2}, "options of .*/small: stpes: Extra inputs are not permitted"),
        ({"steps": 0}, "options of .*/small: steps: Input should be greater"),
    ],
)
def test_wrong_options_of_a_generator_are_said_in_one_sentence(runs, options, said) -> None:
    wanted = Wanted(str(runs / "small"), options=tuple(options.items()))
    with pytest.raises(UserError, match=said) as found:
        run_generator(wanted)
    assert "\n" not in str(found.value)


def by_prompt(generator, prompts: Prompts, count: int, folder: Path) -> dict[str, np.ndarray]:
    drawn = DrawnPictures(generator, prompts, count, seed=5, folder=folder)
    drawn.draw(QUIET)
    found = drawn.read(0, count, Stages())
    return dict(zip(found.keys, found.images, strict=True))


def test_a_prompt_keeps_its_picture_in_another_list(runs, tmp_path) -> None:
    """Within the engine's bound wherever it stands; bitwise at the same place of a block."""
    generator = run_generator(Wanted(str(runs / "small"), options=(("steps", 2),)))
    whole = class_prompts("digits", DIGITS)
    ten = by_prompt(generator, whole, 70, tmp_path)
    assert len({image.tobytes() for image in ten.values()}) == 70
    turned = Prompts("turned", whole.prompts[6::-1], whole.classes)
    seven = by_prompt(generator, turned, 70, tmp_path)
    both = ten.keys() & seven.keys()
    assert len(both) == 49 and all(close(ten[key], seven[key]) for key in both)
    assert not close(ten["5/class 1/0"], ten["5/class 2/0"])
    # The first five of each round of ten stay where they are; their neighbours are others.
    mixed = Prompts("mixed", (*whole.prompts[:5], *whole.prompts[:4:-1]), whole.classes)
    again = by_prompt(generator, mixed, 70, tmp_path)
    same = [f"5/class {n}/{turn}" for n in range(5) for turn in range(7)]
    assert all(np.array_equal(ten[key], again[key]) for key in same)
    assert again.keys() == ten.keys() and all(close(ten[key], again[key]) for key in ten)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder that test_stable_diffusion.py writes and compares with diffusers."""
    pytest.importorskip("diffusers")
    place = Path(__file__).with_name("test_stable_diffusion.py")
    spec = importlib.util.spec_from_file_location("stable_diffusion_folders", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_folder(tmp_path_factory.mktemp("sd") / "tiny", "1.x", "epsilon")


def test_a_prompt_draws_what_a_class_of_that_text_draws(
    stable_diffusion, tmp_path, monkeypatch
) -> None:
    """Also of more prompts than are encoded together, in any order, twice."""
    monkeypatch.setattr(PromptedGenerator, "TOGETHER", 64)
    texts = [f"the {n} red cat" for n in range(70)]
    options = (("steps", 2), ("spacing", "leading"))
    wanted = Wanted(str(stable_diffusion), None, 3.0, "", tuple(texts), options=options)
    prompted = run_generator(wanted)
    assert isinstance(prompted, PromptedGenerator)
    chosen = [68, 0, 33, 69]
    sampler = SamplerConfig(**prompted.protocol["sampler"])
    assert (sampler.guidance_scale, sampler.steps) == (3.0, 2)
    by_class = open_generator(
        stable_diffusion, classes=[texts[n] for n in chosen], prompt="{name}", sampler=sampler
    )
    places = np.array([noise_position(texts[n], 0) for n in range(70)])
    rows = np.arange(4)
    expected = by_class.draw(rows, rows, seed=5, positions=places[chosen])[0]
    assert not close(expected[0], expected[1])
    nothing = np.full(4, -1)
    for order in (chosen, chosen[::-1]):
        asked = dict(seed=5, captions=[texts[n] for n in order], positions=places[order])
        found = prompted.draw(rows, nothing, **asked)[0]
        assert close(found if order == chosen else found[::-1], expected)
    swapped = [texts[n] for n in (0, 68, 33, 69)]
    other = prompted.draw(rows, nothing, seed=5, captions=swapped, positions=places[chosen])[0]
    assert not close(other[0], expected[0]) and close(other[2:], expected[2:])  # the text matters

    prompts = Prompts("cats", tuple(Prompt(text, text) for text in texts))
    drawn = by_prompt(prompted, prompts, 70, tmp_path)  # two blocks, two encodings
    for row, n in enumerate(chosen):
        assert close(drawn[f"5/{texts[n]}/0"], expected[row])


def test_a_folder_asked_by_text_wants_prompts(stable_diffusion, tmp_path) -> None:
    generator = run_generator(Wanted(str(stable_diffusion)))
    silent = Prompts("silent", (Prompt("a", "a cat"), Prompt("b", "")))
    with pytest.raises(UserError, match="is asked by text and prompts of silent have none"):
        DrawnPictures(generator, silent, 2, seed=5, folder=tmp_path)
