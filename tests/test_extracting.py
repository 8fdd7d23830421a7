"""`etude extract SOURCE --extractors ...` by its command line: sources, rates, faults, batches."""

import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from etude import cli
from etude.core.errors import UserError
from etude.core.files import file_sha256
from etude.data.shards import write_shards
from etude.evaluation.extract import extract_set, feature_key
from etude.evaluation.sets import ShardPictures, open_pictures
from etude.metrics.extractors import Extractor
from etude.metrics.extractors.classifier import save_classifier
from etude.metrics.store import FeatureStore
from etude.models.classifier import Classifier, ClassifierConfig

COUNT = 37
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights that sees 8 grey pixels a side."""
    folder = tmp_path_factory.mktemp("network")
    model = Classifier(ClassifierConfig(channels=(8, 16), num_classes=4), seed=3).eval()
    save_classifier(folder, model, 8, list("abcd"))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same pictures as files in class folders, as shards and as an archive."""
    root = tmp_path_factory.mktemp("sources")
    members = []
    for number, image in enumerate(IMAGES):
        path = root / "folder" / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        entry = {"key": f"{number:03d}", "image": path.read_bytes(), "extension": "png"}
        members.append(entry | {"label": number % 2})
    write_shards(root / "shards", members, per_shard=10, classes=["a", "b"])
    np.savez(root / "arrays.npz", IMAGES)
    return {"folder": root / "folder", "shards": root / "shards", "npz": root / "arrays.npz"}


def extract(*words: object) -> tuple[int, str, str]:
    """`etude extract WORDS` in this process: status, output, messages."""
    found = CliRunner().invoke(cli.app, ["extract", *map(str, words)], catch_exceptions=True)
    if isinstance(found.exception, UserError):
        return 2, found.stdout, str(found.exception)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.stdout, found.stderr


PAIR = ("--extractors", "pixels, classifier", "pixels.input_size=6", "pixels.channels=3")


@pytest.mark.parametrize("kind", ["folder", "shards", "npz"])
def test_sources_give_the_features_of_their_pictures(kind, sources, network, tmp_path) -> None:
    where = ("--store", tmp_path / "store", "--weights", f"classifier={network}")
    status, out, err = extract(sources[kind], *PAIR, *where, "--batch-size", 8)
    assert status == 0, err
    rows = dict(re.findall(r"(pixels|classifier)\W+37\W+([0-9a-f]{64})", out))
    assert rows.keys() == {"pixels", "classifier"}
    (rates,) = re.findall(r"pictures/s: (.*)", out)
    stages = {"resize", "forward", "statistics", "all"} | ({"read"} if kind != "npz" else set())
    assert stages <= {one.rpartition(" ")[0] for one in rates.split(", ")}
    assert f"features of {sources[kind]}" in err and "37/37 images" in err
    order = list(range(COUNT))
    if kind == "folder":  # class after class
        order = order[::2] + order[1::2]
    store = FeatureStore(tmp_path / "store")
    pixels, judged = (store.load(rows[name]) for name in ("pixels", "classifier"))
    # A reduction by two with antialiasing, written out for one row of one picture.
    taps = np.array([1, 3, 3, 1]) / 8
    grey = IMAGES[order[5], :, :, 1].astype(float) / 255
    value = taps @ grey[3:7, 5:9] @ taps
    assert pixels.features[5].reshape(3, 6, 6)[1, 2, 3].item() == pytest.approx(value, abs=1e-6)
    expected = Extractor("classifier", network)(IMAGES[order])
    torch.testing.assert_close(judged.features, expected, rtol=1e-5, atol=1e-5)
    if kind != "npz":
        assert judged.groups == ["ab"[n % 2] for n in order]
        assert judged.labels.tolist() == [n % 2 for n in order]
    before = {p: file_sha256(p) for p in (tmp_path / "store").rglob("*.*")}
    status, again, err = extract(sources[kind], *PAIR, *where, "--batch-size", 16)
    assert status == 0 and "pictures/s" not in again and rows["pixels"] in again
    assert {p: file_sha256(p) for p in (tmp_path / "store").rglob("*.*")} == before


def test_options_of_pictures_reach_them(sources, tmp_path) -> None:
    """`image_size` resizes the pictures before an extractor sees them, `channels` greys them."""
    where = ("--store", tmp_path / "store", "--extractors", "pixels", "pixels.input_size=4")
    status, out, err = extract(sources["npz"], *where, "image_size=4", "channels=1", "fit=squash")
    assert status == 0, err
    ((_, digest),) = re.findall(r"(pixels)\W+37\W+([0-9a-f]{64})", out)
    found = FeatureStore(tmp_path / "store").load(digest).features
    grey = [Image.fromarray(image).convert("L") for image in IMAGES]
    small = [np.asarray(one.resize((4, 4), Image.Resampling.BICUBIC)) for one in grey]
    np.testing.assert_allclose(found, np.stack(small).reshape(COUNT, 16) / 255.0, atol=2.1 / 255)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("SOURCE/nowhere", "--extractors", "pixels"), "nowhere is not a folder; name a folder"),
        (
            ("SOURCE", "--extractors", "pixels"),
            "pixels has 1 or 3 channels and needs its option input_size",
        ),
        (("SOURCE", "--extractors", "pixel"), "there is no extractor 'pixel'; choose one of"),
        (("SOURCE", "--extractors", "pixels,", "pixels.input_size=4"), "no extractor ''"),
        (("SOURCE", "--extractors", "pixels/nose", "pixels.input_size=4"), "no features 'nose'"),
        (("SOURCE", "--extractors", "pixels", "pixels.nose=4"), "has no option 'nose'"),
        (("SOURCE", "--extractors", "pixels", "clip.resize=cmmd"), "clip is not in --extractors"),
        (("SOURCE", "--extractors", "classifier"), "add --weights classifier=PATH"),
        (("SOURCE", "--extractors", "pixels", "--weights", "x"), "write --weights x=PATH"),
        (("SOURCE", "--extractors", "pixels", "--weights", "clip=x"), "clip is not in"),
        (
            ("SOURCE", "--extractors", "pixels", "pixels.input_size=4", "--weights", "pixels=x"),
            "--weights pixels=x has no effect: pixels needs no weights",
        ),
        (
            ("SOURCE", "--extractors", "pixels", "size=3"),
            "channels; an extractor's own are typed as EXTRACTOR.size=VALUE",
        ),
        (("SOURCE", "--extractors", "pixels", "image_size=big"), "such as image_size=3"),
        (("SOURCE", "--extractors", "pixels", "image_size=-3"), "such as image_size=3"),
        (("SOURCE", "--extractors", "pixels", "channels=2"), "channels=1, or in colour"),
        (("SOURCE", "--extractors", "pixels", "fit=stretch"), "no fit 'stretch'; choose"),
        (("SOURCE", "--extractors", "pixels", "fit=squash"), "set image_size=PIXELS"),
        (
            ("SOURCE", "--extractors", "pixels", "pixels.input_size=4", "--dtype", "float8"),
            "there is no dtype 'float8'",
        ),
        (
            ("SOURCE", "--extractors", "pixels", "pixels.input_size=4", "--dtype", "tf32"),
            "set dtype=float32 on a CPU",
        ),
    ],
)
def test_faults_are_said_in_one_sentence(sources, tmp_path, words, said) -> None:
    given = [str(word).replace("SOURCE", str(sources["folder"])) for word in words]
    status, out, err = extract(*given, "--store", tmp_path)
    assert status == 2 and said in err and "\n" not in err and not out
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_picture_is_named(sources, tmp_path) -> None:
    folder = Path(shutil.copytree(sources["folder"], tmp_path / "folder"))
    (folder / "b/003.png").write_bytes((folder / "b/003.png").read_bytes()[:60])
    words = ("--extractors", "pixels", "pixels.input_size=4", "--store", tmp_path / "store")
    status, _, err = extract(folder, *words)
    assert status == 2 and "picture b/003.png cannot be used" in err and "\n" not in err


def test_the_program_prints_the_sentence_and_leaves_with_2(
    sources, tmp_path, monkeypatch, capsys
) -> None:
    words = ["etude", "extract", str(sources["npz"]), "--extractors", "pixels", "channels=2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("etude: channels=2: pictures are grey")
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def networks(network, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Extractor]:
    """Opens a convolutional network or a transformer with random weights."""
    if find_spec("transformers") is not None:
        import transformers as tf

        vit = tmp_path_factory.mktemp("dinov2")
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
        tf.Dinov2Model(tf.Dinov2Config(image_size=28, patch_size=14, **shape)).save_pretrained(vit)

    def opened(name: str) -> Extractor:
        if name == "classifier":
            return Extractor("classifier", network)
        pytest.importorskip("transformers")
        return Extractor("dinov2", vit, input_size=28)

    return opened


@pytest.mark.parametrize("name", ["classifier", "dinov2"])
def test_features_do_not_depend_on_the_batch(name, networks, sources, tmp_path) -> None:
    """Through the store, at most 2e-6 of the largest feature apart; at one batch size, bitwise."""
    one = networks(name)
    pictures = open_pictures(sources["shards"])
    found = {}
    for number, batch in enumerate((1, 5, 16, 64, 16)):
        store = FeatureStore(tmp_path / f"{number}")
        extract_set(pictures, [one], store, batch_size=batch, shard_size=20)
        found[number] = store.load(feature_key(pictures, one)).features
    assert torch.equal(found[2], found[4])
    scale = found[0].abs().max()
    assert scale > 0.1
    for other in found.values():
        assert (other - found[0]).abs().max() <= 2e-6 * scale
    # Nor on which pictures share its block, nor on its place there.
    rows = [30, 3, 36]
    some, store = ShardPictures(sources["shards"], rows=rows), FeatureStore(tmp_path / "some")
    extract_set(some, [one], store, batch_size=16)
    apart = store.load(feature_key(some, one)).features - found[2][rows]
    assert apart.abs().max() <= 2e-6 * scale
