"""A whole plan on real digits: its table, what is not done twice, screening, refusals."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.run import Run
from etude.data.digits import write_digits
from etude.dry_run import shrink
from etude.evaluation.planned.recipe import PlanRecipe
from etude.evaluation.planned.running import Plan
from etude.evaluation.sets import ShardPictures, Stages
from etude.evaluation.verdict import Verdict
from etude.metrics.frechet import frechet_distance
from etude.metrics.prdc import prdc
from etude.planning import figures_table, judged

# Draws held-out digits of the asked class with noise; the source says how much.
NOISY = """
import numpy as np
from etude.core.rng import normal, Stream
from etude.evaluation.generators import generator
from etude.evaluation.sets import ShardPictures, Stages

class Noisy:
    asked_by_text, classes = False, [str(n) for n in range(10)]
    protocol = {"sampler": {"method": "none"}, "rounding": "down"}
    opened = drawn = 0

    def __init__(self, wanted):
        folder, _, noise = wanted.source.partition(":")
        self.noise = float(noise) * (wanted.guidance or 1.0) / (1 + (wanted.checkpoint or 0))
        self.name = f"noise :{noise}"
        self.fingerprint = wanted.source + str(self.noise)
        shards = ShardPictures(folder, size=8, channels=1)
        self.pictures = shards.read(0, len(shards), Stages())
        Noisy.opened += 1

    def draw(self, indices, labels, *, seed, captions, positions):
        Noisy.drawn += len(indices)
        assert captions is None
        found = []
        noise = normal(seed, Stream.SAMPLE_NOISE, positions, (8, 8, 1)).numpy() * self.noise
        for index, label, more in zip(indices, labels, noise):
            rows = np.flatnonzero(self.pictures.labels == label)
            image = self.pictures.images[rows[(index // 10) % len(rows)]]
            found.append(np.clip(image + more, 0, 255).astype(np.uint8))
        return np.stack(found)

@generator("noisy", lambda source: [0, 1] if "many" in source else [])
def noisy(wanted):
    return Noisy(wanted)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "noisy.py"
    path.write_text(NOISY)
    return path


def recipe(digits: Path, noisy: Path, store: Path, **changes) -> PlanRecipe:
    shards = {"kind": "shards", "folder": str(digits / "test")}
    fields = {
        "name": "evaluate/test",
        "models": {
            "clean": {"kind": "noisy", "source": f"{digits / 'monitor'}:20"},
            "rough": {"kind": "noisy", "source": f"{digits / 'monitor'}:150"},
        },
        "data_sets": {"digits": shards},
        "metrics": ["frechet@pixels", {"metric": "prdc@pixels", "options": {"k": 3}}],
        "extractors": {"pixels": {"options": {"input_size": 8, "channels": 1}}},
        "samples": 150,
        "image_size": 8,
        "channels": 1,
        "interval": {"replicates": 20},
        "files": [str(noisy)],
        "store": str(store),
    }
    return PlanRecipe(**(fields | changes))


def carried_out(made: PlanRecipe, root: Path) -> tuple[Plan, dict]:
    with Run.open(made, root=root) as run:
        plan = Plan(made, run, Log(run.folder, quiet=True))
        return plan, plan.run()


def test_figures_are_those_of_the_pictures(digits, noisy, tmp_path) -> None:
    plan, result = carried_out(recipe(digits, noisy, tmp_path / "store"), tmp_path / "runs")
    results = plan.table.read()
    assert result["candidates"] == ["clean", "rough"]
    real = ShardPictures(digits / "test", size=8, channels=1)
    real = real.read(0, len(real), Stages())
    x = torch.from_numpy(real.images).flatten(1).double() / 255.0
    for name in ("clean", "rough"):
        (folder,) = [
            f
            for f in plan.pictures.iterdir()
            if (name == "rough") == (":150" in (f / "protocol.json").read_text())
        ]
        blocks = [np.load(path) for path in sorted(folder.glob("*.npy"))]
        y = torch.from_numpy(np.concatenate(blocks)[:150]).flatten(1).double() / 255.0
        rows = {row.metric: row for row in results.where(model=name, group="").rows}
        expected = frechet_distance(x, y, warn=False)
        distance = rows["Fréchet distance (pixels features)"]
        assert distance.value == pytest.approx(expected, rel=1e-5)
        for figure, value in prdc(x.float(), y.float(), k=3).items():
            assert rows[figure].value == pytest.approx(value, abs=0.01)
        assert distance.low < distance.value < distance.high
        assert (distance.n_real, distance.n_generated) == (len(x), 150)
    better = {row.metric: row.better for row in results.rows}
    assert better["recall"] == "higher" and better["Fréchet distance (pixels features)"] == "lower"
    # The prompts are the real pictures' classes; a group of fewer than ten has no figures.
    drawn = [prompt.group for prompt in plan.sets[0].prompts.prompts[:150]]
    asked = collections.Counter(drawn)
    assert {row.group for row in results.rows} == {"", *(g for g, n in asked.items() if n >= 10)}
    of_three = {row.metric: row for row in results.where(model="rough", group="3").rows}
    kept = [n for n, group in enumerate(real.groups) if group == "3"]
    expected = frechet_distance(x[kept], y[[g == "3" for g in drawn]], warn=False)
    assert of_three["Fréchet distance (pixels features)"].value == pytest.approx(expected, rel=1e-5)


def test_other_protocols_of_a_shared_table_are_counted_and_not_shown(digits, noisy, tmp_path):
    """One figure of two protocols: what a plan reports is of its own, the other model's too."""
    shared = {"table": str(tmp_path / "shared"), "metrics": ["prdc@pixels"], "by_group": False}
    both = recipe(digits, noisy, tmp_path / "store").models
    values = {}
    for side, names in ((8, ["clean", "rough"]), (4, ["clean"]), (8, ["rough"])):
        changes = {
            "models": {name: both[name] for name in names},
            "extractors": {"pixels": {"options": {"input_size": side, "channels": 1}}},
        }
        made = recipe(digits, noisy, tmp_path / "store", **(shared | changes))
        plan, _ = carried_out(made, tmp_path / "runs")
        found, other = plan.results()
        recalls = {row.model: row.value for row in found.where(metric="recall").rows}
        values[side, tuple(names)] = recalls
        figures = figures_table(found)[1]
        assert len(figures) == len(recalls) and all(len(row) == 9 for row in figures)
        assert sum(other.values()) == (0 if len(names) == 2 else 8 if side == 4 else 4)
        assert all(isinstance(one, Verdict) for one in judged(found, made.interval))
    assert values[8, ("clean", "rough")] == values[8, ("rough",)]
    assert values[4, ("clean",)]["clean"] != values[8, ("rough",)]["clean"]


def test_what_a_model_is_is_checked_before_any_work(digits, noisy, tmp_path) -> None:
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number in range(3):
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    good = recipe(digits, noisy, tmp_path / "store").models["clean"]
    for config, said in (
        ({"source": str(folder)}, "models.last: .*drawn is no run but .*models.last.kind=pictures"),
        ({"source": str(folder), "kind": "picture"}, "models.last.kind: .*'picture'.* pictures, "),
        ({"source": f"{folder}s", "kind": "pictures"}, "models.last.source: there is no folder"),
        ({"source": str(folder), "kind": "pictures"}, "last.source: .* 3 pictures .*samples=3"),
    ):
        models = {"good": good, "last": config}
        made = recipe(digits, noisy, tmp_path / "store", models=models)
        with pytest.raises(UserError, match=said):
            carried_out(made, tmp_path / "runs")
    assert not (tmp_path / "store").exists()


def test_nothing_is_done_twice(digits, noisy, tmp_path) -> None:
    made = recipe(digits, noisy, tmp_path / "store", by_group=False)
    plan, _ = carried_out(made, tmp_path / "runs")
    (plan.table.folder.parent / "result.json").unlink(missing_ok=True)
    made_files = [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.npy")]
    before = {p: p.stat().st_mtime_ns for p in made_files}
    rows = {p: p.read_bytes() for p in plan.table.folder.glob("rows/*.json")}
    again, result = carried_out(made, tmp_path / "runs")
    assert result["images_per_second"] == {}
    assert len(before) > 8 and {p: p.stat().st_mtime_ns for p in before} == before
    assert {p: p.read_bytes() for p in again.table.folder.glob("rows/*.json")} == rows


def test_a_screen_promotes_and_marks_its_rows(digits, noisy, tmp_path) -> None:
    made = recipe(
        digits,
        noisy,
        tmp_path / "store",
        screen={"samples": 60, "metrics": ["Fréchet distance (pixels features)"], "keep": 1},
        guidance=[1.0, 3.0],
        metrics=["frechet@pixels"],
        by_group=False,
    )
    plan, result = carried_out(made, tmp_path / "runs")
    assert result["candidates"] == ["clean, guidance 1"]
    rows = plan.table.rows()
    screened, reported = ([r for r in rows if r.selected == s] for s in (True, False))
    assert len(screened) == 4 and {row.n_generated for row in screened} == {60}
    assert [(r.model, r.guidance, r.n_generated) for r in reported] == [("clean", 1.0, 150)]
    assert {row.seed for row in screened}.isdisjoint({row.seed for row in reported})


def test_a_screen_looks_at_its_own_plans_rows_and_speaks_early(digits, noisy, tmp_path) -> None:
    """A shared table holds the screen of another plan; a figure that nobody measures."""
    name = "Fréchet distance (pixels features)"
    changes = {"metrics": ["frechet@pixels"], "by_group": False, "table": str(tmp_path / "table")}
    changes["screen"] = {"samples": 60, "metrics": [name], "keep": 1}
    found = []
    for size, low in ((8, 0), (6, 1), (8, 2)):
        made = recipe(digits, noisy, tmp_path / "s", image_size=size, **changes)
        found.append(carried_out(made, tmp_path / f"runs{low}")[1]["candidates"])
    assert found == [["clean"]] * 3
    changes["screen"] = changes["screen"] | {"metrics": ["FID"]}
    made = recipe(digits, noisy, tmp_path / "s", **changes | {"table": ""})
    with pytest.raises(UserError, match="there is no figure 'FID'; choose of Fréchet") as said:
        carried_out(made, tmp_path / "runs3")
    assert "\n" not in str(said.value)
    assert len(list((tmp_path / "runs3").glob("*/results/rows/*"))) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {"f": {"kind": "pictures", "source": "F"}}}, "both choose and be reported"),
        ({"screen": {"metrics": ["frechet@pixels"]}}, "frechet@pixels, which is a metric: name"),
        ({"screen": {"seed": 0}}, "screen.seed is seed"),
        (
            {
                "screen": None,
                "models": {"a": {"kind": "pictures", "source": "a"}},
                "watch_minutes": 1.0,
            },
            "watch_minutes: folders of pictures get no checkpoints",
        ),
        ({"screen": None, "metrics": ["kid", "kid"]}, "names kid and kid,"),
        ({"screen": None, "metrics": ["kid", "kid@inception"]}, "names kid and kid@inception,"),
    ],
)
def test_a_screen_or_list_that_would_mislead_is_refused(digits, noisy, tmp_path, changes, said):
    screen = {"samples": 60, "metrics": ["FID"]}
    if changes.get("screen", {}) is not None:
        changes = changes | {"screen": screen | changes.get("screen", {})}
    with pytest.raises(ValueError, match=said):
        recipe(digits, noisy, tmp_path / "s", **changes)


def test_a_rehearsal_writes_below_its_root_alone(digits, noisy, tmp_path) -> None:
    screen = {"samples": 500, "metrics": ["FID"]}
    made = recipe(
        digits, noisy, tmp_path / "s", table=str(tmp_path / "shared"), screen=screen, samples=900,
        watch_minutes=60.0,
    )  # fmt: skip
    small = shrink(made, tmp_path / "tried")
    assert (small.table, small.watch_minutes) == ("", None)
    assert small.store == str(tmp_path / "tried" / "features")
    assert small.samples <= 128 and small.screen.samples <= 32


def test_pictures_of_several_sizes_stand_side_by_side(digits, noisy, tmp_path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    lines = ["file_name,caption"]
    for number in range(12):
        Image.new("L", (8 + number, 20), 20 * number).save(files / f"{number}.png")
        lines.append(f"{number}.png,picture {number}")
    (files / "metadata.csv").write_text("\n".join(lines))
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("\n".join(["caption", *(f"picture {n}" for n in range(12))]))
    made = recipe(
        digits, noisy, tmp_path / "s", samples=12, image_size=0, metrics=["vendi@pixels"],
        models={"files": {"kind": "pictures", "source": str(files)}},
        data_sets={"words": {"kind": "csv", "folder": str(prompts)}},
        interval={"replicates": 0},
    )  # fmt: skip
    plan, _ = carried_out(made, tmp_path / "runs")
    images = plan.shown["words"].pictures["files"]
    for text, image in zip(plan.shown["words"].prompts, images, strict=True):
        assert image.shape == (256, 256, 3) and image[0, 0, 0] == 20 * int(text.split()[1])


def test_checkpoints_are_candidates(digits, noisy, tmp_path) -> None:
    (tmp_path / "many").symlink_to(digits / "monitor")  # a name of which there are checkpoints
    many = {"kind": "noisy", "source": f"{tmp_path / 'many'}:9", "checkpoints": "all"}
    made = recipe(
        digits,
        noisy,
        tmp_path / "s",
        models={"m": many},
        metrics=["frechet@pixels"],
        by_group=False,
    )
    plan, result = carried_out(made, tmp_path / "runs")
    assert result["candidates"] == ["m, at 0 images", "m, at 1 images"]
    assert [row.images_seen for row in plan.table.rows()] == [0, 1]
    only = many | {"checkpoints": [5]}
    with pytest.raises(UserError, match="keeps no checkpoint at 5 images; it keeps 0, 1"):
        carried_out(recipe(digits, noisy, tmp_path / "s", models={"m": only}), tmp_path / "runs")


def test_a_folder_of_pictures_is_a_candidate(digits, noisy, tmp_path) -> None:
    plan, _ = carried_out(
        recipe(digits, noisy, tmp_path / "s", metrics=["frechet@pixels"]), tmp_path / "runs"
    )
    (folder,) = [f for f in plan.pictures.iterdir() if ":150" in (f / "protocol.json").read_text()]
    images = np.concatenate([np.load(p) for p in sorted(folder.glob("*.npy"))])[:150]
    asked = [prompt.id for prompt in plan.sets[0].prompts.prompts]
    files = tmp_path / "files"
    files.mkdir()
    lines = ["file_name,prompt_id"]
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(files / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,{asked[number]}")
    (files / "metadata.csv").write_text("\n".join(lines))
    models = {"files": {"kind": "pictures", "source": str(files)}}
    other, _ = carried_out(
        recipe(digits, noisy, tmp_path / "s", models=models, metrics=["frechet@pixels"]),
        tmp_path / "runs",
    )
    drawn = {r.group: r.value for r in plan.table.rows() if r.model == "rough"}
    read = {r.group: r.value for r in other.table.rows()}
    assert drawn.keys() == read.keys() and len(read) > 8
    for group, value in read.items():
        assert value == pytest.approx(drawn[group], rel=1e-6)


def test_few_pictures_are_spread_over_prompts_whose_classes_lie_together(
    digits, noisy, tmp_path
) -> None:
    """A folder lists its classes one after the other; 100 of 400 must not be four of ten."""
    real = tmp_path / "real"
    rng = np.random.default_rng(0)
    for number in range(400):
        place = real / f"{number // 40}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8))
        image.save(place / f"{number:03d}.png")
    sets = {"real": {"kind": "folder", "folder": str(real)}}
    models = {
        "drawn": {"kind": "noisy", "source": f"{digits / 'monitor'}:20"},
        "files": {"kind": "pictures", "source": str(real)},
    }
    made = recipe(
        digits, noisy, tmp_path / "s", data_sets=sets, models=models, samples=100,
        metrics=["frechet@pixels"], by_group=False, interval={"replicates": 0},
    )  # fmt: skip
    plan, _ = carried_out(made, tmp_path / "runs")
    for place in plan.store.folder.rglob("manifest.json"):
        found = plan.store.load(place.parent.name)
        counts = collections.Counter(found.labels.tolist())
        assert len(counts) == 10 and len(found) in (100, 400)
        assert len(found) == 400 or max(counts.values()) < 20
    assert set(plan.shown["real"].pictures) == {"drawn"}


def test_folders_without_classes_or_prompts_compare(digits, noisy, tmp_path) -> None:
    rng = np.random.default_rng(0)
    sides = {"real": rng.integers(0, 200, (40, 8, 8)), "drawn": rng.integers(0, 255, (30, 8, 8))}
    for name, images in sides.items():
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / name / f"{number:02d}.png")
    changes = {
        "models": {"drawn": {"kind": "pictures", "source": str(tmp_path / "drawn")}},
        "data_sets": {"real": {"kind": "folder", "folder": str(tmp_path / "real")}},
        "metrics": ["frechet@pixels"],
        "samples": 30,
    }
    plan, _ = carried_out(recipe(digits, noisy, tmp_path / "s", **changes), tmp_path / "runs")
    (row,) = plan.table.rows()
    real, drawn = (torch.from_numpy(i).flatten(1).double() / 255 for i in sides.values())
    assert row.value == pytest.approx(frechet_distance(real, drawn, warn=False), rel=1e-5)
    changes["models"] = {"noise": {"kind": "noisy", "source": f"{digits / 'monitor'}:20"}}
    with pytest.raises(UserError, match="nothing says what noise is to draw"):
        carried_out(recipe(digits, noisy, tmp_path / "s", **changes), tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": ["frechet@nothing"], "extractors": {}}, "no extractor 'nothing'"),
        ({"metrics": ["fretchet"]}, "no metric 'fretchet'.*clipscore"),
        (
            {"metrics": [{"metric": "prdc@pixels", "options": {"q": 3}}]},
            "prdc.q: no such option; it has k, convention",
        ),
        ({"extractors": {"inception": {}}}, "extractors.inception has no effect"),
        (
            {"models": {"f": {"kind": "pictures", "source": "F"}}},
            "models.f.source: there is no folder F; name one",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(digits, noisy, tmp_path, changes, said) -> None:
    with pytest.raises(UserError, match=said) as found:
        carried_out(recipe(digits, noisy, tmp_path / "store", **changes), tmp_path / "runs")
    assert "\n" not in str(found.value)
