"""While one process times something, others pause, and nobody waits for ever."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from lowrank_helpers import parallel
from lowrank_helpers.parallel import side_by_side
from lowrank_helpers.timing import exclusive_timing, wait_for_timing

WORK = """
import sys
from lowrank_helpers.timing import wait_for_timing

print(flush=True)
sys.stdin.read(1)
wait_for_timing()
"""
TIMING = """
import time
from lowrank_helpers.timing import exclusive_timing

with exclusive_timing():
    print(flush=True)
    time.sleep(100)
"""


@pytest.fixture
def start():
    """Start Python code in a process of its own that has printed a line."""
    processes = []

    def start(code):
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_other_processes_pause_until_the_timing_ends(start):
    other = start(WORK)
    with exclusive_timing():
        other.stdin.write(b".")
        other.stdin.flush()
        time.sleep(0.3)
        assert other.poll() is None
    assert other.wait(timeout=30) == 0


def test_what_is_timed_may_have_workers_and_waits_neither_for_itself_nor_for_them(monkeypatch):
    monkeypatch.setattr(parallel, "_n_side_by_side", 2)
    with exclusive_timing(), exclusive_timing():
        wait_for_timing()
        assert side_by_side([lambda stop: wait_for_timing()] * 2, torch.device("cpu")) == [None, None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
def test_a_process_forked_meanwhile_does_not_keep_the_lock():
    with exclusive_timing():
        forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        forked.start()
    try:
        begin = time.perf_counter()
        wait_for_timing()
        assert time.perf_counter() - begin < 10
    finally:
        forked.kill()
        forked.join()


def test_a_killed_process_gives_the_lock_back(start):
    timing = start(TIMING)
    timing.kill()
    timing.wait()
    wait_for_timing()
    with exclusive_timing():
        pass
