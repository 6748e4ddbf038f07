"""Workers of Dask distributed, on this machine or on others: what runs the points of a sweep."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Worker, WorkerPlugin
from tqdm import tqdm

from lowrank_helpers.series.execution import RunError

# Dask's scheduler and workers look after themselves many times a second, which suits tasks of milliseconds. Left so,
# five processes that wait for notebooks take a sixth of a core.
SETTINGS = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.daemon": False,  # a daemon, to Python's multiprocessing, has no processes
}


class EndsQuietly(WorkerPlugin):
    """Lets a worker end without a traceback when a sweep is interrupted."""

    def setup(self, worker: Worker) -> None:
        """Prepare a worker that has just started."""
        # A terminal sends Ctrl-C to workers too, and who started them ends them. Kernels set this for themselves.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Bars would share a lock with other processes, which a worker that is killed leaves behind.
        tqdm.set_lock(threading.RLock())


class ClosingClient(Client):
    """A client that closes itself if it cannot connect.

    Garbage collection would close it later, perhaps in a thread that starts another client and holds a lock of Dask's:
    then both wait for good.
    """

    def start(self, **options: Any) -> None:
        """Connect to the scheduler; Dask's constructor calls this."""
        try:
            super().start(**options)
        except BaseException:
            with suppress(RuntimeError):  # its thread has not started: there is nothing to close
                self.close()
            raise


@contextmanager
def connected(scheduler: str | None = None, workers: int | None = None) -> Iterator[Client]:
    """Connect to a scheduler, or start one with workers on this machine.

    Parameters
    ----------
    scheduler : str, optional
        Address such as ``tcp://node7:8786``. For ``tls://`` Dask's configuration names the certificates.
    workers : int, optional
        Processes to start here, where no scheduler is given; by default one a core. Their kernels share the cores.

    Raises
    ------
    RunError
        No scheduler answers at the address.
    """
    if scheduler:
        try:
            client = ClosingClient(scheduler, timeout=4)  # seconds without an answer
        # Silence, no address, tls:// without certificates, a machine too busy to start the client's thread in time.
        except (OSError, ValueError, TypeError, AssertionError) as error:
            raise RunError(f"no scheduler answers at {scheduler}: {error}") from error
        with client:
            yield client
        return
    workers = workers or CPU_COUNT
    n_threads = str(max(1, CPU_COUNT // workers))
    with (
        dask.config.set(SETTINGS),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            env={"OMP_NUM_THREADS": n_threads, "MKL_NUM_THREADS": n_threads},  # Dask sets both to 1
            memory_limit=0,  # it would be the worker's own; what takes memory is the kernel
            dashboard_address=":0",  # any port: several runs may be at work
            silence_logs="CRITICAL",  # failures are reported at the end
        ) as cluster,
        ClosingClient(cluster) as client,
    ):
        client.register_plugin(EndsQuietly())
        yield client
