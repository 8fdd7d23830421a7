"""Pickles of plain values and numpy arrays, read without ever calling what a pickle asks for.

Data sets and weights come as pickles (the captions of CC12M as an `.npy` of dictionaries, LPIPS as
nested dictionaries of arrays). Python's own reader imports and calls whatever a pickle names. This
one interprets the instructions itself: it knows dictionaries with text as keys, lists, tuples,
text, bytes, numbers and numpy's arrays, builds each of them here, and refuses the rest. Its work
grows with the length of the input alone. Called by evaluation/datasets/cc12m.py and unpacking.py.
"""

import io
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from etude.core.errors import UserError

DEEPEST = 64  # containers inside one another
LARGEST = 50_000_000  # values, those that are reached twice counted twice

_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5}|O8?)")
_PLAIN = (
    "INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
).split()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Refused(Exception):
    """Why a pickle is not read."""


class _Named:
    """A function or class that a pickle names; called by `_call` where it is known."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Unfinished:
    """An array or dtype between its making and its BUILD, and the memo places that hold it."""

    def __init__(self, dtype: np.dtype | None) -> None:
        self.dtype, self.places = dtype, []


class ArrayUnpickler:
    """Reads one pickle of dictionaries, lists, tuples, plain values and numpy arrays.

    Args:
        file: open for reading bytes, at the start of the pickle.
        where: what a message names.
    """

    def __init__(self, file: BinaryIO, where: str = "the pickle") -> None:
        self._file, self._where = file, where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._read, self._copied = 0, 0  # bytes

    def load(self) -> Any:
        """The value.

        Raises:
            UserError: anything but such values, damage, a value inside itself, or more than
                50 million values after expansion.
        """
        try:
            for opcode, argument, place in pickletools.genops(self._file):
                self._read = place or 0
                if opcode.name == "STOP":
                    value = self._pop()
                    if self._stack or self._marks:
                        raise _Refused("is damaged: values are left over")
                    _check_size(value)
                    return value
                self._step(opcode.name, argument)
            raise _Refused("is damaged: it stops early")
        except _Refused as error:
            raise UserError(f"{self._where} {error}") from None
        # Damage shows as many kinds: struct, Unicode and value errors, and short memory.
        except Exception as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise UserError(f"{self._where} is damaged ({reason}); copy it again") from None

    def _step(self, name: str, argument: Any) -> None:
        if name in _PLAIN:
            self._stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            return
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._remember(len(self._memo) if name == "MEMOIZE" else argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise _Refused("is damaged: it refers to a value that it does not hold")
            self._stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            function, module = self._pop(), self._pop()
            self._stack.append(self._named(module, function))
        elif name in _CONTAINERS:
            _CONTAINERS[name](self)
        else:
            raise _Refused(f"holds {name}, which is no plain value; only numpy arrays are read")

    def _named(self, module: Any, function: Any) -> _Named:
        name = f"{module}.{function}".replace("numpy.core.", "numpy._core.")
        if name not in _CALLS and name != "numpy.ndarray":
            raise _Refused(f"asks for {name}; only numpy arrays are read")
        return _Named(name)

    def _remember(self, place: int) -> None:
        value = self._top()
        if isinstance(value, _Unfinished):
            value.places.append(place)
        self._memo[place] = value

    def _top(self) -> Any:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            raise _Refused("is damaged: it takes a value that it does not hold")
        return self._stack[-1]

    def _pop(self) -> Any:
        """The top value, finished."""
        value = self._top()
        if isinstance(value, _Unfinished):
            raise _Refused("is damaged: it uses an array before it is filled")
        return self._stack.pop()

    def _marked(self) -> list[Any]:
        """The values above the last mark."""
        if not self._marks:
            raise _Refused("is damaged: a mark is missing")
        start = self._marks.pop()
        values, self._stack[start:] = self._stack[start:], []
        if any(isinstance(value, _Unfinished) for value in values):
            raise _Refused("is damaged: it uses an array before it is filled")
        return values

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise _Refused("is damaged: it appends to something that is no list")
        target.extend(values)

    def _update(self, values: list[Any]) -> None:
        self._fill(self._top(), values)

    @staticmethod
    def _fill(target: Any, values: list[Any]) -> dict:
        if not isinstance(target, dict) or len(values) % 2:
            raise _Refused("is damaged: it sets items of something that is no dictionary")
        # Text hashes by a secret of the process; crafted numbers would all fall into one slot.
        if not all(isinstance(key, str) for key in values[::2]):
            raise _Refused("holds a dictionary whose keys are not text")
        target.update(zip(values[::2], values[1::2], strict=True))
        return target

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Named) or not isinstance(arguments, tuple):
            raise _Refused("is damaged: it calls something that is no function")
        if function.name not in _CALLS:
            raise _Refused(f"calls {function.name} itself; only numpy's own pickles are read")
        self._charge(arguments)
        self._stack.append(_CALLS[function.name](*arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, _Unfinished):
            raise _Refused("fills something that is no array; only numpy arrays are read")
        self._charge(state)
        value = _array(*state) if target.dtype is None else _ordered(target.dtype, state)
        self._stack[-1] = value
        for place in target.places:
            self._memo[place] = value

    def _charge(self, arguments: tuple) -> None:
        """Refuses a pickle that makes many arrays of one content."""
        self._copied += sum(len(a) for a in arguments if isinstance(a, bytes | str | list))
        if self._copied > 4 * self._read + 65_536:
            raise _Refused("makes many arrays of one content")


_CONTAINERS: dict[str, Callable[[ArrayUnpickler], None]] = {
    "EMPTY_LIST": lambda self: self._stack.append([]),
    "EMPTY_DICT": lambda self: self._stack.append({}),
    "EMPTY_TUPLE": lambda self: self._stack.append(()),
    "LIST": lambda self: self._stack.append(self._marked()),
    "TUPLE": lambda self: self._stack.append(tuple(self._marked())),
    "DICT": lambda self: self._stack.append(self._fill({}, self._marked())),
    "TUPLE1": lambda self: self._tuple(1),
    "TUPLE2": lambda self: self._tuple(2),
    "TUPLE3": lambda self: self._tuple(3),
    "APPEND": lambda self: self._extend([self._pop()]),
    "APPENDS": lambda self: self._extend(self._marked()),
    "SETITEM": lambda self: self._update([self._pop(), self._pop()][::-1]),
    "SETITEMS": lambda self: self._update(self._marked()),
    "REDUCE": ArrayUnpickler._reduce,
    "BUILD": ArrayUnpickler._build,
}


def _dtype(spec: Any, *_: Any) -> _Unfinished:
    text = spec.decode("latin1") if isinstance(spec, bytes) else str(spec)
    if not _DTYPE.fullmatch(text):
        raise _Refused(f"holds an array of type {text[:40]!r}; only plain types are read")
    return _Unfinished(np.dtype(text))


def _ordered(dtype: np.dtype, state: Any) -> np.dtype:
    """A plain dtype with the byte order that its pickled state names; nothing else of it counts."""
    order = state[1].decode() if isinstance(state[1], bytes) else state[1]
    if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
        raise _Refused("holds an array of records; only plain types are read")
    return dtype if order == "|" else dtype.newbyteorder(order)


def _array(_version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> np.ndarray:
    """An array from its pickled state."""
    return _shaped(content, dtype, shape, "F" if fortran else "C")


def _shaped(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    sizes = [size for size in shape if type(size) is int and size >= 0]
    if not isinstance(dtype, np.dtype) or len(sizes) != len(shape):
        raise _Refused("is damaged: an array has no type or no shape")
    count = 1
    for size in sizes:
        count *= size
    if dtype.hasobject:
        if not isinstance(content, list) or len(content) != count:
            raise _Refused("is damaged: an array has not as many values as its shape says")
        flat = np.empty(count, object)
        for place, value in enumerate(content):  # numpy would unpack values that are lists
            flat[place] = value
    else:
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(content, bytes) or len(content) != count * dtype.itemsize:
            raise _Refused("is damaged: an array has not as many values as its shape says")
        flat = np.frombuffer(content, dtype).copy()
    return flat.reshape(sizes, order="F" if order == "F" else "C")


def _scalar(dtype: Any, content: Any = b"") -> Any:
    return _shaped(content, dtype, (), "C")[()]


def _reconstruct(*_: Any) -> _Unfinished:
    return _Unfinished(None)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Old pickles write bytes as text that is to be encoded."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"holds bytes encoded as {encoding!r}")
    return text.encode("latin1")


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _shaped,
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",  # how old pickles write empty bytes
    "builtins.bytes": lambda: b"",
}


def _check_size(value: Any) -> None:
    """`_Refused` where a value holds itself, is too deep, or expands to too many values.

    A container that is reached twice is counted twice, since whoever walks the value walks it
    twice; the sums are made once for each.
    """
    sizes: dict[int, int] = {}
    open_: set[int] = set()
    stack: list[tuple[Any, bool]] = [(value, False)]
    while stack:
        node, done = stack.pop()
        inner = _inside(node)
        if inner is None or (id(node) in sizes and not done):
            continue
        if done:
            open_.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes.get(id(child), 1) for child in inner)
            if sizes[id(node)] > LARGEST:
                raise _Refused(f"expands to more than {LARGEST:,} values")
            continue
        if id(node) in open_:
            raise _Refused("holds a value that lies inside itself")
        open_.add(id(node))
        if len(open_) > DEEPEST:
            raise _Refused(f"is nested more than {DEEPEST} deep")
        stack.append((node, True))
        stack.extend((child, False) for child in inner)


def _inside(node: Any) -> Any:
    """What a container holds; None for a plain value."""
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, list | tuple):
        return node
    return node.ravel() if isinstance(node, np.ndarray) and node.dtype.hasobject else None


def load_npy(path: str | Path) -> np.ndarray:
    """The array in an `.npy` file, one of objects (pickled dictionaries) included.

    Raises:
        UserError: there is no such file, or it holds anything but plain values.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(f"{path} is not a file that can be read; name an .npy file") from None
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version)
        shape, _, dtype = (read or np.lib.format.read_array_header_2_0)(stream)
        if not dtype.hasobject:
            return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # numpy raises many kinds on damaged headers
        raise UserError(f"{path} is damaged or no .npy file; copy it again") from None
    array = ArrayUnpickler(stream, str(path)).load()
    if not isinstance(array, np.ndarray) or array.shape != shape or dtype != np.dtype(object):
        raise UserError(f"{path} does not hold the array that its header states; copy it again")
    return array
