"""Importing any module of the package changes nothing in the process that imports it, and asks for no GPU."""

import json
import os
import subprocess
import sys

from lowrank_helpers import PROJECT

# First all that the package imports from elsewhere, so that what other libraries change is not laid at its door.
PROBE = """
import ast, importlib, json, locale, os, random, signal, socket, sys, threading, warnings
from pathlib import Path

import matplotlib, numpy, pandas, torch

torch._C._cuda_getDeviceCount = None  # who asks for a GPU fails: a kernel forked after that could use none
package = Path(sys.argv[1])
files = sorted(file for file in package.rglob("*.py") if file.name != "__main__.py")
for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "lowrank_helpers" not in ast.unparse(node):
            exec(ast.unparse(node), {})


def state():
    return {
        "environment": dict(os.environ),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "denormal numbers": (torch.tensor([1e-39]) * 1).item(),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()),
        "random numbers": (torch.initial_seed(), random.getstate(), numpy.random.get_state()[1].tolist()),
        "figures": dict(dict.items(matplotlib.rcParams)),
        "tables": (pandas.get_option("display.max_columns"), pandas.get_option("display.width")),
        "warnings": list(warnings.filters),
        "blocked modules": [name for name, module in sys.modules.items() if module is None],
        "search path": list(sys.path),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "time to wait for sockets": socket.getdefaulttimeout(),
        "running threads": threading.active_count(),
    }


changed = {}
before = state()
for file in files:
    module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(module)
    after = state()
    changed[module] = [name for name in before if repr(before[name]) != repr(after[name])]
    before = after
for name in importlib.import_module("lowrank_helpers.series.kernels").IMPORTED:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
print(json.dumps(changed))
"""


def test_import_of_no_module_changes_the_process(tmp_path):
    # Other numbers than PyTorch's defaults or the package's, so that either shows.
    environment = os.environ | {"OMP_NUM_THREADS": "3", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(PROJECT / "lowrank_helpers")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    changed = json.loads(done.stdout)
    assert {"lowrank_helpers.training", "lowrank_helpers.plots", "lowrank_helpers.series.run"} <= changed.keys()
    assert {module: what for module, what in changed.items() if what} == {}
