"""The tracking server or database of MLflow: checks, time-outs, log levels.

MLflow takes a second to import, so only functions that need it import it.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import sqlalchemy
from sqlalchemy import text

from search.config.settings import StudyConfig
from search.config.urls import sqlite_path
from search.errors import InputError, one_line, redact
from search.study.postgres import check_server, connected
from search.study.sqlite import check_schema, check_sqlite, read_only_url


def check_tracking(uri: str) -> None:
    """Raise InputError if `uri` is no database of this MLflow version and no running server.

    Changes nothing.
    """
    check_uri(uri)
    path = sqlite_path(uri)
    if path is not None and path.exists():
        _check_schema(uri, path)
    elif uri.startswith("http"):
        _check_server(uri)


def _check_schema(uri: str, path: Path) -> None:
    import mlflow
    from mlflow.store.db.utils import _get_latest_schema_revision

    head: str = _get_latest_schema_revision()  # type: ignore[no-untyped-call]
    upgrade = f"mlflow db upgrade {redact(uri)}"
    check_schema("--tracking-uri", path, f"MLflow {mlflow.__version__}", head, upgrade)


def _check_server(uri: str) -> None:
    import requests

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


_SCHEMES = ("http", "https", "postgresql", "mysql", "mssql")


def check_uri(uri: str) -> None:
    """Raise InputError if `uri` is no MLflow database and no server's URL; changes nothing."""
    path = sqlite_path(uri)
    if path is not None:
        check_sqlite("--tracking-uri", uri, path, {"experiments", "runs"}, "MLflow")
    elif uri.split(":")[0].split("+")[0] not in _SCHEMES or "://" not in uri:
        raise InputError(
            "--tracking-uri must be sqlite:///FILE, a database URL or http(s)://SERVER, but got "
            f"{redact(uri)!r}; for example --tracking-uri sqlite:///mlflow.db"
        )
    elif not uri.startswith("http"):
        check_server("--tracking-uri", uri, "sqlite:///mlflow.db")


def check_experiment(config: StudyConfig) -> None:
    """Raise InputError if the experiment can't take runs or models; changes nothing."""
    path = sqlite_path(config.tracking_uri)
    stage, location = _stored(config) or ("active", None)
    if stage == "deleted":
        raise in_trash(config.tracking_uri, config.experiment)
    if location is None and path is not None:
        location = (path.parent / "mlruns" / config.experiment).as_uri()
    if location is None or not location.startswith("file:"):
        return
    folder = Path(url2pathname(urlsplit(location).path))
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"--experiment {config.experiment} must have a folder that can be written to, but "
            f"{str(folder)!r} cannot; change its permissions, or give another --experiment"
        )


def in_trash(uri: str, experiment: str) -> InputError:
    """The error for an experiment that was deleted."""
    return InputError(
        f"--experiment {experiment} must not be deleted, but it is in the trash of "
        f"{redact(uri)}; restore it with mlflow experiments restore, or give another"
    )


def _stored(config: StudyConfig) -> tuple[str, str] | None:
    """The experiment's lifecycle stage and artifact location; None if it does not exist."""
    uri, path = config.tracking_uri, sqlite_path(config.tracking_uri)
    if uri.startswith("http"):
        from mlflow.tracking import MlflowClient

        configure_client()
        found = MlflowClient(uri, registry_uri=uri).get_experiment_by_name(config.experiment)
        return None if found is None else (found.lifecycle_stage, found.artifact_location)
    if path is not None and not path.exists():
        return None
    try:
        with connected(uri if path is None else read_only_url(path)) as connection:
            if not sqlalchemy.inspect(connection).has_table("experiments"):
                return None
            row = connection.execute(_EXPERIMENT, {"name": config.experiment}).first()
        return None if row is None else (row.lifecycle_stage, row.artifact_location)
    except sqlalchemy.exc.OperationalError as error:
        if path is not None and "locked" in str(error):
            return None  # in use; opening it later waits
        raise


_EXPERIMENT = text("SELECT lifecycle_stage, artifact_location FROM experiments WHERE name = :name")


def configure_client() -> None:
    """Limit how long MLflow's client waits for a server, and keep it from printing."""
    # MLflow's default, 7 retries of 120 s, would block a trial for 20 minutes if the server hangs,
    # and would repeat a creation that a slow server has carried out.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # At the end of every run it would print the URL, including a password in it.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # errors are raised anyway
    logging.getLogger("alembic").setLevel(logging.ERROR)


_URIS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_taking_turns = threading.RLock()  # there is one URI for the whole process


@contextlib.contextmanager
def global_uri(uri: str) -> Iterator[None]:
    """Let MLflow's functions that take no URI use `uri` in the block; threads take turns."""
    import mlflow

    with _taking_turns:
        uris: tuple[str | None, str | None] = None, None
        if mlflow.is_tracking_uri_set():  # type: ignore[no-untyped-call]
            uris = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
            if uris[0] == uris[1]:  # or the registry's would no longer follow the other
                uris = uris[0], None
        variables = {name: os.environ.get(name) for name in _URIS}
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(uris[0])  # type: ignore[arg-type]
            mlflow.set_registry_uri(uris[1])  # type: ignore[arg-type]
            for name, value in variables.items():  # setting a URI sets its variable, too
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
