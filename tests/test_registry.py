"""Registering goes on where it was stopped: one version, one in production, nothing twice."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import invariants
import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search import pipeline
from search.config import StudyConfig

NAME = "MNIST_DNN_Model"
TRIALS = 2


class Stopped(BaseException):
    """The process ends here, as far as the code above can tell."""


@pytest.fixture
def config(in_folder: Path, clouds: Path) -> StudyConfig:
    return small(clouds)


def small(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {"epochs": 1, "n_trials": TRIALS, "workers": 1, "hidden_units": "8,16"}
    return StudyConfig(dataset=str(dataset), **{**settings, **changed})


@pytest.fixture
def client(in_folder: Path) -> Iterator[MlflowClient]:
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    uri = f"sqlite:///{in_folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    yield MlflowClient(uri, registry_uri=uri)
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


def retrainings(found: dict[str, Any]) -> list[str]:
    return sorted(r.info.status for r in found["children"] if r.info.run_name.startswith("retrain"))


# ---- stopped between two steps -------------------------------------------------------------------

RETRAINING = ("log_artifact",)
REGISTERING = (
    "get_run",
    "create_registered_model",
    "get_logged_model",
    "create_model_version",
    "set_registered_model_alias",
    "get_model_version_by_alias",
    "transition_model_version_stage",
    "set_model_version_tag",
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [*RETRAINING, *REGISTERING])
def test_a_registration_stopped_at_any_step_is_completed_by_the_next_run(
    config: StudyConfig,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: str,
) -> None:
    original = getattr(MlflowClient, step)
    stopped = []

    def stop(self: MlflowClient, *arguments: Any, **named: Any) -> Any:
        if not retrained(client):  # get_run serves the trials too
            return original(self, *arguments, **named)
        stopped.append(step)
        if when == "after":
            original(self, *arguments, **named)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, stop)
        with pytest.raises(Stopped):
            pipeline.run(config)
    assert stopped

    result = pipeline.run(config)
    found = invariants.check(Path.cwd(), TRIALS)
    assert result.ran == 0
    assert result.winner is not None
    assert (result.winner.trial, result.winner.version) == (result.best.number, 1)  # type: ignore[union-attr]
    assert [v.version for v in client.search_model_versions(f"name = '{NAME}'")] == ["1"]
    assert retrainings(found) == (["FAILED", "FINISHED"] if step in RETRAINING else ["FINISHED"])
    before = invariants.dump(Path.cwd())
    pipeline.run(config)
    assert invariants.dump(Path.cwd()) == before


def retrained(client: MlflowClient) -> bool:
    """Whether a retraining has begun."""
    with closing(sqlite3.connect("mlflow.db")) as database:
        query = "SELECT count(*) FROM runs WHERE name LIKE 'retrain-%'"
        return bool(database.execute(query).fetchone()[0])


def test_an_error_while_registering_ends_the_parent_run_and_the_next_run_completes_it(
    config: StudyConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("the server is down")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", refuse)
        with pytest.raises(MlflowException, match="the server is down"):
            pipeline.run(config)
    assert invariants.check(Path.cwd(), TRIALS, registered=False)["parent"].info.status == "FAILED"
    pipeline.run(config)
    found = invariants.check(Path.cwd(), TRIALS)
    assert retrainings(found) == ["FINISHED"]


# ---- production ----------------------------------------------------------------------------------


def test_a_second_study_takes_over_production_and_the_model_loads_by_alias_and_by_stage(
    config: StudyConfig, client: MlflowClient, clouds: Path
) -> None:
    first = pipeline.run(config)
    second = pipeline.run(
        small(clouds, study_name="second", epochs=8, hidden_units="64", learning_rate="0.01")
    )
    assert first.winner is not None
    assert second.winner is not None
    assert (first.winner.version, second.winner.version) == (1, 2)
    assert second.winner.test_accuracy > first.winner.test_accuracy
    versions = {v.version: v for v in client.search_model_versions(f"name = '{NAME}'")}
    assert {n: v.current_stage for n, v in versions.items()} == {"1": "Archived", "2": "Production"}
    assert client.get_model_version_by_alias(NAME, "production").version == "2"
    assert versions["2"].run_id == second.winner.run_id
    assert versions["2"].tags["optuna.study_name"] == "second"
    assert invariants.check(Path.cwd(), TRIALS, study_name="second")["winner"] is not None
    assert invariants.check(Path.cwd(), TRIALS)["winner"] is None

    with np.load(clouds) as data:
        x, y = data["x_test"], data["y_test"]
    for name in (f"{NAME}@production", f"{NAME}/Production"):
        model = mlflow.keras.load_model(f"models:/{name}")
        accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
        assert accuracy == pytest.approx(second.winner.test_accuracy, abs=1e-6)

    before = invariants.dump(Path.cwd())
    assert pipeline.run(config).winner == first.winner.__class__(
        **{**vars(first.winner), "new": False}
    )
    assert invariants.dump(Path.cwd()) == before


def test_a_better_trial_is_registered_over_the_old_one(config: StudyConfig, clouds: Path) -> None:
    wide = {"hidden_units": "8", "learning_rate": "1e-5:1:log", "sampler": "random"}
    first = pipeline.run(small(clouds, **wide, n_trials=1))
    more = pipeline.run(small(clouds, **wide, n_trials=8))
    found = invariants.check(Path.cwd(), 8)
    assert first.winner is not None
    assert more.winner is not None
    assert (first.winner.trial, more.winner.trial) == (0, more.best.number)  # type: ignore[union-attr]
    assert more.winner.trial > 0
    assert (first.winner.version, more.winner.version, more.winner.new) == (1, 2, True)
    assert retrainings(found) == ["FINISHED", "FINISHED"]
