import os
from dataclasses import replace
from pathlib import Path

import invariants
import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search import StudyConfig, run
from search.errors import RunError
from search.listener import Listener
from search.outcome import Outcome


class Outcomes(Listener):
    def __init__(self) -> None:
        self.seen: list[Outcome] = []

    def trial(self, outcome: Outcome, best: float | None) -> None:
        self.seen.append(outcome)


def config(clouds: Path) -> StudyConfig:
    return StudyConfig(
        dataset=str(clouds),
        epochs=2,
        n_trials=3,
        hidden_units="8",
        workers=1,
        pruner="none",
        report="none",
    )


@pytest.mark.parametrize("method", ["create_run", "log_batch", "log_inputs", "set_terminated"])
def test_a_trial_outlives_a_failing_tracking_server_and_its_run_is_written_later(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    working = getattr(MlflowClient, method)
    outcomes = Outcomes()

    def failing(client: MlflowClient, *arguments: object, **keywords: object) -> object:
        name = keywords.get("run_name") or ""
        while_training = len(outcomes.seen) == 1 and not str(name).startswith("retrain")
        if while_training:
            raise MlflowException("the server is down")
        return working(client, *arguments, **keywords)

    monkeypatch.setattr(MlflowClient, method, failing)
    result = run(config(clouds), outcomes)
    assert [outcome.state for outcome in outcomes.seen] == ["COMPLETE"] * 3
    assert any("trial 1" in line for line in result.mended)
    invariants.check(in_folder, 3)


def test_an_outcome_says_what_the_ledgers_say(in_folder: Path, clouds: Path) -> None:
    outcomes = Outcomes()
    run(config(clouds), outcomes)
    for outcome, trial in zip(outcomes.seen, invariants.check(in_folder, 3)["trials"], strict=True):
        assert (outcome.number, outcome.place) == (trial.number, trial.user_attrs["place"])
        assert outcome.value == outcome.last == trial.value
        assert outcome.hyperparameters is not None
        assert outcome.hyperparameters == trial.params
        assert (outcome.epochs, outcome.failure) == (2, None)


@pytest.mark.parametrize("known", [None, "sqlite:///elsewhere.db"])
def test_a_run_leaves_no_address_behind(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch, known: str | None
) -> None:
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", known)

    def addresses() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.endswith("_URI")}

    before, default = addresses(), mlflow.get_tracking_uri()
    run(config(clouds))
    assert addresses() == before
    assert mlflow.get_tracking_uri() == (known or default)
    mlflow.set_tracking_uri("sqlite:///another.db")
    assert mlflow.get_registry_uri() == "sqlite:///another.db"


def test_a_failure_is_kept_and_shown_without_control_characters(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("\x1b[31mrot\x00 \ud800 größer 模型\nnext")

    monkeypatch.setattr("search.training.train", fail)
    outcomes = Outcomes()
    with pytest.raises(RunError) as stopped:
        run(replace(config(clouds), max_failures=1), outcomes)
    shown = r"ValueError: \x1b[31mrot\x00 \ud800 größer 模型 next"
    assert shown in str(stopped.value)
    assert outcomes.seen[0].failure == shown
    found = invariants.check(in_folder, 0, registered=False)
    assert found["trials"][0].user_attrs["failure"] == shown
