"""Registering goes on where it was stopped: one version, one in production, nothing twice."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import keras
import mlflow
import numpy as np
import pytest
import sqlalchemy
from conftest import copy_databases
from mlflow.tracking import MlflowClient

from search import pipeline
from search.config.settings import StudyConfig

NAME = "MNIST_DNN_Model"
TRIALS = 2


class Stopped(BaseException):
    """The process ends here, as far as the code above can tell."""


@pytest.fixture
def config(in_folder: Path, clouds: Path) -> StudyConfig:
    return small(clouds)


def small(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {"epochs": 1, "n_trials": TRIALS, "workers": 1, "hidden_units": "8,16"}
    return StudyConfig(
        dataset=str(dataset), report="none", baselines="none", **{**settings, **changed}
    )


def retrainings(found: dict[str, Any]) -> list[str]:
    return sorted(r.info.status for r in found["children"] if r.info.run_name.startswith("retrain"))


# ---- stopped between two steps -------------------------------------------------------------------

STEPS = (
    "get_run",
    "create_registered_model",
    "get_logged_model",
    "create_model_version",
    "set_registered_model_alias",
    "get_model_version_by_alias",
    "transition_model_version_stage",
    "set_model_version_tag",
)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> Path:
    """A study whose best trial was retrained, and whose run was stopped right then."""
    folder = tmp_path_factory.mktemp("retrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        stop_at(patch, "create_registered_model", "before")
        with pytest.raises(Stopped):
            pipeline.run(small(clouds))
    return folder


def stop_at(patch: pytest.MonkeyPatch, step: str, when: str) -> None:
    """End the process before, or after, its first call of the MLflow client's method `step`."""
    original = getattr(MlflowClient, step)

    def stop(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        if when == "after":
            original(self, *arguments, **named)
        raise Stopped

    patch.setattr(MlflowClient, step, stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "when"),
    [*((step, "before") for step in STEPS), ("set_model_version_tag", "after")],
)  # after one step is before the next
def test_a_registration_stopped_at_any_step_is_completed_by_the_next_run(
    config: StudyConfig,
    retrained: Path,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: str,
) -> None:
    copy_databases(retrained, Path.cwd())
    with monkeypatch.context() as patch:
        stop_at(patch, step, when)
        with pytest.raises(Stopped):
            pipeline.run(config)

    result = pipeline.run(config)
    found = invariants.check(Path.cwd(), TRIALS)
    assert result.ran == 0
    assert result.winner is not None
    assert (result.winner.version, result.winner.new) == (1, False)
    assert [int(v.version) for v in client.search_model_versions(f"name = '{NAME}'")] == [1]
    assert retrainings(found) == ["FINISHED"]
    before = invariants.dump(Path.cwd())
    pipeline.run(config)
    assert invariants.dump(Path.cwd()) == before


@pytest.fixture
def refused() -> Iterator[list[str]]:
    """The errors of the databases from here on, also those that MLflow handles."""
    errors: list[str] = []

    def note(context: sqlalchemy.engine.ExceptionContext) -> None:
        errors.append(str(context.original_exception))

    sqlalchemy.event.listen(sqlalchemy.Engine, "handle_error", note)
    yield errors
    sqlalchemy.event.remove(sqlalchemy.Engine, "handle_error", note)


def test_a_retraining_stopped_before_its_end_is_done_again_and_logs_no_point_twice(
    config: StudyConfig,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    refused: list[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "log_artifacts", "after")
        with pytest.raises(Stopped):
            pipeline.run(config)
    pipeline.run(config)
    found = invariants.check(Path.cwd(), TRIALS)
    assert len(retrainings(found)) == 2
    assert [int(v.version) for v in client.search_model_versions(f"name = '{NAME}'")] == [1]
    assert [error for error in refused if "metrics" in error] == []
    winner = found["winner"].data
    model = client.get_logged_model(winner.tags["model_uri"].removeprefix("models:/"))
    measured = {point.key: point.value for point in model.metrics}
    assert measured == {name: v for name, v in winner.metrics.items() if name.startswith("test_")}


# ---- production ----------------------------------------------------------------------------------


@pytest.mark.slow
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
    versions = {int(v.version): v for v in client.search_model_versions(f"name = '{NAME}'")}
    assert {n: v.current_stage for n, v in versions.items()} == {1: "Archived", 2: "Production"}
    assert int(client.get_model_version_by_alias(NAME, "production").version) == 2
    assert versions[2].run_id == second.winner.run_id
    assert versions[2].tags["optuna.study_name"] == "second"
    for study_name, result in (("second", second), ("mnist-dnn", first)):
        found = invariants.check(Path.cwd(), TRIALS, study_name=study_name)
        assert found["winner"].info.run_id == result.winner.run_id

    with np.load(clouds) as data:
        x, y = data["x_test"], data["y_test"]
    for name in (f"{NAME}@production", f"{NAME}/Production"):
        model = mlflow.keras.load_model(f"models:/{name}")
        accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
        assert accuracy == pytest.approx(second.winner.test_accuracy, abs=1e-6)

    before = invariants.dump(Path.cwd())
    assert pipeline.run(config).winner == replace(first.winner, new=False, in_production=2)
    assert invariants.dump(Path.cwd()) == before


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_model_holds_no_pickle_and_loads_in_safe_mode(
    config: StudyConfig, client: MlflowClient, in_folder: Path
) -> None:
    pipeline.run(config)
    assert [path for path in in_folder.rglob("*") if path.suffix in (".pkl", ".pickle")] == []
    (file,) = in_folder.rglob("*.keras")
    assert keras.saving.load_model(file, safe_mode=True).input_shape == (None, 4)
