"""Pictures by index: the same whatever is drawn beside them; in shards, stopped and resumed."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude import cli
from etude.conditions import Conditions
from etude.core import distributed, rng
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.core.run import Run
from etude.core.signals import EXIT_REQUEUE, Stopper, StopRequested
from etude.data.decode_torch import decode_picture
from etude.data.shards import ShardSet, write_shards
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.evaluation.sets import Stages, open_pictures
from etude.exporting import export
from etude.gathering import gather
from etude.jobs import run_recipe
from etude.models.conditioning import ConditioningConfig, ControlConfig
from etude.page import Page
from etude.sampled import contact_sheet, sample_to_folder
from etude.sampling import BLOCK, Generator, balanced_labels, denoiser, open_generator, to_uint8
from etude.training import Look
from etude.training.diffusion import DiffusionJob

ALONE = distributed.World(0, 1, 0, torch.device("cpu"), ("here:cpu",))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run of ten steps with a large learning rate, so that labels and weights matter."""
    root = tmp_path_factory.mktemp("sampling")
    overrides = ["loop.images=320", "optim.lr=5e-3"]
    return run_recipe(load_recipe(tiny.ldm, overrides), root=root / "runs", quiet=True)[0]


@pytest.fixture(scope="module")
def generator(run):
    return open_generator(run)


def close(one: np.ndarray, two: np.ndarray) -> bool:
    """At most 2 levels apart, in at most 1% of the pixels."""
    apart = np.abs(one.astype(int) - two.astype(int))
    return apart.max() <= 2 and (apart > 0).mean() <= 0.01


def test_levels_are_rounded_half_to_even_and_clamped() -> None:
    values = torch.tensor([-1.5, -1.0, -1 / 255, 0.0, 1 / 255, 1.0, 2.0]).reshape(1, 1, 1, 7)
    # (v + 1) * 127.5: -63.75, 0, 127, 127.5, 128, 255, 382.5
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 127, 128, 128, 255, 255]


def test_a_run_opens_without_flags_on_its_longest_average(run, generator) -> None:
    assert generator.profile == "ema:0.9" and generator.num_classes == 10
    raw = open_generator(run, weights="raw")
    assert raw.fingerprint != generator.fingerprint
    indices = np.arange(4)
    drawn = [g.draw(indices, indices, seed=0)[0] for g in (generator, raw)]
    assert not np.array_equal(*drawn)
    with pytest.raises(UserError, match="no weights 'ema:0.5'.*raw, ema:0.9"):
        open_generator(run, weights="ema:0.5")


def test_a_picture_depends_on_its_index_label_and_seed_alone(generator) -> None:
    count = BLOCK + 40
    indices = np.arange(count)
    labels = balanced_labels(indices, 10)
    whole, _ = generator.draw(indices, labels, seed=7)
    assert whole.shape == (count, 16, 16, 1) and whole.std() > 10
    order = np.random.default_rng(0).permutation(count)
    shuffled, _ = generator.draw(order, labels[order], seed=7)
    assert np.array_equal(shuffled, whole[order])  # whole blocks of the same shape: equal bytes
    for part in ([3], [90, 2, 64], list(range(60, 70))):
        some, _ = generator.draw(np.array(part), labels[part], seed=7)
        assert close(some, whole[part])
    other, _ = generator.draw(np.array([3]), labels[[3]], seed=8)
    assert not close(other, whole[[3]])
    relabelled, _ = generator.draw(np.array([3]), np.array([4]), seed=7)
    assert not np.array_equal(relabelled, whole[[3]])


def test_a_picture_is_what_the_sampler_alone_makes_of_its_noise(generator) -> None:
    """Written out for one index without blocks or padding."""
    index, label, seed = 70, 5, 11
    where = np.array([index * (1 << 24)], dtype=np.int64)
    noise = rng.normal(seed, rng.Stream.SAMPLE_NOISE, where, (1, 16, 16))
    latents = sample(
        denoiser(generator.model),
        generator.objective,
        generator.sampler,
        noise,
        {"labels": torch.tensor([label])},
        nulls=[{"labels": torch.tensor([10])}],
    )
    drawn, _ = generator.draw(np.array([index]), np.array([label]), seed=seed)
    assert close(drawn, to_uint8(latents.detach()))


def test_shards_are_resumed_by_block_and_hold_what_was_drawn(generator, tmp_path) -> None:
    folder, count = tmp_path / "drawn", 2 * BLOCK + 10

    class Stopping(Log):
        done = 0

        def look(self) -> None:
            self.done += 1
            if self.done == 2:
                raise StopRequested("a test")

    log = Stopping(None, quiet=True)
    log.on_advance = log.look
    with pytest.raises(StopRequested):
        sample_to_folder(generator, folder, count, seed=1, log=log, labels=[3, 8])
    assert not folder.exists()
    blocks = sorted((tmp_path / ".drawn.blocks").glob("*.npy"))
    assert [int(path.stem) for path in blocks] == [0, BLOCK]
    quiet, folders = Log(None, quiet=True), "holds blocks of other pictures"
    with pytest.raises(UserError, match=folders):
        sample_to_folder(generator, folder, count, seed=2, log=quiet, labels=[3, 8])
    stated = tmp_path / ".drawn.blocks/protocol.json"
    kept = stated.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=folders):  # nobody knows of what
        sample_to_folder(generator, folder, count, seed=1, log=quiet, labels=[3, 8])
    kept.rename(stated)
    marked = np.load(blocks[0])
    np.save(blocks[0], 255 - marked)  # a block that is there is not drawn again

    sample_to_folder(generator, folder, count, seed=1, log=quiet, labels=[3, 8])
    assert [p.name for p in tmp_path.iterdir()] == ["drawn"]
    samples = ShardSet(folder, verify=True)
    labels = np.array([3, 8])[np.arange(count) % 2]
    expected, _ = generator.draw(np.arange(count), labels, seed=1)
    expected[:BLOCK] = 255 - marked
    assert len(samples) == count and samples.labels.tolist() == labels.tolist()
    stored = np.stack([np.asarray(decode_picture(samples[i].data, 1)) for i in range(count)])
    assert np.array_equal(stored.reshape(expected.shape), expected)
    assert np.array_equal(
        255 - expected[:BLOCK], generator.draw(np.arange(BLOCK), labels[:BLOCK], seed=1)[0]
    )

    stated = json.loads((folder / "protocol.json").read_text())
    assert stated["labels"] == [3, 8] and stated["profile"] == "ema:0.9" and stated["seed"] == 1
    assert stated["sampler"]["steps"] == 2 and stated["generator"] == generator.fingerprint
    for change in ({"seed": 2}, {"labels": [3]}, {"count": count + 1}):
        asked = {"count": count, "seed": 1, "labels": [3, 8]} | change
        with pytest.raises(UserError, match="pictures of another protocol: name another folder"):
            sample_to_folder(generator, folder, log=quiet, **asked)
    with Image.open(contact_sheet(folder, limit=20)) as sheet:
        assert sheet.size == (10 * 66 + 2, 2 * 66 + 2)  # ten in a row, 64 pixels and a frame


def test_png_files_hold_the_same_pictures_and_their_classes(generator, tmp_path) -> None:
    folder, quiet = tmp_path / "drawn", Log(None, quiet=True)
    asked = {"seed": 1, "labels": [8, 3], "log": quiet}
    sample_to_folder(generator, folder, 12, form="png", **asked)
    names = [f"{index:09d}.png" for index in range(12)]
    stated = ["metadata.csv", "protocol.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, *stated])
    labels = np.array([8, 3] * 6)
    expected, _ = generator.draw(np.arange(12), labels, seed=1)
    found = open_pictures(folder, channels=1, classes=generator.classes)
    read = found.read(0, 12, Stages())
    assert np.array_equal(read.images, expected) and read.labels.tolist() == labels.tolist()
    form = {"image_size": 0, "fit": "as stored", "channels": 1}
    assert found.protocol == json.loads((folder / "protocol.json").read_text()) | form
    gathered = gather(folder, quiet)
    assert gathered.form == "classes" and not gathered.bad
    assert {(p.path.name, p.label) for p in gathered.pictures} <= {
        (name, generator.classes[label]) for name, label in zip(names, labels, strict=True)
    }
    assert contact_sheet(folder) == tmp_path / "drawn-contact-sheet.png"
    with pytest.raises(UserError, match="is not empty and holds no shards: name another folder"):
        sample_to_folder(generator, folder, 12, **asked)
    with pytest.raises(UserError, match="are not written as 'jpg': give shards or png"):
        sample_to_folder(generator, folder, 12, form="jpg", **asked)


def test_two_processes_write_what_one_does(
    run, generator, tmp_path, run_ranks, monkeypatch
) -> None:
    """Three blocks for two processes, so that one of them has nothing to do in the last round."""
    count, quiet = 2 * BLOCK + 10, Log(None, quiet=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    try:
        sample_to_folder(generator, tmp_path / "one", count, seed=4, log=quiet, form="png")
    finally:
        torch.set_num_threads(threads)
    words = ["-m", "etude", "sample", run, "--count", str(count), "--seed", "4"]
    done = run_ranks(2, *words, "--format", "png", "--to", tmp_path / "two")
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    said = done[0].stdout + done[1].stdout
    assert said.count(f"{count} pictures in {tmp_path / 'two'}") == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_an_exported_run_draws_the_same_pictures(generator, layout, tmp_path) -> None:
    folder = export(generator, tmp_path / "mine", layout=layout)
    again = open_generator(folder)
    assert again.name == f"mine ({layout} layout)" and again.profile == "ema:0.9"
    assert again.classes == generator.classes and again.sampler == generator.sampler
    indices = np.array([2, 70])
    drawn = [g.draw(indices, np.array([4, 1]), seed=2)[0] for g in (generator, again)]
    assert np.array_equal(*drawn)
    with pytest.raises(UserError, match="is not empty"):
        export(generator, folder, layout=layout)
    (folder / "etude.json").write_text(json.dumps({"model": {"family": "dit"}}))
    with pytest.raises(UserError, match="does not describe a model .*: export the run again"):
        open_generator(folder)


def test_an_exported_run_is_a_model_of_diffusers(run, generator, tmp_path, monkeypatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    words = ["etude", "runs", "export", str(run), str(tmp_path / "mine"), "--layout", "diffusers"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    peer, told = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "mine" / "transformer", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(told.values()), told
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # theirs cannot be told
    x, t, labels = torch.randn(2, 1, 16, 16), torch.tensor([100, 900]), torch.tensor([3, 10])
    expected = generator.model(x, t.float(), {"labels": labels})
    with torch.no_grad():
        found = peer.eval()(x, timestep=t, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="family dit has no layout 'flax'"):
        export(generator, tmp_path / "other", layout="flax")
    assert not (tmp_path / "other").exists()


def test_a_folder_of_other_things_and_a_class_that_is_not_there_are_refused(
    generator, tmp_path
) -> None:
    quiet = Log(None, quiet=True)
    with pytest.raises(UserError, match="has no class 10: give labels from 0 to 9"):
        sample_to_folder(generator, tmp_path / "x", 4, seed=0, log=quiet, labels=[10])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        sample_to_folder(generator, tmp_path / "full", 4, seed=0, log=quiet)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"
    with pytest.raises(UserError, match="letter.txt is a file: name a folder"):
        sample_to_folder(generator, tmp_path / "full" / "letter.txt", 4, seed=0, log=quiet)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "letter.txt"]


def test_a_call_that_drew_nothing_locks_nothing(generator, tmp_path) -> None:
    log, folder = Log(None, quiet=True), tmp_path / "drawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "draw", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample_to_folder(generator, folder, 4, seed=0, log=log)
    assert (tmp_path / ".drawn.blocks/protocol.json").exists()
    sample_to_folder(generator, folder, 4, seed=1, log=log)
    assert json.loads((folder / "protocol.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]


def test_the_command_stops_with_85_and_goes_on(run, generator, forks) -> None:
    words = ["-m", "etude", "sample", run.name, "--count", "256", "--steps", "60"]
    process = forks.start(*words, cwd=run.parents[1])
    deadline = time.monotonic() + 60
    while not list((run / "samples").glob(".*.blocks/*.npy")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(1)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, err
    assert "type the same command to go on" in err and "Traceback" not in err
    done = forks.start(*words, cwd=run.parents[1])
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    (folder,) = (run / "samples").iterdir()
    assert len(ShardSet(folder)) == 256
    assert f"256 pictures in runs/{run.name}/samples/{folder.name}" in out
    assert json.loads((folder / "protocol.json").read_text())["sampler"]["steps"] == 60


class Asked(torch.nn.Module):
    """A model whose prediction says what it was asked by."""

    def forward(self, x, t, condition):
        labels = condition["labels"].float()
        control = condition["control"][:, 0] * ~condition["drop_control"]
        return (x * 0 + (labels + 100.0 * control).view(-1, 1, 1, 1)) / 1000.0


def test_an_aspect_follows_from_the_sizes_asked_for() -> None:
    names = ("height", "width", "aspect", "target_height")
    config = ConditioningConfig(control=[ControlConfig(name=name) for name in names])
    conditions = Conditions(config, 3, 8, torch.device("cpu"))
    for stated, expected in (
        ({}, [8, 8, 1, 8]),
        ({"height": 6, "width": 12}, [6, 12, 0.5, 8]),
        ({"height": 6, "aspect": 2, "target_height": 4}, [6, 8, 2, 4]),
    ):
        condition = conditions.asked(np.zeros(1, np.int64), control=stated)
        assert condition["control"].tolist() == [expected]


def test_a_stored_number_that_nobody_states_is_the_mean_of_training() -> None:
    config = ConditioningConfig(control=[ControlConfig(name=name) for name in ("score", "flip")])
    with pytest.raises(UserError, match="not every picture has a control value 'score'"):
        Conditions(config, 3, 8, torch.device("cpu"))
    conditions = Conditions(config, 3, 8, torch.device("cpu"), scalars={"score": 5.25})
    for stated, expected in (({}, [5.25, 0]), ({"score": 2, "flip": 1}, [2, 1])):
        condition = conditions.asked(np.zeros(1, np.int64), control=stated)
        assert condition["control"].tolist() == [expected]


def test_a_model_is_asked_by_a_number_stored_with_its_pictures(tiny, tmp_path) -> None:
    train = ShardSet(tiny.folder / "train")
    samples = [train[index] for index in range(32)]
    members = [
        {"key": s.key, "image": bytes(s.data), "extension": "png", "label": s.label}
        for s in samples
    ]
    ink = [float(np.asarray(decode_picture(s.data, channels=1)).mean()) for s in samples]
    rich = [member | {"meta": {"ink": value}} for member, value in zip(members, ink, strict=True)]
    for name, chosen in (("rich", rich), ("poor", members)):
        write_shards(tmp_path / name, chosen, classes=train.classes)
    overrides = [f"data.shards={tmp_path / 'rich'}", "loop.images=64", "optim.lr=1e-2"]
    overrides += ["model.conditioning.control=[{name: ink, exponent: 0}]"]
    overrides += ["model.conditioning.control_zero=false"]
    with pytest.raises(UserError, match="poor has the number 'ink' in its .json"):
        recipe = load_recipe(tiny.ldm, [*overrides, f"held_out={tmp_path / 'poor'}"])
        run_recipe(recipe, root=tmp_path / "runs", quiet=True)
    recipe = load_recipe(tiny.ldm, [*overrides, f"held_out={tmp_path / 'rich'}"])
    generator = open_generator(run_recipe(recipe, root=tmp_path / "runs", quiet=True)[0])
    assert generator.conditions.scalars == pytest.approx({"ink": np.mean(ink)})
    drawn = []
    for control in ({}, generator.conditions.scalars, {"ink": 1.0}):
        generator.control = dict(control)
        drawn.append(generator.draw(np.arange(2), np.arange(2), seed=0)[0])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_control_values_have_a_guidance_scale_of_their_own(tiny) -> None:
    def generator(control: list[str], **fields) -> Generator:
        config = ConditioningConfig(control=[ControlConfig(name=name) for name in control])
        options = SamplerConfig(steps=1, guidance_convention="one_plus_lambda", **fields)
        conditions = Conditions(config, 3, 8, torch.device("cpu"))
        return Generator(
            Asked(), Objective(ObjectiveConfig()), options, None, ["a", "b", "c"], (1, 8, 8),
            conditions, control={"flip": 1.0} if control else {},
        )  # fmt: skip

    noise = torch.zeros(BLOCK, 1, 8, 8)
    for control, scale in ((1.0, 2.0), (3.0, 2.0), (0.0, 1.0)):
        made = generator(["flip"], guidance_scale=scale, control_scale=control)
        condition = made.conditions.asked(np.full(BLOCK, 1), control=made.control)
        nulls = made.conditions.nulls(condition)
        got = sample(
            denoiser(made.model), made.objective, made.sampler, noise, condition, nulls=nulls
        )
        # Label 1 with a flip, label 3 (none) with one, label 3 without.
        expected = 3.0 + control * 100.0 + scale * (101.0 - 103.0)
        torch.testing.assert_close(got, torch.full_like(got, -expected / 1000.0))
        pictures, _ = made.draw(np.array([5]), np.array([1]), seed=0)
        assert pictures.shape == (1, 8, 8, 1)
    message = "control_scale has no effect on a model without control values"
    with pytest.raises(UserError, match=message):
        generator([], guidance_scale=2.0, control_scale=3.0)
    with pytest.raises(UserError, match=message):
        load_recipe(tiny.ldm, ["sampler.control_scale=3"])


def test_guidance_away_from_what_was_never_dropped_is_refused(tiny, tmp_path) -> None:
    control = ["model.conditioning.control=[{name: flip}]", "drop_control=0"]

    def begun(overrides: list[str]) -> DiffusionJob:
        recipe = load_recipe(tiny.ldm, overrides)
        run = Run.open(recipe, root=tmp_path, name="open", rank=1)  # writes and locks nothing
        look = Look(Log(None, quiet=True), Page(tmp_path / "page", "page"))
        return DiffusionJob(recipe, run, look, ALONE, Stopper())

    begun(control)  # guided by the class alone: the control is never left out
    begun(["drop_semantic=0", "sampler.guidance_scale=1"])
    begun(["drop_semantic=0", "start.from=elsewhere"])  # which may have dropped it
    for overrides, fault in (
        (["drop_semantic=0"], "drop_semantic=0 never trains what sampler.guidance_scale"),
        ([*control, "sampler.control_scale=3"], "drop_control=0 never trains what sampler.control"),
    ):
        with pytest.raises(UserError, match=fault):
            begun(overrides)
