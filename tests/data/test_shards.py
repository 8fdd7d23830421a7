"""Shards: what is written is read back, here and by webdataset; structural faults are named."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.data.picture import BadPicture
from etude.data.shards import ShardSet, write_shards

RNG = np.random.default_rng(0)


def _picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _samples(count: int, **extra):
    for number in range(count):
        key = f"class{number % 3}/{number:03d}"
        sample = {"key": key, "image": _picture(number), "extension": "png", "label": number % 3}
        yield sample | {"caption": f"a picture né {number}"} | extra


def _tar(path: Path, members: list[tuple], *, end: bool = True) -> Path:
    """A tar of (name, bytes) or (TarInfo, bytes) members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        length = tar.offset
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue() if end else buffer.getvalue()[:length])
    return path.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", _samples(25), per_shard=10, classes=["a", "b", "c"])
    return tmp_path / "set"


def test_what_is_written_is_read(folder: Path) -> None:
    data = ShardSet(folder, verify=True)
    assert len(data) == 25 and data.shard_sizes == (10, 10, 5) and data.classes == ["a", "b", "c"]
    for number, expected in enumerate(_samples(25)):
        sample = data[number]
        assert (sample.key, sample.label, sample.caption, sample.extension) == (
            expected["key"],
            number % 3,
            expected["caption"],
            "png",
        )
        assert bytes(sample.data) == expected["image"]
        assert data.key_of(number) == sample.key
    assert data.shard_of(19) == ("000001.tar", 9)
    assert data.labels.tolist() == [number % 3 for number in range(25)]
    with pytest.raises(IndexError):
        data[25]


def test_webdataset_reads_our_shards(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    ours = [ShardSet(folder)[i] for i in range(25)]
    assert [sample["__key__"] for sample in found] == [sample.key for sample in ours]
    assert [sample["png"] for sample in found] == [bytes(sample.data) for sample in ours]
    assert [sample["txt"].decode() for sample in found] == [sample.caption for sample in ours]


def test_plain_tars_are_indexed_and_fields_come_from_json(tmp_path: Path) -> None:
    long = "x" * 150
    members = [("./" + long + ".jpg", b"one"), (long + ".json", b'{"label": 4, "caption": "hi"}')]
    folder = _tar(tmp_path / "s" / "a.tar", members + [("readme", b"no extension: skipped")])
    sample = ShardSet(folder)[0]
    assert (sample.key, sample.label, sample.caption) == (long, 4, "hi")
    assert bytes(sample.data) == b"one" and ShardSet(folder)[0].label == 4


def test_numbers_that_every_sample_holds_are_scalars(tmp_path: Path) -> None:
    def meta(number: int, **more) -> dict:
        return {"score": number / 3, "year": number, "label": 0, "whole": True, "text": "1"} | more

    more = [{"some": 1.5}, {"some": float("nan")}, {"year": 10**400}, {}]
    metas = [meta(number, **extra) for number, extra in enumerate(more)]
    for name, chosen in (("all", metas), ("half", [*metas[:2], {"score": 1}])):
        samples = [
            {"key": f"{n}", "image": b"one", "extension": "png", "label": n, "meta": m}
            for n, m in enumerate(chosen)
        ]
        write_shards(tmp_path / name, samples, per_shard=2)
    data = ShardSet(tmp_path / "all")
    assert data.scalars == ("score",) and data.scalar("score").tolist() == [0, 1 / 3, 2 / 3, 1]
    assert [data[n].scalars for n in (1, 3)] == [{"score": 1 / 3}, {"score": 1.0}]
    assert [data[n].label for n in range(4)] == [0, 1, 2, 3]
    assert ShardSet(tmp_path / "half").scalars == ("score",)


def test_an_index_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    before = ShardSet(folder)
    (folder / "index.json").unlink()
    elsewhere = ShardSet(folder, index_folder=tmp_path / "index")
    assert not (folder / "index.json").exists()
    assert elsewhere.fingerprint == before.fingerprint and elsewhere[7].key == before[7].key


def test_equal_samples_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", _samples(25), per_shard=10, classes=["a", "b", "c"])
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(UserError, match="not empty"):
        write_shards(folder, _samples(3))


def test_half_written_shards_never_appear(tmp_path: Path) -> None:
    def failing():
        yield from _samples(15)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "set", failing(), per_shard=10)
    assert list(tmp_path.iterdir()) == []


def test_keys_repeated_across_shards_name_their_shard(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        _tar(tmp_path / "s" / name, [("0.png", name.encode())])
    data = ShardSet(tmp_path / "s")
    assert [data[0].key, data[1].key] == ["a/0", "b/0"]


def _link() -> tarfile.TarInfo:
    info = tarfile.TarInfo("x.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../x.png", b"1")], r"a\.tar: member '../x.png' points outside"),
        ([("/etc/x.png", b"1")], "points outside"),
        ([("a/../../x.png", b"1")], "points outside"),
        ([("a\\..\\x.png", b"1")], "points outside"),
        ([(_link(), b"")], "link or a device"),
        ([("x.png", b"1"), ("y.png", b"2"), ("x.cls", b"0")], "repeats the key 'x'"),
        ([("x.png", b"1"), ("x.png", b"2")], "repeats the key 'x'"),
        ([("x.cls", b"1")], "sample x has no picture"),
        ([("x.png", b"1"), ("x.jpg", b"1")], "several pictures"),
        ([("x.png", b"1"), ("x.cls", b"cat")], r"member x\.cls should hold a class number"),
        ([("x.png", b"1"), ("x.cls", b"-1")], "class number"),
        ([("x.png", b"1"), ("x.json", b"{")], r"member x\.json is not JSON"),
        ([("x.png", b"1"), ("x.json", b"[1]")], "not a JSON object"),
        ([("x.png", b"1"), ("x.json", b'{"caption": 3}')], "should hold text"),
        ([("x.png", b"1"), ("x.txt", b"\xff\xfe")], r"member x\.txt is not UTF-8"),
        ([("x.png", b"1"), ("x.cls", b"1"), ("y.png", b"2")], "sample y has no label"),
        ([("x.png", b"1"), ("y.png", b"2"), ("y.txt", b"2")], "sample x has no caption"),
        ([("nothing", b"1")], "holds no samples"),
    ],
)
def test_structural_faults_name_shard_and_member(tmp_path: Path, members, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ShardSet(_tar(tmp_path / "s" / "a.tar", members))
    assert not (tmp_path / "s" / "index.json").exists()


def test_broken_archives(tmp_path: Path) -> None:
    good = [(f"{n}.png", bytes([n]) * 700) for n in range(4)]
    whole = (_tar(tmp_path / "good" / "a.tar", good) / "a.tar").read_bytes()
    cases = {
        "its end mark is missing": whole[: 4 * 1536],
        "truncated|not a readable tar|damaged header": whole[: 2 * 1536 + 900],
        "second archive": whole + whole,
        "damaged header": whole[:1540] + b"?" + whole[1541:],
        "is empty": b"",
        "not a readable tar": b"\x1f\x8b" + bytes(RNG.integers(0, 256, 4000, dtype=np.uint8)),
    }
    for number, (reason, data) in enumerate(cases.items()):
        path = tmp_path / f"bad{number}" / "a.tar"
        path.parent.mkdir()
        path.write_bytes(data)
        with pytest.raises(UserError, match=reason) as caught:
            ShardSet(path.parent)
        assert "a.tar" in str(caught.value)
    _tar(tmp_path / "cut" / "a.tar", good, end=False)
    with pytest.raises(UserError, match="end mark"):
        ShardSet(tmp_path / "cut")


def test_what_opening_checks_against_the_index(folder: Path) -> None:
    shard, index = folder / "000001.tar", folder / "index.json"
    saved, text = shard.read_bytes(), index.read_text()
    shard.write_bytes(saved[:-512])
    with pytest.raises(UserError, match=r"000001\.tar is truncated"):
        ShardSet(folder)
    shard.write_bytes(b"?" + saved[1:])
    with pytest.raises(UserError, match="first header"):
        ShardSet(folder)
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        ShardSet(folder)
    shard.write_bytes(saved)
    (folder / "extra.tar").write_bytes(saved)
    with pytest.raises(UserError, match=r"extra\.tar is not in"):
        ShardSet(folder)
    (folder / "extra.tar").unlink()
    index.write_text(text.replace('"b"', '"d"', 1))
    with pytest.raises(UserError, match="digest"):
        ShardSet(folder)
    index.write_text(text)
    (folder / "classes.txt").write_text("only\n")
    index.unlink()
    with pytest.raises(UserError, match="classes.txt names 1 classes"):
        ShardSet(folder)


def test_an_index_cannot_point_outside(folder: Path) -> None:
    from etude.data.index import Index

    index = Index.model_validate_json((folder / "index.json").read_bytes())
    entry = index.shards[0].model_copy(update={"name": "../000000.tar"})
    index = index.model_copy(update={"shards": [entry]})
    index = index.model_copy(update={"digest": index.computed_digest()})
    (folder / "index.json").write_text(index.model_dump_json())
    with pytest.raises(UserError, match="outside the folder"):
        ShardSet(folder)


def test_500_mutations_are_found(folder: Path, tmp_path: Path) -> None:
    """A flipped, cut, grown or swapped file: a `UserError` with verify=True, and without it either
    that or a `BadPicture` of the sample, unless no sample changed."""
    pristine = {path.name: path.read_bytes() for path in folder.iterdir()}
    truth = _content(ShardSet(folder))
    names = sorted(pristine)
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    refused = 0
    for case in range(500):
        rng = np.random.default_rng(case)
        name = names[case % len(names)]
        data = bytearray(pristine[name])
        kind = case // len(names) % 4
        if kind < 2:
            for place in rng.integers(0, len(data), 1 + kind * 7):
                data[place] ^= 1 << rng.integers(0, 8)
        elif kind == 2:
            data = data[: rng.integers(0, len(data))]
        else:
            place = rng.integers(0, len(data))
            data[place:place] = rng.integers(0, 256, rng.integers(1, 600), dtype=np.uint8).tobytes()
        (work / name).write_bytes(bytes(data))
        if name == "classes.txt":  # read only when an index is built
            assert _content(ShardSet(work, verify=True)) == truth
        elif bytes(data) != pristine[name]:
            with pytest.raises(UserError) as caught:
                ShardSet(work, verify=True)
            assert name.removesuffix(".offsets.npy") in str(caught.value)
            refused += 1
            try:
                seen = _content(ShardSet(work))
            except UserError:
                seen = []
            for got, expected in zip(seen, truth, strict=False):
                assert got in (expected, "bad"), f"case {case} changed a sample of {name}"
        (work / name).write_bytes(pristine[name])
    assert refused > 300


def _content(data: ShardSet) -> list:
    found = []
    for number in range(len(data)):
        try:
            sample = data[number]
        except BadPicture:
            found.append("bad")
        else:
            found.append((sample.key, bytes(sample.data), sample.label, sample.caption))
    return found


def test_mutated_tars_without_an_index_raise_only_user_errors(folder: Path, tmp_path: Path) -> None:
    pristine = (folder / "000002.tar").read_bytes()
    (tmp_path / "s").mkdir()
    accepted = 0
    for case in range(200):
        rng = np.random.default_rng(case)
        data = bytearray(pristine)
        for block in rng.integers(0, len(data) // 512, 1 + case % 3):
            data[block * 512 + rng.integers(0, 512)] ^= 1 << rng.integers(0, 8)
        (tmp_path / "s" / "a.tar").write_bytes(bytes(data))
        try:
            accepted += len(ShardSet(tmp_path / "s")) == 5
        except UserError:
            pass
        for path in (tmp_path / "s").glob("*.[jn]*"):
            path.unlink()
    assert 0 < accepted < 200  # without a recorded hash a flipped pixel cannot be noticed
