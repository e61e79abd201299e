"""The MLflow side: a study's parent run, and a nested run per trial.

The Optuna study is authoritative. A trial's run, timestamps included, follows from the trial and
the study's metadata alone, so writing it is idempotent, and a lost run can be written again.
"""

import contextlib
import getpass
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
from search.study.trials import history_of, metrics_in, now_ms
from search.tracking import schema
from search.tracking.address import configure_client, global_uri, in_trash

TRACKING_ERRORS = (MlflowException, requests.RequestException)  # a tracking server that fails
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the view in MLflow's UI
_BATCH = 900  # MLflow takes 1,000 entries a call


class Tracking:
    """The runs of an experiment. Constructing changes nothing; `open` creates what is missing."""

    def __init__(self, config: StudyConfig) -> None:
        path = sqlite_path(config.tracking_uri)
        self.uri = config.tracking_uri if path is None else sqlite_url(path)
        self._path = path
        self._experiment = config.experiment
        configure_client()

    def open(self) -> "Tracking":
        """Create the database and the experiment if they do not exist; returns itself."""
        if self._path is not None:
            create_sqlite(self._path, lambda url: _create_schema(url, self._artifacts()))
            tune_sqlite(self._path)
        self.client = MlflowClient(self.uri, registry_uri=self.uri)
        self.experiment_id = self._experiment_id()
        return self

    def disconnect(self) -> None:
        """Close the database connections, which MLflow keeps open until the process ends."""
        if not hasattr(self, "client"):
            return
        registry = self.client._get_registry_client()  # type: ignore[no-untyped-call]
        for store in (self.client._tracking_client.store, registry.store):
            engine = getattr(store, "engine", None)  # a server's store has none
            if engine is not None:
                engine.dispose()

    def exists(self) -> bool:
        """Whether `open` would create nothing."""
        if self._path is not None and not self._path.exists():
            return False
        self.client = MlflowClient(self.uri, registry_uri=self.uri)
        return self.client.get_experiment_by_name(self._experiment) is not None

    def _artifacts(self) -> str:
        assert self._path is not None
        return (self._path.parent / "mlruns").as_uri()

    def _experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            location = None if self._path is None else f"{self._artifacts()}/{self._experiment}"
            try:
                return self.client.create_experiment(self._experiment, location, _KIND)
            except MlflowException:  # another process was faster
                found = self.client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise in_trash(self.uri, self._experiment)
        return str(found.experiment_id)

    # ---- the parent run ----------------------------------------------------------------------

    def parent_run(self, study: optuna.Study, params: Mapping[str, Any]) -> str:
        """The id of the study's parent run, created or restored from the trash if needed."""
        known = self._find_parent(study)
        if known is None:
            run_id = self.client.create_run(
                self.experiment_id,
                run_name=study.study_name,
                tags={
                    schema.STUDY: study.study_name,
                    schema.STUDY_UID: study.user_attrs[UID],
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
        """Whether `parent_run` would neither create nor restore a run."""
        known = self._find_parent(study)
        return (
            known is not None
            and known.info.lifecycle_stage == "active"
            and known.info.run_id == study.user_attrs.get(RUN_ID)
        )

    def _find_parent(self, study: optuna.Study) -> Run | None:
        """The study's parent run, deleted or not: the linked one, or else the oldest one."""
        named = study.user_attrs.get(RUN_ID)
        known = None if named is None else self.find(named)
        if known is not None:
            return known
        runs = self._search(f"tags.`{schema.STUDY_UID}` = '{study.user_attrs[UID]}'")
        parents = [run for run in runs if schema.PARENT not in run.data.tags]
        return parents[-1] if parents else None

    def find(self, run_id: str) -> Run | None:
        """The run, deleted or not; None if it does not exist."""
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def reopen(self, run_id: str) -> None:
        """Set a run's status to RUNNING."""
        self.client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: str) -> None:
        """End a running run with `status`; one that ended otherwise may still become FINISHED."""
        now = self.client.get_run(run_id).info.status
        if now == "RUNNING" or (status == "FINISHED" and now != status):
            self.client.set_terminated(run_id, status)

    def is_described(self, run_id: str, text: str) -> bool:
        """Whether `text` was the last text that `describe` wrote."""
        return self.client.get_run(run_id).data.tags.get(schema.SUMMARY) == text

    def describe(self, run_id: str, text: str) -> None:
        """Make `text` the run's description, unless the user has edited it."""
        tags = self.client.get_run(run_id).data.tags
        own = tags.get(schema.NOTE, "") in ("", tags.get(schema.SUMMARY))
        self._log(run_id, tags={**({schema.NOTE: text} if own else {}), schema.SUMMARY: text})

    def log_values(self, run_id: str, values: Mapping[str, float]) -> None:
        """Log metrics that have no epoch."""
        now = now_ms()
        self._log(run_id, metrics=[Metric(name, value, now, 0) for name, value in values.items()])

    # ---- runs of trials ----------------------------------------------------------------------

    def create_run(
        self,
        parent: str,
        name: str,
        number: int,
        tags: Mapping[str, str] | None = None,
        start_ms: int | None = None,
    ) -> str:
        """Create a nested run of trial `number`, started now or at `start_ms`; returns its id."""
        run = self.client.create_run(
            self.experiment_id,
            start_time=start_ms,
            run_name=name,
            tags={schema.PARENT: parent, schema.NUMBER: str(number), **_author(), **(tags or {})},
        )
        return str(run.info.run_id)

    def log_start(self, run_id: str, trial: FrozenTrial, metadata: schema.Metadata) -> None:
        """Log the params and the dataset, which are known before the first epoch."""
        self._log(run_id, params=schema.params_of(trial, metadata))
        dataset = mlflow.entities.Dataset(**metadata["dataset"])
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags=[])])

    def log_epochs(self, run_id: str, entries: Iterable[Mapping[str, float]]) -> None:
        """Log entries of a trial's history."""
        self._log(run_id, metrics=_metrics(entries))

    def finish(self, run_id: str, trial: FrozenTrial) -> None:
        """End the run as its trial ended; the tag of the state is written last."""
        ended = trial.datetime_complete
        self.client.set_terminated(
            run_id,
            schema.STATUS[trial.state],
            None if ended is None else int(ended.timestamp() * 1000),
        )
        self._log(run_id, tags=schema.tags_of(trial))

    def runs_of(self, parent: str) -> list[Run]:
        """All nested runs of a parent run, newest first."""
        return self._search(f"tags.`{schema.PARENT}` = '{parent}'")

    def repair(self, run_id: str, trial: FrozenTrial, metadata: schema.Metadata) -> None:
        """Write a finished trial into its run; idempotent."""
        self.log_start(run_id, trial, metadata)
        self.log_epochs(run_id, history_of(trial))
        self.finish(run_id, trial)

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """All points of a metric as (step, value), by step."""
        points = self.client.get_metric_history(run_id, metric)
        return sorted((point.step, point.value) for point in points)

    def adopt(self, run_id: str, parent: str) -> None:
        """Nest a run under `parent`."""
        self.client.set_tag(run_id, schema.PARENT, parent)

    def orphan(self, run: Run) -> None:
        """End a run that belongs to no trial, and tag it so."""
        if run.info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, "KILLED")
        self.client.set_tag(run.info.run_id, schema.ORPHAN, "true")

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
        self,
        run_id: str,
        history: list[dict[str, float]],
        final: Mapping[str, float],
        model_id: str,
    ) -> None:
        """Log the retraining's history and its final metrics, those also to the logged model."""
        now, step = now_ms(), len(history) - 1
        last = [Metric(*point, now, step, model_id, run_id=run_id) for point in final.items()]
        self._log(run_id, metrics=[*_metrics(history), *last])

    @contextlib.contextmanager
    def active(self, run_id: str) -> Iterator[None]:
        """Make `run_id` MLflow's active run, for functions that take no run; end it as FINISHED."""
        with global_uri(self.uri), mlflow.start_run(run_id=run_id, nested=True):
            yield


def _author() -> dict[str, str]:
    """The tags of user and program that MLflow's fluent API sets."""
    tags = {"mlflow.source.name": "study.py"}
    with contextlib.suppress(KeyError, OSError):  # in a container the user may have no name
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
        for name in metrics_in(entry)
    ]
