"""Database URLs: which file or server they mean, and whether the study can use them."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from search.errors import InputError, redact


def sqlite_path(url: str) -> Path | None:
    """The file of a SQLite URL; None for any other database."""
    match = re.fullmatch(r"sqlite(\+\w+)?:///(?P<path>.+)", url, re.DOTALL)
    return Path(unquote(match["path"])).absolute() if match else None


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, as SQLAlchemy reads it."""
    return f"sqlite:///{quote(str(path))}"


def is_postgresql(url: str) -> bool:
    """Whether `url` is that of a PostgreSQL server, which has advisory locks."""
    return url.startswith("postgresql")


def same_database(storage: str, tracking_uri: str) -> bool:
    """Whether both URLs lead to one database."""
    paths = sqlite_path(storage), sqlite_path(tracking_uri)
    if None in paths:
        one_url, other_url = (
            re.sub(r"^(\w+)\+\w+", r"\1", url.split("?")[0]) for url in (storage, tracking_uri)
        )
        return one_url == other_url
    one, other = (path.resolve() for path in paths if path is not None)
    both = os.path.exists(one) and os.path.exists(other)  # also False if a name is too long
    return one == other or (both and os.path.samefile(one, other))


def check_stores(storage: str, tracking_uri: str, *, cluster: bool) -> None:
    """Raise InputError if both URLs are one database, or the workers of a cluster can't reach it.

    storage: Optuna's. tracking_uri: MLflow's.
    """
    why = "with --scheduler, because the workers of a cluster share no disk"
    if cluster and not is_postgresql(storage):
        raise InputError(
            f"--storage must be PostgreSQL's {why}, but got {redact(storage)}; for example "
            "--storage postgresql+psycopg://USER@HOST/DATABASE"
        )
    if cluster and not tracking_uri.startswith("http"):
        raise InputError(
            f"--tracking-uri must be an MLflow server {why}, but got {redact(tracking_uri)}; "
            "start one with mlflow server and give --tracking-uri http://HOST:5000"
        )
    if same_database(storage, tracking_uri):
        raise InputError(
            "--storage and --tracking-uri must be two databases (Optuna and MLflow cannot share "
            f"one), but both are {redact(storage)}; give one another file name"
        )
