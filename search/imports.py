"""The large libraries: importing them without what makes them slow or noisy, and quiet use."""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator

_LOGGERS = ("optuna", "mlflow", "alembic", "tensorflow", "distributed")
_VARIABLES = (  # what importing TensorFlow sets by itself is not ours
    *("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
    *("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"),
    *("TF_CPP_MIN_LOG_LEVEL", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"),
)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give a Python caller back what we set: environment variables, log levels and sys.path."""
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """What is imported meanwhile finds that `modules`, unless loaded, are not installed."""
    unloaded = [module for module in modules if module not in sys.modules]
    for module in unloaded:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in unloaded:
            del sys.modules[module]


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Import large libraries in the block a third faster, and end the process a second sooner.

    What they define stays until the end, so the garbage collector need not search it, neither
    while it grows nor at exit. In forked processes it stays in memory that all of them share.
    For processes of our own: what else exists is no longer searched either.
    """
    with uncollected():
        try:
            yield
        finally:
            gc.freeze()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Do without the garbage collector in a block that makes very many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """TensorFlow's native code announces CPU features and missing GPUs before any log level."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
