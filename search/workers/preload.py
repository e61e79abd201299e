"""Imported once, by the process that workers are forked from: TensorFlow takes seconds."""

import os
import sys
import traceback
from typing import Any

from search.imports import hidden, quickly
from search.workers.tasks import load_trial


class _EndWithParent:
    """A finder that finds no module, but ends this process where its parent has gone.

    A command that is refused or killed meanwhile would leave it at work, and who reads the
    command's output would wait for it.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()

    def find_spec(self, *_: object) -> None:
        """Called for every module that is imported."""
        if os.getppid() != self._parent:
            os._exit(1)


def _report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say nothing of a worker that starts as its command ends: the semaphores are gone by then."""
    where = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(trace)]
    if kind is not FileNotFoundError or where[-1] != "multiprocessing.synchronize":
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
sys.meta_path.insert(0, finder := _EndWithParent())


with quickly(), hidden("sklearn", "matplotlib"):  # a second, for parts of Keras not used
    load_trial()
    # What MLflow imports and SQLAlchemy prepares when the first of its databases is opened.
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from sqlalchemy.orm import configure_mappers

    import search.workers.reproduce  # noqa: F401 - has the last one of the tasks

    configure_mappers()


sys.meta_path.remove(finder)
