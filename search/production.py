"""Which version of the model is in production, and whence: read without MLflow's slow import."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

import sqlalchemy
from sqlalchemy import text

from search.config import InputError, RunError, StudyConfig, one_line
from search.contract import NUMBER, STUDY
from search.database import check_server, check_sqlite, read_only_url
from search.urls import redact, sqlite_path, sqlite_url

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

ALIAS = "production"
_SCHEMES = ("http", "https", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class Production:
    """A version of the registered model `model`, the study and trial it is from, and its run."""

    model: str
    version: int
    run_id: str
    study: str | None
    trial: int | None
    test_accuracy: float | None


def check(uri: str) -> None:
    """Raise InputError where `uri` names no MLflow database or server; a file is only read."""
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
    """Raise InputError where the experiment takes no runs or no models; creates nothing."""
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
    """What to tell the user of an experiment that was deleted."""
    return InputError(
        f"--experiment {experiment} must not be deleted, but it is in the trash of "
        f"{redact(uri)}; restore it with mlflow experiments restore, or give another"
    )


def _stored(config: StudyConfig) -> tuple[str, str] | None:
    """The experiment's lifecycle stage and its artifacts' address; None where there is none."""
    uri, path = config.tracking_uri, sqlite_path(config.tracking_uri)
    if uri.startswith("http"):
        from mlflow.tracking import MlflowClient

        from search.tracking import Tracking

        Tracking(config)  # says how long MLflow may wait for a server
        found = MlflowClient(uri, registry_uri=uri).get_experiment_by_name(config.experiment)
        return None if found is None else (found.lifecycle_stage, found.artifact_location)
    if path is not None and not path.exists():
        return None
    engine = sqlalchemy.create_engine(uri if path is None else read_only_url(path))
    try:
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("experiments"):
                return None
            row = connection.execute(_EXPERIMENT, {"name": config.experiment}).first()
        return None if row is None else (row.lifecycle_stage, row.artifact_location)
    except sqlalchemy.exc.OperationalError as error:
        if path is not None and "locked" in str(error):
            return None  # in use; opening it waits
        raise
    finally:
        engine.dispose()


_EXPERIMENT = text("SELECT lifecycle_stage, artifact_location FROM experiments WHERE name = :name")


def find(config: StudyConfig) -> Production | None:
    """The version with the alias `production`, None where nothing is in production."""
    if config.tracking_uri.startswith("http"):
        return _from_server(config)
    path = sqlite_path(config.tracking_uri)
    if path is not None and not path.exists():
        return None
    engine = sqlalchemy.create_engine(config.tracking_uri if path is None else sqlite_url(path))
    try:
        with engine.connect() as connection:
            return _from_tables(connection, config.model_name)
    finally:
        engine.dispose()


def _from_tables(connection: sqlalchemy.Connection, name: str) -> Production | None:
    """From the tables of MLflow 3.17, whose import alone takes longer than all the rest."""
    found = connection.execute(
        text(
            "SELECT v.version, v.run_id FROM model_versions v JOIN registered_model_aliases a "
            "ON a.name = v.name AND a.version = v.version WHERE a.name = :name AND a.alias = :alias"
        ),
        {"name": name, "alias": ALIAS},
    ).first()
    if found is None:
        return None
    tags = connection.execute(
        text("SELECT key, value FROM model_version_tags WHERE name = :name AND version = :version"),
        {"name": name, "version": found.version},
    )
    accuracy = connection.execute(
        text("SELECT value FROM latest_metrics WHERE run_uuid = :run AND key = 'test_accuracy'"),
        {"run": found.run_id},
    ).scalar()
    return _production(
        name, found.version, found.run_id, {tag.key: tag.value for tag in tags}, accuracy
    )


def _from_server(config: StudyConfig) -> Production | None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from search import address, tracking

    address.check(config.tracking_uri)
    tracking.Tracking(config)  # says how long MLflow may wait for a server
    client = MlflowClient(config.tracking_uri, registry_uri=config.tracking_uri)
    try:
        version = aliased(client, config.model_name)
    except MlflowException as error:
        raise RunError(
            f"the MLflow server did not answer ({one_line(error)}); look at it and try again"
        ) from None
    if version is None:
        return None
    accuracy = None
    with contextlib.suppress(MlflowException):  # its run may have been deleted
        accuracy = client.get_run(str(version.run_id)).data.metrics.get("test_accuracy")
    return _production(version.name, version.version, str(version.run_id), version.tags, accuracy)


def aliased(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """The version of the model `name` with the alias, None where there is no such."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _production(
    name: str,
    version: int | str,
    run_id: str,
    tags: Mapping[str, str],
    accuracy: float | None,
) -> Production:
    number = tags.get(NUMBER, "")
    return Production(
        model=name,
        version=int(version),
        run_id=run_id,
        study=tags.get(STUDY),
        trial=int(number) if number.isdigit() else None,
        test_accuracy=accuracy,
    )
