"""A run follows from its trial; the parent run and the experiment are created once."""

from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search import InputError, StudyConfig
from search.data.load import load_dataset
from search.study import storage
from search.task import Task
from search.tracking.runs import Tracking
from search.tracking.schema import study_metadata

SETTINGS = {"epochs": 400}


NAMES = ("train_loss", "train_accuracy", *(metric.name for metric in Task().metrics))


@pytest.fixture
def tracking(in_folder: Path) -> Tracking:
    return Tracking(StudyConfig()).open()


def finished_trial(epochs: int) -> optuna.trial.FrozenTrial:
    history = [
        {
            "epoch": epoch,
            "time_ms": 1_700_000_000_000 + epoch,
            **dict.fromkeys(NAMES, epoch / epochs),
        }
        for epoch in range(epochs)
    ]
    trial = create_trial(
        state=TrialState.COMPLETE,
        value=1.0,
        params={"hidden_units": 8},
        distributions={"hidden_units": optuna.distributions.IntDistribution(1, 9)},
        user_attrs={"history": history, "seed": 3, "trainable_parameters": 99},
    )
    trial.datetime_complete = datetime(2026, 1, 1)
    return trial


@pytest.mark.slow
def test_a_run_is_written_from_its_trial_and_writing_it_again_changes_nothing(
    tracking: Tracking, clouds: Path
) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    parent = tracking.parent_run(study, SETTINGS)
    config = StudyConfig(dataset=str(clouds), epochs=400)
    metadata = study_metadata(config, load_dataset(str(clouds), 0.1))
    trial = finished_trial(epochs=400)  # 2,800 metrics: more than MLflow takes in a call
    run_id = tracking.create_run(parent, "trial-0000", 0)
    for _ in range(2):
        tracking.repair(run_id, trial, metadata)
        (run,) = tracking.runs_of(parent)
        assert run.info.status == "FINISHED"
        assert run.info.end_time == int(trial.datetime_complete.timestamp() * 1000)  # type: ignore[union-attr]
        assert run.data.params == {
            "hidden_units": "8",
            "seed": "3",
            "trainable_parameters": "99",
            **{name: str(value) for name, value in metadata["params"].items()},
        }
        assert len(run.inputs.dataset_inputs) == 1
        for name in NAMES:
            logged = tracking.client.get_metric_history(run_id, name)
            assert [metric.step for metric in logged] == list(range(400))


def test_the_parent_run_is_created_once_and_found_again_without_its_link(
    tracking: Tracking,
) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    parent = tracking.parent_run(study, SETTINGS)
    assert tracking.parent_run(study, SETTINGS) == parent
    study.set_user_attr("mlflow_run_id", None)  # a kill between the run and its link
    assert tracking.parent_run(study, SETTINGS) == parent
    assert study.user_attrs["mlflow_run_id"] == parent


def test_a_deleted_experiment_is_refused(tracking: Tracking) -> None:
    tracking.client.delete_experiment(tracking.experiment_id)
    with pytest.raises(InputError, match="must not be deleted"):
        Tracking(StudyConfig()).open()


def test_artifacts_lie_beside_the_database(in_folder: Path) -> None:
    (in_folder / "there").mkdir()
    uri = "sqlite:///there/mlflow.db"
    tracking = Tracking(StudyConfig(tracking_uri=uri)).open()
    experiment = tracking.client.get_experiment(tracking.experiment_id)
    expected = (in_folder / "there" / "mlruns" / "MNIST_Classification").as_uri()
    assert experiment.artifact_location == expected
