"""Worker processes, each with one hand-in at a time; one that dies or hangs costs that hand-in and no other.

    submit(judge_one, job) ──► a free slot ──► its process (made anew when it died, hung, or has done RECYCLE jobs)
            Future  ◄── the result, or WorkerLost with words

A `concurrent.futures.Executor`, so that a Dask cluster's (`Client.get_executor()`) can stand in its place. Not
`ProcessPoolExecutor`: there, one worker that is killed ends all that is waiting. Processes are forked from a server
that has imported torch once (multiprocessing's "forkserver"); when the grader is killed, its end of each pipe closes,
and every worker ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

RECYCLE = 40  # jobs that a worker does before it is replaced: whatever a job leaves behind does not add up
PRELOAD = ["pefttools.grading.judging", "pefttools.grading.warm"]
# How a process ended can be read from its pipe once, and starting one makes multiprocessing look at all the others.
# Two threads that look at the same moment take it from each other, and one is told 255. So: one at a time.
_ENDS = threading.Lock()


class WorkerLost(RuntimeError):
    """The process that had this job ended, or was ended, without a result; the message says so for the report."""


class Pool(Executor):
    """`workers` processes; a job that takes longer than `seconds` is given up with its process."""

    def __init__(self, workers: int, seconds: float) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._seconds = seconds
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._guard = threading.Lock()
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="slot")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        return self._threads.submit(self._do, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """With `wait=False` the running jobs are given up too: their processes are killed."""
        if not wait:
            self._closed = True
            with self._guard:
                for worker in list(self._all):
                    worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=cancel_futures)
        with self._guard:
            self._closed = True
            for worker in list(self._all):
                worker.kill()
            self._all.clear()

    def _do(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        worker = self._take()
        try:
            done, value = worker.ask((fn, args, kwargs), self._seconds)
        except BaseException:
            self._drop(worker)
            raise
        if worker.jobs >= RECYCLE:
            self._drop(worker)
        else:
            self._idle.put(worker)
        if not done:
            raise value
        return value

    def _take(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            with self._guard:  # one at a time; and none after the end
                if self._closed:
                    raise WorkerLost("Stopped before it was done.") from None
                worker = _Worker(self._context)
                self._all.add(worker)
            return worker

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        with self._guard:
            self._all.discard(worker)


class _Worker:
    """One process, and this side's end of the pipe to it."""

    def __init__(self, context: Any) -> None:
        self.jobs = 0
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=False, name="grader")
        with _ENDS:
            self.process.start()
        theirs.close()

    def ask(self, job: Any, seconds: float) -> tuple[bool, Any]:
        self.jobs += 1
        try:
            self.pipe.send(job)
            if not self.pipe.poll(seconds):
                raise WorkerLost(f"It was given up after {seconds:.0f} seconds: the process that graded it hung.")
            return self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise WorkerLost(_ended(self._end(5))) from None

    def kill(self) -> None:
        with _ENDS:
            if self.process.is_alive():
                self.process.kill()
        self._end(10)

    def _end(self, seconds: float) -> int | None:
        """Its exit code, None when it still runs after `seconds`."""
        wait_for([self.process.sentinel], seconds)
        with _ENDS:
            return self.process.exitcode


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        why = " Perhaps this machine's memory ran out: try fewer --workers." if name == "SIGKILL" else ""
        return f"The process that graded it was ended by {name}.{why} Grade again to try it once more."
    return f"The process that graded it ended without a result (exit code {code}). Grade again to try it once more."


def _serve(pipe: Connection) -> None:
    """The worker: one job after the other, until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, lambda *_: None)  # the grader decides what Ctrl-C means; kernels get the default back
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    while True:
        fn, args, kwargs = jobs.get()
        try:
            answer = True, fn(*args, **kwargs)
        except BaseException as error:
            answer = False, error
        try:
            pipe.send(answer)
        except (OSError, ValueError):
            os._exit(1)
        except Exception as error:  # an exception that cannot be pickled
            pipe.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]} ({error})")))


def _listen(pipe: Connection, jobs: queue.SimpleQueue[Any]) -> None:
    """Take jobs from the pipe; end the process at once, in the middle of whatever it does, when the grader is gone."""
    while True:
        try:
            jobs.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(memory: int) -> int:
    """One a core, fewer where `memory` bytes for each would be more than there is."""
    import psutil

    return max(1, min(cores(), int(psutil.virtual_memory().available // memory)))


@contextmanager
def executor(workers: int, seconds: float, scheduler: str | None = None) -> Iterator[Executor]:
    """This machine's pool, or, with a `scheduler` ("tcp://host:8786"), that of a Dask cluster.

    Leaving it with an exception gives up what runs. Raises ValueError without `distributed` or without a cluster there.
    """
    if scheduler is None:
        pool: Executor = Pool(workers, seconds)
        client = None
    else:
        try:
            from distributed import Client
        except ImportError as error:
            raise ValueError('--scheduler needs Dask: pip install "pefttools[dask]"') from error
        try:
            client = Client(scheduler, timeout="20s", set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ValueError(f"no Dask scheduler answers at {scheduler!r} ({error}); start one with `dask scheduler`, "
                             "and workers with `dask worker tcp://… --nworkers -1 --nthreads 1`") from error
        if not client.scheduler_info()["workers"]:
            client.close()
            raise ValueError(f"the Dask scheduler at {scheduler!r} has no workers: start some with "
                             f"`dask worker {scheduler} --nworkers -1 --nthreads 1`")
        pool = client.get_executor(pure=False, retries=0)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True) if client is None else pool.shutdown(wait=False)
        raise
    else:
        pool.shutdown(wait=True)
    finally:
        if client is not None:
            client.close()
