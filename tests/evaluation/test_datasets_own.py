"""Sets of one's own (folder, shards, csv) and the fetched ones with groups (emoji, flags)."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.registry import load_file
from etude.data.emoji import TONES
from etude.data.shards import write_shards
from etude.evaluation.datasets import open_data_set
from etude.evaluation.sets import Pictures, ShardPictures, Stages
from etude.unpacking_flags import flags


def encoded(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def put(folder: Path, values: dict[str, int]) -> None:
    for name, value in values.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value))


def everything(data_set: Any, **form: Any) -> Pictures:
    pictures = data_set.pictures(**form)
    return pictures.read(0, len(pictures), Stages())


def asked(data_set: Any, **options: Any) -> list[tuple[str, str, int, str]]:
    prompts = data_set.prompts(**options).prompts
    return [(prompt.id, prompt.text, prompt.label, prompt.group) for prompt in prompts]


def reds(read: Pictures) -> list[int]:
    return [int(image[0, 0, 0]) for image in read.images]


def test_a_folder_of_classes_is_asked_for_by_class(tmp_path) -> None:
    put(tmp_path, {"dog/1.png": 3, "cat/2.png": 2, "cat/1.png": 1})
    found = open_data_set("folder", tmp_path)
    assert asked(found) == [
        ("cat/1.png", "", 0, "cat"),
        ("cat/2.png", "", 0, "cat"),
        ("dog/1.png", "", 1, "dog"),
    ]
    assert found.prompts().classes == ("cat", "dog")
    read = everything(found)
    assert reds(read) == [1, 2, 3] and read.groups == ["cat", "cat", "dog"]


def test_a_folder_with_captions_is_asked_for_by_them(tmp_path) -> None:
    put(tmp_path, {"a.png": 1, "b.png": 2})
    assert open_data_set("folder", tmp_path).prompts() is None
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"/b.txt is missing and other pictures have a caption"):
        open_data_set("folder", tmp_path).prompts()
    (tmp_path / "b.txt").write_text("two\n")
    assert asked(open_data_set("folder", tmp_path)) == [
        ("a.png", "one", -1, ""),
        ("b.png", "two", -1, ""),
    ]
    text = "file_name,caption,group\nb.png,second,south\na.png,first,north\n"
    (tmp_path / "metadata.csv").write_text(text)
    found = open_data_set("folder", tmp_path)
    assert asked(found) == [("a.png", "first", -1, "north"), ("b.png", "second", -1, "south")]
    assert everything(found).groups == ["north", "south"]


def test_captions_lie_in_class_folders_too(tmp_path) -> None:
    put(tmp_path, {"cat/1.png": 1, "dog/1.png": 2})
    (tmp_path / "dog" / "1.txt").write_text("a dog\n")
    (tmp_path / "1.txt").write_text("of no picture\n")
    with pytest.raises(UserError, match=r"/cat/1.txt is missing and other"):
        open_data_set("folder", tmp_path).prompts()
    (tmp_path / "cat" / "1.txt").write_text("a cat\n")
    assert [row[1] for row in asked(open_data_set("folder", tmp_path))] == ["a cat", "a dog"]


def test_shards_are_asked_for_by_captions_or_classes(tmp_path) -> None:
    samples = [
        {"key": f"s{i}", "image": encoded(i), "extension": "png", "label": i % 2} for i in range(3)
    ]
    write_shards(tmp_path / "plain", samples, classes=["even", "odd"])
    found = open_data_set("shards", tmp_path / "plain")
    assert asked(found) == [("s0", "", 0, "even"), ("s1", "", 1, "odd"), ("s2", "", 0, "even")]
    assert reds(everything(found)) == [0, 1, 2]
    plain = ShardPictures(tmp_path / "plain", channels=1).fingerprint
    assert found.pictures(channels=1).fingerprint == plain  # one set of features serves both
    captioned = [sample | {"caption": f"number {sample['key']}\n"} for sample in samples]
    write_shards(tmp_path / "text", captioned)
    assert asked(open_data_set("shards", tmp_path / "text"))[1] == ("s1", "number s1", 1, "")
    bare = [{"key": "a", "image": encoded(1), "extension": "png"}]
    write_shards(tmp_path / "bare", bare)
    assert open_data_set("shards", tmp_path / "bare").prompts() is None


def test_a_table_keeps_its_order_and_may_lack_columns(tmp_path) -> None:
    put(tmp_path, {"x/a.png": 1, "x/b.webp": 2})
    text = "\ufefffile_name,caption,label,group\nx/b.webp,second,dog,south\nx/a.png,first,cat,\n"
    (tmp_path / "set.csv").write_text(text)
    found = open_data_set("csv", tmp_path / "set.csv")
    assert asked(found) == [("x/b.webp", "second", 1, "south"), ("x/a.png", "first", 0, "")]
    read = everything(found)
    assert reds(read) == [2, 1] and read.groups == ["south", ""] and found.classes == ("cat", "dog")
    (tmp_path / "metadata.csv").write_text("caption,label\none,10\ntwo,2\n")
    found = open_data_set("csv", tmp_path)
    assert asked(found) == [("0", "one", 10, ""), ("1", "two", 2, "")]
    assert found.pictures() is None and len(found.classes) == 11
    (tmp_path / "set.csv").write_text("id,file_name\np,x/a.png\n")
    found = open_data_set("csv", tmp_path / "set.csv")
    assert found.prompts() is None and everything(found).keys == ["p"]
    for text, message in (
        ("id,label\na,b\n", "needs a column file_name or caption"),
        ("file_name\nnotes.txt\n", "notes.txt is no .png, .jpg or .webp picture"),
        ("file_name\nx/c.png\n", "x/c.png is not in"),
        ("id,caption\na,one\na,two\n", "names a twice"),
    ):
        (tmp_path / "set.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            found = open_data_set("csv", tmp_path / "set.csv")
            found.pictures()
    with pytest.raises(UserError, match="none.csv is not there"):
        open_data_set("csv", tmp_path / "none.csv")


def test_emoji_are_grouped_by_their_tone(tmp_path) -> None:
    codes = ["1f44b", "1f44b-1f3fd", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", "1f44b-1f3fb"]
    samples = [
        {"key": code, "image": encoded(i), "extension": "png", "label": 0, "caption": f"wave {i}"}
        for i, code in enumerate(codes)
    ]
    write_shards(tmp_path / "test", samples, classes=["people"])
    found = open_data_set("emoji", tmp_path)
    assert [group for _, _, _, group in asked(found)] == ["", "medium", "", "light"]
    assert everything(found).groups == ["", "medium", "", "light"]
    toned = open_data_set("emoji", tmp_path, toned=True)
    assert asked(toned) == [(codes[1], "wave 1", 0, "medium"), (codes[3], "wave 3", 0, "light")]
    read = everything(toned)
    assert reds(read) == [1, 3] and read.groups == ["medium", "light"]
    with pytest.raises(UserError, match="has no folder train; type: etude data fetch emoji"):
        open_data_set("emoji", tmp_path, split="train")


@pytest.mark.fetched("emoji")
def test_the_fetched_emoji_are_balanced_and_paired() -> None:
    found = open_data_set("emoji", "data/emoji", split="train", toned=True)
    prompts = found.prompts().prompts
    assert Counter(prompt.group for prompt in prompts) == dict.fromkeys(TONES.values(), 277)
    parts = [[part for part in p.id.upper().split("-") if part not in TONES] for p in prompts]
    assert set(Counter("-".join(rest) for rest in parts).values()) == {5}
    read = found.pictures(size=32).read(0, 5, Stages())
    assert read.images.shape == (5, 32, 32, 3) and set(read.groups) == set(TONES.values())


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_flags_are_put_on_white_squares_by_region(tmp_path) -> None:
    countries = [
        {"cca2": "KE", "region": "Africa", "name": {"common": "Kenya"}},
        {"cca2": "FR", "region": "Europe", "name": {"common": "France"}},
        {"cca2": "XX", "region": "Europe", "name": {"common": "No flag"}},
    ]
    pictures = {
        "png250px/ke.png": encoded(40, (250, 125)),
        "png250px/fr.png": encoded(9, (50, 100)),
    }
    paths = [
        archive(tmp_path / "flags.tgz", pictures | {"png1000px/ke.png": b"unused"}),
        archive(tmp_path / "names.tgz", {"countries.json": json.dumps(countries).encode()}),
    ]
    said = flags(paths, tmp_path / "flags", Log(None, quiet=True))
    assert said == "2 flags of 2 regions as shards"
    found = open_data_set("flags", tmp_path / "flags")
    assert asked(found) == [
        ("fr", "the flag of France", 1, "Europe"),
        ("ke", "the flag of Kenya", 0, "Africa"),
    ]
    tall, wide = everything(found).images[..., 0].astype(int)
    expected = np.full((128, 128), 255)
    expected[32:96] = 40
    np.testing.assert_array_equal(wide, expected)
    expected[:] = 255
    expected[:, 32:96] = 9
    np.testing.assert_array_equal(tall, expected)
    with pytest.raises(UserError, match="holds no package/countries.json"):
        flags([paths[0], paths[0]], tmp_path / "again", Log(None, quiet=True))
    with pytest.raises(UserError, match="type: etude data fetch flags"):
        open_data_set("flags", tmp_path / "none")


@pytest.mark.fetched("flags")
def test_the_fetched_flags_have_six_regions() -> None:
    prompts = open_data_set("flags", "data/flags").prompts().prompts
    regions = {"Africa": 59, "Americas": 56, "Europe": 53, "Asia": 50, "Oceania": 27}
    assert Counter(prompt.group for prompt in prompts) == regions | {"Antarctic": 5}


def test_a_file_of_ones_own_registers_a_data_set(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "from etude.evaluation.datasets import Prompt, Prompts, data_set\n\n"
        '@data_set("weather-test")\n'
        "class Weather:\n"
        '    name = "weather-test"\n\n'
        "    def __init__(self, folder, *, words=2):\n"
        '        self.found = ["rain", "snow", "fog"][:words]\n\n'
        "    def pictures(self, **form):\n"
        "        return None\n\n"
        "    def prompts(self):\n"
        "        rows = [Prompt(w, w) for w in self.found]\n"
        "        return Prompts(self.name, tuple(rows))\n"
    )
    load_file(tmp_path / "mine.py")
    assert [row[1] for row in asked(open_data_set("weather-test"))] == ["rain", "snow"]
    assert len(open_data_set("weather-test", words=3).prompts()) == 3
