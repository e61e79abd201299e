from datetime import datetime
from pathlib import Path

import optuna
import pytest
from conftest import as_nobody, of_root
from optuna.trial import TrialState, create_trial

from search import InputError, StudyConfig, run
from search.data.dataset import load_dataset
from search.study import storage
from search.study.trials import METRICS
from search.tracking.address import check_experiment
from search.tracking.runs import Tracking
from search.tracking.schema import study_metadata

SETTINGS = {"epochs": 400}


@pytest.fixture
def ledger(in_folder: Path) -> Tracking:
    return Tracking(StudyConfig()).open()


def finished_trial(epochs: int) -> optuna.trial.FrozenTrial:
    history = [
        {
            "epoch": epoch,
            "time_ms": 1_700_000_000_000 + epoch,
            **dict.fromkeys(METRICS.values(), epoch / epochs),
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


def test_a_run_is_written_from_its_trial_and_writing_it_again_changes_nothing(
    ledger: Tracking, clouds: Path
) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    parent = ledger.parent_run(study, SETTINGS)
    config = StudyConfig(dataset=str(clouds), epochs=400)
    facts = study_metadata(config, load_dataset(str(clouds), 0.1))
    trial = finished_trial(epochs=400)  # 1,600 metrics: more than MLflow takes in a call
    run_id = ledger.create_run(parent, "trial-0000", 0)
    for _ in range(2):
        ledger.repair(run_id, trial, facts)
        (run,) = ledger.runs_of(parent)
        assert run.info.status == "FINISHED"
        assert run.info.end_time == int(trial.datetime_complete.timestamp() * 1000)  # type: ignore[union-attr]
        assert run.data.params == {
            "hidden_units": "8",
            "seed": "3",
            "trainable_parameters": "99",
            **{name: str(value) for name, value in facts["params"].items()},
        }
        assert len(run.inputs.dataset_inputs) == 1
        for name in METRICS.values():
            logged = ledger.client.get_metric_history(run_id, name)
            assert [metric.step for metric in logged] == list(range(400))


def test_the_parent_run_is_made_once_and_found_again_without_its_link(ledger: Tracking) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    parent = ledger.parent_run(study, SETTINGS)
    assert ledger.parent_run(study, SETTINGS) == parent
    study.set_user_attr("mlflow_run_id", None)  # a kill between the run and its link
    assert ledger.parent_run(study, SETTINGS) == parent
    assert study.user_attrs["mlflow_run_id"] == parent


def test_a_deleted_experiment_is_refused(ledger: Tracking) -> None:
    ledger.client.delete_experiment(ledger.experiment_id)
    with pytest.raises(InputError, match="must not be deleted"):
        Tracking(StudyConfig()).open()


def files(folder: Path) -> dict[str, bytes]:
    """Every file's content, but of those in which SQLite's readers leave their marks."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found if not path.name.endswith("-shm")}


def test_an_experiment_in_the_trash_is_refused_before_anything_is_made_or_changed(
    ledger: Tracking, in_folder: Path, clouds: Path
) -> None:
    ledger.client.delete_experiment(ledger.experiment_id)
    before = files(in_folder)
    with pytest.raises(InputError, match="must not be deleted, but it is in the trash of sqlite"):
        run(StudyConfig(dataset=str(clouds)))
    assert files(in_folder) == before


@of_root
def test_an_experiment_whose_folder_is_another_users_is_refused(temporary: Path) -> None:
    ledger = Tracking(StudyConfig()).open()
    ledger.disconnect()
    (temporary / "mlflow.db").chmod(0o666)
    temporary.chmod(0o777)
    folder = temporary / "mlruns" / "MNIST_Classification"
    folder.mkdir(parents=True)
    check_experiment(StudyConfig())

    def be_refused() -> None:
        with pytest.raises(InputError, match="must have a folder that can be written to"):
            check_experiment(StudyConfig())

    as_nobody(be_refused)
    folder.chmod(0o777)
    as_nobody(lambda: check_experiment(StudyConfig()))


def test_artifacts_lie_beside_the_database(in_folder: Path) -> None:
    (in_folder / "there").mkdir()
    uri = "sqlite:///there/mlflow.db"
    ledger = Tracking(StudyConfig(tracking_uri=uri)).open()
    experiment = ledger.client.get_experiment(ledger.experiment_id)
    expected = (in_folder / "there" / "mlruns" / "MNIST_Classification").as_uri()
    assert experiment.artifact_location == expected
