"""Workers on a Dask cluster (extra `cluster`): a scheduler somewhere, or one of this machine.

Workers may be on other machines, so no file is read or written there: each gets a trace once, over the network, and
gives results back as values. Dask runs again what a lost worker had under way; a trace that went with the last worker
that had it is sent again. Workers may come and go. A worker has to have the same version of ssmcache, or its results
could be others; that is checked at first, and again in each call.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ssmcache import __version__
from ssmcache_sim.errors import WorkersError
from ssmcache_sim.executors import Workers, deaf_to_interrupts

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
_SILENT = logging.CRITICAL + 1  # at a Ctrl-C Dask logs even its own goodbye as critical
_SCHEDULER_SECONDS = 10  # for a scheduler to answer
_WORKER_SECONDS = 30  # for a first worker, or for the next one after all were lost


@contextmanager
def cluster_workers(address: str, num_processes: int) -> Iterator[Workers]:
    """Workers of a Dask scheduler, as long as the block lasts.

    Args:
        address: of the scheduler (tcp://host:port), or `local`: a cluster of this machine, gone at the end.
        num_processes: of a local cluster.

    Errors: WorkersError without the extra, for a scheduler that does not answer or has no workers within a bounded
    time, for workers of another version, and inside the block for a scheduler that is lost and a call that too many
    workers died of.
    """
    try:
        from distributed import KilledWorker
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise WorkersError("cluster: expected Dask (pip install 'ssmcache[cluster]'), got none") from error
    # what is worth knowing comes as an error of one line
    with silence_logging_cmgr(_SILENT), _client(address, num_processes) as client:
        workers = _ClusterWorkers(client, address)
        workers.check()
        try:
            yield workers
        except KilledWorker as error:
            raise WorkersError(
                f"cluster: expected every call to end, got {error.allowed_failures + 1} workers that died with one "
                "under way (too little memory?)"
            ) from error
        except ModuleNotFoundError as error:
            raise WorkersError(f"cluster: expected ssmcache {__version__} on every worker, got: {error}") from error


@contextmanager
def _client(address: str, num_processes: int) -> "Iterator[Client]":
    from distributed import Client, LocalCluster
    from distributed.comm import parse_address
    from distributed.comm.registry import get_backend

    if address == LOCAL:
        with deaf_to_interrupts():  # its thread, and so the processes that it starts now and later
            cluster = LocalCluster(
                n_workers=num_processes,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # whatever is free: two sweeps may run at a time
                memory_limit=None,  # as without a cluster: the system's business
                silence_logs=_SILENT,
            )
        with cluster, Client(cluster) as client:
            yield client
        return
    try:
        get_backend(parse_address(address)[0])  # of a scheme that it does not know a client waits without end
        client = Client(address, timeout=_SCHEDULER_SECONDS)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WorkersError(f"cluster: expected a Dask scheduler at {address!r}, got: {reason}") from error
    with client:
        yield client


class _ClusterWorkers(Workers):
    """Dask's own executor, with values scattered to all workers."""

    def __init__(self, client: "Client", address: str) -> None:
        self._client = client
        self._address = address
        self._executor = client.get_executor(pure=False)
        self._scattered: list[tuple[Any, Any]] = []  # value, Dask's future of it

    def check(self) -> None:
        """Errors: WorkersError without workers, or with some of another version."""
        self._wait_for_a_worker()
        found = self._client.get_versions(packages=["ssmcache"])["workers"]
        for address, versions in sorted(found.items()):
            version = (versions or {}).get("packages", {}).get("ssmcache")
            if version != __version__:
                raise WorkersError(_mismatch(__version__, version, address))

    def share(self, value: Any) -> Any:
        for index, (known, future) in enumerate(self._scattered):
            if known is value:
                if future.status == "finished":
                    return future
                del self._scattered[index]
                break
        self._wait_for_a_worker()
        try:
            [future] = self._client.scatter([value], broadcast=True, hash=False)
        except (OSError, TimeoutError) as error:
            raise WorkersError(f"cluster: cannot send the trace to the workers: {error}") from error
        self._scattered.append((value, future))
        return future

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(_checked, __version__, fn, *args, **kwargs)
        return future

    def cancel(self, futures: Iterable[Future[Any]]) -> list[Future[Any]]:
        self._executor.shutdown(wait=False)  # all at once: one by one each is a message there and back
        self._executor = self._client.get_executor(pure=False)
        return super().cancel(futures)

    def require(self) -> None:
        # a call that was sent while the connection broke is never answered
        if self._client.status != "running":
            raise WorkersError(f"cluster: lost the scheduler at {self._address}")

    def _wait_for_a_worker(self) -> None:
        self.require()
        try:
            self._client.wait_for_workers(1, timeout=_WORKER_SECONDS)
        except TimeoutError as error:
            raise WorkersError(
                f"cluster: expected a worker of the scheduler at {self._address}, got none in {_WORKER_SECONDS} s"
            ) from error


def _checked(version: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """On a worker, which may have come after the check."""
    if version != __version__:
        raise WorkersError(_mismatch(version, __version__, "one that came later"))
    return function(*args, **kwargs)


def _mismatch(expected: str, found: str | None, where: str) -> str:
    return f"cluster: expected ssmcache {expected} on every worker, got {found or 'none'} on {where}"
