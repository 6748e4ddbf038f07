"""Kernels that are forked: separate processes that have imported already and that outlive nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from lowrank_helpers.series import kernels

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")]


@contextmanager
def kernel(**options) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    with kernels.forked():
        manager, client = start_new_kernel(**options)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client: BlockingKernelClient, source: str) -> str:
    messages: list = []
    client.execute_interactive(source, timeout=60, output_hook=messages.append)
    return "".join(message["content"].get("text", "") for message in messages).strip()


def test_kernel_has_imported_and_shares_nothing_else(tmp_path):
    with kernel(cwd=tmp_path, env=os.environ | {"GREETING": "hello"}) as (_, first), kernel() as (_, second):
        assert printed(first, "import sys; print('torch' in sys.modules)") == "True"
        assert printed(first, "import os; print(os.environ['GREETING'], os.getcwd())") == f"hello {tmp_path}"
        printed(first, "import torch; torch.set_num_threads(7); sys.left_behind = True")
        left = "import sys, torch; print(hasattr(sys, 'left_behind'), torch.get_num_threads() == 7)"
        assert printed(second, left) == "False False"
        trains = "from lowrank_helpers.models import mlp; before = {*sys.modules}; "
        trains += "torch.optim.Adam(mlp([4, 2], seed=0).parameters()); print({*sys.modules} - before)"
        assert printed(second, trains) == "set()", "what trains imports nothing more"


def test_kernel_is_as_any_kernel():
    with kernel() as (_, client):
        loads = "from torch.utils.data import DataLoader; print(len(list(DataLoader(range(3), num_workers=1))))"
        assert printed(client, loads) == "3"
        asks = "import multiprocessing; print(multiprocessing.get_start_method())"
        assert printed(client, asks) == subprocess.check_output([sys.executable, "-c", asks], text=True).strip()
        assert printed(client, "import pandas; print(pandas.get_option('display.max_columns'))") == "20"
        assert printed(client, "import matplotlib; print(matplotlib.get_backend())").endswith("inline")


def test_a_kernel_is_interrupted_and_its_death_is_seen():
    with kernel() as (manager, client):
        # Or else the kernel would for a moment refuse what comes after the error.
        message = client.execute("import time\nprint('started')\ntime.sleep(60)", stop_on_error=False)
        while client.get_iopub_msg(timeout=30)["header"]["msg_type"] != "stream":  # before, the kernel is not at it yet
            pass
        manager.interrupt_kernel()
        while client.get_shell_msg(timeout=30)["parent_header"]["msg_id"] != message:  # late replies from its start
            pass
        assert printed(client, "print('alive')") == "alive"
        os.kill(manager.provisioner.pid, signal.SIGKILL)
        assert manager.provisioner.process.wait() == -signal.SIGKILL
        assert not manager.is_alive()


OPENER = """
import os, signal, sys
import psutil
from jupyter_client.manager import start_new_kernel
from lowrank_helpers.series import kernels

kernels.IMPORTED = kernels.IMPORTED[:2]  # what is imported takes seconds and is not asked here
with kernels.forked():
    for _ in range(2):
        manager, client = start_new_kernel()
        kernel = psutil.Process(manager.provisioner.pid)
        print(kernel.pid, kernel.parent().pid, flush=True)
        sys.stdin.readline()
        kernel.parent().kill()
        kernel.wait(20)
"""


def test_kernels_end_with_their_server_the_next_kernel_has_a_new_one_and_both_end_with_their_process():
    process = subprocess.Popen([sys.executable, "-c", OPENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.stdin.write("\n")
    process.stdin.flush()
    second = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert psutil.wait_procs(first, timeout=0)[1] == []
    process.kill()
    assert psutil.wait_procs(second, timeout=30)[1] == []
    process.communicate(timeout=60)
