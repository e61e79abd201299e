"""Importing the large libraries without what makes them slow or noisy."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """What is imported meanwhile finds that `module`, unless it is loaded, is not installed."""
    unloaded = module not in sys.modules
    if unloaded:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if unloaded:
            del sys.modules[module]


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
