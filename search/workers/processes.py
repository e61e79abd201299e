"""The workers of this machine: processes of one thread, or this process alone."""

import contextlib
import math
import multiprocessing
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from search import memory, signals
from search.config.settings import StudyConfig
from search.config.urls import sqlite_path
from search.errors import RunError
from search.training import environment
from search.workers import tasks

if TYPE_CHECKING:
    from search.data.dataset import Dataset


def worker_count(workers: int | None, *, gpu: bool = False) -> int:
    """How many workers `--workers` asks for; None: one per core, one where there is a GPU."""
    if workers is not None:
        return workers
    return 1 if gpu else cpu_count()  # processes would compete for the GPU's memory


def cpu_count(root: Path = Path("/")) -> int:
    """How many CPUs this process may use: those of its affinity, at most its cgroups' quota.

    root: where /proc and /sys are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    known = getattr(os, "process_cpu_count", None)  # of Python 3.13, which PYTHON_CPU_COUNT sets
    if known is None and affinity is not None:
        count = len(affinity(0))
    else:
        count = (known or os.cpu_count)() or 1
    return min([count, *(max(1, math.ceil(quota)) for quota in _quotas(root))])


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that the cgroups of this process and those above them may use, where they are limited.

    Files as described in the kernel's admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (mount / controllers, mount / "cpu") if controllers else (mount, mount / "unified")
        own = PurePosixPath(path.lstrip("/"))
        for tree in mounts:  # in a container it may begin at its own cgroup, whatever the path says
            for folder in (own, *own.parents):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    if controllers:
                        quota = int((tree / folder / "cpu.cfs_quota_us").read_text())
                        period = int((tree / folder / "cpu.cfs_period_us").read_text())
                    else:
                        quota, period = map(int, (tree / folder / "cpu.max").read_text().split())
                    if quota > 0:
                        yield quota / period


def start_importing(config: StudyConfig) -> None:
    """Start the process that workers are forked from; it imports TensorFlow in the meantime.

    Only for a study in a file that has trials left to run.
    """
    path = sqlite_path(config.storage)
    if path is None or config.scheduler is not None or trains_here(config):
        return
    if sys.platform == "linux" and _count_finished(path, config) < config.n_trials:
        _start_method()


def trains_here(config: StudyConfig) -> bool:
    """Whether this process may train, because there may be one worker only."""
    may_have_gpu = environment.gpu_device() is not None
    return config.scheduler is None and worker_count(config.workers, gpu=may_have_gpu) == 1


def _count_finished(path: Path, config: StudyConfig) -> int:
    """How many trials of the study in the file `path` have finished; 0 where it can't be read."""
    if not os.path.exists(path):  # unlike Path.exists, it takes a name that no disk does
        return 0
    from search.study.sqlite import read_sqlite  # not at the top: a new study need not wait for it

    query = (
        "SELECT count(*) FROM trials JOIN studies USING (study_id) "
        "WHERE study_name = ? AND state IN ('COMPLETE', 'PRUNED')"
    )
    with contextlib.suppress(sqlite3.Error, OSError), read_sqlite(path) as file:
        return int(file.execute(query, (config.study_name,)).fetchone()[0])
    return 0


def _prepare_process(environ: dict[str, str], run: str, config: StudyConfig, data: Any) -> None:
    """Prepare a process that dies with the main process, and has its `environ` and its data."""
    os.environ.clear()
    os.environ.update(environ)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tasks.prepare(run, config, memory.opened(data))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep processes started in the block from importing the main module, the user's script.

    It may lack its guard or have come from stdin, and workers need nothing that is defined there.
    `multiprocessing` reads this entry of `sys.modules` to decide what its children import.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class ProcessBackend:
    """Processes, started on demand; one that dies is replaced when the next task is submitted.

    Each has an executor of its own: if a process of a shared executor dies, Python ends them all,
    and nothing tells which one died first.
    """

    most_deaths = 3
    remedy = (
        "(out of memory?); use fewer --workers, a smaller --batch-size or a smaller --hidden-units"
    )

    def __init__(
        self,
        config: StudyConfig,
        parent_run: str,
        dataset: "Dataset",
        report: Callable[[str], None],
    ) -> None:
        self._workers = config.workers
        self._prepare = parent_run, config, dataset
        self._report = report
        self._slots: int | None = None
        self._in_process: tasks.InProcess | None = None
        self._last: dict[ProcessPoolExecutor, Future[Any]] = {}  # the last task of each

    def slots(self) -> int:
        """How many tasks run at once; the first call determines and reports it."""
        if self._slots is None:
            device = environment.gpu_device()
            gpu = None if device is None else self._ask_for_gpu(device)
            self._slots = worker_count(self._workers, gpu=gpu is not None)
            many = self._slots > 1
            text = f"{self._slots} worker{'s' * many}"
            text += f", 1 thread{' each' * many}, CPU" if gpu is None else f" on GPU {gpu}"
            if device is not None and gpu is None:
                text += f"; {device} is there, but TensorFlow finds no GPU that it can use"
            self._report(text)
        return self._slots

    def _ask_for_gpu(self, device: str) -> str | None:
        """The GPU that TensorFlow finds, in a separate process: this one must not import it."""
        asked = self._executor()
        try:
            found: str | None = _submit(asked, tasks.gpu).result()
            return found
        except BrokenProcessPool:
            raise RunError(
                f"TensorFlow died while it looked for a GPU ({device} is there); fix its "
                "installation, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
            ) from None
        finally:
            _kill(asked)
            asked.shutdown()

    def _executor(self) -> ProcessPoolExecutor:
        parent_run, config, dataset = self._prepare
        return ProcessPoolExecutor(
            1,
            mp_context=_start_method(),
            initializer=_prepare_process,
            initargs=(dict(os.environ), parent_run, config, memory.hand_over(dataset)),
        )

    def submit(self, task: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start `task`; `wait` tells how it ends."""
        if self.slots() == 1:
            if self._in_process is None:
                tasks.prepare(*self._prepare)
                self._in_process = tasks.InProcess()
            return self._in_process.submit(task, *arguments)
        self._drop_dead()
        for executor in [executor for executor, last in self._last.items() if last.done()]:
            try:
                self._last[executor] = _submit(executor, task, *arguments)
                return self._last[executor]
            except BrokenProcessPool:  # it died while it was idle
                executor.shutdown()
                del self._last[executor]
        executor = self._executor()
        self._last[executor] = Future()  # `close` ends it also if its start is interrupted
        try:
            self._last[executor] = _submit(executor, task, *arguments)
        except BrokenProcessPool as error:  # it died at once
            self._last[executor] = Future()
            self._last[executor].set_exception(error)
        return self._last[executor]

    def wait(self, running: "Collection[Future[Any]]") -> "Iterator[tuple[Future[Any], tasks.End]]":
        """Those of the `running` tasks that have ended, as soon as there are some, and how."""
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield future, tasks.end_of(future, deaths=(BrokenProcessPool,))

    def _drop_dead(self) -> None:
        """Shut down the executors whose process has died."""
        for executor, last in list(self._last.items()):
            dead = last.done() and not last.cancelled()
            if dead and isinstance(last.exception(), BrokenProcessPool):
                executor.shutdown()
                del self._last[executor]

    def close(self, *, now: bool) -> None:
        """End the processes; `now`: also what they are at."""
        for executor in self._last:
            if now:
                _kill(executor)
        for executor in self._last:
            executor.shutdown(cancel_futures=True)
        self._last.clear()
        tasks.forget(self._prepare[0])


def _submit(
    executor: ProcessPoolExecutor, task: Callable[..., Any], *arguments: Any
) -> "Future[Any]":
    with signals.no_ctrl_c_for_children(), _no_main_module():  # the first task starts the process
        return executor.submit(task, *arguments)


def _kill(executor: ProcessPoolExecutor) -> None:
    """End its process at once; Python has a public method for that from 3.14 on."""
    for process in list((executor._processes or {}).values()):
        process.kill()


def _start_method() -> Any:
    """How workers are started: on Linux forked from a process that has imported what they need.

    Elsewhere the systems' own libraries do not survive a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.workers.preload"])
    # That process finds this package, and no namesake in the working directory.
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}
    before = dict(os.environ)
    os.environ.update(paths)
    try:
        resource_tracker.ensure_running()  # first: it lets Ctrl-C through again
        with signals.no_ctrl_c_for_children(), _no_main_module():
            forkserver.ensure_running()
    finally:
        for name in paths:
            os.environ.pop(name)
        os.environ.update(before)
    return context
