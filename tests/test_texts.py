"""Captions to features: the cache, who fills it, and training and sampling by text."""

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etude import cli
from etude.core.errors import UserError
from etude.core.log import Log, read_metrics
from etude.core.recipe import load_recipe
from etude.data.shards import ShardSet, write_shards
from etude.data.text_cache import TextCache, keyed, write_texts
from etude.evaluation.sets import GeneratedPictures, Stages
from etude.exporting import export
from etude.gathering import gather
from etude.jobs import run_recipe
from etude.models.conditioning import ConditioningConfig
from etude.sampled import sample_to_folder
from etude.sampling import BLOCK, open_generator
from etude.texts import TextConfig, TextFeatures, read_prompts

QUIET = Log(None, quiet=True)
TEXTS = ["a red cat", "the moon", "a picture of the blue house one two sun star", ""]


class Killed(Exception):
    pass


def config(text_models: Path, tmp_path: Path, *names: str, **changes) -> TextConfig:
    given = {"encoders": [str(text_models / name) for name in names or ("bert",)]}
    given |= {"max_tokens": 8, "folder": str(tmp_path / "text")}
    return TextConfig(**given | changes)


def prepared(text_config: TextConfig, captions: list[str]) -> TextFeatures:
    features = TextFeatures(text_config)
    features.prepare(captions, log=QUIET)
    features.complete(captions)
    return features


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("names", [["bert"], ["t5"], ["clip_l", "clip_g", "t5"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_stored_is_what_the_encoder_gave(text_models, tmp_path, names, dtype) -> None:
    asked = config(text_models, tmp_path, *names, dtype=dtype)
    captions = [TEXTS[i] for i in (2, 0, 0, 3, 1)]
    features = prepared(asked, TEXTS)
    found = features(captions)
    encoded = features.encoder.encode(sorted(TEXTS))
    rows = [sorted(TEXTS).index(caption) for caption in captions]
    assert torch.equal(found["text"], encoded.tokens[rows].float())
    assert torch.equal(found["text_lengths"], encoded.lengths[rows])
    assert torch.equal(found["pooled"], encoded.pooled[rows].float())
    assert found["text"].shape[1:] == (features.encoder.tokens, features.encoder.width)
    assert found["text"].dtype == torch.float32 and found["text"].std() > 0.1
    features.encoder.encode = pytest.fail  # nothing is encoded again
    assert equal(features(captions), found)


def test_the_encoders_are_asked_for_each_caption_once(text_models, tmp_path, monkeypatch) -> None:
    asked = config(text_models, tmp_path)
    features = TextFeatures(asked)
    seen: list[str] = []
    encode = features.encoder.encode
    monkeypatch.setattr(features.encoder, "encode", lambda c: seen.extend(c) or encode(c))
    features.prepare(TEXTS * 3)
    assert sorted(seen) == sorted(TEXTS)
    features.prepare([*TEXTS, "one star"])
    assert sorted(seen) == sorted([*TEXTS, "one star"])
    features.complete([*TEXTS, "one star"])
    features(["two cat", "two cat", "a red cat"])  # not in the cache: encoded, remembered
    features(["two cat"])
    assert seen[5:] == ["two cat"]
    assert len(TextCache(features.folder, features.encoder.plan)) == 5


def test_ranks_share_the_work_and_agree(text_models, tmp_path, monkeypatch) -> None:
    captions = [f"{one} {two}" for one in ("red", "blue") for two in ("cat", "sun", "dog", "tree")]
    asked = config(text_models, tmp_path)
    alone = prepared(asked.model_copy(update={"folder": str(tmp_path / "alone")}), captions)
    ranks, seen = [TextFeatures(asked) for _ in range(3)], []
    two = 2 * ranks[0].encoder.tokens * ranks[0].encoder.width
    monkeypatch.setattr("etude.texts._FILE_NUMBERS", two)  # so many numbers are two texts at most
    for features in ranks:
        encode = features.encoder.encode
        monkeypatch.setattr(features.encoder, "encode", lambda c, e=encode: seen.extend(c) or e(c))
    threads = [
        threading.Thread(target=f.prepare, args=(captions,), kwargs={"rank": r, "world": 3})
        for r, f in enumerate(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(ranks[0].folder.glob("text-*.safetensors"))) == 4
    assert sorted(seen) == sorted(captions)
    for features in ranks:
        assert features.complete(captions) == 8
        assert equal(features(captions), alone(captions))
    ranks[0].prepare(captions, rank=0, world=1)  # another world size finds everything
    assert len(list(ranks[0].folder.glob("text-*.safetensors"))) == 4


def test_texts_outside_the_cache_take_bounded_memory(text_models, tmp_path, monkeypatch) -> None:
    features = TextFeatures(config(text_models, tmp_path))
    monkeypatch.setattr("etude.texts._REMEMBERED", 3 * 8 * features.encoder.width)
    for text in TEXTS:
        features([text])
    assert list(features._remembered) == TEXTS[3:]


def test_an_interrupted_cache_goes_on(text_models, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("etude.texts.PER_FILE", 1)
    asked = config(text_models, tmp_path)
    turns = iter(range(10))

    def kill() -> None:
        if next(turns) == 2:
            raise Killed

    features = TextFeatures(asked)
    with pytest.raises(Killed):
        features.prepare(TEXTS, check=kill)
    written = {p.name: p.stat().st_mtime_ns for p in features.folder.glob("text-*")}
    assert len(written) == 2 and not list(features.folder.glob("*.tmp"))
    with pytest.raises(UserError, match="lacks 2 captions although they were encoded"):
        TextFeatures(asked).complete(TEXTS)
    features = prepared(asked, TEXTS)
    now = {p.name: p.stat().st_mtime_ns for p in features.folder.glob("text-*")}
    assert len(now) == 4 and written.items() <= now.items()


def test_damage_is_one_sentence(tmp_path) -> None:
    plan = keyed({"encoders": ["x"]})
    tokens = [torch.arange(12.0).view(4, 3), torch.ones(1, 3), torch.zeros(0, 3)]
    pooled = torch.arange(6.0).view(3, 2)
    cache = TextCache(tmp_path, plan)
    path = write_texts(tmp_path, plan["key"], ["one", "two", "none"], tokens, pooled)
    cache.refresh()
    for caption, rows, vector in zip(["one", "two", "none"], tokens, pooled, strict=True):
        found = cache.read(caption)
        assert torch.equal(found[0], rows) and torch.equal(found[1], vector)
    assert cache.has(["two", "three"]).tolist() == [True, False]
    with pytest.raises(KeyError):
        cache.read("three")
    whole = path.read_bytes()
    place = whole.index(torch.full((1, 3), 1.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(UserError, match="the features of 'two' changed"):
        TextCache(tmp_path, plan).read("two")
    assert torch.equal(TextCache(tmp_path, plan).read("one")[0], tokens[0])
    for damaged in (whole[:-1], whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged \(.*delete the file to encode"):
            TextCache(tmp_path, plan)
    path.unlink()
    write_texts(tmp_path, "another", ["one"], tokens[:1], pooled[:1])
    with pytest.raises(UserError, match="it belongs to another cache"):
        TextCache(tmp_path, plan)
    with pytest.raises(UserError, match="holds features of another text encoder or length"):
        TextCache(tmp_path, keyed({"encoders": ["y"]}))


def test_a_model_of_another_shape_is_told_what_to_set(text_models, tmp_path) -> None:
    features = TextFeatures(config(text_models, tmp_path, "clip_l", "clip_g", "t5"))
    model = ConditioningConfig(semantic="text", text_tokens=16, text_width=48, pooled_width=24)
    features.check(model, "x")
    features.check(model.model_copy(update={"pooled_width": 0}), "x")
    wrong = model.model_copy(update={"text_tokens": 77, "text_width": 4096, "pooled_width": 2048})
    expected = (
        "recipe x does not fit its text encoders: set model.conditioning.text_tokens=16"
        " model.conditioning.text_width=48 model.conditioning.pooled_width=24"
    )
    with pytest.raises(UserError, match=expected):
        features.check(wrong, "x")


def test_prompts_are_the_lines_of_a_file(tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  the moon \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "the moon"]
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_prompts(tmp_path / "absent.txt")


@pytest.fixture(scope="module")
def recipe(tiny, text_models, tmp_path_factory) -> str:
    """The tiny recipe on captioned digits, asked by text, with a small PixArt and BERT."""
    root = tmp_path_factory.mktemp("texts")
    words = "sun moon star tree house face hand cat dog one".split()
    for part in ("train", "monitor"):
        data = ShardSet(tiny.folder / part)
        samples = [
            {"key": s.key, "image": bytes(s.data), "extension": "png"}
            | {"caption": f"a {('red', 'blue')[i % 2]} {words[s.label]}"}
            for i, s in enumerate(data[i] for i in range(len(data)))
        ]
        write_shards(root / part, samples, per_shard=100)
    text = Path(tiny.ldm).read_text().replace(str(tiny.folder), str(root))
    text = text.replace(
        "num_classes: 10",
        "family: pixart\n  conditioning: {semantic: text, text_tokens: 8, text_width: 16}",
    )
    text += f"text: {{encoders: [{text_models}/bert], max_tokens: 8, folder: {root}/text}}\n"
    text = text.replace("grid: {per_class: 1}", "grid: {per_class: 2, max_classes: 3}")
    (root / "texts.yaml").write_text(text)
    return str(root / "texts.yaml")


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    overrides = ["loop.images=320", "optim.lr=5e-3", "drop_semantic=0.2"]
    root = tmp_path_factory.mktemp("runs") / "runs"
    threads, made = [], TextFeatures.__call__

    def noting(features: TextFeatures, captions: list[str]) -> dict:
        threads.append(threading.current_thread().name)
        return made(features, captions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextFeatures, "__call__", noting)
        folder = run_recipe(load_recipe(recipe, overrides), root=root, quiet=True)[0]
    # 20 steps, features of which are read ahead; the others are evaluations'.
    assert threads.count("etude-data") >= 20 > threads.count("MainThread") > 0
    return folder


@pytest.fixture(scope="module")
def generator(run):
    return open_generator(run)


def test_a_run_by_text_trains_draws_its_prompts_and_opens(run, generator, recipe) -> None:
    captions = ShardSet(load_recipe(recipe).held_out)
    expected = list(dict.fromkeys(captions[i].caption for i in range(64)))
    assert generator.prompts == expected and generator.asked_by_text and not generator.classes
    expected = expected[:3]
    assert f"From left to right: {'; '.join(expected)}" in (run / "page.html").read_text()
    assert "features of 20 different captions" in (run / "log.txt").read_text()
    folders = [p for p in Path(load_recipe(recipe).text.folder).iterdir()]
    assert [len(list(folder.glob("text-*"))) for folder in folders] == [1]


def test_a_picture_depends_on_its_own_caption(generator) -> None:
    indices, zeros = np.arange(4), np.zeros(4, np.int64)
    texts = ["a red sun", "a blue moon", "two faces", "a red sun"]
    whole, _ = generator.draw(indices, zeros, seed=0, captions=texts)
    some, _ = generator.draw(indices[2:], zeros[2:], seed=0, captions=texts[2:])
    assert np.abs(some.astype(int) - whole[2:]).max() <= 2
    other, _ = generator.draw(indices, zeros, seed=0, captions=["a blue moon", *texts[1:]])
    assert not np.array_equal(other[0], whole[0]) and np.array_equal(other[1:], whole[1:])
    relabelled, _ = generator.draw(indices, zeros + 5, seed=0, captions=texts)
    assert np.array_equal(relabelled, whole)
    own, _ = generator.draw(indices, zeros, seed=0)
    turns = generator.prompts[:4]
    assert np.array_equal(own, generator.draw(indices, zeros, seed=0, captions=turns)[0])


def test_prompts_become_captioned_shards(generator, tmp_path) -> None:
    folder, prompts = tmp_path / "drawn", ["a red sun", "the moon"]
    count = BLOCK + 3
    sample_to_folder(generator, folder, count, seed=1, log=QUIET, prompts=prompts)
    samples = ShardSet(folder)
    assert samples.captioned and not samples.labelled and len(samples) == count
    assert [samples[i].caption for i in range(count)] == [prompts[i % 2] for i in range(count)]
    stated = json.loads((folder / "protocol.json").read_text())
    assert stated["prompts"] == prompts and "labels" not in stated
    with pytest.raises(UserError, match="pictures of another protocol"):
        sample_to_folder(generator, folder, count, seed=1, log=QUIET, prompts=prompts[:1])
    with pytest.raises(UserError, match="is asked by text, not by class: give --prompt"):
        sample_to_folder(generator, folder, 2, seed=1, log=QUIET, labels=[1])


def test_prompts_become_captions_of_png_files_and_exports_draw_the_same_bytes(
    generator, tmp_path
) -> None:
    prompts = ["a red sun", "the moon, of course"]
    asked = {"seed": 1, "log": QUIET, "prompts": prompts, "form": "png"}
    sample_to_folder(generator, tmp_path / "drawn", 4, **asked)
    gathered = gather(tmp_path / "drawn", QUIET)
    assert gathered.form == "captions" and not gathered.bad
    found = {p.path.name: p.caption for p in gathered.pictures}
    assert found == {f"{i:09d}.png": prompts[i % 2] for i in range(4)}
    for layout in ("original", "diffusers"):
        again = open_generator(export(generator, tmp_path / f"mine-{layout}", layout=layout))
        assert again.asked_by_text and not again.prompts
        sample_to_folder(again, tmp_path / layout, 4, **asked)
        for name in found:
            one, two = ((tmp_path / place / name).read_bytes() for place in ("drawn", layout))
            assert one == two


def test_an_evaluation_draws_the_held_out_captions_in_turn(generator) -> None:
    drawn = GeneratedPictures(generator, 5, seed=3, classes=["a", "b"])
    found = drawn.read(2, 5, Stages())
    texts = generator.prompts[2:5]
    expected, _ = generator.draw(np.arange(2, 5), np.zeros(3), seed=3, captions=texts)
    assert np.array_equal(found.images, expected)
    assert found.labels.tolist() == [-1] * 3 and found.groups == [""] * 3
    assert drawn.protocol["labels"] == "none" and drawn.protocol["prompts"] == generator.prompts


def test_another_encoder_in_its_place_is_refused(run, generator, text_models, monkeypatch) -> None:
    monkeypatch.setattr(
        "etude.external.transformers.TextEncoder.identity", property(lambda self: "other")
    )
    with pytest.raises(UserError, match="bert is another text encoder than the run was trained"):
        open_generator(run)


def test_a_run_does_not_go_on_with_another_encoder(run, recipe, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(run, tmp_path / run.name)
    (folder / "result.json").unlink()
    monkeypatch.setattr(
        "etude.external.transformers.TextEncoder.identity", property(lambda self: "other")
    )
    overrides = ["loop.images=320", "optim.lr=5e-3", "drop_semantic=0.2"]
    changed = load_recipe(recipe, [*overrides, f"text.folder={tmp_path}/other"])
    with pytest.raises(UserError, match="text.encoders names other weights than .* trained with"):
        run_recipe(changed, root=tmp_path, quiet=True)
    assert not (folder / "result.json").exists()


def test_a_batch_by_batch_run_has_the_same_losses(run, recipe, tmp_path) -> None:
    overrides = ["loop.images=320", "optim.lr=5e-3", "drop_semantic=0.2", "text.ahead=false"]
    overrides += [f"text.folder={tmp_path}/none"]
    folder = run_recipe(load_recipe(recipe, overrides), root=tmp_path, quiet=True)[0]
    rows = [
        [json.loads(line).get("loss") for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (run, folder)
    ]
    found, expected = ([loss for loss in column if loss] for column in rows)
    assert len(found) == 20 and found == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "none").exists()


def test_two_ranks_fill_one_cache_and_learn_what_one_does(run, recipe, tmp_path, run_ranks) -> None:
    overrides = ["loop.images=32", "loop.evaluate_every=32", "optim.lr=5e-3", "drop_semantic=0.2"]
    overrides += [f"text.folder={tmp_path}/text", "run=pair"]
    ended = run_ranks(2, "-m", "etude", "train", recipe, *overrides, cwd=tmp_path)
    assert [one.returncode for one in ended] == [0, 0], "".join(one.stderr for one in ended)
    pair = read_metrics(tmp_path / "runs/pair/metrics.jsonl", "train")
    alone = read_metrics(run / "metrics.jsonl", "train")
    # The first two steps, where the learning rates are still the same.
    assert [row["loss"] for row in pair] == pytest.approx(
        [row["loss"] for row in alone[:2]], rel=1e-4
    )
    (folder,) = (tmp_path / "text").iterdir()
    assert len(list(folder.glob("text-*.safetensors"))) == 1


def test_recipes_that_make_no_sense_are_one_sentence(recipe, tiny, tmp_path) -> None:
    for path, override, match in (
        (recipe, "text.encoders=[]", "needs a text encoder: set text.encoders"),
        (recipe, "judge=x", "a judge tells classes, not texts"),
        (tiny.ldm, "text.encoders=[x]", "text.encoders is for a model asked by text"),
        (tiny.ldm, "grid.prompts=[x]", "grid.prompts is for a model asked by text"),
        (tiny.ldm, "text.max_tokens=9", "text.max_tokens is for a model asked by text"),
    ):
        with pytest.raises((UserError, ValidationError), match=match):
            load_recipe(path, [override])
    for override, match in (
        (f"data.shards={tiny.folder}/train", "has no captions: add a .txt to each picture"),
        ("text.max_tokens=9", "set model.conditioning.text_tokens=9"),
        ("text.encoders=[nowhere]", "nowhere/config.json does not exist"),
    ):
        with pytest.raises(UserError, match=match):
            run_recipe(load_recipe(recipe, [override]), root=tmp_path, quiet=True)


@pytest.fixture
def command(monkeypatch, capsys):
    """Call `etude` in this process: (status, output, errors)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["etude", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def test_the_command_line_draws_prompts(run, recipe, command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(run.parents[1])
    (tmp_path / "prompts.txt").write_text("the moon\na blue cat\n")
    words = ["sample", run.name, "--count", "4", "--to", str(tmp_path / "drawn")]
    status, out, err = command(*words, "--prompt", "a dog", "--prompts", tmp_path / "prompts.txt")
    assert status == 0 and "4 pictures in" in out, err
    samples = ShardSet(tmp_path / "drawn")
    captions = [samples[i].caption for i in range(4)]
    assert captions == ["a dog", "the moon", "a blue cat", "a dog"]
    status, _, err = command("sample", run.name, "--label", "3")
    assert status == 2 and "is asked by text, not by class: give --prompt" in err
    status, out, err = command("train", recipe, "--dry-run", f"text.folder={tmp_path}/none")
    assert status == 0 and "4 pictures were drawn from it" in out, err
    assert not (tmp_path / "none").exists()


def test_a_model_asked_by_class_takes_no_prompt(tiny, tmp_path) -> None:
    folder, _ = run_recipe(load_recipe(tiny.ldm, ["loop.images=16"]), root=tmp_path, quiet=True)
    generator = open_generator(folder)
    with pytest.raises(UserError, match="is asked by class, not by text: give --label"):
        sample_to_folder(generator, tmp_path / "x", 1, seed=0, log=QUIET, prompts=["a cat"])
    with pytest.raises(UserError, match="is asked by class, not by text: give labels"):
        generator.draw(np.arange(1), np.zeros(1), seed=0, captions=["a cat"])
