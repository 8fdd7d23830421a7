"""Every published layout, written small with real pictures: which, in which order, labelled how."""

import io
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.data.augment import AugmentConfig
from etude.data.class_list import ClassList
from etude.data.labelled_folders import LAYOUTS, open_folder, split_source
from etude.data.prepared import PreparedPictures, prepare

# Twelve "classes of ImageNet", so that folders 10 and 11 sort before 2 as text. The file order of
# the whole list is not that of the sorted numbers.
WNIDS = [f"n{10000000 + 7 * i:08d}" for i in range(12)]
NAMES = [
    "tench, Tinca tinca",
    "goldfish",
    "crane",
    "digital clock",
    "analog clock",
    "crane",
    "backpack, back pack",
    "hen",
    "mug",
    "sombrero",
    "kite",
    "maillot",
]


def jpeg(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A smooth picture that the seed fixes."""
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(stream, "jpeg", quality=95)
    return stream.getvalue()


def fill(folder: Path, names: Sequence[str], first_seed: int = 0) -> None:
    """Pictures of the given names; `a/b.jpg` makes the folder a."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(first_seed + number))


@pytest.fixture
def whole(tmp_path: Path) -> ClassList:
    rows = list(zip(WNIDS, NAMES, strict=True))
    lines = [f"{wnid} {name}\n" for wnid, name in rows[6:] + rows[:6]]
    (tmp_path / "classes.txt").write_text("".join(lines) + "\n")
    return ClassList.read(tmp_path / "classes.txt")


@pytest.fixture
def part(tmp_path: Path, whole: ClassList) -> ClassList:
    """Four of the twelve, in an order of their own; one line has a name of its own."""
    (tmp_path / "part.txt").write_text(
        f"{WNIDS[10]}\n{WNIDS[2]} a crane, the bird\n{WNIDS[3]}\nhen\n"
    )
    return ClassList.read(tmp_path / "part.txt").within(whole)


def listed(folder) -> list[tuple[str, int]]:
    return list(zip(folder.files, folder.labels.tolist(), strict=True))


def test_a_list_and_its_part(whole: ClassList, part: ClassList) -> None:
    assert whole.identifiers == WNIDS[6:] + WNIDS[:6] and whole.names == NAMES[6:] + NAMES[:6]
    assert part.identifiers == [WNIDS[10], WNIDS[2], WNIDS[3], WNIDS[7]]
    assert part.names == ["kite", "a crane, the bird", "digital clock", "hen"]
    assert [whole.numbered(n, "") for n in range(12)] == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]
    chosen = {10: 0, 2: 1, 3: 2, 7: 3}
    assert [part.numbered(n, "") for n in range(12)] == [chosen.get(n) for n in range(12)]
    assert whole.find("digital_clock", "") == 9 and whole.find("nothing", "") is None
    with pytest.raises(UserError, match=f"2 classes are called 'crane'.*{WNIDS[2]} or {WNIDS[5]}"):
        whole.find("crane", "here")
    with pytest.raises(UserError, match="12 is no class, numbers go from 0 to 11"):
        part.numbered(12, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{WNIDS[0]} a\n\n{WNIDS[0]} b\n", f"line 3: {WNIDS[0]} stands in line 1"),
        ("\n", "holds no class"),
        (None, "is not a file that can be read"),
    ],
)
def test_a_damaged_list_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        ClassList.read(tmp_path / "list.txt")


def test_a_part_must_be_of_the_whole(whole: ClassList) -> None:
    with pytest.raises(UserError, match="'goldfsh' is none of the 12 classes.*'goldfish'"):
        ClassList(["goldfsh"]).within(whole)
    with pytest.raises(UserError, match="are one class"):
        ClassList(["hen", WNIDS[7]]).within(whole)


@pytest.mark.parametrize("layout", ["imagenet", "imagenet-sketch", "imagenet-r", "imagenet-a"])
def test_wordnet_folders(layout: str, tmp_path: Path, whole: ClassList, part: ClassList) -> None:
    names = [f"{WNIDS[i]}/{name}" for i in (3, 2, 8) for name in ("b.JPEG", "a_1.jpg", "a_0.png")]
    fill(tmp_path / "set", names)
    fill(tmp_path / "set", ["README.txt", f"{WNIDS[2]}/._a.jpg", f"{WNIDS[2]}/notes.txt"])
    (tmp_path / "set" / WNIDS[7]).mkdir()  # a class without pictures is not present
    found = open_folder(f"{layout}:{tmp_path / 'set'}", whole)
    ending = ["a_0.png", "a_1.jpg", "b.JPEG"]
    order = [(2, 8), (3, 9), (8, 2)]  # (number, index in the list)
    assert listed(found) == [(f"{WNIDS[n]}/{e}", index) for n, index in order for e in ending]
    assert found.left_out == {}
    restricted = layout in ("imagenet-r", "imagenet-a")
    assert (found.choices is None) != restricted
    assert open_folder(f"{layout}:{tmp_path / 'set'}", whole, restrict=False).choices is None

    smaller = open_folder(f"{layout}:{tmp_path / 'set'}", part, restrict=True)
    assert listed(smaller) == [(f"{WNIDS[n]}/{e}", i) for n, i in ((2, 1), (3, 2)) for e in ending]
    assert smaller.left_out == {WNIDS[8]: 3} and smaller.choices.tolist() == [1, 2]
    assert found.read(1) == jpeg(4) and found.name(1).endswith(f"set/{WNIDS[2]}/a_1.jpg")


def test_folders_alone_are_the_classes(tmp_path: Path) -> None:
    fill(tmp_path, ["dog/1.png", "ankle boot/2.png", "cat/3.png"])
    found = open_folder(f"folders:{tmp_path}")
    assert found.classes.names == ["ankle boot", "cat", "dog"]
    assert listed(found) == [("ankle boot/2.png", 0), ("cat/3.png", 1), ("dog/1.png", 2)]
    named = ClassList(["dog", "ankle_boot", "cat", "emu"])
    assert open_folder(f"folders:{tmp_path}", named).labels.tolist() == [1, 2, 0]
    with pytest.raises(UserError, match="no class is called 'dog'; the nearest is 'dogs'"):
        open_folder(f"folders:{tmp_path}", ClassList(["dogs", "ankle boot", "cat"]))


def test_imagenet_v2_counts_in_sorted_wordnet_numbers(
    tmp_path: Path, whole: ClassList, part: ClassList
) -> None:
    fill(tmp_path / "v2", [f"{n}/{k}.jpeg" for n in range(12) for k in (0, 1)])
    found = open_folder(f"imagenet-v2:{tmp_path / 'v2'}", whole)
    as_text = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [file for file, _ in listed(found)][::2] == [f"{n}/0.jpeg" for n in as_text]
    right_names = [whole.names[label] for label in found.labels[::2]]
    assert right_names == [NAMES[n] for n in as_text]
    smaller = open_folder(f"imagenet-v2:{tmp_path / 'v2'}", part)
    assert listed(smaller)[::2] == [
        ("10/0.jpeg", 0),
        ("2/0.jpeg", 1),
        ("3/0.jpeg", 2),
        ("7/0.jpeg", 3),
    ]
    assert smaller.left_out == {str(n): 2 for n in (0, 1, 11, 4, 5, 6, 8, 9)}
    alone = ClassList(part.identifiers)  # without the whole list, the numbers cannot be meant
    with pytest.raises(UserError, match="10 is no class, numbers go from 0 to 3.*whole list"):
        open_folder(f"imagenet-v2:{tmp_path / 'v2'}", alone)
    fill(tmp_path / "v2", ["x1/0.jpeg"])
    with pytest.raises(UserError, match="x1: class folders of this layout are numbers"):
        open_folder(f"imagenet-v2:{tmp_path / 'v2'}", whole)


FLAT = ["val_1.JPEG", "val_2.JPEG", "val_3.JPEG", "val_4.JPEG"]  # of classes 3, 0, 3 and 11
KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"{name[:-5]},{WNIDS[n]} 85 1 499 272 {boxes}\n"
    for name, n, boxes in zip(FLAT, (3, 0, 3, 11), ("", f"{WNIDS[3]} 1 2 3 4", "", ""), strict=True)
)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("val.txt", "".join(f"{WNIDS[n]}\n" for n in (3, 0, 3, 11))),
        ("val.txt", "".join(f"{name} {n}\n" for name, n in zip(FLAT, (3, 0, 3, 11), strict=True))),
        ("val/labels.txt", "digital clock\ntench, Tinca tinca\ndigital clock\nmaillot"),
        ("val.csv", KAGGLE.replace("272 \n", "272\n")),
        (
            "val/labels.csv",
            f"label,file\n{WNIDS[11]},val_4.JPEG\n3,val_3.JPEG\n3,val_1.JPEG\n0,val_2.JPEG\n",
        ),
    ],
)
def test_flat_folders_with_a_file_of_labels(
    place: str, text: str, tmp_path: Path, whole: ClassList, part: ClassList
) -> None:
    fill(tmp_path / "val", FLAT)
    (tmp_path / place).write_text(text)
    found = open_folder(f"imagenet:{tmp_path / 'val'}", whole)
    assert listed(found) == list(zip(FLAT, [9, 6, 9, 5], strict=True))
    smaller = open_folder(f"imagenet:{tmp_path / 'val'}", part)
    assert listed(smaller) == [(FLAT[0], 2), (FLAT[2], 2)] and sum(smaller.left_out.values()) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("val.txt", f"{WNIDS[0]}\n" * 3, "has 3 lines but its folder 4 pictures"),
        ("val.txt", "12\n3\n4\n5\n", "12 is no class.*ILSVRC2012's own IDs"),
        ("val.txt", "digital clok\n" * 4, "no class is called.*'digital clock'"),
        ("val.csv", "picture,label\nval_1.JPEG,3\n", "needs a first line that names a column"),
        ("val.csv", "file,label\nval_9.JPEG,3\n", "line 2: val_9.JPEG is not in"),
        (
            "val.csv",
            "file,label\nval_1,3\nval_1.JPEG,3\n",
            "val_1.JPEG has a label already",
        ),
        ("val.csv", "file,label\nval_1.JPEG,\n", "line 2: a label is missing"),
        ("other.txt", "", "holds pictures but no class folders"),
    ],
)
def test_wrong_files_of_labels_are_refused(
    name: str, text: str, message: str, tmp_path: Path, whole: ClassList
) -> None:
    fill(tmp_path / "val", FLAT)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_folder(f"imagenet:{tmp_path / 'val'}", whole)


def test_a_table_may_name_part_of_the_pictures_and_several_classes(
    tmp_path: Path, whole: ClassList
) -> None:
    fill(tmp_path / "val", [*FLAT, "deep/er.png"])
    (tmp_path / "val/labels.csv").write_text(
        "file,label\nval_3.JPEG,digital clock;analog clock\ndeep/er.png,8\n"
    )
    found = open_folder(f"folders:{tmp_path / 'val'}", whole)
    assert listed(found) == [("deep/er.png", 2), ("val_3.JPEG", 9)]
    assert [found.answers[group] for group in found.groups] == [(2,), (9, 10)]
    assert found.left_out == {"not in labels.csv": 3}


def write_objectnet(root: Path, *, numbers: bool) -> None:
    """The folders and files of ObjectNet 1.0, with a red frame of two pixels around a picture."""
    fill(root / "images", [f"{name}/1.png" for name in ("alarm_clock", "mug", "backpack", "tape")])
    frame = Image.new("RGB", (24, 24), (255, 0, 0))
    frame.paste(Image.new("RGB", (20, 20), (0, 0, 255)), (2, 2))
    frame.save(root / "images/mug/1.png")
    labels = {"alarm_clock": "Alarm clock", "mug": "Mug", "backpack": "Backpack", "tape": "Tape"}
    right = {"Alarm clock": "analog clock; digital clock", "Mug": "mug"}
    right |= {"Backpack": "backpack, back pack"}
    (root / "mappings").mkdir()
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(right))
    if numbers:  # ID i is the sorted number (5 i + 1) mod 12
        ids = {str((5 * i + 1) % 12): i for i in range(12)}
        lines = [NAMES[(5 * i + 1) % 12] + "\n" for i in range(12)]
        (root / "mappings/pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))
        (root / "mappings/imagenet_to_label_2012_v2").write_text("".join(lines))


@pytest.mark.parametrize("numbers", [False, True])
def test_objectnet(numbers: bool, tmp_path: Path, whole: ClassList, part: ClassList) -> None:
    write_objectnet(tmp_path / "objectnet-1.0", numbers=numbers)
    source = f"objectnet:{tmp_path / 'objectnet-1.0'}"
    found = open_folder(source, whole)
    assert found.files == ["alarm_clock/1.png", "backpack/1.png", "mug/1.png"]
    assert [found.answers[group] for group in found.groups] == [(10, 9), (0,), (2,)]
    assert found.left_out == {"tape": 1} and found.choices is None
    smaller = open_folder(source, part)
    assert listed(smaller) == [("alarm_clock/1.png", 2)]
    assert smaller.left_out == {"backpack": 1, "mug": 1, "tape": 1}
    whole_picture = PreparedPictures(found, AugmentConfig(image_size=8), border=found.border)
    assert (whole_picture.images([2]) == (0, 0, 255)).all()  # no red is left
    if numbers:  # then the class list may call its classes what it likes
        renamed = ClassList(whole.identifiers)
        assert open_folder(source, renamed).answers == found.answers
    fill(tmp_path / "objectnet-1.0/images", ["back_pack/1.png"])
    with pytest.raises(UserError, match="no class folder 'back_pack'; the nearest is 'backpack'"):
        open_folder(source, whole)
    shutil.rmtree(tmp_path / "objectnet-1.0/mappings")
    with pytest.raises(UserError, match="has neither mapping.json nor mappings/"):
        open_folder(source, whole)


def test_a_mapping_of_ones_own(tmp_path: Path, whole: ClassList) -> None:
    fill(tmp_path, ["clocks/1.png", "cups/1.png", "rest/1.png"])
    mapping = {"clocks": ["analog clock", WNIDS[3]], "cups": 8, "rest": None}
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    found = open_folder(f"objectnet:{tmp_path}", whole)
    assert found.answers == [(10, 9), (2,)] and found.left_out == {"rest": 1}
    (tmp_path / "mapping.json").write_text('{"clocks": [true]}')
    with pytest.raises(UserError, match="clocks: True is no class"):
        open_folder(f"objectnet:{tmp_path}", whole)


def test_sources_and_their_errors(tmp_path: Path, whole: ClassList) -> None:
    assert split_source("data/digits/test") == ("", Path("data/digits/test"))
    assert split_source("a/b:c") == ("", Path("a/b:c"))
    assert split_source("imagenet-r:data/r:2") == ("imagenet-r", Path("data/r:2"))
    with pytest.raises(UserError, match="'imagenetr' is no layout.*did you mean imagenet-r"):
        split_source("imagenetr:data/r")
    with pytest.raises(UserError, match=f"names no layout; type one of {', '.join(LAYOUTS)}"):
        open_folder(tmp_path, whole)
    with pytest.raises(UserError, match="gone is not a folder"):
        open_folder(f"imagenet:{tmp_path / 'gone'}", whole)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture of the 12 classes was found"):
        open_folder(f"imagenet-a:{tmp_path / 'empty'}", whole)
    fill(tmp_path / "far", ["n99999999/1.jpg", "n99999999/2.jpg"])
    with pytest.raises(UserError, match="no picture of the 12 .* 2 of classes outside the list"):
        open_folder(f"imagenet-r:{tmp_path / 'far'}", whole)
    with pytest.raises(UserError, match="part of a larger list of classes"):
        open_folder(f"imagenet-r:{tmp_path / 'far'}")
    fill(tmp_path / "typo", ["n1000000/1.jpg"])
    with pytest.raises(UserError, match="no class is called 'n1000000'; the nearest is 'n100000"):
        open_folder(f"imagenet:{tmp_path / 'typo'}", whole)


def png(width: int, height: int) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    levels = [(7 * x + 3 * y) % 256, (x * y) % 256, (5 * x + 11 * y + x * x) % 256]
    stream = io.BytesIO()
    Image.fromarray(np.stack(levels, -1).astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


# CRC-32 of torchvision 0.29.1's CenterCrop(size)(Resize(side, BICUBIC)(picture)), Pillow 13.0.0:
# zlib.crc32(np.asarray(...).tobytes()) of the pictures that `png` makes.
TORCHVISION = [
    ((37, 53), 24, 17, 865157076),
    ((53, 37), 24, 17, 2148732368),
    ((41, 41), 24, 24, 2412318003),
    ((100, 33), 20, 15, 2266819677),
    ((33, 100), 31, 16, 558022661),
    ((24, 57), 24, 21, 2554780048),
    ((101, 64), 37, 32, 8276147),
]


@pytest.mark.parametrize(("picture", "side", "size", "crc"), TORCHVISION)
def test_shorter_side_then_centre_is_torchvisions(
    picture: tuple[int, int], side: int, size: int, crc: int
) -> None:
    found = prepare(png(*picture), AugmentConfig(image_size=size), shorter_side=side)
    assert zlib.crc32(found.tobytes()) == crc


def test_only_the_first_pictures_are_kept(tmp_path: Path) -> None:
    names = [f"c/{i}.png" for i in range(30)]
    fill(tmp_path, names)
    folder = open_folder(f"folders:{tmp_path}")
    config = AugmentConfig(image_size=10, channels=1)
    pictures = PreparedPictures(folder, config, cache_bytes=1250, workers=3)
    assert pictures.kept == 12
    indices = np.array([29, 3, 0, 3, 14, *range(30)])
    expected = np.stack(
        [
            np.asarray(
                Image.open(folder.name(i))
                .convert("L")
                .crop((2, 0, 18, 16))
                .resize((10, 10), Image.Resampling.BICUBIC)
            )[..., None]
            for i in indices
        ]
    )
    assert np.array_equal(pictures.images(indices), expected)
    for path in (tmp_path / "c").iterdir():  # what is kept needs no file any more
        path.unlink()
    kept = indices < 12
    assert np.array_equal(pictures.images(indices[kept]), expected[kept])
    with pytest.raises(UserError, match=r"c/21\.png cannot be read"):
        pictures.images([folder.files.index("c/21.png")])
    with pytest.raises(IndexError):
        pictures.images([30])


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    fill(tmp_path, ["c/1.jpg", "c/2.jpg", "c/3.jpg"])
    data = (tmp_path / "c/2.jpg").read_bytes()
    (tmp_path / "c/2.jpg").write_bytes(data[: len(data) // 2])
    pictures = PreparedPictures(open_folder(f"folders:{tmp_path}"), AugmentConfig(image_size=8))
    assert pictures.images([0, 2]).any()
    with pytest.raises(UserError, match=r"c/2\.jpg cannot be read \(the JPEG is truncated"):
        pictures.images(np.arange(3))


def test_what_would_be_random_or_without_effect_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, ["c/1.jpg"])
    folder = open_folder(f"folders:{tmp_path}")
    for config in ({"crop": "random"}, {"flip": True}):
        with pytest.raises(UserError, match="would change the real splits at random"):
            PreparedPictures(folder, AugmentConfig(image_size=8, **config))
    for config, side in (({}, 7), ({"crop": "none"}, 9)):
        with pytest.raises(UserError, match=f"pictures.shorter_side={side} needs"):
            PreparedPictures(folder, AugmentConfig(image_size=8, **config), shorter_side=side)
