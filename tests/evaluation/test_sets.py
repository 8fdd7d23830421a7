"""Sets of pictures: shards, folders and generators give the same kind of thing."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.data.shards import write_shards
from etude.evaluation import decoding
from etude.evaluation.picture_set import spread, spread_order
from etude.evaluation.sets import (
    FITS,
    ArrayPictures,
    FolderPictures,
    GeneratedPictures,
    ListedPictures,
    NpzPictures,
    ShardPictures,
    Stages,
    open_pictures,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 10, 10), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def shards(folder: Path, images: list[np.ndarray]) -> Path:
    samples = (
        {"key": f"s{i}", "image": png(image), "extension": "png", "label": i % 2}
        for i, image in enumerate(images)
    )
    write_shards(folder, samples, per_shard=3, classes=["even", "odd"])
    return folder


def files(folder: Path, images: list[np.ndarray]) -> Path:
    for i, image in enumerate(images):
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return folder


def test_shards_and_files_hold_the_same_pictures(tmp_path) -> None:
    one = open_pictures(shards(tmp_path / "a", list(IMAGES)), channels=1)
    two = open_pictures(files(tmp_path / "b", list(IMAGES)), channels=1)
    assert isinstance(one, ShardPictures) and isinstance(two, FolderPictures)
    assert len(one) == len(two) == 7 and one.classes == two.classes == ["even", "odd"]
    first = one.read(2, 6, Stages())
    np.testing.assert_array_equal(first.images[..., 0], IMAGES[2:6])
    assert first.keys == ["s2", "s3", "s4", "s5"] and first.labels.tolist() == [0, 1, 0, 1]
    assert first.groups == ["even", "odd", "even", "odd"]
    second = two.read(0, 7, Stages())
    np.testing.assert_array_equal(second.images[..., 0], IMAGES[[0, 2, 4, 6, 1, 3, 5]])
    assert second.keys[4] == "odd/1.png" and second.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_labels_of_a_folder_follow_the_real_classes(tmp_path) -> None:
    found = FolderPictures(files(tmp_path, list(IMAGES)), channels=1, classes=["odd", "other"])
    assert found.read(0, 7, Stages()).labels.tolist() == [-1, -1, -1, -1, 0, 0, 0]


def test_a_table_names_the_pictures_and_their_classes(tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(IMAGES[i]))
    plain = FolderPictures(tmp_path, channels=1)
    assert len(plain) == 3 and not plain.classes
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,odd\n0.png,even\n")
    found = FolderPictures(tmp_path, channels=1)
    assert found.classes == ["even", "odd"] and len(found) == 2
    read = found.read(0, 2, Stages())
    assert read.keys == ["0.png", "2.png"] and read.labels.tolist() == [0, 1]
    turned = FolderPictures(tmp_path, channels=1, classes=["odd", "even"])
    assert turned.read(0, 2, Stages()).labels.tolist() == [1, 0]
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,even\n0.png,odd\n")
    assert FolderPictures(tmp_path, channels=1).fingerprint != found.fingerprint
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match="metadata.csv names 2.png, which is not there"):
        FolderPictures(tmp_path)


@pytest.mark.parametrize("kind", [files, shards])
def test_a_damaged_protocol_is_named(tmp_path, kind) -> None:
    kind(tmp_path, list(IMAGES))
    (tmp_path / "protocol.json").write_text('{"guidance": 3}')
    assert open_pictures(tmp_path).protocol["guidance"] == 3
    for text, message in (('{"guidance": ', "cannot be read as JSON"), ("[3]", "holds no fields")):
        (tmp_path / "protocol.json").write_text(text)
        with pytest.raises(UserError, match=f"protocol.json {message}"):
            open_pictures(tmp_path)


def test_fingerprints_follow_content_and_form(tmp_path) -> None:
    folder = files(tmp_path / "a", list(IMAGES))
    plain = FolderPictures(folder, channels=1).fingerprint
    assert FolderPictures(folder, channels=1).fingerprint == plain
    assert FolderPictures(folder, channels=3).fingerprint != plain
    assert FolderPictures(folder, channels=1, size=8).fingerprint != plain
    (folder / "even" / "0.png").write_bytes(png(255 - IMAGES[0]))
    assert FolderPictures(folder, channels=1).fingerprint != plain


def test_pictures_are_fitted_by_their_central_square(tmp_path) -> None:
    wide = np.zeros((10, 20), np.uint8)
    wide[:, 5:15] = IMAGES[0]
    found = ShardPictures(shards(tmp_path, [wide, IMAGES[1]]), size=10, channels=1)
    images = found.read(0, 2, Stages()).images
    np.testing.assert_array_equal(images[..., 0], IMAGES[:2])
    smaller = ShardPictures(tmp_path, size=5, channels=1).read(1, 2, Stages()).images[0, :, :, 0]
    expected = Image.fromarray(IMAGES[1]).resize((5, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(smaller, np.asarray(expected))


def test_unequal_sizes_are_read_as_a_list_of_what_is_stored(tmp_path) -> None:
    found = ShardPictures(shards(tmp_path, [IMAGES[0], IMAGES[1][:8], IMAGES[2]]), channels=1)
    images = found.read(0, 3, Stages()).images
    assert isinstance(images, list) and images[1].shape == (8, 10, 1)
    np.testing.assert_array_equal(images[1][..., 0], IMAGES[1][:8])
    np.testing.assert_array_equal(images[2][..., 0], IMAGES[2])
    alike = found.read(2, 3, Stages()).images
    assert isinstance(alike, np.ndarray) and alike.shape == (1, 10, 10, 1)


def test_a_folder_is_what_lies_in_it_and_nothing_hidden(tmp_path) -> None:
    """Linked folders count, a link to where it lies does not; classes of digits are numbers."""
    for i, place in enumerate(("set/10", "set/2", "set/.ipynb_checkpoints", "set/__MACOSX", "far")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.png").write_bytes(png(IMAGES[i]))
    (tmp_path / "set/2/._b.png").write_bytes(b"of macOS")
    (tmp_path / "set/1").symlink_to(tmp_path / "far")
    (tmp_path / "set/2/up").symlink_to(tmp_path / "set")
    found = FolderPictures(tmp_path / "set", channels=1)
    assert found.files == ["1/a.png", "10/a.png", "2/a.png"]
    assert found.classes == ["1", "2", "10"] and found.labels.tolist() == [0, 2, 1]
    (tmp_path / "set/2/c.BMP").write_bytes(b"not read")
    with pytest.raises(UserError, match=r"2/c.BMP is no .png, .jpg or .webp picture; convert it"):
        FolderPictures(tmp_path / "set")


def test_a_broken_picture_is_named_and_never_skipped(tmp_path) -> None:
    folder = files(tmp_path, list(IMAGES))
    (folder / "odd" / "3.png").write_bytes(png(IMAGES[3])[:-20])
    with pytest.raises(UserError, match="odd/3.png cannot be used"):
        FolderPictures(folder, channels=1).read(0, 7, Stages())


def test_no_pictures_and_no_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no .png"):
        open_pictures(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        open_pictures(tmp_path / "no")


class Ramp:
    """Picture i of label l is filled with 10 i + l."""

    name, fingerprint, protocol = "ramp", "f", {"rounding": "half even"}

    def draw(self, indices: np.ndarray, labels: np.ndarray, *, seed: int) -> tuple:
        values = (10 * indices + labels).astype(np.uint8)
        return np.broadcast_to(values[:, None, None, None], (len(indices), 4, 4, 1)), {}


def test_a_generator_is_asked_for_classes_in_turn() -> None:
    found = GeneratedPictures(Ramp(), 9, seed=3, classes=["a", "b", "c"])
    block = found.read(4, 8, Stages())
    assert block.images[:, 0, 0, 0].tolist() == [41, 52, 60, 71]
    assert block.labels.tolist() == [1, 2, 0, 1] and block.groups == ["b", "c", "a", "b"]
    assert block.keys[0] == "3/000000004"
    others = [
        GeneratedPictures(Ramp(), 9, seed=4, classes=["a", "b", "c"]),
        GeneratedPictures(Ramp(), 8, seed=3, classes=["a", "b", "c"]),
        GeneratedPictures(Ramp(), 9, seed=3, classes=["a", "b"]),
    ]
    assert len({found.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_generator_that_names_its_classes_is_asked_by_name() -> None:
    plain, named = Ramp(), Ramp()
    named.classes = ["c", "a", "b"]
    found = GeneratedPictures(named, 9, seed=3, classes=["a", "b", "c"])
    block = found.read(4, 8, Stages())
    assert block.images[:, 0, 0, 0].tolist() == [42, 50, 61, 72]
    assert block.labels.tolist() == [1, 2, 0, 1] and block.groups == ["b", "c", "a", "b"]
    unnamed = GeneratedPictures(plain, 9, seed=3, classes=["a", "b", "c"])
    assert found.fingerprint != unnamed.fingerprint
    with pytest.raises(UserError, match="ramp knows 3 classes and the real set has 2; name a data"):
        GeneratedPictures(named, 9, classes=["a", "b"])


def test_a_squashed_picture_is_whole_and_no_square_of_it(tmp_path) -> None:
    """Columns of one value each: the crop holds the middle ones, the squash all of them."""
    wide = np.repeat(np.arange(0, 240, 12, dtype=np.uint8)[None], 10, axis=0)  # 10 x 20
    folder = files(tmp_path, [wide])
    squashed = FolderPictures(folder, size=5, fit="squash", channels=1).read(0, 1, Stages())
    expected = Image.fromarray(wide).resize((5, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squashed.images[0, ..., 0], np.asarray(expected))
    cropped = FolderPictures(folder, size=5, channels=1).read(0, 1, Stages()).images[0, 0, :, 0]
    assert squashed.images[0, 0, :, 0].min() < 40 < 60 <= cropped.min()


def test_a_fit_without_effect_is_an_error_and_the_protocol_says_which(tmp_path) -> None:
    folder = files(tmp_path, list(IMAGES))
    said = {fit: FolderPictures(folder, size=5, fit=fit).protocol for fit in ("crop", "squash")}
    for fit, protocol in said.items():
        assert protocol == {"image_size": 5, "fit": FITS[fit], "channels": 3}
    stored = FolderPictures(folder, fit="as stored")
    assert stored.protocol == {"image_size": 0, "fit": "as stored", "channels": 3}
    prints = [FolderPictures(folder, size=5, fit=fit).fingerprint for fit in said]
    assert len({*prints, stored.fingerprint}) == 3
    for form, message in (
        ({"fit": "squash"}, "no effect without a size"),
        ({"fit": "as stored", "size": 5}, "contradict"),
        ({"fit": "pad", "size": 5}, "there is no fit 'pad'; choose one of crop, squash, as stored"),
    ):
        with pytest.raises(UserError, match=message):
            FolderPictures(folder, **form)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def only(folder: Path, name: str, data: bytes, channels: int = 3) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return ListedPictures(folder, [name], channels=channels).read(0, 1, Stages()).images[0]


def test_colours_of_every_kind_of_file(tmp_path) -> None:
    """Each against the formula of its conversion."""
    colour = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    alpha = RNG.integers(0, 256, (9, 7, 1), dtype=np.uint8)
    plain = only(tmp_path, "plain.png", saved(Image.fromarray(colour), "PNG"))
    np.testing.assert_array_equal(plain, colour)
    lossless = saved(Image.fromarray(colour), "WEBP", lossless=True)
    np.testing.assert_array_equal(only(tmp_path, "a.webp", lossless), colour)
    clear = Image.fromarray(np.concatenate([colour, alpha], axis=2))
    white = (colour * (alpha / 255.0) + 255.0 * (1 - alpha / 255.0)).round()
    found = only(tmp_path, "clear.png", saved(clear, "PNG")).astype(float)
    assert abs(found - white).max() <= 1
    palette = Image.fromarray(colour).quantize(16)
    found = only(tmp_path, "palette.png", saved(palette, "PNG"))
    table = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(found, table[np.asarray(palette)])
    wide = RNG.integers(0, 65536, (9, 7)).astype(np.uint16)
    found = only(tmp_path, "wide.png", saved(Image.fromarray(wide), "PNG"), channels=1)
    np.testing.assert_array_equal(found[..., 0], wide >> 8)
    inks = RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    found = only(tmp_path, "inks.tif", saved(Image.fromarray(inks, "CMYK"), "TIFF")).astype(float)
    light = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255.0
    assert abs(found - light).max() <= 1
    grey = only(tmp_path, "plain.png", saved(Image.fromarray(colour), "PNG"), channels=1)
    luma = (colour @ np.array([0.299, 0.587, 0.114]))[..., None]
    assert abs(grey - luma).max() <= 0.51


def test_a_jpeg_is_decoded_at_its_own_size_before_it_is_made_smaller(tmp_path) -> None:
    """A decoder that starts from an eighth of the size, as a draft does, gives other pixels."""
    big = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((512, 512))
    data = saved(big, "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    found = ListedPictures(tmp_path, ["a.jpg"], size=64).read(0, 1, Stages()).images[0]
    whole = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(whole))
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (64, 64))
    assert (np.asarray(draft.resize((64, 64), Image.Resampling.BICUBIC)) != found).any()


def test_listed_files_keep_their_order_and_their_groups(tmp_path) -> None:
    folder = files(tmp_path, list(IMAGES))
    names, groups = ["odd/3.png", "even/0.png", "odd/1.png"], ["north", "", "south"]
    found = ListedPictures(folder, names, keys=list("xyz"), groups=groups, channels=1)
    read = found.read(0, 3, Stages())
    np.testing.assert_array_equal(read.images[..., 0], IMAGES[[3, 0, 1]])
    assert read.keys == list("xyz") and read.groups == groups and read.labels.tolist() == [-1] * 3
    short = ListedPictures(folder, names, keys=list("xyz"), groups=groups, channels=1, limit=2)
    kept = short.read(0, 2, Stages())
    assert len(short) == 2 and kept.keys == sorted(kept.keys)
    assert kept.groups == [dict(zip("xyz", groups, strict=True))[key] for key in kept.keys]
    other = ListedPictures(folder, names, keys=list("xyz"), groups=["north"] * 3, channels=1)
    assert len({found.fingerprint, short.fingerprint, other.fingerprint}) == 3
    with pytest.raises(UserError, match="odd/4.png is not in"):
        ListedPictures(folder, [*names, "odd/4.png", "odd/5.png"])


def test_a_limit_takes_every_class_by_its_share(tmp_path) -> None:
    strata = [0] * 60 + [1] * 30 + [2] * 10
    order = spread_order(strata)
    assert sorted(order) == list(range(100))
    for n in range(1, 101):
        for stratum, size in ((0, 60), (1, 30), (2, 10)):
            taken = sum(strata[place] == stratum for place in order[:n])
            assert abs(taken - n * size / 100) <= 1.5
    assert order[:5] != sorted(order[:5]) or order[:60] != list(range(60))
    assert spread(strata, 0) == spread(strata, 100) == list(range(100))
    images = np.zeros((100, 2, 2, 3), np.uint8)
    images[..., 0] = np.arange(100)[:, None, None]
    labels, some = np.array(strata), spread(strata, 20)
    arrays = ArrayPictures(images, labels=labels, limit=20).read(0, 20, Stages())
    assert arrays.images[:, 0, 0, 0].tolist() == some
    assert np.bincount(arrays.labels).tolist() == [12, 6, 2]


def test_a_table_may_name_groups_and_shards_may_be_given_some(tmp_path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(IMAGES[i]))
    text = "file_name,label,group\n2.png,odd,north\n0.png,even,\n"
    (folder / "metadata.csv").write_text(text)
    read = FolderPictures(folder, channels=1).read(0, 2, Stages())
    assert read.groups == ["", "north"] and read.labels.tolist() == [0, 1]
    stored = shards(tmp_path / "shards", list(IMAGES))
    rows, groups = [5, 0, 2], ["a", "b", ""]
    found = ShardPictures(stored, channels=1, rows=rows, groups=groups)
    read = found.read(0, 3, Stages())
    np.testing.assert_array_equal(read.images[..., 0], IMAGES[rows])
    assert read.groups == groups and read.keys == ["s5", "s0", "s2"]
    prints = [found.fingerprint, ShardPictures(stored, channels=1, rows=rows).fingerprint]
    prints.append(ShardPictures(stored, channels=1, limit=3).fingerprint)
    assert len(set(prints)) == 3


def test_pictures_in_memory(tmp_path) -> None:
    tensors = ArrayPictures(torch.from_numpy(IMAGES), labels=[0, 1] * 3 + [-1], classes=["a", "b"])
    arrays = ArrayPictures(IMAGES[..., None], labels=[0, 1] * 3 + [-1], classes=["a", "b"])
    assert tensors.fingerprint != ArrayPictures(IMAGES).fingerprint
    for found in (tensors, arrays):
        read = found.read(5, 7, Stages())
        np.testing.assert_array_equal(read.images[..., 0], IMAGES[5:7])
        assert read.labels.tolist() == [1, -1] and read.groups == ["b", ""]
        assert read.keys == ["000000005", "000000006"]
    changed = IMAGES.copy()
    changed[6, 9, 9] ^= 1
    assert ArrayPictures(changed).fingerprint != ArrayPictures(IMAGES).fingerprint
    ragged = ArrayPictures([IMAGES[0], IMAGES[1][:8]]).read(0, 2, Stages()).images
    assert [image.shape for image in ragged] == [(10, 10, 1), (8, 10, 1)]
    for images, message in (
        (IMAGES / 255.0, "float64 of shape"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        ([IMAGES[0], IMAGES[1].astype(np.int16)], "int16"),
    ):
        with pytest.raises(UserError, match=message):
            ArrayPictures(images)
    with pytest.raises(UserError, match="2 groups for 7 pictures"):
        ArrayPictures(IMAGES, groups=["a", "b"])


def test_an_array_takes_the_steps_of_its_file(tmp_path) -> None:
    """The same picture as an array, an archive, a file, a shard and a drawing: equal bytes."""
    wide = RNG.integers(0, 256, (12, 18, 3), dtype=np.uint8)

    class Drawn:
        name, fingerprint, protocol = "drawn", "f", {}

        def draw(self, indices: np.ndarray, labels: np.ndarray, *, seed: int) -> np.ndarray:
            return np.stack([wide] * len(indices))

    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(png(wide))
    np.savez(tmp_path / "a.npz", wide[None])
    for form in (
        {"size": 7, "channels": 3},
        {"size": 7, "fit": "squash", "channels": 3},
        {"size": 0, "channels": 1},
        {"size": 12, "channels": 1},
    ):
        sets = [
            FolderPictures(tmp_path / "f", **form),
            ArrayPictures(wide[None], **form),
            open_pictures(tmp_path / "a.npz", **form),
            GeneratedPictures(Drawn(), 1, **form),
        ]
        first, *others = (np.asarray(one.read(0, 1, Stages()).images) for one in sets)
        for other in others:
            np.testing.assert_array_equal(other, first)
        assert len({str(one.protocol.get("fit")) for one in sets}) == 1


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_archives_of_samples(tmp_path, pack) -> None:
    images = RNG.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    pack(tmp_path / "a.npz", images, np.array([1, 0, 1, 1, 0]), mu=np.zeros(3))
    found = open_pictures(tmp_path / "a.npz", classes=["cat", "dog"])
    assert isinstance(found, NpzPictures) and len(found) == 5
    read = found.read(1, 4, Stages())
    np.testing.assert_array_equal(read.images, images[1:4])
    assert read.labels.tolist() == [0, 1, 1] and read.groups == ["cat", "dog", "dog"]
    assert len(NpzPictures(tmp_path / "a.npz", limit=2)) == 2


def test_archives_of_something_else(tmp_path) -> None:
    np.savez(tmp_path / "named.npz", pictures=np.zeros((1, 2, 2, 3), np.uint8))
    np.savez(tmp_path / "floats.npz", np.zeros((1, 2, 2, 3)))
    np.savez(tmp_path / "objects.npz", np.array([{}], object))
    (tmp_path / "text.npz").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as file:
        file.writestr("arr_0.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', ")
    for name, message in (
        ("named", "it has no arr_0"),
        ("floats", "float64"),
        ("objects", "object|[Pp]ickle"),
        ("text", "archive of pictures"),
        ("short", "archive of pictures"),
        ("none", "No such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            NpzPictures(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)


def test_a_file_is_hashed_once_in_a_process_and_again_when_it_changes(
    tmp_path, monkeypatch
) -> None:
    folder, hashed = files(tmp_path, list(IMAGES)), []
    plain = decoding.file_sha256
    monkeypatch.setattr(decoding, "file_sha256", lambda path: hashed.append(path) or plain(path))
    for path in folder.rglob("*.png"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    first = FolderPictures(folder, channels=1).fingerprint
    assert len(hashed) == 7
    assert FolderPictures(folder, channels=1).fingerprint == first and len(hashed) == 7
    path = folder / "odd" / "3.png"
    path.write_bytes(png(255 - IMAGES[3])[:-1] + b"\x82")
    os.utime(path, (1_000_000_000, 1_000_000_000))  # the time stamp of before
    assert FolderPictures(folder, channels=1).fingerprint != first
    assert hashed[7:] == [path]
