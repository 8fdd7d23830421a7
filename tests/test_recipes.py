"""Every shipped recipe: the size of its model, and one real step of it on this machine.

The size is that of the published model, built without memory. The step is `--dry-run`: pictures are
read, augmented, encoded and noised, the loss goes back, the optimizer moves, held-out pictures are
looked at, a checkpoint is written and read, pictures are drawn. What is the recipe's own in it: its
family, objective, conditions and their path, drops, optimizer, averages, sampler, text padding and
number of classes. What is made small (`small`): the network's width and depth, the picture (64
pixels, or half of 32), batches, steps of the sampler, the tokens of a text; plain torch
in float32 stands for ZeRO and bf16 (`tests/models/test_families.py` has those). Pictures are 8
smooth ones in the layout of the recipe's data, or real digits; autoencoder and text encoders are
folders of random weights in diffusers' and transformers' layout. Of a study every run is resolved,
and of each job that changes its recipe and takes no other job's run, the last one of its grid is
tried like a recipe. What evaluates ImageNet does so on digits with a judge's features in place of
Inception's. Recipes that are the same made small, but for the size of fractions (`structure`), have
their step taken by one of them.
"""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from etude.core.errors import UserError
from etude.core.recipe import Recipe, fingerprint, leaves, load_recipe, shipped
from etude.core.recipe_tree import parse, to_plain
from etude.data.shards import ShardSet, write_shards
from etude.dry_run import dry_run
from etude.estimate import discriminator_count, parameter_count, study_runs
from etude.external.diffusers import Autoencoder, AutoencoderConfig
from etude.jobs import run_recipe
from etude.models.families import build_denoiser
from etude.models.lpips import LPIPS
from etude.study import instances, overrides
from etude.transfer import transfer

# Millions of parameters: Peebles and Xie 2023, table 4; the papers and repositories themselves
# for the others, and arithmetic for the mmDiTs (28 layers of width 1152, 4 channels).
PUBLISHED = {
    "ldm/dit_xl2_imagenet256": 675.13,
    "ldm/mdtv2_xl2_imagenet256": 742.26,
    "ldm/pixart_xl2_cc12m256": 611.35,
    "ldm/unet_imagenet256": 407 + 1001 * 1024 / 1e6,  # and the table of classes
    "ldm/mmdit_xl2_imagenet256": 1326,
    "autoencoder/kl_f8": 83.65,
}
WIDTHS = {"t5-v1_1-xxl": 48, "clip-vit-large-patch14": 16, "minilm": 16}  # of the stand-ins
# Backwards: what steps for 256 and 512 pixels is then that of 512, whose noise is shifted.
RECIPES = [name for name in reversed(shipped()) if not name.startswith("studies/")]
STUDIES = [name for name in shipped() if name.startswith("studies/")]
# Fields that say nothing about what a step runs through; `images` is one step whatever it says.
UNTRIED = {("name",), ("description",), ("loop", "images"), ("seed",)}


def scene(seed: int, size: int) -> bytes:
    """A smooth random colour picture, as PNG."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((size + 8, size), Image.Resampling.BICUBIC).save(stream, "png")
    return stream.getvalue()


def pictures(folder: Path, size: int, classes: int = 0) -> None:
    """Splits of 8, 4 and 4 pictures, labelled, or captioned with words that the tokenizers know."""
    for number, part in enumerate(("train", "val", "test")):
        members = [
            {"key": f"{i}", "image": scene(100 * number + i, size), "extension": "png"}
            | ({"label": i % classes} if classes else {"caption": f"a {'red blue'.split()[i % 2]}"})
            for i in range(8 if part == "train" else 4)
        ]
        names = [f"class {c}" for c in range(classes)]
        write_shards(folder / part, members, classes=names)


def write_test_sets(root: Path) -> None:
    """ImageNet and its test sets as they are published, of ten classes out of twelve."""
    wnids = [f"n{10000000 + c}" for c in range(12)]
    lines = [f"{wnid} class {c}\n" for c, wnid in enumerate(wnids)]
    for name, count in (("imagenet", 12), ("imagenet100", 10)):
        (root / name).mkdir()
        (root / name / "classes.txt").write_text("".join(lines[:count]))
    for number, (folder, named) in enumerate(
        {
            "imagenet/train": wnids,
            "imagenet/val": wnids,
            "imagenet-sketch": wnids,
            "imagenet-r": wnids[3:6],
            "imagenet-a": wnids[4:7],
            "imagenetv2-matched-frequency-format-val": map(str, range(12)),
        }.items()
    ):
        for c, name in enumerate(named):
            path = root / folder / name / "1.JPEG"
            path.parent.mkdir(parents=True)
            path.write_bytes(scene(1000 * (number + 1) + c, 40))


@pytest.fixture(scope="module")
def world(tiny, text_models, tmp_path_factory) -> Path:
    """A folder with everything that the recipes name, small."""
    root = tmp_path_factory.mktemp("world")
    for name, size, classes in (
        ("imagenet256", 72, 1000),
        ("imagenet512", 72, 1000),
        ("cc12m", 72, 0),
        ("cifar10", 32, 10),
        ("emoji", 64, 0),
    ):
        pictures(root / "data" / name, size, classes)
    write_test_sets(root / "data")
    digits = ShardSet(tiny.folder / "train")
    for part, first in (("train", 0), ("monitor", 64), ("test", 128)):
        chosen = [digits[i] for i in range(first, first + 64)]
        members = [
            {"key": s.key, "image": bytes(s.data), "extension": "png", "label": s.label}
            for s in chosen
        ]
        write_shards(root / "data/digits" / part, members, classes=digits.classes)
    (root / "weights").mkdir()
    shape = {"layers_per_block": 1, "norm_num_groups": 2, "mid_block_attention": False}
    for name, channels, levels in (("sd-vae-ft-ema", 3, 4), ("digits", 1, 2)):
        config = AutoencoderConfig(in_channels=channels, block_out_channels=(4,) * levels, **shape)
        Autoencoder.build(config).save(root / "weights" / name)
    for place, encoder in (
        ("weights/t5-v1_1-xxl", "t5"),
        ("weights/clip-vit-large-patch14", "clip"),
        ("data/minilm", "bert"),
    ):
        (root / place).symlink_to(text_models / encoder, target_is_directory=True)
    (root / "data/lpips").mkdir()
    save_file(LPIPS("alexnet").to_file(), root / "data/lpips/vgg16.safetensors")
    return root


@pytest.fixture(scope="module")
def runs(world) -> dict[str, str]:
    """Generators of digits and of colours, and a judge, trained for a step: what others take."""
    before = Path.cwd()
    os.chdir(world)
    try:
        found = {}
        for name in ("ldm/digits", "ldm/cifar10", "evaluate/judge_digits"):
            short = [f"loop.{field}=4" for field in ("images", "log_every", "evaluate_every")]
            changes = small(load_recipe(name), {})
            changes += short if name.startswith("ldm/") else []
            changes += ["latents.variants=0"] if name == "ldm/digits" else []
            recipe = load_recipe(name, changes)
            kind, root = name.split("/")[-1], world / "runs"
            found[kind] = str(run_recipe(recipe, root=root, name=kind, quiet=True)[0])
    finally:
        os.chdir(before)
    judge = found["judge_digits"]
    return {"generator": found["digits"], "colours": found["cifar10"], "judge": judge}


def small(recipe: Recipe, runs: dict[str, str]) -> list[str]:
    """The overrides that make a recipe a matter of a second; see the head of this file."""
    if recipe.kind == "judge":
        return ["judge.images=64"]
    if recipe.kind == "theory":
        return []
    if recipe.kind == "practice":
        return ["sampler.steps=2", *practice(recipe, runs)]
    if recipe.kind in ("extract", "evaluate"):
        extractor = f"{{kind: classifier, weights: {runs['judge']}}}"
        digits = ["real=data/digits/test", "image_size=16"]
        return [
            f"extractor=!replace {extractor}",
            f"generator={runs['generator']}",
            "samples=40",
            *(digits if recipe.image_size > 16 else []),
        ]
    if recipe.kind == "plan":
        return planned(recipe, runs)
    changes = ["strategy.kind=local", "strategy.stage=null", "strategy.precision=fp32"]
    changes += ["data.decoder=torch", "data.workers=1"]
    changes += ["loop.global_batch=4", "loop.micro_batch=2"]
    if recipe.kind == "autoencoder":
        if recipe.adversarial:
            changes += ["model.block_out_channels=[8, 8, 8, 8]", "model.norm_num_groups=4"]
            changes += ["adversarial.discriminator={channels: 8, layers: 2, groups: 4}"]
            changes += ["data.augment.image_size=64", "adversarial.adaptive_images=2"]
        return changes
    changes += ["sampler.steps=2", "grid.per_class=1", "grid.max_classes=2"]
    changes += ["latents.folder=latents", "text.folder=text"]
    if recipe.name.endswith("digits"):
        changes += ["autoencoder=weights/digits"]
    size = recipe.data.augment.image_size
    share = size // 64 if size > 64 else 1 if recipe.name.endswith("digits") else 2
    for field, value in (
        ("model.input_size", recipe.model.input_size),
        ("data.augment.image_size", size),
    ):
        changes.append(f"{field}={value // share}")
    if recipe.text.encoders:
        width = WIDTHS[Path(recipe.text.encoders[0]).name]
        changes += ["text.max_tokens=8", "model.conditioning.text_tokens=8"]
        changes.append(f"model.conditioning.text_width={width}")
    return changes + [f"model.{field}={json.dumps(v)}" for field, v in narrow(recipe.model).items()]


def planned(recipe: Recipe, runs: dict[str, str]) -> list[str]:
    """Digits, their generator and a judge for a plan, whose candidates and screen stay."""
    changes = [f"models.{name}.source={runs['generator']}" for name in recipe.models]
    changes += ["data_sets=!replace {digits: {kind: shards, folder: data/digits/test}}"]
    changes += [f"extractors=!replace {{classifier: {{weights: {runs['judge']}}}}}"]
    changes += ["metrics=[frechet@classifier, {metric: prdc@classifier, options: {k: 3}}]"]
    changes += [
        "samples=40",
        "image_size=16",
        "channels=1",
        f"guidance={list(recipe.guidance[:2])}",
    ]
    if recipe.screen:
        changes += [
            "screen.samples=20",
            "screen.metrics=[Fréchet distance (classifier features), recall]",
        ]
    return changes


def practice(recipe: Recipe, runs: dict[str, str]) -> list[str]:
    """A generator of ten classes for a practice recipe, and what makes its learner small."""
    if recipe.name.endswith("digits"):
        return [f"generator={runs['generator']}"]
    changes = [f"generator={runs['colours']}", "learner.batch=8", "strategy.kind=local"]
    changes += ["strategy.stage=null", "strategy.precision=fp32", "pictures.image_size=16"]
    if recipe.learner.model.family == "vit":  # of ImageNet, by way of a text-to-image model
        changes += ["weights=''", "pictures.shorter_side=18", "learner.model.num_classes=10"]
        changes += ["learner.model.preset=''", "learner.model.hidden_size=16", "start_samples=10"]
        changes += ["learner.model.num_heads=2", "learner.model.depth=1", "round_samples=10"]
        changes += ["learner.model.patch_size=8", "learner.model.input_size=16"]
        changes += ["classes=data/imagenet100/classes.txt", "guidance.decode_precision=fp32"]
        changes += ["whole_classes=data/imagenet/classes.txt", "sampler.method=heun"]
    elif recipe.learner.model.family == "resnet":
        changes += ["learner.model.width=8"]
    if not recipe.monitor:
        changes += ["monitor=data/cifar10/val", "test=data/cifar10/test"]
    return changes


def narrow(model) -> dict[str, object]:
    """The fields of a model's section that make it small and leave everything else as it is."""
    sizes: dict[str, object] = {"preset": ""}
    if model.family == "unet":
        shape = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
        shape |= {"attention_downsamplings": [1, 2], "head_channels": 8, "context_width": 16}
        return sizes | shape
    sizes |= {"hidden_size": 48, "num_heads": 4, "depth": 2}
    sizes |= {"patch_size": min(4, model.patch_size)}
    if model.family == "mdt":
        sizes |= {"depth": 4, "decode_layer": 2}
    if model.family == "pixart" and model.micro_conditions:
        sizes |= {"micro_conditions": True}
    return sizes


@pytest.fixture(scope="module")
def stepped() -> set:
    """The structures that have taken a step."""
    return set()


def structure(recipe: Recipe) -> frozenset:
    """What decides the code that a step runs through: each field, of a fraction whether it is 0.

    Folders of pictures of 512 pixels count as those of 256; `world` has both.
    """
    found = set()
    for path, value, _ in leaves(recipe):
        if path in UNTRIED or path[0] == "expects":
            continue
        if isinstance(value, float):
            value = value != 0
        found.add((path, str(value).replace("imagenet512", "imagenet256")))
    return frozenset(found)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_size_and_takes_a_step(name, world, runs, stepped, monkeypatch) -> None:
    monkeypatch.chdir(world)
    recipe = load_recipe(name)
    count = parameter_count(recipe)
    assert (count is None) == (recipe.kind in ("judge", "theory", "extract", "evaluate", "plan"))
    if name in PUBLISHED:
        same = recipe
        if name.startswith("ldm/mmdit"):  # published without control
            same = load_recipe(name, ["model.conditioning.control=[]"])
        assert parameter_count(same) / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)
    elif name.endswith("512"):  # the same network, but for the tables of its positions
        same = parameter_count(load_recipe(name.replace("512", "256")))
        assert same <= count < 1.01 * same
    if name == "autoencoder/kl_f8":
        assert discriminator_count(recipe) > 2e6
    tried = load_recipe(name, small(recipe, runs))
    if structure(tried) in stepped:
        return
    stepped.add(structure(tried))
    lines: list[str] = []
    dry_run(tried, print_line=lines.append)
    if recipe.kind in ("autoencoder", "ldm"):
        told = next(line for line in lines if line.startswith("one step"))
        seen = re.search(r"'images_seen': (\d+)", told)
        assert int(seen[1]) == 4 and "nan" not in told
        assert any("drawn from it" in x or "loaded again" in x for x in lines)
    assert "nothing was kept" in lines[-1]


@pytest.mark.parametrize("name", STUDIES)
def test_a_studys_runs_are_recipes_and_its_changes_take_a_step(
    name, world, runs, stepped, monkeypatch
) -> None:
    monkeypatch.chdir(world)
    study = load_recipe(name)
    prints = [(label, fingerprint(job)) for label, job in study_runs(study)]
    assert len(set(prints)) == len(prints) == len(instances(study))  # each value has an effect
    for instance in {instance.job: instance for instance in instances(study)}.values():
        job, lines = study.jobs[instance.job], []
        if (job.set or job.grid) and not job.takes:
            changes = overrides(study, instance, {}) + small(load_recipe(job.recipe), runs)
            tried = load_recipe(job.recipe, changes)
            if structure(tried) in stepped:
                continue
            stepped.add(structure(tried))
            dry_run(tried, print_line=lines.append)
            assert "nothing was kept" in lines[-1], instance.label


def test_a_study_dry_runs_what_takes_nothing_and_resolves_the_rest(
    world, runs, monkeypatch
) -> None:
    monkeypatch.chdir(world)
    study, changes = load_recipe("studies/demo"), []
    first = [label for label, job in study.jobs.items() if not job.takes]
    for label in first:
        fields = [c.split("=", 1) for c in small(load_recipe(study.jobs[label].recipe), runs)]
        plain = {field: to_plain(parse(value, field)) for field, value in fields}
        changes.append(f"jobs.{label}.set={json.dumps(plain)}")
    lines: list[str] = []
    dry_run(load_recipe("studies/demo", changes), print_line=lines.append)
    assert sum("nothing was kept" in line for line in lines) == len(first) == 2
    assert sum("takes runs from" in line for line in lines) == len(study.jobs) - 2


def test_captions_start_from_classes_with_what_the_study_lets_be_new() -> None:
    found = dict(study_runs(load_recipe("studies/transfer_cc12m512")))
    models = {}
    for name in ("imagenet256", "cc12m256"):
        fields = found[name].model.model_dump() | narrow(found[name].model)
        models[name] = build_denoiser(type(found[name].model).model_validate(fields))
    source, allowed = models["imagenet256"], found["cc12m256"].start.allow_new
    state, config = source.state_dict(), source.config
    report = transfer(state, config, models["cc12m256"], allow_new=allowed)
    assert {name.split(".")[0] for name in report.names("new")} == set(allowed)
    with pytest.raises(UserError, match="allow_new"):
        transfer(state, config, models["cc12m256"], allow_new=allowed[:1])


def test_an_evaluation_draws_with_the_sampler_that_it_names(
    world, runs, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(world)
    sampler = "{method: heun, steps: 2, guidance_convention: one_plus_lambda, guidance_scale: 3.5}"
    changes = [*small(load_recipe("evaluate/default"), runs), "metrics=[frechet]"]
    changes += [f"store={tmp_path}/features", f"sampler={sampler}"]
    found = run_recipe(load_recipe("evaluate/default", changes), root=tmp_path, quiet=True)[1]
    assert json.loads(found["protocol"]["guidance"])["guidance_scale"] == 3.5
    with pytest.raises(UserError, match="sampler has no effect without a generator"):
        load_recipe("evaluate/default", [f"sampler={sampler}"])
