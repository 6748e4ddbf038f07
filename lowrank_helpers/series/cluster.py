"""Workers of Dask distributed, on this machine or on others: what runs notebooks side by side."""

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Security, Worker, WorkerPlugin, wait
from tqdm import tqdm

CONNECT_TIMEOUT = 4  # seconds without an answer from the scheduler
TICK = 1  # seconds between two looks at what is running

# Dask's scheduler and workers look after themselves many times a second, which suits tasks of milliseconds. Left so,
# five processes that wait for notebooks take a sixth of a core.
UNHURRIED = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.profile.enabled": False,
}
WITH_KERNELS = {"distributed.worker.daemon": False}  # a daemon, to Python's multiprocessing, has no processes


class EndsQuietly(WorkerPlugin):
    """Lets a worker end without a word where a run is interrupted."""

    def setup(self, worker: Worker) -> None:
        """Prepare a worker that has just started."""
        # A terminal sends Ctrl-C to workers too, and who started them ends them. Kernels set this for themselves.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Bars would share a lock with other processes, which a worker that is killed leaves behind.
        tqdm.set_lock(threading.RLock())


class ClosingClient(Client):
    """A client that closes itself if it cannot connect.

    Left open, garbage collection would close it later. That takes a lock of Dask's, for which a thread that is about to
    start another client and so holds it would wait for good.
    """

    def start(self, **options: Any) -> None:
        """Connect to the scheduler; Dask's constructor calls this."""
        try:
            super().start(**options)
        except BaseException:
            with suppress(RuntimeError):  # its thread has not started: there is nothing to close
                self.close()
            raise


class ClusterError(Exception):
    """The scheduler or a worker cannot be used; the message says which, why and what to do."""


@contextmanager
def connected(
    scheduler: str | None = None, *, workers: int | None = None, threads: int | None = None, tls: Sequence[Path] = ()
) -> Iterator[Client]:
    """Connect to a scheduler, or start one with workers on this machine.

    Parameters
    ----------
    scheduler : str, optional
        Address such as ``tcp://node7:8786``.
    workers : int, optional
        Processes to start here, where no scheduler is given; by default one a core.
    threads : int, optional
        In how many threads each kernel here may work, and so how many networks it trains side by side; by default its
        share of the cores.
    tls : sequence of Path
        For a scheduler that wants TLS: the authority's certificate, and this client's certificate and key.

    Raises
    ------
    ClusterError
        No scheduler answers at the address.
    """
    if scheduler:
        with _client(scheduler, tls) as client:
            yield client
        return
    workers = workers or CPU_COUNT
    n_threads = str(threads or max(1, CPU_COUNT // workers))
    with (
        dask.config.set(UNHURRIED | WITH_KERNELS),
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


def _client(scheduler: str, tls: Sequence[Path]) -> Client:
    try:
        security = None
        if tls:
            names = ("tls_ca_file", "tls_client_cert", "tls_client_key")
            security = Security(**dict(zip(names, map(str, tls), strict=True)), require_encryption=True)
        return ClosingClient(scheduler, timeout=CONNECT_TIMEOUT, security=security)
    # Silence, no address, tls:// without certificates, a machine too busy to start the client's thread in ten seconds.
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise ClusterError(f"no scheduler answers at {scheduler}: {error}") from error


def ended_of(futures: Iterable[Future]) -> set[Future]:
    """Return the futures that have ended, once one has, or none after a second: time to look at how all stand."""
    try:
        return wait(list(futures), timeout=TICK, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        return set()
