"""Which code made this: digests blind to comments, docstrings and layout.

Notebooks and the package are read as texts. What decides a training is taken apart alive: functions count by their
bytecode, which is what runs, whatever has become of their source since.
"""

import ast
import dis
import hashlib
import json
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from lowrank_helpers import PROJECT
from lowrank_helpers.hashing import checksum

PACKAGE = "lowrank_helpers"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
WRAPPERS = {MethodType: ("__func__", "__self__"), property: ("fget", "fset", "fdel"), CellType: ("cell_contents",)}
WRAPPERS |= dict.fromkeys((staticmethod, classmethod), ("__func__",))

# Read when the code is: the files may change while a kernel runs.
SOURCES = {file: file.read_text() for file in sorted((PROJECT / PACKAGE).rglob("*.py"))}
RECIPES = (PROJECT / PACKAGE / "series" / "recipes.yaml").read_text()


class UnknownError(Exception):
    """Something has no digest that is the same in each run; the message names it."""


def of_json(value: Any) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of what JSON knows, blind to the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_cells(sources: Sequence[str]) -> str:
    """Return a digest (32 hexadecimal digits) of code cells; one with magics, which is not Python, counts as text."""
    return hashlib.sha256("\0".join(map(_meaning, sources)).encode()).hexdigest()[:32]


def of_notebook(notebook: Path) -> str:
    """Return a digest (32 hexadecimal digits) of a notebook's code cells."""
    return of_cells([source for source, _ in code_cells(notebook)])


def code_cells(notebook: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the source and the metadata of each code cell, without nbformat, whose import would delay a kernel."""
    cells = json.loads(notebook.read_text())["cells"]
    return [("".join(cell["source"]), cell["metadata"]) for cell in cells if cell["cell_type"] == "code"]


@cache
def of_package() -> str:
    """Return a digest (32 hexadecimal digits) of all of the package's code, as this process imported it."""
    return of_cells([RECIPES, *SOURCES.values()])


@cache
def of_science() -> str:
    """Return a digest (32 hexadecimal digits) of what computes: the modules at the top of the package, and recipes."""
    return of_cells([RECIPES, *(text for file, text in SOURCES.items() if file.parent.name == PACKAGE)])


def of_objects(*values: Any, apart_from: Iterable[Tensor] = ()) -> str:
    """Return a digest (32 hexadecimal digits) of all that decides what objects do.

    Of a function that is its code, what it closes over and the globals that it uses, of a class its functions and
    attributes, of a network its class and attributes, and of other objects what pickle would write. Libraries count by
    name and version. Of this package's globals only functions, classes and constants count, which are in capitals.

    Parameters
    ----------
    *values
        Functions, classes, networks, tensors, containers, numbers, and whatever can be pickled.
    apart_from : iterable of Tensor
        Tensors whose numbers do not count.

    Raises
    ------
    UnknownError
        There is something in them that cannot be known, such as a lock or an open file.
    """
    parts = _Parts(apart_from)
    parts.add(*values)
    return parts.sha.hexdigest()[:32]


def _meaning(source: str) -> str:
    """Return what code does, without what it says: better words change nothing."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


@cache
def _library(module: str) -> str:
    """Return the name and version of the library that a module belongs to; empty for code that is edited here."""
    top = module.partition(".")[0]
    parents = Path(getattr(sys.modules.get(top), "__file__", None) or os.__file__).parents
    if top in sys.stdlib_module_names and Path(os.__file__).parent in parents:
        return top
    if top in ("__main__", PACKAGE) or not {"site-packages", "dist-packages"} & {folder.name for folder in parents}:
        return ""
    version = getattr(sys.modules[top], "__version__", None)
    return f"{top} {version or metadata.version(metadata.packages_distributions()[top][0])}"


@cache
def _code(code: CodeType) -> str:
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    arguments = (
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_varnames,
        code.co_flags & 12,
    )
    return of_objects(arguments, code.co_exceptiontable, steps)


def _used(code: CodeType, scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the globals that code uses, by name; of a module what is used of it: ``torch.nn.functional.relu``."""
    name, found = "", None
    for step in dis.get_instructions(code):
        if isinstance(found, ModuleType) and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            name, inside = f"{name}.{step.argval}", getattr(found, step.argval, None)
            # A cell may replace a library's function; its other objects have a state, as `os.environ` has.
            if not _library(found.__name__) or isinstance(inside, (FunctionType, type, ModuleType)):
                found = inside
            continue
        if found is not None:
            yield name, found
        name, found = step.argval, None
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found = scope.get(name)
        elif step.opname == "IMPORT_NAME":
            found = sys.modules.get(name)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _used(inner, scope)


class _Parts:
    """Takes objects apart and hashes the parts, each but once."""

    def __init__(self, apart_from: Iterable[Tensor]) -> None:
        self.sha = hashlib.sha256()
        self._apart_from = {id(tensor) for tensor in apart_from}
        self._seen: dict[int, tuple[int, Any]] = {}  # with the object: once it is gone, its id may be another's
        self._path: list[str] = []

    def add(self, *values: Any) -> None:
        self._write(len(values))
        for value in values:
            if type(value) in PLAIN:
                self._write(value)
            elif id(value) in self._seen:
                self._write(self._seen[id(value)][0])
            else:
                if not isinstance(value, tuple):  # Python makes one or several of those, as it likes
                    self._seen[id(value)] = len(self._seen), value
                self._take_apart(value)

    def add_named(self, values: Iterable[tuple[str, Any]]) -> None:
        for name, value in values:
            self._path.append(name)
            self.add(name, value)
            self._path.pop()

    def _write(self, plain: Any) -> None:
        self.sha.update(f"{type(plain).__name__} {plain!r}\0".encode())

    def _take_apart(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, CodeType):
            self.add(_code(value))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._network(value)
        elif isinstance(value, ModuleType) and _library(value.__name__):
            self.add(_library(value.__name__), value.__name__)
        elif kind in WRAPPERS:
            self.add(kind.__name__, *(getattr(value, part, None) for part in WRAPPERS[kind]))
        elif kind is weakref.ref:
            self.add(value())
        elif kind in (dict, OrderedDict):
            self.add(*value.items())
        elif kind in (list, tuple):
            self.add(*value)
        elif kind in (set, frozenset):
            self.add(*sorted(map(of_objects, value)))
        else:
            self._pickled(value)

    def _function(self, function: FunctionType) -> None:
        home = function.__globals__.get("__name__", "")
        if library := _library(home):
            self.add(library, home, function.__qualname__)
        else:
            self.add(function.__code__, function.__defaults__, function.__kwdefaults__, vars(function))
            in_package = home.partition(".")[0] == PACKAGE
            for name, used in _used(function.__code__, function.__globals__):
                if not in_package or callable(used) or isinstance(used, ModuleType) or name.split(".")[-1].isupper():
                    self.add_named([(name, used)])
        self.add_named(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def _class(self, kind: type) -> None:
        if library := _library(kind.__module__):
            self.add(library, kind.__module__, kind.__qualname__)
        else:
            self.add(*kind.__bases__)
            self.add_named(
                (name, value)
                for name, value in vars(kind).items()
                if name != "_abc_impl" and (callable(value) or not name.startswith("__"))
            )

    def _tensor(self, tensor: Tensor) -> None:
        hooks = [tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
        try:
            numbers = "" if id(tensor) in self._apart_from else checksum({"": tensor})
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._unknown(tensor) from error
        self.add(numbers, tensor.requires_grad, *(list((by_number or {}).values()) for by_number in hooks))

    def _network(self, network: nn.Module) -> None:
        self.add(type(network))
        for name, value in vars(network).items():
            if {f"{name}_orig", f"{name}_g"} & network._parameters.keys():
                continue  # a weight that torch.nn.utils computes from these before each pass
            if "_hooks" not in name and name != "training":  # that mode is set by who trains it
                self.add_named([(name, value)])
            elif name.startswith(("_forward", "_backward")):
                self.add_named([(name, list(value.values()))])  # their keys differ from run to run

    def _pickled(self, value: Any) -> None:
        """Add what pickle would write of a value: where that is a name, the library's that it is in."""
        try:
            reduced = value.__wrapped__ if hasattr(value, "__wrapped__") else value.__reduce_ex__(2)
        except Exception as error:
            raise self._unknown(value) from error
        if isinstance(reduced, str):
            home = getattr(value, "__module__", None) or type(value).__module__
            if not _library(home):
                raise self._unknown(value)
            self.add(_library(home), home, reduced)
        elif isinstance(reduced, tuple):
            self.add(*reduced[:3], *(list(rest) if rest else None for rest in reduced[3:5]))
        else:
            self.add(type(value), reduced)

    def _unknown(self, value: Any) -> UnknownError:
        return UnknownError(f"{'.'.join(self._path) or 'it'} is a {type(value).__qualname__}, which has no digest")
