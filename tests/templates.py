"""What is made once and then copied or remembered, because making it takes long."""

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import alembic.util
import sqlalchemy.orm
from filelock import FileLock
from forks import FOLDER
from mlflow.store.db.utils import _get_latest_schema_revision
from mlflow.utils import requirements_utils

from search.config.urls import sqlite_path, sqlite_url
from search.study.storage import _alembic_head
from search.tracking import runs as tracking
from search.tracking.runs import _create_schema

_make_mlflows_tables = _create_schema


@functools.cache
def use() -> None:
    """In this process and those forked from it."""
    tracking._create_schema = copy_mlflows_tables
    alembic.util.load_python_file = _load_once(alembic.util.load_python_file)
    for newest in (_get_latest_schema_revision, _alembic_head):
        newest()
    requirements_utils._init_packages_to_modules_map()  # reads what all packages consist of
    sqlalchemy.orm.configure_mappers()


def mlflows_tables() -> Path:
    """An empty database of MLflow's, which whoever asks first makes: sixty migrations."""
    path = Path(os.environ[FOLDER]) / "mlflow.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.unlink(missing_ok=True)  # who began was killed
            _make_mlflows_tables(sqlite_url(unfinished), str(path.parent))
            os.rename(unfinished, path)
    return path


def copy_mlflows_tables(url: str, _artifacts: str = "") -> None:
    """In place of `tracking._create_schema`."""
    path = sqlite_path(url)
    assert path is not None
    shutil.copy(mlflows_tables(), path)


def _load_once(load: Any) -> Any:
    """Alembic loads all migrations of Optuna or MLflow whenever it is asked for the newest."""
    once = functools.cache(load)

    @functools.wraps(load)
    def load_python_file(folder: Any, filename: Any) -> Any:
        runs = Path(filename).name == "env.py"  # not only defines
        return load(folder, filename) if runs else once(str(folder), str(filename))

    return load_python_file
