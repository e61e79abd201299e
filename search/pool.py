"""The workers of this machine: processes of one thread, or this process alone."""

import contextlib
import math
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from search import environment, signals, tasks
from search.config import RunError, StudyConfig
from search.data import Dataset

_DYING = 10  # seconds that a process which has closed its pipe gets to be gone by itself


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


class WorkerDied(Exception):
    """A process ended in the middle of its task."""


class Process(Executor):
    """A process of its own that runs one task at a time; `arguments` are those of `tasks.prepare`.

    Where it dies, that task and no other raises WorkerDied: `ProcessPoolExecutor` would end all of
    its processes and not tell which one was the first.
    """

    def __init__(self, context: Any, *arguments: Any) -> None:
        self._died = False
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(os.environ), *arguments))
        with signals.no_ctrl_c_for_children(), _no_main_module():
            self._process.start()
        theirs.close()
        self._thread = ThreadPoolExecutor(1)  # hands over a task and waits for its result

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `task` when those before it have ended."""
        return self._thread.submit(self._run, task, args, kwargs)

    def _run(self, *task: Any) -> Any:
        try:
            self._ours.send_bytes(pickle.dumps(task))
            connection.wait([self._ours, self._process.sentinel])
            if not self._ours.poll():
                raise EOFError
            result, error = pickle.loads(self._ours.recv_bytes())
        except (EOFError, ConnectionError):
            self._died = True
            raise WorkerDied(f"process {self._process.pid}") from None
        if error is not None:
            raise error
        return result

    def is_alive(self) -> bool:
        """Whether it can run a task."""
        return not self._died and bool(self._process.is_alive())

    def stop(self, *, now: bool) -> None:
        """Let it end; `now`: also what it is at."""
        if now:
            self._process.kill()
        elif self.is_alive():
            with contextlib.suppress(OSError):
                self._ours.send_bytes(b"")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait until it is gone, and let go of it."""
        self._thread.shutdown(cancel_futures=cancel_futures)
        self._process.join(_DYING if self._died else None)
        self._process.kill()  # it closed its pipe, and is of no use
        self._process.join()
        self._process.close()
        self._ours.close()


def _serve(theirs: Any, environ: dict[str, str], *arguments: Any) -> None:
    """Run the tasks that come, in a process that dies with the main one and has its `environ`."""
    os.environ.clear()
    os.environ.update(environ)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tasks.prepare(*arguments)
    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone
        while task := theirs.recv_bytes():
            theirs.send_bytes(_answer(task))


def _answer(pickled: bytes) -> bytes:
    """What a task returns and what it raises, one of them None, pickled as the task is."""
    answer: tuple[Any, BaseException | None]
    try:
        task, positional, keywords = pickle.loads(pickled)
        answer = task(*positional, **keywords), None
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))  # which no pickle holds
        answer = None, error
    try:
        return pickle.dumps(answer)
    except Exception as error:
        return pickle.dumps((None, RunError(f"a worker's {answer!r} can't be pickled ({error})")))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Processes started in the block do not import the main module, which is the user's script.

    It may lack its guard, or have come from stdin, and nothing that workers get is defined there.
    `multiprocessing` looks here for what its children are to import.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Pool:
    """Processes, started as tasks come; one that dies is replaced when the next task comes."""

    deaths = (WorkerDied,)
    not_begun = ()  # ends of a task that say nothing of it
    most_deaths = 3
    remedy = (
        "(out of memory?); use fewer --workers, a smaller --batch-size or a smaller --hidden-units"
    )

    def __init__(
        self, config: StudyConfig, parent_run: str, dataset: Dataset, say: Callable[[str], None]
    ) -> None:
        self._workers = config.workers
        self._prepare = parent_run, config, dataset
        self._say = say
        self._slots: int | None = None
        self._in_process: InProcess | None = None
        self._last: dict[Process, Future[Any]] = {}  # what each process was given last

    def slots(self) -> int:
        """How many tasks run at once; the first call finds out, and says so."""
        if self._slots is None:
            device = environment.gpu_device()
            gpu = None if device is None else self._ask_for_gpu(device)
            self._slots = worker_count(self._workers, gpu=gpu is not None)
            text = f"{self._slots} worker{'s' * (self._slots != 1)}"
            text += ", 1 thread each, CPU" if gpu is None else f" on GPU {gpu}"
            if device is not None and gpu is None:
                text += f"; {device} is there, but TensorFlow finds no GPU that it can use"
            self._say(text)
        return self._slots

    def _ask_for_gpu(self, device: str) -> str | None:
        """The GPU that TensorFlow finds, in a process of its own: this one stays free of it."""
        asked = Process(_processes(), *self._prepare)
        try:
            found: str | None = asked.submit(tasks.gpu).result()
            asked.stop(now=False)
            return found
        except WorkerDied:
            raise RunError(
                f"TensorFlow died while it looked for a GPU ({device} is there); mend its "
                "installation, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
            ) from None
        except BaseException:
            asked.stop(now=True)
            raise
        finally:
            asked.shutdown()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start `task`; its future raises one of `deaths` where its process dies."""
        if self.slots() == 1:
            if self._in_process is None:
                tasks.prepare(*self._prepare)
                self._in_process = InProcess()
            return self._in_process.submit(task, *arguments)
        self.bury()
        idle = (process for process, last in self._last.items() if last.done())
        process = next(idle, None) or Process(_processes(), *self._prepare)
        self._last[process] = process.submit(task, *arguments)
        return self._last[process]

    def wait(self, running: "Collection[Future[Any]]") -> "set[Future[Any]]":
        """Those that have ended, as soon as there are some."""
        return wait(running, return_when=FIRST_COMPLETED).done

    def bury(self) -> None:
        """Let go of the processes that have died."""
        for process in [process for process in self._last if not process.is_alive()]:
            process.shutdown()
            del self._last[process]

    def close(self, *, now: bool) -> None:
        """End the processes; `now`: also what they are at."""
        for process in self._last:
            process.stop(now=now)
        for process in self._last:
            process.shutdown(cancel_futures=True)
        self._last.clear()
        tasks.forget(self._prepare[0])


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
        with signals.no_ctrl_c_for_children(), _no_main_module():
            forkserver.ensure_running()
    finally:
        for name in paths:
            os.environ.pop(name)
        os.environ.update(before)
    return context
