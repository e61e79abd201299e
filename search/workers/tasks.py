"""Tasks, in whichever process or thread of a worker they run, and how they end.

A task is a function of a `Worker` and of numbers, such as `trial.run_trial`; it is submitted with
the parent run that it is for.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search.config.custom_model import ModelError
from search.config.settings import StudyConfig
from search.errors import RunError, interruption_behind, one_line
from search.imports import silent_stderr

if TYPE_CHECKING:
    from search.data.dataset import Dataset
    from search.workers.worker import Worker


@dataclass(frozen=True)
class Done:
    """A task ended by itself and returned `result`."""

    result: Any


class Died:
    """The worker died while it ran the task."""


class NotStarted:
    """The task was not started, so its end says nothing about it."""


End = Done | Died | NotStarted
Task = Callable[..., Any]
Errors = tuple[type[BaseException], ...]


def end_of(future: "Future[Any]", deaths: Errors, not_started: Errors = ()) -> End:
    """How a task ended, whose `future` is done. Raises what the task raised, if it did.

    deaths, not_started: the exceptions of the future that stand for these ends.
    """
    try:
        return Done(future.result(0))
    except not_started:
        return NotStarted()
    except deaths:
        return Died()


class InProcess(Executor):
    """Runs a task at once, in this process."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run `task`; an interruption is raised at once, any other error by the future."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            if (interruption := interruption_behind(error)) is not None:
                raise interruption from None
            future.set_exception(error)
        return future


class NotPrepared(Exception):
    """This process is not the one that was prepared: it has taken the place of one that died."""


class Unfit(RunError):
    """This worker can't run any task of the study, but another one may."""


_prepared: dict[str, "tuple[StudyConfig, Dataset, int]"] = {}
_workers: dict[tuple[str, int], "Worker"] = {}  # by parent run and thread
_one_at_a_time = threading.Lock()
_PATIENCE = 30  # seconds that servers which a cluster's worker doesn't reach get to come back


def prepare(parent_run: str, config: StudyConfig, dataset: "Dataset", threads: int = 1) -> None:
    """Remember what this process's workers are for; the first tasks make them and get the errors.

    threads: how many tasks run at once in this process.
    """
    forget(parent_run)  # what a run that was killed has left, with its settings
    _prepared[parent_run] = config, dataset, threads


def forget(parent_run: str) -> None:
    """Let go of what `prepare` brought, and of the connections of its workers."""
    _prepared.pop(parent_run, None)
    for key in [key for key in list(_workers) if key[0] == parent_run]:
        _workers.pop(key).close()


def _worker(parent_run: str) -> "Worker":
    """The worker of this thread, with everything heavy a trial needs, TensorFlow included."""
    key = parent_run, threading.get_ident()
    if key not in _workers:
        if parent_run not in _prepared:
            raise NotPrepared
        config, dataset, threads = _prepared[parent_run]
        deadline = time.monotonic() + (0 if config.scheduler is None else _PATIENCE)
        while True:
            try:
                with _one_at_a_time:
                    worker = load_trial()(config, parent_run, dataset, threads)
                break
            except Exception as error:
                if config.scheduler is None:
                    raise
                if isinstance(error, ModelError):
                    raise Unfit(str(error)) from None
                if time.monotonic() > deadline:
                    raise Unfit(
                        f"it can't open the study ({type(error).__name__}: {one_line(error)}); "
                        "give a --storage and a --tracking-uri that the workers reach, too"
                    ) from None
                time.sleep(1)
        if parent_run not in _prepared:  # the run has ended meanwhile
            worker.close()
            raise NotPrepared
        _workers[key] = worker
    return _workers[key]


def load_trial() -> "type[Worker]":
    """Import everything heavy that a trial needs, TensorFlow included, in silence."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with silent_stderr():
        import optuna_integration.keras  # noqa: F401

        import search.training.train  # noqa: F401
        from search.workers.worker import Worker
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # advice on retracing
    return Worker


def gpu() -> str | None:
    """As `training.gpu`."""
    load_trial()
    from search.training.train import gpu_name

    with silent_stderr():
        return gpu_name()


def call(task: Task, parent_run: str, *arguments: int) -> Any:
    """What `task` returns, called with this thread's worker of that run and `arguments`."""
    return task(_worker(parent_run), *arguments)
