"""Recipes: YAML with places, merging, overrides, strictness, identity, copies, mutations."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from etude.core import recipe as recipes
from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.recipe import (
    Recipe,
    copy_recipe,
    describe_shipped,
    differences,
    fingerprint,
    json_schema,
    load_recipe,
    origins,
    recipe_from_dict,
    shipped,
    to_yaml,
)
from etude.core.recipe_text import scalar
from etude.core.recipe_tree import parse, resolve, to_plain


class Optim(Config):
    lr: float = option(1e-3, "learning rate", gt=0)
    betas: tuple[float, float] = option((0.9, 0.99), "decay of the two moments")


class Ddim(Config):
    method: Literal["ddim"] = option("ddim", "rule")
    eta: float = option(0.0, "noise", ge=0)


class Heun(Config):
    method: Literal["heun"] = option("heun", "rule")
    order: int = option(2, "order", ge=1)
    verbose: bool = option(False, "talk", affects_result=False)


class ToyJob(Config):
    recipe: str = option(..., "recipe")
    takes: dict[str, str] = Field({}, alias="from", description="where from")


class ToyRecipe(Recipe):
    kind: Literal["toy"] = option("toy", "kind")
    images: int = option(..., "how long", unit="images", gt=0)
    log_every: int = option(10, "how often", unit="steps", gt=0, affects_result=False)
    optim: Optim = option(Optim(), "the optimizer")
    sampler: Annotated[Ddim | Heun, Field(discriminator="method")] = Ddim()
    either: Ddim | Heun | None = None
    jobs: dict[str, ToyJob] = option({}, "jobs")
    steps: list[Optim] = option([], "sections in a list")
    folder: Path | None = option(None, "a path")
    note: str = option("", "text")


GOOD = """# a toy
kind: toy
images: 2e6
optim:
  lr: 1e-4
sampler: {method: heun, order: 3}
jobs:
  first: {recipe: a/b, from: {generator: zero}}
steps:
  - {lr: 0.5}
  - {lr: 0.25, betas: [0, 0.5]}
note: "yes: \\u00e9"
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(recipes.KINDS, "toy", ToyRecipe)
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD, encoding="utf-8")
    return tmp_path


def refusal(text: str, overrides: tuple[str, ...] = ()) -> str:
    Path("bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe("bad.yaml", overrides)
    return str(caught.value)


def test_values_arrive_with_their_types() -> None:
    recipe = load_recipe("good.yaml")
    assert recipe.name == "good"
    assert (recipe.images, type(recipe.images)) == (2_000_000, int)
    assert recipe.optim == Optim(lr=1e-4)
    assert recipe.sampler == Heun(order=3)
    assert recipe.jobs["first"].takes == {"generator": "zero"}
    assert recipe.steps[1].betas == (0.0, 0.5)
    assert recipe.note == "yes: é"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 100_000), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("1_000", 1000),
        ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("~", None),
        ("true", True), ("-.inf", float("-inf")), ("0x10", "0x10"), ("1e", "1e"), ("e5", "e5"),
        ("1e19", 1e19), ("_1", "_1"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = resolve(text)
    assert found == value and type(found) is type(value)
    assert to_plain(parse(f"key: {text}", "x")) == {"key": value}


@pytest.mark.parametrize("text", [".nan", "1e999"])
def test_numbers_a_recipe_cannot_hold_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        resolve(text)


def test_extends_merges_mappings_and_replaces_lists_and_marked_mappings() -> None:
    Path("base.yaml").write_text(GOOD + "name: parent\n", encoding="utf-8")
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text(
        "extends: ../base.yaml\noptim: {betas: [0.1, 0.2]}\nsampler: !replace {method: ddim}\n"
        "steps: [{lr: 9}]\n"
    )
    recipe = load_recipe("sub/child.yaml")
    assert recipe.optim == Optim(lr=1e-4, betas=(0.1, 0.2))
    assert recipe.sampler == Ddim()
    assert recipe.steps == [Optim(lr=9)]
    assert recipe.name == "child"


def test_extends_refuses_circles_and_strangers() -> None:
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("kind: toy\nextends: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_recipe("a.yaml")
    assert refusal("extends: ldm/digit\n").startswith("bad.yaml:1: there is no recipe `ldm/digit`")
    assert "did you mean `ldm/digits`" in refusal("extends: ldm/digit\n")
    assert "nothere.yaml" in refusal("extends: nothere.yaml\n")
    assert "extends" in refusal("extends: [a]\n")


def test_overrides_come_last_and_reach_into_lists() -> None:
    recipe = load_recipe(
        "good.yaml",
        ["optim.lr=3e-4", "steps.1.lr=7", "note=\"\\ud83d\\ude00 'x'\"", "optim={betas: [0, 0]}",
         "either={method: ddim, eta: 1}", "optim.lr=5e-4"],
    )  # fmt: skip
    assert recipe.optim == Optim(lr=5e-4, betas=(0, 0))
    assert recipe.steps[1] == Optim(lr=7, betas=(0, 0.5))
    assert recipe.note == "\U0001f600 'x'"
    assert recipe.either == Ddim(eta=1)


def test_overrides_reach_entries_of_a_list_by_their_names() -> None:
    control = "model.conditioning.control"
    recipe = load_recipe(
        "ldm/cifar10_small",
        [f"{control}.flip.exponent=8", f"{control}.crop_top,crop_left.exponent=3"],
    )
    found = {entry.name: entry.exponent for entry in recipe.model.conditioning.control}
    assert found == {"crop_top": 3, "crop_left": 3, "crop_height": 4, "flip": 8}
    numbers = load_recipe("good.yaml", ["steps.0,1.lr=7"])
    assert [entry.lr for entry in numbers.steps] == [7, 7] and numbers.steps[1].betas == (0, 0.5)
    for name, hint in (("fip", "did you mean `flip`?"), ("9", "give one of crop_top, crop_left")):
        with pytest.raises(UserError, match=re.escape(f"`{name}` is not an entry of a list")) as e:
            load_recipe("ldm/cifar10_small", [f"{control}.{name}.exponent=1"])
        assert hint in str(e.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "override optim.lrr=1: `lrr` is not a field in `optim`; did you mean `lr`"),
        ("sampler.ordr=1", "did you mean `order`?"),
        ("sampler.eta=1", "the fields are method, order, verbose"),
        ("either={method: heun, eta: 1}", "`eta` is not a field in `either`"),
        ("jobs.first.form={}", "did you mean `from`?"),
        ("optim.lr=abc", '`optim.lr` is "abc": should be a valid number'),
        ("optim.lr=-1", "`optim.lr` is -1: should be greater than 0"),
        ('optim.lr="1"', "should be a valid number"),
        ("images=1.5", "`images` is 1.5"),
        ("images=true", "`images` is true"),
        ("note=3", "`note` is 3"),
        ("kind=toi", "did you mean `toy`?"),
        ("extends=ldm/digits", "belongs in a recipe file"),
        ("images", "write field=value"),
        ("steps.9.lr=1", "use 0 to 1"),
        ("jobs.first={from: {}}", "`images"),
    ],
)
def test_faulty_overrides(override: str, message: str) -> None:
    if override.startswith("jobs.first={"):  # merges into what is there: nothing is missing
        assert load_recipe("good.yaml", [override]).jobs["first"].recipe == "a/b"
        return
    with pytest.raises(UserError) as caught:
        load_recipe("good.yaml", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("lr: 1e-4", "lrate: 1e-4"), "bad.yaml:5: `lrate` is not a field in `optim`"),
        (GOOD.replace("images: 2e6", "images:\n    x"), "bad.yaml:3: `images` is \"x\""),
        (GOOD.replace("order: 3", "order: 0"), "bad.yaml:6: `sampler.order` is 0"),
        (GOOD.replace("lr: 0.25", "lr: x"), "bad.yaml:11: `steps.1.lr` is \"x\""),
        (GOOD.replace("images: 2e6\n", ""), "`images` is missing; add it (how long)"),
        (GOOD + "images: 3\n", "bad.yaml:13: `images` is given twice (first on line 3)"),
        (GOOD.replace("kind: toy", "kind: [toy]"), "bad.yaml:2: "),
        (GOOD.replace("kind: toy", "king: toy"), "`kind` is missing"),
        ("- 1\n", "bad.yaml:1: a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("kind: toy\nimages: [1\n", "this is not YAML"),
        ("kind: toy\nimages: !!python/object:os.system x\n", "bad.yaml:2: the tag"),
        ("kind: toy\n---\nkind: toy\n", "not YAML"),
        ("kind: toy\n? [a]\n: 1\n", "a key must be plain text"),
        ("kind: toy\nnote: \"\\ud800\"\n", "bad.yaml:2: half a character"),
        ("a: &a [*a]\n", "nested too deep"),
        ("k: " + "[" * 100_000, "nested too deep"),
        ("a0: &a0 x\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n"
                                  for i in range(9)), "aliases"),
        ("kind: toy\n<<: {images: 1}\n", "`<<` is not supported"),
    ],
)  # fmt: skip
def test_faulty_files_are_named_with_their_line(text: str, message: str) -> None:
    assert message in refusal(text)


def test_bytes_that_are_not_text() -> None:
    Path("bad.yaml").write_bytes(b"kind: toy\nnote: \xff\n")
    with pytest.raises(UserError, match="not UTF-8 text at byte 16"):
        load_recipe("bad.yaml")


def test_origins_name_file_line_override_or_default() -> None:
    Path("child.yaml").write_text("extends: good.yaml\noptim:\n  betas: [0, 0]\n")
    found = {o.field: o for o in origins("child.yaml", ["images=7"])}
    assert found["images"].source == "override images=7"
    assert found["optim.lr"].source == "good.yaml:5"
    assert found["optim.betas"].source == "child.yaml:3"
    assert found["sampler.verbose"].source == "default"
    assert found["steps.1.lr"].source == "good.yaml:11"
    assert found["jobs.first.from.generator"].source == "good.yaml:8"
    assert found["name"].source == "the recipe's file name"
    shipped_kind = next(o for o in origins("ldm/digits") if o.field == "kind")
    assert re.fullmatch(r"ldm/digits:\d+", shipped_kind.source)
    assert not found["sampler.verbose"].affects_result and found["optim.lr"].affects_result


def test_fingerprint_is_sha256_of_the_fields_that_change_results() -> None:
    class Small(Recipe):
        kind: Literal["small"] = option("small", "kind")
        log: int = option(1, "log", affects_result=False)
        part: Ddim | Heun = option(Heun(), "part")

    content = '{"kind":"small","part":{"method":"heun","order":2},"seed":3}'
    assert fingerprint(Small(seed=3)) == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("log_every=5", False), ("description=other", False), ("name=other", False),
        ("expects.hours=3", False), ("sampler.verbose=true", False), ("seed=1", True),
        ("optim.lr=2e-4", True), ("steps.0.betas=[0.3, 0.3]", True), ("sampler.order=4", True),
        ("sampler=!replace {method: ddim}", True), ("either={method: heun}", True),
        ("optim.lr=0.0001", False), ("images=2000000", False), ("jobs.first.from.x=y", True),
    ],
)  # fmt: skip
def test_fingerprint_moves_only_with_results(override: str, changes: bool) -> None:
    before, after = load_recipe("good.yaml"), load_recipe("good.yaml", [override])
    assert (fingerprint(before) != fingerprint(after)) == changes


def test_differences_are_dotted_leaves() -> None:
    other = load_recipe("good.yaml", ["optim.lr=1", "steps=[{lr: 0.5}]", "name=b"])
    found = {field: (old, new) for field, old, new in differences(load_recipe("good.yaml"), other)}
    assert found == {
        "optim.lr": (1e-4, 1.0),
        "steps.1.lr": (0.25, recipes.ABSENT),
        "steps.1.betas": ((0.0, 0.5), recipes.ABSENT),
    }


def test_text_of_a_recipe_reads_back_equal() -> None:
    recipe = load_recipe("good.yaml", ["folder=a/b c", "either={method: heun}", "optim.lr=1e16"])
    for comments in (True, False):
        Path("good2.yaml").write_text(to_yaml(recipe, comments=comments), encoding="utf-8")
        assert load_recipe("good2.yaml", ["name=good"]) == recipe


def test_scalars_read_back_equal() -> None:
    generator = random.Random(0)
    alphabet = list("abn019eE._-+~:#'\"\\{}[],&*!|>%@` \t\n\x7f\x85\u2028\u00e9\U0001f600\x00\x1b")
    values: list = ["", "null", "true", "1e5", ".inf", "no", "- a", "=", "?", "<<", "\ufeffx"]
    values += ["".join(generator.choices(alphabet, k=generator.randrange(6))) for _ in range(600)]
    values += [
        generator.uniform(-1, 1) * 10.0 ** generator.randrange(-300, 300) for _ in range(200)
    ]
    values += [0.0, float("inf"), -(10**30), True, None, [1, [2.5, "x, y"]], {"a b": {"1": None}}]
    for value in values:
        found = to_plain(parse(f"k: {scalar(value)}\n", "x"))["k"]
        assert found == value, (value, scalar(value))
        assert type(found) is type(value)


def test_recipe_from_dict_checks_too() -> None:
    data = {"kind": "toy", "images": 5, "folder": Path("x/y"), "optim": {"betas": (0.1, 0.2)}}
    recipe = recipe_from_dict(data, "mine")
    assert (recipe.name, recipe.folder, recipe.optim.betas) == ("mine", Path("x/y"), (0.1, 0.2))
    for bad in ({"kind": "toy", "images": "5"}, {"kind": "toy", "images": float("nan")}, [], {}):
        with pytest.raises(UserError):
            recipe_from_dict(bad)


@pytest.mark.parametrize("standalone", [True, False])
def test_own_copies_say_the_same_and_can_be_changed(standalone: bool) -> None:
    path = copy_recipe("good.yaml", Path("own") / "mine.yaml", standalone=standalone)
    text = path.read_text(encoding="utf-8")
    assert ("extends: " in text) != standalone
    assert "lr: 0.0001  # learning rate" in text
    assert differences(load_recipe("good.yaml"), load_recipe(path)) == []
    if not standalone:  # a commented section works as written once its marks are gone
        changed = text.replace("# optim:", "optim:").replace("#   lr: 0.0001", "  lr: 0.5")
        path.write_text(changed, encoding="utf-8")
        assert load_recipe(path).optim == Optim(lr=0.5)
    with pytest.raises(UserError, match="exists"):
        copy_recipe("good.yaml", path)
    with pytest.raises(UserError, match="ends in .yaml"):
        copy_recipe("good.yaml", "own/mine.txt")


def test_json_schema_lets_parts_be_inherited() -> None:
    found = json_schema("toy")
    assert found["anyOf"] == [{"required": ["extends"]}, {"required": ["images"]}]
    assert "required" not in found["$defs"]["ToyJob"]
    assert found["properties"]["images"]["description"] == "how long"
    assert found["properties"]["images"]["unit"] == "images"
    assert found["$defs"]["ToyJob"]["properties"].keys() == {"recipe", "from"}
    assert found["additionalProperties"] is False


def test_shipped_recipes_have_a_card() -> None:
    columns, rows = describe_shipped()
    assert [row[0] for row in rows] == shipped()
    assert {"ldm/digits", "autoencoder/digits", "ldm/dit_xl2_imagenet256"} <= set(shipped())
    for row in rows:
        card = dict(zip(columns, row, strict=True))
        assert card["hardware"] and card["expected result"] and card["hours"]
        assert len(card["task"].split(": ", 1)[1]) > 5


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid_and_copy(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    Path("copy.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe("copy.yaml", [f"name={name}"]) == recipe
    json.dumps(json_schema(recipe.kind))


_SPLINTERS = [b": ", b"[", b"}", b"- ", b"\n", b"&a ", b"*a", b"!!int ", b"\t", b"'", b"\x00"]
_SPLINTERS += [b"1e99", b".nan", b"null", b"\n  ", b"{}", b"|\n", b"? ", b"<<: ", b"-1"]


def _mutate(text: str, generator: random.Random) -> bytes:
    data = bytearray(text.encode("utf-8"))
    for _ in range(generator.choice([1, 1, 2, 3])):
        place = generator.randrange(len(data))
        match generator.randrange(8):
            case 0:
                data[place] = generator.randrange(256)
            case 1:
                del data[place : place + generator.randrange(1, 20)]
            case 2:
                data[place:place] = generator.choice(_SPLINTERS)
            case 3:
                lines = data.split(b"\n")
                lines.insert(generator.randrange(len(lines)), generator.choice(lines))
                data = bytearray(b"\n".join(lines))
            case 4:
                lines = data.split(b"\n")
                generator.shuffle(lines)
                data = bytearray(b"\n".join(lines))
            case 5:
                lines = data.split(b"\n")
                chosen = generator.randrange(len(lines))
                key = lines[chosen].split(b":")[0]
                value = generator.choice(
                    [b"[]", b"{}", b"3", b"x", b"null", b"true", b"[1, {a: 2}]"]
                )
                lines[chosen] = key + b": " + value
                data = bytearray(b"\n".join(lines))
            case 6:
                digits = [i for i, byte in enumerate(data) if chr(byte).isdecimal()]
                if digits:
                    data[generator.choice(digits)] = ord(generator.choice("0123456789"))
            case _:
                del data[place:]
        if not data:
            break
    return bytes(data)


def test_a_thousand_mutations_give_a_recipe_or_one_sentence() -> None:
    generator = random.Random(7)
    originals = [GOOD]
    for name in shipped():
        originals.append(to_yaml(load_recipe(name), comments=False))
    accepted = 0
    for turn in range(1000):
        data = _mutate(originals[turn % len(originals)], generator)
        Path("mutant.yaml").write_bytes(data)
        try:
            recipe = load_recipe("mutant.yaml")
        except UserError as error:
            assert "mutant.yaml" in str(error), (str(error), data)
            continue
        accepted += 1
        Path("again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        assert fingerprint(load_recipe("again.yaml")) == fingerprint(recipe)
    assert 50 < accepted < 700
