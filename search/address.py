"""The address of MLflow's database or tracking server: whether it can be used."""

from pathlib import Path

import mlflow
import requests
from mlflow.store.db.utils import _get_latest_schema_revision

from search import production
from search.config import InputError, one_line
from search.database import other_schema
from search.urls import redact, sqlite_path


def check(uri: str) -> None:
    """Raise InputError where `uri` is no MLflow database or server of today; a file is only read.

    A server has to answer.
    """
    production.check(uri)
    path = sqlite_path(uri)
    if path is not None and path.exists():
        _check_schema(uri, path)
    elif uri.startswith("http"):
        _check_server(uri)


def _check_schema(uri: str, path: Path) -> None:
    head: str = _get_latest_schema_revision()  # type: ignore[no-untyped-call]
    found = other_schema(path, head)
    if found is not None:
        raise InputError(
            f"--tracking-uri must be a database of MLflow {mlflow.__version__}, but {str(path)!r} "
            f"has the schema {found or 'of no version'}; copy the file and run "
            f"mlflow db upgrade {redact(uri)}, or give another file"
        )


def _check_server(uri: str) -> None:
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=10)
        answer.raise_for_status()
        if answer.text.strip() != "OK":
            raise requests.RequestException("/health does not answer OK")
    except Exception as error:  # urllib3's errors are not all requests' own
        raise InputError(
            f"--tracking-uri must be a running MLflow server, but {redact(uri)} is not: "
            f"{one_line(error)}; start it, or give sqlite:///mlflow.db"
        ) from None
