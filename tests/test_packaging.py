"""What the project declares: one list of dependencies, each used, pinned once, and the same for conda users."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lowrank_helpers.data import PROJECT
from lowrank_helpers.series import execution

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
RUN = [Requirement(line) for line in PYPROJECT["dependencies"]]
TEST = [Requirement(line) for line in PYPROJECT["optional-dependencies"]["test"]]
PINNED = {
    canonicalize_name(requirement.name): requirement
    for line in (PROJECT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
# Used without being imported: the kernel, the lab and its widgets' front end, what pandas writes Parquet with and what
# PyTorch translates to ONNX with, the tests' time limit, the linters and what types they need.
TOOLS = {
    "ipykernel",
    "jupyterlab",
    "pyarrow",
    "mypy",
    "onnxscript",
    "pdoc",
    "pytest-timeout",
    "ruff",
    "pandas-stubs",
    "types-pyyaml",
    "types-tqdm",
}


def _version(pinned):
    (specifier,) = pinned.specifier
    assert specifier.operator == "=="
    return specifier.version


def _imported(*sources):
    """Return the distributions behind the imports in the given Python sources, standard library and own left out."""
    modules = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    known = packages_distributions()
    return {canonicalize_name(known[module][0]) for module in modules - sys.stdlib_module_names if module in known} - {
        "lowrank-helpers"
    }


def _notebook_code():
    for name in execution.notebook_names():
        cells = nbformat.read(execution.notebook_path(name), as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        yield "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))


def test_every_direct_dependency_is_pinned_to_a_version_that_it_allows():
    for requirement in [*RUN, *TEST]:
        assert _version(PINNED[canonicalize_name(requirement.name)]) in requirement.specifier, requirement


def test_conda_users_get_the_same_versions():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python.removeprefix("python=") in Requirement(f"python{PYPROJECT['requires-python']}").specifier
    assert {"-c constraints.txt", "-e ."} <= set(pip["pip"])
    listed = {canonicalize_name(Requirement(line).name): line for line in pip["pip"] if not line.startswith("-")}
    assert listed.keys() == {canonicalize_name(requirement.name) for requirement in [*RUN, *TEST]}
    for name, line in listed.items():
        assert _version(Requirement(line)) == _version(PINNED[name])


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    package = [path.read_text() for path in sorted((PROJECT / "lowrank_helpers").rglob("*.py"))]
    tests = [path.read_text() for path in sorted((PROJECT / "tests").rglob("*.py"))]
    run = {canonicalize_name(requirement.name) for requirement in RUN}
    test = {canonicalize_name(requirement.name) for requirement in TEST}
    checks = {"pytest", "nbval"}  # `lowrank check` says what to install where they are missing
    assert _imported(*package, *_notebook_code()) - checks <= run
    assert _imported(*tests) <= run | test
    assert run | test == _imported(*package, *tests, *_notebook_code()) & (run | test) | TOOLS


def test_this_environment_is_the_pinned_one():
    if os.environ.get("CI") != "true":
        pytest.skip("only a fresh environment must be the pinned one")
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    installed = {Requirement(line) for line in re.findall(r"^[\w.-]+==\S+$", frozen, re.MULTILINE)}
    assert {str(PINNED.get(canonicalize_name(requirement.name))) for requirement in installed} == set(
        map(str, installed)
    )
