"""Run trials as tasks: N of them on W workers, until the budget is met or something says stop.

A trial is a task. One process, a pool of processes or a cluster differ only in which
`concurrent.futures.Executor` takes the tasks, so the number of trials is exact whichever it is.
"""

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import signals
from search.config import RunError, StudyConfig
from search.imports import silent_stderr
from search.outcome import Outcome

if TYPE_CHECKING:
    from search.promotion import Comparison
    from search.trial import Worker

INTERRUPTED = "interrupted"
_DEATHS = 3  # pools that may break in a row, without a trial finished, before the run stops


# ---- in a worker -------------------------------------------------------------------------------

_arguments: tuple[StudyConfig, str] | None = None
_worker: "Worker | None" = None


def _prepare(config: StudyConfig, parent_run: str) -> None:
    """Remember what the worker is for; the first task makes it and gets its errors."""
    global _arguments, _worker
    _arguments, _worker = (config, parent_run), None


def _prepare_process(environment: dict[str, str], config: StudyConfig, parent_run: str) -> None:
    """The same in a process that dies with the main process and has its `environment`."""
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _prepare(config, parent_run)


def _ready() -> "Worker":
    """The worker of this process, with everything heavy a trial needs, TensorFlow included."""
    global _worker
    if _worker is None:
        assert _arguments is not None
        _worker = load_trial()(*_arguments)
    return _worker


def load_trial() -> "type[Worker]":
    """Import everything heavy that a trial needs, TensorFlow included, in silence."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with silent_stderr():
        from search.trial import Worker
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # advice on retracing
    return Worker


def _run_trial(place: int) -> Outcome:
    return _ready().run_trial(place)


def _repeat(number: int, repeat: int) -> dict[str, Any]:
    return _ready().repeat(number, repeat)


def _retrain(number: int) -> str:
    return _ready().retrain(number)


def _compare(challenger: int, champion: int) -> "Comparison | str":
    return _ready().compare(challenger, champion)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


# ---- in the main process -----------------------------------------------------------------------


def worker_count(workers: int | None) -> int:
    """How many workers `--workers` asks for; None: one per core, one where there is a GPU."""
    if workers is not None:
        return workers
    if any(os.path.exists(device) for device in ("/dev/nvidia0", "/dev/kfd")):
        return 1  # processes would compete for the GPU's memory
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class InProcess(Executor):
    """Runs a task at once, in this process."""

    def __init__(self, initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
        initializer(*initargs)

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `task`; an interruption is raised here, anything else by the future."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Engine:
    """Workers, started when the first task comes and replaced when one of them dies."""

    def __init__(self, config: StudyConfig, parent_run: str) -> None:
        self._config = config
        self._parent_run = parent_run
        self.workers = worker_count(config.workers)
        self._executor: Executor | None = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and isinstance(self._executor, ProcessPoolExecutor):
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _submit(self, task: Callable[..., Any], *argument: int) -> "Future[Any]":
        if self._executor is None:
            arguments = (self._config, self._parent_run)
            if self.workers == 1:
                self._executor = InProcess(_prepare, arguments)
            else:
                self._executor = ProcessPoolExecutor(
                    self.workers,
                    mp_context=_processes(),
                    initializer=_prepare_process,
                    initargs=(dict(os.environ), *arguments),
                )
        if self.workers == 1:
            return self._executor.submit(task, *argument)
        with signals.no_ctrl_c_for_children():  # the pool starts its processes when a task comes
            return self._executor.submit(task, *argument)

    def _bury(self) -> None:
        """Wait until every process of a broken pool is gone."""
        assert self._executor is not None
        self._executor.shutdown()
        self._executor = None

    def retrain(self, number: int, on_death: Callable[[], object]) -> str:
        """Train the configuration of trial `number` anew on a worker; returns its MLflow run.

        Raises RunError after three deaths in a row.
        """
        return str(self._call(_retrain, number, on_death=on_death))

    def compare(
        self, challenger: int, champion: int, on_death: Callable[[], object]
    ) -> "Comparison | str":
        """Compare two versions of the model on a worker, as `promotion.compare` does."""
        found: Comparison | str = self._call(_compare, challenger, champion, on_death=on_death)
        return found

    def _call(
        self, task: Callable[..., Any], *arguments: int, on_death: Callable[[], object]
    ) -> Any:
        for _ in range(_DEATHS):
            try:
                return self._submit(task, *arguments).result()
            except BrokenProcessPool:
                self._bury()
                on_death()
        raise RunError(_DYING.format(_DEATHS))

    def run_repeats(
        self,
        missing: Callable[[], list[tuple[int, int]]],
        on_repeat: Callable[[int, int, dict[str, Any]], None],
        stopping: Callable[[], bool],
    ) -> bool:
        """Train finalists again until none is `missing` (trial, repeat); False where it stopped.

        on_repeat: gets every result, and keeps it, so that it is not missing any more.
        Raises RunError after three deaths in a row.
        """
        deaths = 0
        while queue := deque(missing()):
            running: dict[Future[dict[str, Any]], tuple[int, int]] = {}
            try:
                while running or (queue and not stopping()):
                    while queue and len(running) < self.workers and not stopping():
                        running[self._submit(_repeat, *queue[0])] = queue[0]
                        queue.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        on_repeat(*running.pop(future), future.result())
                        deaths = 0
            except BrokenProcessPool:
                self._bury()
                deaths += 1
                if deaths == _DEATHS:
                    raise RunError(_DYING.format(deaths)) from None
                continue
            if queue:
                return False
        return True

    def run_trials(
        self,
        places: Iterable[int],
        on_trial: Callable[[Outcome], None],
        on_death: Callable[[], Iterable[int]],
        *,
        timeout: float | None,
        patience: "Patience",
        max_failures: int,
        stopping: Callable[[], bool],
    ) -> str | None:
        """Run a trial for every place, a failed one again; returns why it stopped early, if so.

        on_trial: gets every trial's outcome, in the order in which they end.
        on_death: is called when a worker has died and took the others with it; says which places
        are missing now, because a trial may have ended whose outcome did not arrive.
        stopping: tells whether no more trials shall start.
        Raises RunError after `max_failures` failures, or three deaths, in a row.
        """
        queue = deque(places)
        running: dict[Future[Outcome], int] = {}
        deadline = None if timeout is None else time.monotonic() + timeout
        failures = deaths = 0
        stopped = None
        while True:
            if stopping():
                stopped = INTERRUPTED
            elif deadline is not None and time.monotonic() >= deadline:
                stopped = f"--timeout: {timeout:g} s are over"
            elif patience.exhausted:
                stopped = f"--patience: {patience.limit} trials without a better one"
            broken = False
            while queue and not stopped and not broken and len(running) < self.workers:
                try:
                    running[self._submit(_run_trial, queue[0])] = queue[0]
                    queue.popleft()
                except BrokenProcessPool:
                    broken = True
            if not running and not broken:
                return stopped if queue else None

            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                place = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    broken = True
                    continue
                on_trial(outcome)
                if outcome.state == "FAIL":
                    queue.appendleft(place)
                    failures += 1
                    if failures == max_failures:
                        raise RunError(
                            f"{failures} trials in a row failed, the last with {outcome.failure}; "
                            "mend the cause, or allow more with --max-failures, and run again"
                        )
                else:
                    deaths = failures = 0
                    patience.see(outcome.value)
            if broken:
                self._bury()
                running.clear()
                queue = deque(on_death())
                deaths += 1
                if deaths == _DEATHS:
                    raise RunError(_DYING.format(deaths))


_DYING = (
    "workers died {} times in a row (out of memory?); use fewer --workers, a smaller --batch-size "
    "or a smaller --hidden-units, and run the same command again"
)


class Patience:
    """Counts the finished trials since the best one; a pruned one is not better."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._best = float("-inf")
        self._since = 0

    def see(self, value: float | None) -> None:
        """Take note of a finished trial: its value, or None where it was pruned."""
        if value is not None and value > self._best:
            self._best, self._since = value, 0
        else:
            self._since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the search has waited long enough."""
        return self.limit is not None and self._since >= self.limit
