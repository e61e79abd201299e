"""The registered model: its versions, the alias, and the stage that follows the alias."""

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy
from sqlalchemy import text

from search.config.settings import StudyConfig
from search.config.urls import sqlite_path, sqlite_url
from search.errors import RunError, one_line
from search.study.lock import promotion_lock
from search.study.postgres import connected
from search.tracking.address import check_tracking, configure_client
from search.tracking.schema import LINEAGE, MODEL_URI, NUMBER, STUDY, test_metrics

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from search.tracking.runs import Tracking

ALIAS = "production"


@dataclass(frozen=True)
class Production:
    """A version of the registered model `model`, with the study, trial and run it comes from.

    metrics: of the test examples, by name, as `test_accuracy`.
    """

    model: str
    version: int
    run_id: str
    study: str | None
    trial: int | None
    metrics: dict[str, float]


def find_production(config: StudyConfig) -> Production | None:
    """The version with the alias `production`; None if there is none."""
    if config.tracking_uri.startswith("http"):
        return _from_server(config)
    path = sqlite_path(config.tracking_uri)
    if path is not None and not path.exists():
        return None
    with connected(config.tracking_uri if path is None else sqlite_url(path)) as connection:
        return _from_tables(connection, config.model_name)


def _from_tables(connection: sqlalchemy.Connection, name: str) -> Production | None:
    """Read from MLflow 3.17's tables: importing MLflow would take longer than all the rest."""
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
    metrics = connection.execute(
        text("SELECT key, value FROM latest_metrics WHERE run_uuid = :run ORDER BY key"),
        {"run": found.run_id},
    )
    return _production(
        name,
        found.version,
        found.run_id,
        {tag.key: tag.value for tag in tags},
        {row.key: row.value for row in metrics},
    )


def _from_server(config: StudyConfig) -> Production | None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    check_tracking(config.tracking_uri)
    configure_client()
    client = MlflowClient(config.tracking_uri, registry_uri=config.tracking_uri)
    try:
        version = aliased_version(client, config.model_name)
    except MlflowException as error:
        raise RunError(
            f"the MLflow server did not answer ({one_line(error)}); check it and try again"
        ) from None
    if version is None:
        return None
    metrics: dict[str, float] = {}
    with contextlib.suppress(MlflowException):  # its run may have been deleted
        metrics = client.get_run(str(version.run_id)).data.metrics
    return _production(version.name, version.version, str(version.run_id), version.tags, metrics)


def aliased_version(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """The version of the model `name` with the alias; None if there is none."""
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
    metrics: Mapping[str, float],
) -> Production:
    number = tags.get(NUMBER, "")
    return Production(
        model=name,
        version=int(version),
        run_id=run_id,
        study=tags.get(STUDY),
        trial=int(number) if number.isdigit() else None,
        metrics=test_metrics(metrics),
    )


STAGE = "Production"


def find_version(tracking: "Tracking", config: StudyConfig, run_id: str) -> "ModelVersion | None":
    """The model version that was registered from `run_id`; None if there is none."""
    found = tracking.client.search_model_versions(f"run_id = '{run_id}'")
    versions = [version for version in found if version.name == config.model_name]
    return versions[0] if versions else None


def register(tracking: "Tracking", config: StudyConfig, run: "Run") -> "ModelVersion":
    """Register the model that the retraining `run` logged; returns the new version."""
    from mlflow.exceptions import MlflowException

    client = tracking.client
    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(config.model_name)
    model_id = run.data.tags[MODEL_URI].removeprefix("models:/")
    return client.create_model_version(
        config.model_name,
        source=client.get_logged_model(model_id).artifact_location,
        run_id=run.info.run_id,
        model_id=model_id,
        tags={key: value for key, value in run.data.tags.items() if key in LINEAGE},
    )


def wrong_stages(tracking: "Tracking", name: str) -> "list[tuple[ModelVersion, str]]":
    """The versions whose stage does not follow the alias, each with the expected stage.

    At most one version has the alias, but each has a stage, so processes that promote at the same
    time may leave two in Production.
    """
    production = aliased_version(tracking.client, name)
    if production is None:
        return []  # nothing to follow
    versions = tracking.client.search_model_versions(f"name = '{name}'")
    wanted = [(v, STAGE if v.version == production.version else "Archived") for v in versions]
    wrong = [
        (version, stage)
        for version, stage in wanted
        if version.current_stage != stage and STAGE in (stage, version.current_stage)
    ]
    return sorted(wrong, key=lambda pair: pair[1] != STAGE)


def follow_alias(tracking: "Tracking", config: StudyConfig) -> None:
    """Give the stage Production to the version with the alias, and to no other one."""
    name = config.model_name
    deprecated = warnings.catch_warnings(action="ignore", category=FutureWarning)  # but required
    with promotion_lock(config), deprecated:
        for version, stage in wrong_stages(tracking, name):
            tracking.client.transition_model_version_stage(name, version.version, stage)
