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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from lowrank_helpers import PROJECT
from lowrank_helpers.hashing import checksum

PACKAGE = "lowrank_helpers"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
HELD = {MethodType: ("__func__", "__self__"), property: ("fget", "fset", "fdel"), CellType: ("cell_contents",)}

# By dotted name. Read when the code is: the files may change while a kernel runs.
SOURCES = {
    ".".join(file.relative_to(PROJECT).with_suffix("").parts): file.read_text()
    for file in sorted((PROJECT / PACKAGE).rglob("*.py"))
}
RECIPES = (PROJECT / PACKAGE / "series" / "recipes.yaml").read_text()


class UnknownError(Exception):
    """An object has no digest that is the same in each run; the message names it."""


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


def of_science(notebook: Path) -> str:
    """Return a digest (32 hexadecimal digits) of the recipes and of the top modules that a notebook imports.

    Those count too that it imports by way of others; how it is run and shown does not.
    """
    found, more = set[str](), set[str]().union(*(imported(source) for source, _ in code_cells(notebook)))
    while more:
        found |= more
        more = set[str]().union(*(imported(SOURCES[module]) for module in more)) - found
    top = [module for module in sorted(found) if module.count(".") == 1]
    return of_cells([RECIPES, *(SOURCES[module] for module in top)])


def imported(source: str) -> set[str]:
    """Return the modules of this package that code imports, anywhere in it; none of a cell with magics."""
    names: set[str] = set()
    with suppress(SyntaxError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return names & SOURCES.keys()


def of_objects(*values: Any, apart_from: Iterable[Tensor] = ()) -> str:
    """Return a digest (32 hexadecimal digits) of all that decides what objects do.

    Of a function that is its code, what it closes over and the globals that it uses, of a class its functions and
    attributes, of a network its class and attributes, and of other objects what pickle would write. Libraries count by
    name and version. Of this package's globals only functions, classes, modules and constants in capitals count. Of the
    tensors in ``apart_from`` the numbers do not count.

    Raises
    ------
    UnknownError
        One of them holds or uses an object that cannot be pickled, such as a lock or an open file.
    """
    hasher = _Hasher(apart_from)
    hasher.add(values)
    return hasher.sha.hexdigest()[:32]


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
    file = Path(getattr(sys.modules.get(top), "__file__", None) or os.__file__)
    if top in sys.stdlib_module_names and Path(os.__file__).parent in file.parents:
        return top
    if top in ("__main__", PACKAGE) or not {"site-packages", "dist-packages"} & {*file.parts}:
        return ""
    version = getattr(sys.modules[top], "__version__", None)
    return f"{top} {version or metadata.version(metadata.packages_distributions()[top][0])}"


class _Hasher:
    """Hashes objects with all their parts, each object once."""

    def __init__(self, apart_from: Iterable[Tensor]) -> None:
        self.sha = hashlib.sha256()
        self._apart_from = {id(tensor) for tensor in apart_from}
        self._seen: dict[int, tuple[int, Any]] = {}  # with the object: once it is gone, its id may be another's

    def add(self, value: Any, *path: str) -> None:
        if type(value) in PLAIN:
            self._write(type(value).__name__, value)
        elif id(value) in self._seen:
            self._write("again", self._seen[id(value)][0])
        else:
            if not isinstance(value, tuple):  # Python makes one or several of those, as it likes
                self._seen[id(value)] = len(self._seen), value
            try:
                parts = _parts(value, with_numbers=id(value) not in self._apart_from)
            except Exception as error:
                name = ".".join(filter(None, path)) or "it"
                raise UnknownError(f"{name} is a {type(value).__qualname__}, which has no digest") from error
            self._write(type(value).__name__, len(parts))
            name = ""
            for part in parts:
                self.add(part, *path, name)
                name = part if isinstance(part, str) else ""

    def _write(self, *plain: Any) -> None:
        self.sha.update(repr(plain).encode())


def _parts(value: Any, *, with_numbers: bool) -> list[Any]:
    """Return all that decides what an object does; a text names what follows it."""
    kind = type(value)
    if isinstance(value, Tensor):
        hooks = [value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)]
        numbers = checksum({"": value}) if with_numbers else ""
        return [numbers, value.requires_grad, *(list((by_number or {}).values()) for by_number in hooks)]
    if isinstance(value, nn.Module):
        return _of_network(value)
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, type):
        return _of_class(value)
    if isinstance(value, CodeType):
        return _of_code(value)
    if isinstance(value, ModuleType):
        return _of_library(value.__name__)
    if kind in HELD:
        return [getattr(value, name) for name in HELD[kind]]
    if kind is weakref.ref:
        return [value()]
    if kind is dict:
        return [*chain(*value.items())]
    if kind is tuple:
        return [*value]
    if kind in (set, frozenset):
        return sorted(map(of_objects, value))
    if hasattr(value, "__wrapped__"):  # as functools.cache and staticmethod leave it
        return [value.__wrapped__]
    reduced = value.__reduce_ex__(2)  # what pickle would write: an object's name, or how to make it again
    if isinstance(reduced, str):
        return _of_library(getattr(value, "__module__", None) or kind.__module__, reduced)
    return [*reduced[:3], *(tuple(rest or ()) for rest in reduced[3:5])]


def _of_library(module: str, name: str = "") -> list[Any]:
    """Return what a library's object is known by."""
    if not _library(module):
        raise ValueError(f"{module} is no library")
    return [_library(module), module, name]


def _of_network(network: nn.Module) -> list[Any]:
    parts: list[Any] = [type(network)]
    for name, value in vars(network).items():
        if {f"{name}_orig", f"{name}_g"} & network._parameters.keys():
            continue  # a weight that torch.nn.utils computes from these before each pass
        if "_hooks" not in name and name != "training":  # that mode is set by who trains it
            parts += name, value
        elif name.startswith(("_forward", "_backward")):
            parts += name, list(value.values())  # their keys differ from run to run
    return parts


def _of_class(kind: type) -> list[Any]:
    if _library(kind.__module__):
        return _of_library(kind.__module__, kind.__qualname__)
    named = [(name, value) for name, value in vars(kind).items() if callable(value) or not name.startswith("__")]
    return [*kind.__bases__, *chain(*(pair for pair in named if pair[0] != "_abc_impl"))]


def _of_function(function: FunctionType) -> list[Any]:
    code, scope = function.__code__, function.__globals__
    closure = chain(*zip(code.co_freevars, function.__closure__ or (), strict=True))
    home = scope.get("__name__", "")
    if _library(home):
        return [*_of_library(home, function.__qualname__), *closure]
    if home.partition(".")[0] == PACKAGE:  # its other globals are its state
        scope = {name: x for name, x in scope.items() if callable(x) or isinstance(x, ModuleType) or name.isupper()}
    own = code, function.__defaults__, function.__kwdefaults__, vars(function)
    return [*own, *chain(*_used(code, scope)), *closure]


def _of_code(code: CodeType) -> list[Any]:
    """Return a function's signature and what it does step by step, without its docstring, which is in no step."""
    steps = [*dis.get_instructions(code)]
    constants = [step.argval for step in steps if step.opcode in dis.hasconst]
    others = str([(step.opname, step.opcode in dis.hasconst or step.argval) for step in steps])
    signature = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_varnames, code.co_flags
    return [*signature, code.co_exceptiontable, others, *constants]


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
