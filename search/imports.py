"""Import the large libraries faster and without their log output; undo what that changed."""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator

_LOGGERS = ("optuna", "mlflow", "alembic", "tensorflow", "distributed")
_VARIABLES = (  # not those that importing TensorFlow sets by itself
    *("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
    *("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"),
    *("TF_CPP_MIN_LOG_LEVEL", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"),
    "TF_FORCE_GPU_ALLOW_GROWTH",
)


def prepare_tensorflow() -> None:
    """Let TensorFlow start silently, on one thread, and take a GPU's memory only as needed.

    As a worker needs it, which the process that reads the data may be as well.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    for threads in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(threads, "1")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the environment variables, log levels and sys.path that this tool changes."""
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
    """Make imports in the block see `modules` as not installed, unless they are already loaded."""
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
    """Import large libraries in the block a third faster, and exit the process a second sooner.

    Their objects live until the process ends, so the garbage collector need not scan them, neither
    during the imports nor at exit; in forked processes they stay in shared memory. Only for
    processes that this tool owns: all other existing objects are no longer scanned either.
    """
    with uncollected():
        try:
            yield
        finally:
            gc.freeze()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Turn the garbage collector off in a block that creates very many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard stderr: TensorFlow's native code reports CPU features and missing GPUs there."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
