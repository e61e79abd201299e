"""Databases that are copied, because making them takes long."""

import os
import shutil
from pathlib import Path

from filelock import FileLock
from forks import FOLDER

from search import tracking
from search.urls import sqlite_path, sqlite_url

_make = tracking._create_schema


def mlflows_tables() -> Path:
    """An empty database of MLflow's, which whoever asks first makes: sixty migrations."""
    path = Path(os.environ[FOLDER]) / "mlflow.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.unlink(missing_ok=True)  # who began was killed
            _make(sqlite_url(unfinished), str(path.parent))
            os.rename(unfinished, path)
    return path


def copy_mlflows_tables(url: str, _artifacts: str = "") -> None:
    """In place of `tracking._create_schema`."""
    path = sqlite_path(url)
    assert path is not None
    shutil.copy(mlflows_tables(), path)
