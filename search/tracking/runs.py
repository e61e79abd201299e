"""The MLflow side: the parent run, a nested run per trial, and making a run match its trial.

Optuna is the truth and this is its mirror. What a run shall hold follows from its trial and the
study's facts alone, timestamps included, so writing it once more changes nothing, and a run that
was lost, or never made, is written again from them.
"""

import contextlib
import getpass
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mlflow
import optuna
import requests
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.trial import FrozenTrial

from search.config.settings import StudyConfig
from search.config.urls import sqlite_path, sqlite_url
from search.study.sqlite import create_sqlite, tune_sqlite
from search.study.storage import RUN_ID, UID
from search.study.trials import METRICS, history_of
from search.tracking.address import configure_client, in_trash
from search.tracking.schema import (
    NOTE,
    NUMBER,
    ORPHAN,
    PARENT,
    STATUS,
    STUDY,
    STUDY_UID,
    SUMMARY,
    Metadata,
    params_of,
    tags_of,
)

TRACKING_ERRORS = (MlflowException, requests.RequestException)  # a tracking server that fails
_URIS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # how MLflow's UI opens it
_address = threading.RLock()  # around the address that MLflow keeps for the whole process
_BATCH = 900  # MLflow takes 1,000 entries a call


class Tracking:
    """The experiment's runs. Constructing changes nothing; `open` creates what is missing."""

    def __init__(self, config: StudyConfig) -> None:
        path = sqlite_path(config.tracking_uri)
        self.uri = config.tracking_uri if path is None else sqlite_url(path)
        self._path = path
        self._experiment = config.experiment
        configure_client()

    def open(self) -> "Tracking":
        """Create the database and the experiment where they do not exist."""
        if self._path is not None:
            create_sqlite(self._path, lambda url: _create_schema(url, self._artifacts()))
            tune_sqlite(self._path)
        self.client = MlflowClient(self.uri, registry_uri=self.uri)
        self.experiment_id = self._experiment_id()
        return self

    def disconnect(self) -> None:
        """Close the connections to a database, which MLflow keeps for the whole process."""
        registry = self.client._get_registry_client()  # type: ignore[no-untyped-call]
        for store in (self.client._tracking_client.store, registry.store):
            engine = getattr(store, "engine", None)  # None of a server's
            if engine is not None:
                engine.dispose()

    def exists(self) -> bool:
        """Whether `open` would create nothing."""
        if self._path is not None and not self._path.exists():
            return False
        client = MlflowClient(self.uri, registry_uri=self.uri)
        return client.get_experiment_by_name(self._experiment) is not None

    def _artifacts(self) -> str:
        assert self._path is not None
        return (self._path.parent / "mlruns").as_uri()

    def _experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            location = None if self._path is None else f"{self._artifacts()}/{self._experiment}"
            try:
                return self.client.create_experiment(self._experiment, location, _KIND)
            except MlflowException:  # another process was first
                found = self.client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise in_trash(self.uri, self._experiment)
        return str(found.experiment_id)

    # ---- the parent run ----------------------------------------------------------------------

    def parent_run(self, study: optuna.Study, params: Mapping[str, Any]) -> str:
        """The id of the study's parent run, made where there is none, out of the trash if there."""
        known = self._find_parent(study)
        if known is None:
            run_id = self.client.create_run(
                self.experiment_id,
                run_name=study.study_name,
                tags={
                    STUDY: study.study_name,
                    STUDY_UID: study.user_attrs[UID],
                    **_author(),
                },
            ).info.run_id
        else:
            run_id = known.info.run_id
            if known.info.lifecycle_stage == "deleted":
                self.client.restore_run(run_id)
        if study.user_attrs.get(RUN_ID) != run_id:
            self._log(run_id, params=params)
            study.set_user_attr(RUN_ID, run_id)
        return str(run_id)

    def has_parent(self, study: optuna.Study) -> bool:
        """Whether `parent_run` would neither make nor restore one."""
        known = self._find_parent(study)
        return (
            known is not None
            and known.info.lifecycle_stage == "active"
            and known.info.run_id == study.user_attrs.get(RUN_ID)
        )

    def _find_parent(self, study: optuna.Study) -> Run | None:
        """The parent run that the study names, in the trash or not; else the oldest made for it."""
        named = study.user_attrs.get(RUN_ID)
        known = None if named is None else self.find(named)
        if known is not None:
            return known
        runs = self._search(f"tags.`{STUDY_UID}` = '{study.user_attrs[UID]}'")
        parents = [run for run in runs if PARENT not in run.data.tags]
        return parents[-1] if parents else None

    def find(self, run_id: str) -> Run | None:
        """The run, in the trash or not; None where there is none."""
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def reopen(self, run_id: str) -> None:
        """Show the parent run as running."""
        self.client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: str) -> None:
        """End a run that has not ended; what ended badly before may be FINISHED after all."""
        now = self.client.get_run(run_id).info.status
        if now == "RUNNING" or (status == "FINISHED" and now != status):
            self.client.set_terminated(run_id, status)

    def is_described(self, run_id: str, text: str) -> bool:
        """Whether `describe` wrote this text last."""
        return self.client.get_run(run_id).data.tags.get(SUMMARY) == text

    def describe(self, run_id: str, text: str) -> None:
        """Make `text` the run's description, unless the user has written another."""
        tags = self.client.get_run(run_id).data.tags
        own = tags.get(NOTE, "") in ("", tags.get(SUMMARY))
        self._log(run_id, tags={**({NOTE: text} if own else {}), SUMMARY: text})

    # ---- runs of trials ----------------------------------------------------------------------

    def create_run(
        self,
        parent: str,
        name: str,
        number: int,
        tags: Mapping[str, str] | None = None,
        start_ms: int | None = None,
    ) -> str:
        """A new nested run of trial `number`, begun now or then (ms); returns its id."""
        run = self.client.create_run(
            self.experiment_id,
            start_time=start_ms,
            run_name=name,
            tags={PARENT: parent, NUMBER: str(number), **_author(), **(tags or {})},
        )
        return str(run.info.run_id)

    def log_start(self, run_id: str, trial: FrozenTrial, facts: Metadata) -> None:
        """Write what is known before the first epoch."""
        self._log(run_id, params=params_of(trial, facts))
        dataset = mlflow.entities.Dataset(**facts["dataset"])
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags=[])])

    def log_epoch(self, run_id: str, epoch: Mapping[str, float]) -> None:
        """Write one entry of a trial's history."""
        self._log(run_id, metrics=_metrics([epoch]))

    def finish(self, run_id: str, trial: FrozenTrial) -> None:
        """End the run as its trial ended; the tag of the state is the last thing written."""
        ended = trial.datetime_complete
        self.client.set_terminated(
            run_id, STATUS[trial.state], None if ended is None else int(ended.timestamp() * 1000)
        )
        self._log(run_id, tags=tags_of(trial))

    def runs_of(self, parent: str) -> list[Run]:
        """The nested runs of a study, trials' and others', newest first."""
        return self._search(f"tags.`{PARENT}` = '{parent}'")

    def repair(self, run_id: str, trial: FrozenTrial, facts: Metadata) -> None:
        """Write all of a finished trial into its run; what is there already stays as it is."""
        self.log_start(run_id, trial, facts)
        self._log(run_id, metrics=_metrics(history_of(trial)))
        self.finish(run_id, trial)

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Every point of a metric: step and value, by step."""
        points = self.client.get_metric_history(run_id, metric)
        return sorted((point.step, point.value) for point in points)

    def adopt(self, run_id: str, parent: str) -> None:
        """Hang a run under its study's parent run."""
        self.client.set_tag(run_id, PARENT, parent)

    def orphan(self, run: Run) -> None:
        """End a run that belongs to no trial, and say so."""
        if run.info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, "KILLED")
        self.client.set_tag(run.info.run_id, ORPHAN, "true")

    def _search(self, query: str) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, max_results=1000, page_token=token
            )
            runs.extend(page)
            token = page.token
            if not token:
                return runs

    def _log(
        self,
        run_id: str,
        metrics: Iterable[Metric] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        entries = list(metrics)
        self.client.log_batch(
            run_id,
            metrics=entries[:_BATCH],
            params=[Param(key, str(value)) for key, value in (params or {}).items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )
        for first in range(_BATCH, len(entries), _BATCH):
            self.client.log_batch(run_id, metrics=entries[first : first + _BATCH])

    # ---- the retrained winner ------------------------------------------------------------------

    def log_result(
        self, run_id: str, history: list[dict[str, float]], final: Mapping[str, float]
    ) -> None:
        """Write the retraining's history and its final metrics."""
        now = int(time.time() * 1000)
        last = [Metric(name, value, now, len(history) - 1) for name, value in final.items()]
        self._log(run_id, metrics=[*_metrics(history), *last])

    @contextlib.contextmanager
    def active(self, run_id: str) -> Iterator[None]:
        """Make `run_id` MLflow's active run, which only `log_model` needs; end it FINISHED."""
        with self.addressed(), mlflow.start_run(run_id=run_id, nested=True):
            yield

    @contextlib.contextmanager
    def addressed(self) -> Iterator[None]:
        """Let MLflow's functions that take no address work here, and nowhere else meanwhile."""
        with _address:
            yield from self._addressed()

    def _addressed(self) -> Iterator[None]:
        uris: Any = None, None
        if mlflow.is_tracking_uri_set():  # type: ignore[no-untyped-call]
            uris = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
            if uris[0] == uris[1]:  # else the registry's would no longer follow the other
                uris = uris[0], None
        variables = {name: os.environ.get(name) for name in _URIS}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(uris[0])
            mlflow.set_registry_uri(uris[1])
            for name, value in variables.items():  # setting an address sets its variable, too
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _author() -> dict[str, str]:
    """Who and what made a run, as MLflow's own fluent API tags it."""
    tags = {"mlflow.source.name": "study.py"}
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _create_schema(url: str, artifacts: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(url, artifacts)  # type: ignore[no-untyped-call]
    store.engine.dispose()


def _metrics(history: Iterable[Mapping[str, float]]) -> list[Metric]:
    return [
        Metric(name, entry[name], int(entry["time_ms"]), int(entry["epoch"]))
        for entry in history
        for name in METRICS.values()
        if name in entry
    ]
