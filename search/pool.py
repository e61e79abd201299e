"""The workers of this machine: processes of one thread, or this process alone."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

from search import signals, tasks
from search.config import StudyConfig
from search.data import Dataset


def worker_count(workers: int | None) -> int:
    """How many workers `--workers` asks for; None: one per core, one where there is a GPU."""
    if workers is not None:
        return workers
    if any(os.path.exists(device) for device in ("/dev/nvidia0", "/dev/kfd")):
        return 1  # processes would compete for the GPU's memory
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcess(Executor):
    """Runs a task at once, in this process."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `task`; an interruption is raised here, anything else by the future."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Pool:
    """Processes, started when the first task comes; where one dies, all are replaced."""

    deaths = (BrokenProcessPool,)
    not_begun = ()  # ends of a task that say nothing of it
    most_deaths = 3
    remedy = (
        "(out of memory?); use fewer --workers, a smaller --batch-size or a smaller --hidden-units"
    )

    def __init__(self, config: StudyConfig, parent_run: str, dataset: Dataset) -> None:
        self._slots = worker_count(config.workers)
        self._prepare = parent_run, config, dataset
        self._executor: Executor | None = None

    def slots(self) -> int:
        """How many tasks run at once."""
        return self._slots

    def submit(self, task: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start `task`; its future, or this, raises one of `deaths` where a process dies."""
        if self._executor is None and self._slots == 1:
            tasks.prepare(*self._prepare)
            self._executor = InProcess()
        elif self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._slots,
                mp_context=_processes(),
                initializer=_prepare_process,
                initargs=(dict(os.environ), *self._prepare),
            )
        if self._slots == 1:
            return self._executor.submit(task, *arguments)
        with signals.no_ctrl_c_for_children():  # the pool starts its processes when a task comes
            return self._executor.submit(task, *arguments)

    def wait(self, running: "Collection[Future[Any]]") -> "set[Future[Any]]":
        """Those that have ended, as soon as there are some."""
        return wait(running, return_when=FIRST_COMPLETED).done

    def bury(self) -> None:
        """Wait until every process of a broken pool is gone."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def close(self, *, now: bool) -> None:
        """End the processes; `now`: also what they are at."""
        if now and isinstance(self._executor, ProcessPoolExecutor):
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        tasks.forget(self._prepare[0])


def _prepare_process(environment: dict[str, str], *arguments: Any) -> None:
    """Prepare a process that dies with the main process and has its `environment`."""
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tasks.prepare(*arguments)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _processes() -> Any:
    """How workers are started: on Linux forked from a process that has imported what they need.

    Elsewhere the systems' own libraries do not survive a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.preload"])
    # That process finds this package, and no namesake in the working directory.
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONSAFEPATH": "1"}
    before = dict(os.environ)
    os.environ.update(paths)
    try:
        resource_tracker.ensure_running()  # first: it lets Ctrl-C through again
        with signals.no_ctrl_c_for_children():
            forkserver.ensure_running()
    finally:
        for name in paths:
            os.environ.pop(name)
        os.environ.update(before)
    return context
