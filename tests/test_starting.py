"""Own pictures: layouts, bad files, near-duplicates, the split, shards, recipes, second calls."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.data.shards import ShardSet
from etude.gathering import Found, difference_hash, gather, groups
from etude.starting import split, start, stored_picture
from etude.starting_recipes import CPU_SIZES, GPU_SIZES, Machine, Pictures, latent_recipe

QUIET = Log(None, quiet=True)


class Lines(Log):
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(None, quiet=True)
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(f"warning: {message}")


def scene(seed: int, size: int = 96) -> Image.Image:
    """A smooth random colour picture; different seeds look nothing alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def folder_of(path: Path, count: int, classes: int = 2, first: int = 0) -> Path:
    for number in range(first, first + count):
        place = path / f"class-{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        scene(number).save(place / f"{number:03d}.png")
    return path


def shard_samples(folder: Path) -> list:
    shards = ShardSet(folder)
    return [shards[i] for i in range(len(shards))]


def test_a_folder_of_classes_becomes_checked_shards(tmp_path: Path) -> None:
    log = Lines()
    started = start(folder_of(tmp_path / "Birds 2", 40), out=tmp_path / "data", log=log)
    assert started.folder == tmp_path / "data" / "birds-2"
    train, test = shard_samples(started.folder / "train"), shard_samples(started.folder / "test")
    assert (len(train), len(test)) == started.counts and sum(started.counts) == 40 and test
    assert ShardSet(started.folder / "train").classes == ["class-0", "class-1"]
    originals = {}
    for path in (tmp_path / "Birds 2").rglob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        originals[path] = (int(path.parent.name[-1]), pixels.mean((0, 1)))
    colours = np.array([colour for _, colour in originals.values()])
    labels = np.array([label for label, _ in originals.values()])
    for sample in train + test:
        picture = np.asarray(Image.open(io.BytesIO(sample.data))).astype(int)
        nearest = np.abs(colours - picture.mean((0, 1))).sum(1).argmin()
        assert labels[nearest] == sample.label
    with Image.open(started.folder / "contact.png") as sheet:
        assert sheet.size == (7 * 99 + 3, 6 * 99 + 3)
    text = "\n".join(log.lines)
    assert "40 pictures are few" in text and "KID rather than FID" in text
    assert all(command in text for command in started.commands) and len(started.commands) == 3


def test_the_recipes_load_and_say_what_was_found(tmp_path: Path) -> None:
    started = start(folder_of(tmp_path / "birds", 30, classes=3), out=tmp_path / "data", log=QUIET)
    autoencoder, latent = load_recipe(started.autoencoder), load_recipe(started.latent)
    assert (autoencoder.kind, latent.kind) == ("autoencoder", "ldm")
    assert (autoencoder.name, latent.name) == ("birds-autoencoder", "birds-ldm")
    assert latent.autoencoder == "runs/birds-autoencoder"
    assert latent.model.num_classes == 3
    for recipe in (autoencoder, latent):
        assert recipe.data.shards == str(started.folder / "train")
        assert recipe.held_out == str(started.folder / "test")
        assert recipe.data.augment.channels == 3
    halvings = len(autoencoder.model.block_out_channels) - 1
    assert latent.model.input_size * 2**halvings == latent.data.augment.image_size
    assert latent.model.in_channels == autoencoder.model.latent_channels


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("gpu", [0.0, 80.0])
@pytest.mark.parametrize("classes", [1, 2])
def test_every_size_gives_recipes_that_load(
    tmp_path: Path, size: int, gpu: float, classes: int
) -> None:
    pictures = Pictures("x", tmp_path, size, 1, classes, 100, True)
    path = tmp_path / "x.yaml"
    path.write_text(latent_recipe(pictures, Machine(4, 16.0, gpu)))
    recipe = load_recipe(path)
    chosen = (GPU_SIZES if gpu else CPU_SIZES)[size]
    assert recipe.model.hidden_size == chosen.hidden and recipe.loop.images == chosen.images
    assert recipe.strategy.precision == ("bf16" if gpu else "fp32")
    assert recipe.data.augment.channels == 1
    assert recipe.model.conditioning.semantic == ("text" if classes == 1 else "class")
    assert ("Asked by class alone" in path.read_text()) == (classes == 2)


@pytest.mark.parametrize(
    ("machine", "sides", "size"),
    [
        (Machine(2, 8, 0), [500] * 5, 32),
        (Machine(16, 64, 0), [500] * 5, 64),
        (Machine(16, 64, 0), [28] * 5, 32),
        (Machine(16, 64, 80), [500] * 5, 256),
        (Machine(16, 64, 80), [100, 100, 900], 64),
        (Machine(16, 64, 12), [500] * 5, 64),
    ],
)
def test_the_picture_size_suits_pictures_and_machine(
    machine: Machine, sides: list[int], size: int
) -> None:
    assert machine.image_size(sides) == size


def test_bad_pictures_are_named_and_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 12)
    good = (folder / "class-0" / "000.png").read_bytes()
    (folder / "class-0" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "class-1" / "empty.jpg").write_bytes(b"")
    (folder / "class-1" / "text.jpg").write_bytes(b"not a picture at all")
    Image.new("RGB", (4, 200)).save(folder / "class-1" / "thin.png")
    (folder / "stray.png").write_bytes(good + b" ")
    (folder / "class-1" / "notes.md").write_text("no picture, not looked at")
    log = Lines()
    started = start(folder, out=tmp_path / "data", log=log)
    assert sum(started.counts) == 12
    text = "\n".join(log.lines)
    for name in ("cut.png", "empty.jpg", "text.jpg", "thin.png", "stray.png"):
        assert f"/{name}: " in text, name
    record = json.loads((started.folder / "start.json").read_text())
    assert len(record["left_out"]) == 5 and "notes.md" not in text


def test_captions_beside_and_in_a_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "beside"
    beside.mkdir()
    for number in range(12):
        scene(number).save(beside / f"{number}.png")
        (beside / f"{number}.txt").write_text(f"picture\n number {number}")
    first = start(beside, out=tmp_path / "data", log=QUIET)
    table = tmp_path / "table"
    (table / "deep").mkdir(parents=True)
    rows = ["File_Name,Caption"]
    for number in range(12):
        scene(number).save(table / "deep" / f"{number}.png")
        rows.append(f'deep/{number}.png,"picture number {number}"')
    (table / "captions.csv").write_text("\n".join([*rows, "deep/none.png,gone"]))
    log = Lines()
    second = start(table, out=tmp_path / "data", log=log)
    captions = []
    for started in (first, second):
        samples = [s for part in ("train", "test") for s in shard_samples(started.folder / part)]
        captions.append(sorted(s.caption for s in samples))
        assert {s.label for s in samples} == {0}
    assert captions[0] == captions[1] == sorted(f"picture number {n}" for n in range(12))
    assert "captions.csv, line 14, not found" in "\n".join(log.lines)
    assert len(second.commands) == 4 and second.commands[0] == "etude data fetch minilm"
    (tmp_path / "data" / "minilm").mkdir()
    assert start(table, out=tmp_path / "data", log=QUIET).commands == second.commands[1:]
    recipe = load_recipe(second.latent)
    asked = recipe.model.conditioning
    assert (recipe.model.family, asked.semantic, asked.text_width) == ("pixart", "text", 384)
    assert recipe.text.encoders == ["data/minilm"] and recipe.text.max_tokens == asked.text_tokens
    (table / "captions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has the columns a, b; it needs file_name"):
        gather(table, QUIET)


def test_near_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(40):
        picture = scene(number, 128)
        picture.save(folder / f"{number:02d}-a.png")
        picture.save(folder / f"{number:02d}-b.jpg", quality=60)
        picture.resize((90, 90)).save(folder / f"{number:02d}-c.png")
    pictures = gather(folder, QUIET).pictures
    together = groups(pictures)
    named = sorted({pictures[i].path.name[:2] for i in group} for group in together)
    assert len(together) == 40 and all(len(names) == 1 for names in named)
    train, test = split(pictures, together, 0.3)
    sides = [{pictures[i].path.name[:2] for i in side} for side in (train, test)]
    assert not sides[0] & sides[1] and len(train) + len(test) == 120
    # 40 groups at 0.3: 12 expected, standard deviation 2.9; by smallest sha256 it would be 26.
    assert 5 <= len(sides[1]) <= 19


def test_flat_pictures_with_equal_hashes_are_not_twins(tmp_path: Path) -> None:
    for level in range(0, 250, 25):
        Image.new("L", (32, 32), level).save(tmp_path / f"{level:03d}.png")
    pictures = gather(tmp_path, QUIET).pictures
    assert {p.hash for p in pictures} == {0}
    assert len(groups(pictures)) == 10


def test_groups_equal_comparing_every_pair() -> None:
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(60):
        bits = generator.integers(0, 2, 64)
        for _ in range(3):
            near = bits.copy()
            near[generator.choice(64, generator.integers(0, 7), replace=False)] ^= 1
            value = int("".join(map(str, near)), 2)
            flat = np.full((16, 16), number * 4 % 256, np.uint8)
            pictures.append(Found(Path("x"), "", 9, 9, True, "", "", value, flat))
    count = len(pictures)
    side = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(count):
            close = bin(pictures[i].hash ^ pictures[j].hash).count("1") <= 6
            error = pictures[i].thumbnail.astype(float) - pictures[j].thumbnail
            side[i, j] = close and np.sqrt((error**2).mean()) < 8
    reach = np.linalg.matrix_power(side.astype(float), 8) > 0
    expected = {frozenset(np.flatnonzero(row).tolist()) for row in reach}
    assert {frozenset(group) for group in groups(pictures)} == expected
    assert 60 <= len(expected) < count


def test_the_difference_hash_follows_its_definition() -> None:
    rising = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1)))
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    cells = np.zeros((8, 9), np.uint8)
    cells[0, 1] = 255  # only the first comparison of the first row
    assert difference_hash(Image.fromarray(cells)) == 1 << 63


def test_more_pictures_move_no_other(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 60)
    first = start(folder, out=tmp_path / "one", log=QUIET)
    folder_of(folder, 30, first=60)
    second = start(folder, out=tmp_path / "two", log=QUIET)
    keys = [
        {part: {s.key for s in shard_samples(s_.folder / part)} for part in ("train", "test")}
        for s_ in (first, second)
    ]
    assert keys[0]["train"] < keys[1]["train"] and keys[0]["test"] <= keys[1]["test"]


def test_exact_copies_are_kept_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 10)
    shutil.copy(folder / "class-0" / "000.png", folder / "class-0" / "copy.png")
    log = Lines()
    started = start(folder, out=tmp_path / "data", log=log)
    assert sum(started.counts) == 10 and "1 exact copies left out" in "\n".join(log.lines)


def test_a_second_call_finds_it_and_other_pictures_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 10)
    first = start(folder, out=tmp_path / "data", log=QUIET)
    (first.folder / "p-ldm.yaml").write_text("# edited by a person\n")
    log = Lines()
    assert start(folder, out=tmp_path / "data", log=log) == first
    assert "already holds exactly these pictures" in "\n".join(log.lines)
    assert (first.folder / "p-ldm.yaml").read_text() == "# edited by a person\n"
    folder_of(folder, 1, first=50)
    with pytest.raises(UserError, match="already holds something else"):
        start(folder, out=tmp_path / "data", log=QUIET)


def test_pictures_that_already_lie_in_the_data_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data" / "p", 10)
    started = start(folder, out=tmp_path / "data", log=QUIET)
    assert started.folder == tmp_path / "data" / "p-shards"
    assert len(list(folder.rglob("*.png"))) == 10


def test_nothing_usable_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; type: etude start FOLDER"):
        start(tmp_path / "none", log=QUIET)
    with pytest.raises(UserError, match="holds no pictures"):
        start(tmp_path, log=QUIET)
    for number in range(5):
        scene(1).save(tmp_path / f"{number}.jpg", quality=95 - number)
    with pytest.raises(UserError, match="all pictures are near-duplicates"):
        start(tmp_path, name="x", out=tmp_path / "data", log=QUIET)
    assert not (tmp_path / "data" / "x").exists()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_stored_pictures_are_small_plain_and_upright() -> None:
    plain = encoded(scene(0, 60), "JPEG")
    assert stored_picture(plain, 32) == (plain, "jpg")
    data, extension = stored_picture(encoded(scene(0, 400), "JPEG", quality=95), 32)
    assert extension == "png" and Image.open(io.BytesIO(data)).size == (64, 64)
    wide = scene(0, 400).resize((800, 400))
    data, extension = stored_picture(encoded(wide, "PNG"), 64)
    assert extension == "jpg" and Image.open(io.BytesIO(data)).size == (256, 128)
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    data, _ = stored_picture(encoded(clear, "PNG"), 32)
    assert (np.asarray(Image.open(io.BytesIO(data))) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    tall = np.zeros((20, 40, 3), np.uint8)
    tall[:, :20] = 255
    data, _ = stored_picture(encoded(Image.fromarray(tall), "JPEG", exif=exif, quality=95), 64)
    upright = np.asarray(Image.open(io.BytesIO(data)))
    assert upright.shape[:2] == (40, 20)
    assert upright[:15].min() > 200 and upright[25:].max() < 50
