"""Names to things that anybody may add to: extractors, metrics, data sets, generators.

A registry belongs to one folder of the engine. A file there registers what it holds with the
registry's decorator; other packages do the same in a module that an entry point of the registry's
group names; `load_file` does it for a file of somebody's own.
"""

import hashlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from .errors import UserError

T = TypeVar("T")
_OWN = "etude_plugin_"  # begins the modules' names of files that `load_file` ran


class Registry(Generic[T]):
    """Things of one sort by name.

    Args:
        what: the sort in the singular, as messages say it ("data set").
        package: dotted name of the package whose modules register the built-in ones.
        group: entry-point group in which other packages name a module or object to import.
    """

    def __init__(self, what: str, package: str, group: str) -> None:
        self.what, self.package, self.group = what, package, group
        self._known: dict[str, T] = {}
        self._searched = False

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; the same definition may come again, another one may not."""
        old = self._known.get(name)
        if old is not None and _origin(old) != _origin(thing):
            raise UserError(
                f"the {self.what} {name!r} of {_origin(thing)} has the name of that of "
                f"{_origin(old)}; rename one"
            )
        self._known[name] = thing
        return thing

    def named(self, name: str) -> Callable[[T], T]:
        """The decorator that registers a class or function under `name`."""
        return lambda thing: self.add(name, thing)

    def get(self, name: str) -> T:
        """What is registered under `name`.

        Raises:
            UserError: nothing is; the message lists the names.
        """
        if name not in self._known and name.isidentifier():
            # Most names are their file's: the others need not be loaded for it.
            module = f"{self.package}.{name}"
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
        if name not in self._known:
            self._search()
        if name not in self._known:
            raise UserError(
                f"there is no {self.what} {name!r}; choose one of {', '.join(self.names())}"
            )
        return self._known[name]

    def names(self) -> list[str]:
        """Every name, sorted."""
        self._search()
        return sorted(self._known)

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        package = importlib.import_module(self.package)
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{info.name}")
        for point in entry_points(group=self.group):
            point.load()


def load_file(path: str | Path) -> None:
    """Run a Python file of somebody's own, for what it registers.

    Raises:
        UserError: the file is not there, or is not Python. What it raises itself is passed on.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; name a Python file that registers something")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"{_OWN}{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = f"{error.filename or path}, line {error.lineno}"
        raise UserError(f"{where} is not Python ({error.msg}); mend it there") from None


def _origin(thing: object) -> str:
    """Where a thing was defined, as text that a second import of its file gives again."""
    inner = getattr(thing, "values", None) or getattr(thing, "open", None) or thing
    named = getattr(inner, "__qualname__", type(inner).__name__)
    module = getattr(inner, "__module__", "")
    if module.startswith(_OWN):  # a file of somebody's own may lie elsewhere the next time
        return f"{module.removeprefix(_OWN).rpartition('_')[0]}.py ({named})"
    code = getattr(inner, "__code__", None)
    file = Path(code.co_filename).resolve() if code is not None else module
    return f"{file} ({named})"
