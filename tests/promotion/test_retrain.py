"""Registering goes on where it was stopped: one version, one in production, nothing twice."""

from pathlib import Path
from typing import Any

import invariants
import keras
import pytest
import sqlalchemy
from conftest import copy_databases
from mlflow.tracking import MlflowClient

from search import pipeline
from search.config.settings import StudyConfig

NAME = "MNIST_DNN_Model"
TRIALS = 2
pytestmark = pytest.mark.usefixtures("no_pictures")


class Stopped(BaseException):
    """The process ends here, as far as the code above can tell."""


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


def small(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {"epochs": 1, "n_trials": TRIALS, "workers": 1, "hidden_units": "8"}
    return StudyConfig(
        dataset=str(dataset), report="none", baselines="none", **{**settings, **changed}
    )


def retrainings(found: dict[str, Any]) -> list[str]:
    return sorted(r.info.status for r in found["children"] if r.info.run_name.startswith("retrain"))


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> dict[str, Any]:
    """A study that was stopped at the end of its best trial's retraining, and, in the next run,
    right after it; and the errors of the databases, also those that MLflow handles."""
    folder = tmp_path_factory.mktemp("retrained")
    errors: list[str] = []

    def note(context: sqlalchemy.engine.ExceptionContext) -> None:
        errors.append(str(context.original_exception))

    sqlalchemy.event.listen(sqlalchemy.Engine, "handle_error", note)
    try:
        for step, when in (("log_artifacts", "after"), ("create_registered_model", "before")):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
                stop_at(patch, step, when)
                with pytest.raises(Stopped):
                    pipeline.run(small(clouds))
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "handle_error", note)
    return {"folder": folder, "errors": errors}


def stop_at(patch: pytest.MonkeyPatch, step: str, when: str) -> None:
    """End the process before, or after, its first call of the MLflow client's method `step`."""
    original = getattr(MlflowClient, step)

    def stop(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        if when == "after":
            original(self, *arguments, **named)
        raise Stopped

    patch.setattr(MlflowClient, step, stop)


@pytest.mark.slow
def test_a_registration_stopped_at_every_step_ends_as_one_that_was_not(
    retrained: dict[str, Any], client: MlflowClient, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run goes on after the last one's step, and is stopped at the next step."""
    copy_databases(retrained["folder"], Path.cwd())
    undisturbed = end_of_registration(client, clouds)
    copy_databases(retrained["folder"], Path.cwd())
    # After one step is before the next.
    for step, when in [*((step, "before") for step in STEPS), ("set_model_version_tag", "after")]:
        with monkeypatch.context() as patch:
            stop_at(patch, step, when)
            with pytest.raises(Stopped):
                pipeline.run(small(clouds))
    assert end_of_registration(client, clouds) == undisturbed
    before = invariants.dump(Path.cwd())
    pipeline.run(small(clouds))
    assert invariants.dump(Path.cwd()) == before


def end_of_registration(client: MlflowClient, clouds: Path) -> tuple[dict[str, Any], Any]:
    """Let a run complete it; returns the one version there is, and the winner's attributes."""
    result = pipeline.run(small(clouds))
    found = invariants.check(Path.cwd(), TRIALS)
    assert result.ran == 0
    assert result.winner is not None
    assert (result.winner.version, result.winner.new) == (1, False)
    assert registered(client) == [1]
    assert retrainings(found) == ["FAILED", "FINISHED"]
    return registry_of(client), found["trials"][result.winner.trial].user_attrs


def registry_of(client: MlflowClient) -> dict[str, Any]:
    """The one version there is, and what it is called, without times."""
    version = client.get_model_version(NAME, "1")
    names = ("aliases", "current_stage", "run_id", "source", "tags")
    return {name: getattr(version, name) for name in names}


def registered(client: MlflowClient) -> list[int]:
    return [int(v.version) for v in client.search_model_versions(f"name = '{NAME}'")]


def test_a_retraining_stopped_before_its_end_is_done_again_and_logs_no_point_twice(
    retrained: dict[str, Any], client: MlflowClient, clouds: Path
) -> None:
    copy_databases(retrained["folder"], Path.cwd())
    pipeline.run(small(clouds))
    found = invariants.check(Path.cwd(), TRIALS)
    assert len(retrainings(found)) == 2
    assert registered(client) == [1]
    assert [error for error in retrained["errors"] if "metrics" in error] == []
    winner = found["winner"].data
    model = client.get_logged_model(winner.tags["model_uri"].removeprefix("models:/"))
    measured = {point.key: point.value for point in model.metrics}
    assert measured == {name: v for name, v in winner.metrics.items() if name.startswith("test_")}


# ---- the registered models -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_better_trial_is_registered_over_the_old_one(in_folder: Path, clouds: Path) -> None:
    rates = {"hidden_units": "8", "dropout_rate": "0.1", "learning_rate": "1e-5,0.1"}
    first = pipeline.run(small(clouds, **rates, sampler="grid", n_trials=1))
    more = pipeline.run(small(clouds, **rates, sampler="grid", n_trials=2))
    found = invariants.check(in_folder, 2)
    assert first.winner is not None
    assert more.winner is not None
    assert (first.winner.trial, more.winner.trial) == (0, more.best.number)  # type: ignore[union-attr]
    assert more.winner.trial > 0
    assert (first.winner.version, more.winner.version, more.winner.new) == (1, 2, True)
    assert retrainings(found) == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_the_model_holds_no_pickle_and_loads_in_safe_mode(retrained: dict[str, Any]) -> None:
    folder: Path = retrained["folder"]
    assert [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle")] == []
    for file in (files := list(folder.rglob("*.keras"))):
        assert keras.saving.load_model(file, safe_mode=True).input_shape == (None, 4)
    assert len(files) == 2
