"""What the project declares: dependencies of the science, the series and the tests, each used and pinned once."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lowrank_helpers import PROJECT
from lowrank_helpers.series import digest, execution
from lowrank_helpers.series.parameters import parse

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
SCIENCE, SERIES, TEST = (
    {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    for lines in (PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"].values())
)
PINNED = {
    canonicalize_name(requirement.name): requirement
    for line in (PROJECT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
# Used without being imported here: the lab, its bars of progress and papermill's client.
TOOLS = {"ipywidgets", "jupyterlab", "nbclient"}


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
    found = {canonicalize_name(known[module][0]) for module in modules - sys.stdlib_module_names if module in known}
    return found - {"lowrank-helpers"}


def _notebook_code():
    for name in execution.notebook_names():
        for source, _ in digest.code_cells(execution.notebook_path(name)):
            yield "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def test_every_direct_dependency_is_pinned_to_a_version_that_it_allows():
    for name, requirement in (SCIENCE | SERIES | TEST).items():
        (pinned,) = PINNED[name].specifier
        assert pinned.operator == "==" and pinned.version in requirement.specifier, requirement


def test_conda_users_get_the_same_packages():
    python, _, pip = parse((PROJECT / "environment.yml").read_bytes(), "environment.yml")["dependencies"]
    assert python.removeprefix("python=") in Requirement(f"python{PYPROJECT['requires-python']}").specifier
    assert pip["pip"] == ["-c constraints.txt", "-e .[series,test]"]


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    package = [path.read_text() for path in sorted((PROJECT / "lowrank_helpers").rglob("*.py"))]
    tests = [path.read_text() for path in sorted((PROJECT / "tests").rglob("*.py"))]
    assert _imported(*package, *_notebook_code()) == (SCIENCE | SERIES).keys() - TOOLS
    assert _imported(*tests) <= (SCIENCE | SERIES | TEST).keys()


def _without_the_series(code):
    """Run Python where the packages of ``[series]`` and ``[test]`` look as if they were not installed."""
    declared = SERIES.keys() | TEST.keys()
    hidden = [
        module for module, names in packages_distributions().items() if {*map(canonicalize_name, names)} & declared
    ]
    hide = f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", hide + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_science_needs_nothing_of_the_series():
    files = sorted((PROJECT / "lowrank_helpers").glob("*.py"))
    science = [file.stem for file in files if file.stem not in ("__init__", "__main__", "cli", "plots")]
    done = _without_the_series("\n".join(f"import lowrank_helpers.{module}" for module in science))
    assert done.returncode == 0, done.stderr


def test_the_command_without_the_series_says_what_to_install():
    done = _without_the_series("runpy.run_module('lowrank_helpers', run_name='__main__')")
    assert done.returncode == 1
    said = r"lowrank needs \w+, which is not installed: run `pip install -e '\.\[series\]'` .*\n"
    assert re.fullmatch(said, done.stderr)


def test_this_environment_is_the_pinned_one():
    if os.environ.get("CI") != "true":
        pytest.skip("only a fresh environment must be the pinned one")
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", frozen, re.MULTILINE):
        assert version in PINNED[canonicalize_name(name)].specifier, name  # PyTorch's may be 2.15.0+cpu
