"""Where long work runs: here, in local processes, or on any `concurrent.futures.Executor`.

A piece of work is a `Call`: a function of a module, a big value that many calls share (a trace), and small arguments.
`Workers` are executors that send such a value to each worker once. Results come back as values and the caller writes
them, so workers need no file of ours: neither the trace nor the output directory.
"""

import multiprocessing
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from typing import Any

from ssmcache_sim.errors import WorkersError

# workers that one call may lose: the first one with others beside it, which may be at fault, and then alone
MAX_LOST = 3
ALIVE_SECONDS = 2.0
"""How often it is asked whether the workers are still there, while nothing ends."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """`function(shared, *arguments)`; `what` names it in errors.

    Function, arguments and result can be pickled; the same arguments give the same result, wherever it runs.
    """

    what: str
    function: Callable[..., Any]
    shared: Any
    arguments: tuple[Any, ...]


class Workers(Executor):
    """An executor that can hold values for its workers.

    Attributes:
        max_pending: how many calls it is given at once; None: all, it has a queue of its own.
    """

    max_pending: int | None = None

    def share(self, value: Any) -> Any:
        """What stands for the value among the arguments of `submit`; the function is called with the value itself.

        The same object twice is sent once, and again where it was lost.
        """
        return value

    def require(self) -> None:
        """Errors: WorkersError if they are lost, and what is under way may never end."""

    def cancel(self, futures: Iterable[Future[Any]]) -> list[Future[Any]]:
        """Cancels what has not begun; gives the others."""
        return [future for future in futures if not future.cancel()]


class _Here(Workers):
    """Calls in this process, one after the other."""

    max_pending = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _OnExecutor(Workers):
    """Any other executor: the value goes with each call. For threads that is a reference, for processes a copy."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._executor.submit(fn, *args, **kwargs)


class LocalProcesses(Workers):
    """Processes of this machine, started at the first call and again when one of them dies.

    They never see a Ctrl-C: the call under way ends, its caller decides what becomes of it.
    """

    def __init__(self, num_processes: int) -> None:
        self.max_pending = num_processes
        self._num_processes = num_processes
        self._values: list[Any] = []
        self._pool: ProcessPoolExecutor | None = None

    def share(self, value: Any) -> Any:
        for index, known in enumerate(self._values):
            if known is value:
                return _Held(index)
        self.shutdown()  # running processes do not have it
        self._values.append(value)
        return _Held(len(self._values) - 1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with deaf_to_interrupts():
            try:
                return self._started().submit(_call_with_held, fn, args, kwargs)
            except BrokenProcessPool:
                self.shutdown()
                return self._started().submit(_call_with_held, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)
            self._pool = None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # the same everywhere, and safe beside threads
            self._pool = ProcessPoolExecutor(self._num_processes, context, _start_process, (tuple(self._values),))
        return self._pool


@dataclass(frozen=True, slots=True)
class _Held:
    """Stands for a value that every process has."""

    index: int


_held: tuple[Any, ...] = ()  # in a process of `LocalProcesses`


def _start_process(values: tuple[Any, ...]) -> None:
    global _held
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _held = values


def _call_with_held(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*(_held[each.index] if isinstance(each, _Held) else each for each in args), **kwargs)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside never see a Ctrl-C, not even while they start; here it comes at the end of the block."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # where it starts, it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_calls(workers: int | Executor, calls: Sequence[Call], finish: Callable[[int, Any], None]) -> None:
    """Runs all calls, in any order; those that a dying worker took along run again, on another.

    Args:
        workers: a number of processes of this machine, or an executor, which stays open. One process, or one call
            without an executor, runs here.
        finish: called in this thread with (index of the call, its result), as they come.

    A KeyboardInterrupt cancels what has not begun, waits for the rest (not on a cluster, which is told to drop it), and
    gives those results to `finish`, too.
    Calls that were lost run again when all others are done, one at a time: so a call that kills whoever runs it takes
    no other along twice, and is the one that is named.
    Errors: WorkersError when one call has lost `MAX_LOST` workers, or the executor takes no more calls; what calls and
    `finish` raise.
    """
    if not calls:
        return
    if isinstance(workers, Executor):
        _Run(workers if isinstance(workers, Workers) else _OnExecutor(workers), calls, finish).run()
        return
    num_processes = min(workers, len(calls))
    with _Here() if num_processes == 1 else LocalProcesses(num_processes) as local:
        _Run(local, calls, finish).run()


class _Run:
    """The calls of one `run_calls`: waiting, under way, lost."""

    def __init__(self, workers: Workers, calls: Sequence[Call], finish: Callable[[int, Any], None]) -> None:
        self._workers = workers
        self._calls = calls
        self._finish = finish
        self._waiting = deque(range(len(calls)))
        self._pending: dict[Future[Any], int] = {}
        self._done: SimpleQueue[Future[Any] | None] = SimpleQueue()  # None: a Ctrl-C
        self._interrupted = False
        self._lost: deque[int] = deque()  # with a worker, and waiting until they can run alone
        self._num_lost: Counter[int] = Counter()  # of each call

    def run(self) -> None:
        with self._interrupts_between_steps():
            try:
                for call in self._calls:  # all of them first: processes get what there is when they start
                    self._workers.share(call.shared)
                self._submit_some()
                while self._pending:
                    if (future := self._next_done()) is not None:
                        self._take(future)
                    self._submit_some()
            except BaseException as error:
                self._stop(keep=isinstance(error, KeyboardInterrupt))
                raise

    def _next_done(self) -> Future[Any] | None:
        while True:
            try:
                return self._done.get(timeout=ALIVE_SECONDS)
            except Empty:
                self._workers.require()

    @contextmanager
    def _interrupts_between_steps(self) -> Iterator[None]:
        """A Ctrl-C inside waits for the next step; a second one does not.

        Raised just anywhere it could leave a future locked, or end in a finalizer, where nobody sees it.
        """
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGINT)
        if isinstance(self._workers, _Here) or not is_main or handler is not signal.default_int_handler:
            yield
            return

        def note(number: int, frame: object) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self._done.put(None)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _submit_some(self) -> None:
        """Also where an interrupt comes out."""
        most = self._workers.max_pending
        while not self._interrupted and (most is None or len(self._pending) < most):
            if self._waiting:
                index = self._waiting.popleft()
            elif self._lost and not self._pending:
                index = self._lost.popleft()
            else:
                break
            call = self._calls[index]
            try:
                shared = self._workers.share(call.shared)
                future = self._workers.submit(call.function, shared, *call.arguments)
            except RuntimeError as error:  # broken, or shut down
                raise WorkersError(f"workers: cannot start {call.what}: {error or type(error).__name__}") from error
            self._pending[future] = index
            future.add_done_callback(self._done.put)
        if self._interrupted:
            raise KeyboardInterrupt

    def _take(self, future: Future[Any]) -> None:
        index = self._pending.pop(future)
        try:
            result = future.result()
        except (BrokenExecutor, CancelledError) as error:  # nobody here cancels before `_stop`
            self._num_lost[index] += 1
            if self._num_lost[index] >= MAX_LOST:
                raise WorkersError(
                    f"workers: expected {self._calls[index].what} to end, got {MAX_LOST} workers that died with it "
                    "under way (too little memory for so many at once?)"
                ) from error
            self._lost.append(index)
        else:
            self._finish(index, result)

    def _stop(self, keep: bool) -> None:
        running = set(self._workers.cancel(self._pending))
        while running:
            if (future := self._done.get()) in running:
                running.remove(future)
                if keep and not future.cancelled() and future.exception() is None:
                    self._finish(self._pending[future], future.result())
