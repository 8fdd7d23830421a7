"""Pickles of plain values and arrays: what numpy wrote is read, and nothing else ever runs."""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.core.errors import UserError
from etude.data.numpy_pickle import ArrayUnpickler, load_npy


def read(data: bytes) -> Any:
    return ArrayUnpickler(io.BytesIO(data)).load()


def equal(one: Any, two: Any) -> bool:
    """Whether two trees are the same, types and dtypes included."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, np.ndarray):
        if one.dtype.hasobject:
            return one.shape == two.shape and equal(one.ravel().tolist(), two.ravel().tolist())
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    return one == two or (one != one and two != two)


SHARED = np.ones(2, ">i4")
TREE = {
    "kernel": np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4),
    "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "texts": np.array(["ab", "c"]),
    "bytes": np.array([b"ab", b"c"]),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.uint8),
    "rows": np.array([{"captions": ["a", "é"]}, {"captions": []}], object),
    "number": np.float32(0.1),
    "shared": [SHARED, SHARED, SHARED.dtype],
    "plain": (1, -(2**70), 2.5, None, True, "text", b"bytes", (), [], {}),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_numpy_wrote_is_read(protocol: int) -> None:
    assert equal(read(pickle.dumps(TREE, protocol=protocol)), TREE)


def test_names_of_older_and_newer_numpy_are_one() -> None:
    data = pickle.dumps(np.arange(3), protocol=0)
    older = data.replace(b"numpy._core", b"numpy.core")
    assert older != data and equal(read(older), np.arange(3))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(TREES, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_every_tree_of_plain_values_comes_back(tree: Any, protocol: int) -> None:
    assert equal(read(pickle.dumps(tree, protocol=protocol)), tree)


class Hostile:
    """Makes a folder where a pickle reader calls what it is asked to."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_nothing_is_called(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps({"a": [Hostile(tmp_path / "escaped")]}, protocol=protocol)
        with pytest.raises(UserError, match=r"the pickle asks for \w+\.mkdir; only numpy arrays"):
            read(data)
    assert not list(tmp_path.iterdir())


class Counts(dict):
    """A dictionary class with a state, as pickles of classes have."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "keys are not text"),
        ({1, 2}, "holds EMPTY_SET"),
        (Counts(a=1), "asks for"),
        (np.zeros(2, [("a", "i4")]), "an array of type 'V4'"),
        (np.zeros(2, "M8[s]"), "an array of type 'M8'"),
        (object, "asks for builtins.object"),
        (np.ndarray, r"(?i)calls|no plain|asks"),
    ],
)
def test_other_values_are_refused_in_one_sentence(value: Any, message: str) -> None:
    if value is np.ndarray:  # naming the class is what numpy does; calling it is not
        value = b"cnumpy\nndarray\n(I3\ntR."
    data = value if isinstance(value, bytes) else pickle.dumps(value)
    with pytest.raises(UserError, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def doubled(times: int) -> bytes:
    """A list that holds one list twice, and so on: 2 to the power of `times` when walked."""
    value: list = []
    for _ in range(times):
        value = [value, value]
    return pickle.dumps(value)


def inside_itself() -> bytes:
    value: list = []
    value.append(value)
    return pickle.dumps(value)


def many_copies() -> bytes:
    """One text of a megabyte, encoded a hundred thousand times: 100 GB if it were done."""
    text = pickle.SHORT_BINUNICODE + b"\x06latin1"
    call = b"c_codecs\nencode\nh\x00" + text + pickle.TUPLE2 + pickle.REDUCE
    big = pickle.BINUNICODE + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20)
    return b"\x80\x04" + big + b"q\x00" + b"](" + call * 100_000 + b"e."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (doubled(50), "expands to more than"),
        (inside_itself(), "inside itself"),
        (pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999 + b".", "nested more than 64 deep"),
        (many_copies(), "many arrays of one content"),
        (b"\x80\x04N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.", None),
        (pickle.BINBYTES8 + b"\xff" * 7 + b"\x7f.", "is damaged"),
        (b"I" + b"9" * 1_000_000 + b"\n.", "is damaged"),
        (b"", "is damaged"),
        (pickle.dumps(TREE)[:-1], "is damaged|stops early"),
    ],
    ids="doubled itself deep copies memo length digits empty cut".split(),
)
def test_bombs_do_not_go_off(data: bytes, message: str | None) -> None:
    """Each would take gigabytes or hours in Python's own reader, or by whoever walks the result."""
    if message is None:  # a memo place of 2^31 - 1: here a key, there a table of 16 GB
        assert read(data) is None
    else:
        with pytest.raises(UserError, match=message):
            read(data)


WHOLE = [pickle.dumps(TREE, protocol=protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
CODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
PIECES = (
    st.sampled_from(CODES)
    | st.binary(max_size=6)
    | st.sampled_from([b"cnumpy\ndtype\n", b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x8c\x02f4"])
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_and_random_pickles_give_one_sentence(data: Any) -> None:
    """Random instructions, and good pickles with bytes changed: a value or a `UserError`."""
    if data.draw(st.booleans()):
        text = b"".join(data.draw(st.lists(PIECES, max_size=40))) + b"."
    else:
        whole = bytearray(data.draw(st.sampled_from(WHOLE)))
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(whole) - 1))
            whole[place] = data.draw(st.integers(0, 255))
        text = bytes(whole)
    try:
        read(text)
    except UserError as error:
        assert "\n" not in str(error)


def test_npy_files_of_objects_and_of_numbers(tmp_path: Path) -> None:
    rows = np.array([{"image_id": "a.jpg", "captions": ["one"]}], object)
    np.save(tmp_path / "rows.npy", rows, allow_pickle=True)
    assert equal(load_npy(tmp_path / "rows.npy"), rows)
    numbers = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.save(tmp_path / "numbers.npy", numbers)
    assert equal(load_npy(tmp_path / "numbers.npy"), numbers)
    np.save(tmp_path / "hostile.npy", np.array([Hostile(tmp_path / "x")]), allow_pickle=True)
    with pytest.raises(UserError, match=r"hostile.npy asks for \w+\.mkdir"):
        load_npy(tmp_path / "hostile.npy")
    (tmp_path / "other.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O', ")
    with pytest.raises(UserError, match="other.npy is damaged or no .npy file"):
        load_npy(tmp_path / "other.npy")
    with pytest.raises(UserError, match="is not a file"):
        load_npy(tmp_path / "none.npy")
