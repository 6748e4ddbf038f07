"""Draws which module of the package imports which, from the imports themselves, into ``docs/architecture.md``.

``python scripts/draw_architecture.py`` writes the picture anew. An arrow that follows from others is left out, and
arrows between rooms stand for those between their modules.
"""

import ast
import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "lowrank_helpers"
PAGE = PROJECT / "docs" / "architecture.md"
PICTURE = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)

Graph = dict[str, set[str]]


def imports() -> Graph:
    """Return for every module, such as ``rank`` or ``series.run``, which others of the package it imports."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    modules = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(files)}
    return {module: _imported(file) & modules.keys() for module, file in modules.items()}


def _imported(file: Path) -> set[str]:
    """Return all that a file imports, anywhere in it, below the package: modules, and the names in them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix(f"{PACKAGE.name}.") for name in names if name.startswith(f"{PACKAGE.name}.")}


def room(module: str) -> str:
    """Return the room of a module: ``series`` of ``series.run``; at the top, all but the command is science."""
    above, _, name = module.rpartition(".")
    return above or ("cli" if name in ("cli", "__main__") else "science")


def picture() -> str:
    """Return the picture in Mermaid's language."""
    graph = imports()
    rooms: dict[str, list[str]] = {}
    for module in graph:
        rooms.setdefault(room(module), []).append(module)
    between: Graph = {name: set() for name in rooms}
    lines = ["flowchart TD"]
    for name, modules in rooms.items():
        inside: Graph = {module: {other for other in graph[module] if room(other) == name} for module in modules}
        lines.append(f"  subgraph {name}")
        lines += [f'    {_id(module)}["{module.rpartition(".")[2]}"]' for module in modules]
        lines += [f"    {_id(module)} --> {_id(other)}" for module, other in _direct(inside)]
        lines.append("  end")
        between[name] |= {room(other) for module in modules for other in graph[module]} - {name}
    lines += [f"  {name} --> {other}" for name, other in _direct(between)]
    return "\n".join(["```mermaid", *lines, "```", ""])


def _id(module: str) -> str:
    return "module_" + module.replace(".", "_")


def _direct(graph: Graph) -> list[tuple[str, str]]:
    """List the arrows of a graph without cycles, but for those that a longer way replaces."""

    def reached(node: str) -> set[str]:
        return graph[node].union(*map(reached, graph[node]))

    return [
        (node, other)
        for node in sorted(graph)
        for other in sorted(graph[node] - set().union(*map(reached, graph[node])))
    ]


if __name__ == "__main__":
    PAGE.write_text(PICTURE.sub(lambda _: picture(), PAGE.read_text()))
