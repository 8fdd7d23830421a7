"""Real splits: in memory or decoded on demand the same pictures, and when an answer is right."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from etude.core.errors import UserError
from etude.data.augment import AugmentConfig
from etude.data.class_list import ClassList
from etude.data.loader import DataConfig
from etude.data.shards import ShardSet, write_shards
from etude.data.still import still_loader
from etude.practice.pictures import PicturesConfig, Stored, Streamed, load_split, right

WNIDS = [f"n{20000000 + i:08d}" for i in range(6)]
NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]
SMALL = AugmentConfig(image_size=12)


def picture(seed: int, kind: str) -> bytes:
    """A smooth picture, wider than high."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).resize((31, 22), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twenty pictures, classes in turn, JPEG and PNG in turn."""
    kinds = ("png", "jpeg")
    samples = (
        {"key": f"{i:02d}", "image": picture(i, kinds[i % 2]), "extension": kinds[i % 2]}
        | {"label": i % 6}
        for i in range(20)
    )
    write_shards(tmp_path / "shards", samples, per_shard=7, classes=NAMES)
    return tmp_path / "shards"


def as_the_loader_has_them(folder: Path) -> np.ndarray:
    """(n, S, S, C) uint8 by the loader that training uses."""
    data = ShardSet(folder)
    loader = still_loader(data, DataConfig(shards=str(folder), augment=SMALL, decoder="torch"))
    batch = loader.fetch(np.arange(len(data)))
    loader.close()
    levels = ((batch.images.double() + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def test_shards_are_the_loaders_pictures_in_memory_and_streamed(shards: Path) -> None:
    expected = as_the_loader_has_them(shards)
    stored, streamed = load_split(shards, SMALL), load_split(shards, SMALL, cache_bytes=3000)
    assert isinstance(stored, Stored) and isinstance(streamed, Streamed)
    assert streamed.pictures.kept == 6  # of 432 bytes each
    indices = np.array([19, 2, 2, 7, 0])
    for split in (stored, streamed, streamed):  # the second time some come from the cache
        assert np.array_equal(split.images(np.arange(20)), expected)
        assert np.array_equal(split.images(indices), expected[indices])
        assert split.labels(indices).tolist() == [1, 2, 2, 1, 0]
        assert split.class_names == NAMES and len(split) == 20


def test_a_folder_is_what_its_shards_are(tmp_path: Path, shards: Path) -> None:
    """The same bytes in class folders and in shards: the same pictures and labels."""
    for i in range(20):
        path = tmp_path / "folder" / WNIDS[i % 6] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, ("png", "jpeg")[i % 2]))
    chosen = ClassList([WNIDS[4], WNIDS[1]], ["emu", "bee"])
    split = load_split(f"imagenet:{tmp_path / 'folder'}", SMALL, chosen)
    rows = [1, 7, 13, 19, 4, 10, 16]  # by sorted folder, then file
    assert np.array_equal(split.images(np.arange(7)), as_the_loader_has_them(shards)[rows])
    assert split.labels(np.arange(7)).tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert split.class_names == ["emu", "bee"] and sum(split.left_out.values()) == 13

    from_shards = load_split(shards, SMALL, chosen.within(ClassList(WNIDS, NAMES)))
    assert isinstance(from_shards, Stored)
    assert from_shards.classes.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert np.array_equal(from_shards.pixels, as_the_loader_has_them(shards)[sorted(rows)])


def test_shards_whose_labels_have_no_names(tmp_path: Path) -> None:
    samples = [
        {"key": str(i), "image": picture(i, "png"), "extension": "png", "label": label}
        for i, label in enumerate([5, 2, 0, 2])
    ]
    write_shards(tmp_path / "plain", samples)
    whole = ClassList(WNIDS, NAMES)
    assert load_split(tmp_path / "plain", SMALL, whole).classes.tolist() == [5, 2, 0, 2]
    part = ClassList([WNIDS[2], WNIDS[5]]).within(whole)
    split = load_split(tmp_path / "plain", SMALL, part, cache_bytes=0)
    assert split.classes.tolist() == [1, 0, 0] and split.left_out == {WNIDS[0]: 1}
    with pytest.raises(UserError, match="label 5 has no place in a list of 5 classes"):
        load_split(tmp_path / "plain", SMALL, ClassList(WNIDS[:5]))
    with pytest.raises(UserError, match="none of its pictures belongs to the 1 classes"):
        load_split(tmp_path / "plain", SMALL, ClassList([WNIDS[1]]).within(whole))


def test_restricted_and_accepted_answers_by_hand() -> None:
    """Six classes, of which the split has 1, 3 and 4; picture 2 may be called 3 or 4."""
    answers = np.zeros((4, 6), bool)
    answers[[0, 1, 2, 2, 3], [1, 3, 3, 4, 4]] = True
    labels = np.array([1, 3, 3, 4])
    logits = torch.tensor(
        [
            [9.0, 2.0, 0.0, 1.0, 1.0, 0.0],  # class 0 is not there: the answer is 1
            [0.0, 3.0, 9.0, 2.0, 1.0, 0.0],  # 1 instead of 3
            [0.0, 1.0, 0.0, 2.0, 5.0, 0.0],  # 4, which counts
            [0.0, -9.0, 0.0, -8.0, -7.0, 7.0],  # 4, although every other class has more
        ]
    )
    rows = np.arange(4)

    def split(choices: np.ndarray | None) -> Streamed:
        return Streamed(None, labels, NAMES, rows, answers, choices)

    assert right(logits, split(np.array([1, 3, 4])), rows).tolist() == [True, False, True, True]
    assert right(logits, split(None), rows).tolist() == [False, False, True, False]
    some = np.array([3, 0])
    assert right(logits[some], split(np.array([1, 3, 4])), some).tolist() == [True, True]
    plain = Stored(np.zeros((4, 1, 1, 1), np.uint8), labels, NAMES)
    assert right(logits, plain, rows).tolist() == [False, False, False, False]
    assert right(logits.roll(-1, 1), plain, rows).tolist() == [False, False, True, True]


def test_imagenet_r_answers_among_its_own_classes(tmp_path: Path) -> None:
    for number, name in enumerate([f"{WNIDS[5]}/a.jpg", f"{WNIDS[2]}/b.jpg", f"{WNIDS[2]}/a.jpg"]):
        path = tmp_path / "r" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "jpeg"))
    whole = ClassList(WNIDS, NAMES)
    logits = torch.eye(6)[[0, 2, 5]] + 0.1 * torch.eye(6)[[2, 5, 2]]  # first, second best
    rows = np.arange(3)  # of classes 2, 2, 5
    split = load_split(f"imagenet-r:{tmp_path / 'r'}", SMALL, whole)
    assert right(logits, split, rows).tolist() == [True, True, True]
    for same in (
        load_split(f"imagenet-r:{tmp_path / 'r'}", SMALL, whole, restrict=False),
        load_split(f"imagenet:{tmp_path / 'r'}", SMALL, whole),
    ):
        assert right(logits, same, rows).tolist() == [False, True, True]
    assert split.accepted(rows).tolist() == torch.eye(6).bool()[[2, 2, 5]].tolist()


def test_several_classes_may_be_right(tmp_path: Path) -> None:
    for number, name in enumerate(["a.png", "b.png"]):
        (tmp_path / name).write_bytes(picture(number, "png"))
    (tmp_path / "labels.csv").write_text("file,label\na.png,fox;bee\nb.png,2\n")
    split = load_split(f"folders:{tmp_path}", SMALL, ClassList(WNIDS, NAMES))
    rows = np.array([0, 0, 0, 1, 1])
    answers = torch.eye(6)[[5, 1, 2, 2, 1]]
    assert right(answers, split, rows).tolist() == [True, True, False, True, False]
    assert split.labels(rows).tolist() == [5, 5, 5, 2, 2]  # the first of several


def test_the_shorter_side_before_the_crop(shards: Path) -> None:
    config = PicturesConfig(image_size=12, shorter_side=16)
    split = load_split(shards, config)
    image = Image.open(io.BytesIO(picture(0, "png")))
    resized = image.resize((22, 16), Image.Resampling.BICUBIC)  # 31 x 22: 16 * 31 / 22 = 22.5
    assert np.array_equal(split.images(np.array([0]))[0], np.asarray(resized.crop((5, 2, 17, 14))))
    assert not np.array_equal(split.pixels, load_split(shards, SMALL).pixels)
    with pytest.raises(ValidationError, match="shorter_side=11 needs crop: center"):
        PicturesConfig(image_size=12, shorter_side=11)


def test_splits_that_cannot_serve(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(UserError, match="would change the real splits at random"):
        load_split(shards, AugmentConfig(image_size=12, flip=True))
    sample = {"image": picture(1, "png"), "extension": "png"}
    write_shards(tmp_path / "bare", [sample | {"key": "x"}, sample | {"key": "y"}])
    with pytest.raises(UserError, match="x has no label"):
        load_split(tmp_path / "bare", SMALL)
    broken = [sample | {"key": "x", "label": 0}, sample | {"key": "y", "label": 0}]
    broken[1]["image"] = picture(1, "png")[:-20]
    write_shards(tmp_path / "broken", broken)
    with pytest.raises(UserError, match=r"broken: y cannot be read \(.*repair or remove it"):
        load_split(tmp_path / "broken", SMALL)
