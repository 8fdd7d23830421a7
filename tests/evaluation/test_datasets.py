"""Published sets of pictures, each written small in its official layout and read back."""

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from etude.core.errors import UserError
from etude.data.shards import write_shards
from etude.evaluation.datasets import DATA_SETS, open_data_set
from etude.evaluation.datasets.geode import OBJECTS, REGIONS
from etude.evaluation.datasets.items import balanced
from etude.evaluation.sets import Pictures, Stages


def encoded(value: int, kind: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 255 - value)).save(stream, kind)
    return stream.getvalue()


def put(folder: Path, values: dict[str, int]) -> None:
    """Pictures of one colour each, PNG inside whatever their names end in."""
    for name, value in values.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value))


EXPECTED_COCO = [25247, 27562, 2653, 16968, 33506, 31845, 104, 14933, 2018]
EXPECTED_CC12M = [13835, 6311, 12418]


def everything(data_set: Any, **form: Any) -> Pictures:
    pictures = data_set.pictures(**form)
    return pictures.read(0, len(pictures), Stages())


def reds(read: Pictures) -> list[int]:
    """The red value that each picture is filled with."""
    return [int(image[0, 0, 0]) for image in read.images]


def texts(data_set: Any, **options: Any) -> list[str]:
    return [prompt.text for prompt in data_set.prompts(**options).prompts]


# ---- COCO


def coco(folder: Path, year: int = 2014) -> Path:
    """Three pictures, their annotations in no order, captions with line ends as in the original."""
    template = {2014: "COCO_val2014_%012d.jpg", 2017: "%012d.jpg"}[year]
    images = [{"id": i, "file_name": template % i, "height": 4} for i in (74, 42, 139)]
    annotations = [
        {"image_id": 42, "id": 900, "caption": "the second of 42"},
        {"image_id": 74, "id": 71, "caption": " A dog.\n"},
        {"image_id": 42, "id": 641, "caption": "the first of 42"},
        {"image_id": 139, "id": 5, "caption": "a room"},
        {"image_id": 42, "id": 700, "caption": "the third of 42"},
    ]
    (folder / "annotations").mkdir(parents=True)
    content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
    (folder / "annotations" / f"captions_val{year}.json").write_text(json.dumps(content))
    put(folder / f"val{year}", {image["file_name"]: image["id"] for image in images})
    return folder


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_has_the_caption_of_the_lowest_annotation_for_each_picture(tmp_path, year) -> None:
    found = open_data_set("coco", coco(tmp_path, year), year=year, whole=False)
    assert texts(found) == ["the first of 42", "A dog.", "a room"]
    assert [prompt.id for prompt in found.prompts().prompts] == ["42", "74", "139"]
    read = everything(found)
    assert reds(read) == [42, 74, 139] and read.keys == ["42", "74", "139"]
    assert read.groups == [""] * 3 and read.labels.tolist() == [-1] * 3
    some = reds(everything(found, limit=2))
    assert len(some) == 2 and set(some) < set(reds(everything(found)))


def test_coco_says_what_is_wrong(tmp_path) -> None:
    folder = coco(tmp_path)
    with pytest.raises(UserError, match="are 3 instead of 40,504: copy the files again, or set"):
        open_data_set("coco", folder).prompts()
    with pytest.raises(UserError, match=r"has no annotations/captions_val2017.json"):
        open_data_set("coco", folder, year=2017)
    with pytest.raises(UserError, match="no validation part of 2015"):
        open_data_set("coco", folder, year=2015)
    with pytest.raises(UserError, match="has no option 'years'; it has year, whole"):
        open_data_set("coco", folder, years=2014)
    with pytest.raises(UserError, match="is not a folder"):
        open_data_set("coco", tmp_path / "none")
    (folder / "val2014" / "COCO_val2014_000000000074.jpg").unlink()
    with pytest.raises(UserError, match="val2014/COCO_val2014_000000000074.jpg is not in"):
        open_data_set("coco", folder, whole=False).pictures()
    path = folder / "annotations" / "captions_val2014.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": content["annotations"][1:2]}))
    with pytest.raises(UserError, match="picture 42 has no caption"):
        open_data_set("coco", folder, whole=False).prompts()
    path.write_text(json.dumps({"images": [], "annotations": [{"bbox": [1]}]}))
    with pytest.raises(UserError, match="not the instances or keypoints"):
        open_data_set("coco", folder, whole=False).prompts()
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_data_set("coco", folder, whole=False).prompts()


# ---- ImageNet

WNIDS = ["n01440764", "n01443537", "n02012849", "n03126707"]
NAMES = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane"]
KIT = {3: 0, 1: 1, 4: 2, 2: 3}  # the kit's own number -> class
TRUTH = [2, 3, 3, 1, 4]  # of pictures 1 to 5, the kit's numbers
LABELS = [3, 0, 0, 1, 2]
FILES = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)]


def mapping(folder: Path) -> None:
    lines = [f"{wnid} {name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True)]
    (folder / "LOC_synset_mapping.txt").write_text("".join(reversed(lines)))


def kit(folder: Path) -> None:
    """The development kit's ground truth and its MATLAB table, an inner node at the end."""
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{number}\n" for number in TRUTH)
    )
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("children", "O")]
    rows = [(n, WNIDS[KIT[n]], NAMES[KIT[n]], np.zeros(0)) for n in sorted(KIT)]
    rows.append((1001, "n00000001", "animal", np.array([1, 3])))
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})


@pytest.mark.parametrize("layout", ["folders", "solution", "kit", "challenge", "lines"])
def test_every_layout_of_imagenet_gives_the_same_set(tmp_path, layout) -> None:
    place = {"challenge": "ILSVRC/Data/CLS-LOC/val", "folders": "val"}.get(layout, "val")
    rows = zip(FILES, LABELS, strict=True)
    for value, (file, label) in enumerate(rows, 1):
        where = f"{place}/{WNIDS[label]}" if layout == "folders" else place
        put(tmp_path / where, {file: value})
    if layout == "kit":
        kit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    else:
        mapping(tmp_path)
    if layout in ("solution", "challenge"):
        with (tmp_path / "LOC_val_solution.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(["ImageId", "PredictionString"])
            for name, label in sorted(zip(FILES, LABELS, strict=True), key=lambda row: row[1]):
                writer.writerow([name[:-5], f"{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 "])
    elif layout == "lines":
        said = "".join(f"{WNIDS[label]}\n" for label in LABELS)
        (tmp_path / "val.txt").write_text(said)
    found = open_data_set("imagenet", tmp_path, whole=False)
    assert found.classes == tuple(NAMES)
    read = everything(found)
    assert read.keys == [file[:-5] for file in FILES] and reds(read) == [1, 2, 3, 4, 5]
    assert read.labels.tolist() == LABELS and read.groups == [""] * 5
    assert texts(found) == [NAMES[label] for label in LABELS]
    assert [prompt.label for prompt in found.prompts().prompts] == LABELS


def test_imagenet_says_what_is_wrong(tmp_path) -> None:
    put(tmp_path / "val", dict.fromkeys(FILES, 1))
    with pytest.raises(UserError, match="nor the development kit, that names the classes"):
        open_data_set("imagenet", tmp_path, whole=False)
    mapping(tmp_path)
    with pytest.raises(UserError, match="the classes are 4 instead of 1,000"):
        open_data_set("imagenet", tmp_path)
    with pytest.raises(UserError, match="nothing says their classes: copy ILSVRC2012_validation"):
        open_data_set("imagenet", tmp_path, whole=False).prompts()
    kit(tmp_path / "data")
    truth = tmp_path / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("2\n3\n3\n1\n9\n")
    with pytest.raises(UserError, match="line 5: '9' is no class of meta.mat"):
        open_data_set("imagenet", tmp_path, whole=False).prompts()
    truth.write_text("2\n3\n3\n1\n")
    with pytest.raises(UserError, match="has 4 lines but .*val 5 pictures"):
        open_data_set("imagenet", tmp_path, whole=False).prompts()
    (tmp_path / "data" / "meta.mat").write_bytes(b"not a MATLAB file")
    with pytest.raises(UserError, match="is not the kit's list of classes"):
        open_data_set("imagenet", tmp_path, whole=False).prompts()


# ---- CC12M

ROWS = [("c.jpg", ["a cat", "an animal"], 3), ("a.jpg", [" a hill \n"], 1), ("b.jpg", ["sea"], 2)]


@pytest.mark.parametrize("form", ["npy", "tsv", "shards"])
def test_each_form_of_cc12m_gives_first_captions_in_stored_order(tmp_path, form) -> None:
    keys = [name for name, _, _ in ROWS]
    if form == "shards":
        keys = [name.removesuffix(".jpg") for name in keys]
        samples = [
            {"key": key, "image": encoded(value), "extension": "png", "caption": captions[0]}
            for key, (_, captions, value) in zip(keys, ROWS, strict=True)
        ]
        write_shards(tmp_path, samples, per_shard=2)
    else:
        put(tmp_path / "images", {name: value for name, _, value in ROWS})
    if form == "npy":
        rows = [{"image_id": name, "captions": captions} for name, captions, _ in ROWS]
        np.save(tmp_path / "val.npy", np.array(rows, object), allow_pickle=True)
    elif form == "tsv":
        lines = [f"{name}\t{captions[0].strip()}\n" for name, captions, _ in ROWS]
        (tmp_path / "cc12m.tsv").write_text("".join(lines))
    found = open_data_set("cc12m", tmp_path, whole=False)
    assert texts(found) == ["a cat", "a hill", "sea"]
    read = everything(found)
    assert reds(read) == [3, 1, 2] and read.keys == keys
    assert [prompt.id for prompt in found.prompts().prompts] == keys
    drawn = [keys[i] for i in random.Random(0).sample(range(3), 3)]
    part = open_data_set("cc12m15k", tmp_path, whole=False)
    assert everything(part).keys == drawn and drawn != keys
    assert [prompt.id for prompt in part.prompts().prompts] == drawn
    with pytest.raises(UserError, match="are 3 instead of 14,749"):
        open_data_set("cc12m", tmp_path).prompts()


def test_the_official_table_of_cc12m_has_addresses_and_gives_prompts_alone(tmp_path) -> None:
    lines = "http://a.org/1.jpg\tone\r\n\nhttps://b.org/2.jpg\ttwo, three\n"
    (tmp_path / "cc12m.tsv").write_text(lines)
    found = open_data_set("cc12m", tmp_path, whole=False)
    assert texts(found) == ["one", "two, three"] and found.pictures() is None
    (tmp_path / "cc12m.tsv").write_text("http://a.org/1.jpg one\n")
    with pytest.raises(UserError, match="line 1: needs a file or address, a tab and a caption"):
        open_data_set("cc12m", tmp_path, whole=False).prompts()
    (tmp_path / "cc12m.tsv").write_text("a.jpg\tone\na.jpg\ttwo\n")
    with pytest.raises(UserError, match="names a.jpg twice"):
        open_data_set("cc12m", tmp_path, whole=False).prompts()
    (tmp_path / "other.tsv").write_text("")
    with pytest.raises(UserError, match="holds 2 .npy and .tsv files"):
        open_data_set("cc12m", tmp_path)


def test_rows_of_cc12m_that_are_no_captions(tmp_path) -> None:
    for row in ({"captions": ["a"]}, {"image_id": "a.jpg", "captions": []}, ["a"]):
        rows = np.empty(2, object)
        rows[:] = [{"image_id": "b.jpg", "captions": ["b"]}, row]
        np.save(tmp_path / "val.npy", rows, allow_pickle=True)
        with pytest.raises(UserError, match="row 1 is no dictionary with an image_id"):
            open_data_set("cc12m", tmp_path, whole=False).prompts()


# ---- GeoDE


def geode(folder: Path, per_block: int, tagged: bool = True, files: bool = True) -> Path:
    """Rows in an order of their own: objects of the set and one outside it, regions mixed."""
    columns = ["file_path", "object", "region", "ip_country"] + ["tree_tag"] * tagged
    rows = []
    for number in range(per_block):
        for region in reversed(REGIONS):
            for thing in ("tree", "monument", "bag", "cooking_pot"):
                name = f"{region}/{thing}_{number}.jpg"
                rows.append([name, thing, region, "Nowhere"] + ["no"] * tagged)
    if tagged:
        rows.insert(0, ["Africa/bag_bad.jpg", "bag", "Africa", "Nowhere", "yes"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    put(folder / "images", {row[0]: i % 100 for i, row in enumerate(rows)} if files else {})
    return folder


def test_geode_counts_by_object_and_region(tmp_path) -> None:
    found = open_data_set("geode", geode(tmp_path, 2), whole=False)
    asked = found.prompts().prompts
    assert len(asked) == 3 * 6 * 2 and found.classes == OBJECTS and len(OBJECTS) == 27
    assert [prompt.id for prompt in asked[:3]] == [
        "Africa/bag_0.jpg",
        "Africa/bag_1.jpg",
        "Americas/bag_0.jpg",
    ]
    said = {prompt.text: prompt.group for prompt in asked if prompt.label == 6}
    assert said == {
        "cooking pot in Africa": "Africa",
        "cooking pot in the Americas": "Americas",
        "cooking pot in East Asia": "EastAsia",
        "cooking pot in Europe": "Europe",
        "cooking pot in Southeast Asia": "SouthEastAsia",
        "cooking pot in West Asia": "WestAsia",
    }
    read = everything(found)
    assert read.keys == [prompt.id for prompt in asked]
    assert read.groups == [prompt.group for prompt in asked]
    assert read.labels.tolist() == [prompt.label for prompt in asked]
    with pytest.raises(UserError, match="pictures of bag in Africa are 2 instead of 180"):
        open_data_set("geode", tmp_path).prompts()


def test_the_balanced_part_of_geode_is_the_first_half_of_each_block(tmp_path) -> None:
    folder = geode(tmp_path, 181, tagged=False, files=False)
    whole = [prompt.id for prompt in open_data_set("geode", folder, whole=False).prompts().prompts]
    part = open_data_set("geode15k", folder, whole=False).prompts().prompts
    assert len(whole) == 3 * 6 * 180 and len(part) == 3 * 6 * 90
    blocks = [whole[i : i + 90] for i in range(0, len(whole), 180)]
    assert [prompt.id for prompt in part] == sum(blocks, [])
    assert blocks[1][0] == "Americas/bag_0.jpg" and blocks[1][-1] == "Americas/bag_89.jpg"


def test_geode_without_a_column_or_a_picture(tmp_path) -> None:
    folder = geode(tmp_path, 1)
    (folder / "images" / "Europe" / "tree_0.jpg").unlink()
    with pytest.raises(UserError, match="Europe/tree_0.jpg is not in"):
        open_data_set("geode", folder, whole=False).pictures()
    (folder / "index.csv").write_text("file_path,object\na.jpg,bag\n")
    with pytest.raises(UserError, match="has no column region in its first line"):
        open_data_set("geode", folder, whole=False).prompts()


def test_geode_of_other_objects_is_not_an_empty_set(tmp_path) -> None:
    text = "file_path,object,region\na.jpg,banana,Africa\nb.jpg,bag,Mars\n"
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(
        UserError, match=r"of the 27 objects in the 6 regions, but banana in Africa"
    ):
        open_data_set("geode", tmp_path, whole=False).prompts()


# ---- the balanced parts


def test_which_rows_are_drawn() -> None:
    """Python's documented shuffle keeps them; a change would change every such figure."""
    rows = balanced(range(40_504))
    assert len(rows) == 14_749 == len(set(rows))
    assert rows[:6] == EXPECTED_COCO[:6] and rows[-3:] == EXPECTED_COCO[6:]
    assert balanced(range(14_749))[:3] == EXPECTED_CC12M
    assert sorted(balanced(range(5))) == [0, 1, 2, 3, 4]


def test_a_balanced_set_is_drawn_from_all_of_it(tmp_path) -> None:
    order = random.Random(0).sample(["42", "74", "139"], 3)
    found = open_data_set("coco15k", coco(tmp_path / "coco"), whole=False)
    assert [prompt.id for prompt in found.prompts().prompts] == order
    assert everything(found).keys == order and found.pictures().name == "coco15k"
    put(tmp_path / "in" / "val", {f"{WNIDS[0]}/{file}": 1 for file in FILES})
    mapping(tmp_path / "in")
    found = open_data_set("imagenet15k", tmp_path / "in", whole=False)
    assert everything(found).keys == random.Random(0).sample([f[:-5] for f in FILES], 5)


def test_the_names() -> None:
    expected = (
        "cc12m cc12m15k coco coco15k csv drawbench dsg1k emoji flags folder geode geode15k "
        "imagenet imagenet15k partiprompts shards t2icompbench tifa160"
    )
    assert set(expected.split()) <= set(DATA_SETS.names())
    for name in expected.split():
        assert DATA_SETS.get(name).name == name
    with pytest.raises(UserError, match="there is no data set 'cocoa'"):
        open_data_set("cocoa", ".")
