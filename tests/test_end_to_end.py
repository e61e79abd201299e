"""The real command on real digits, real databases, read back through Optuna's and MLflow's APIs."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import in_process
import invariants
import mlflow
import numpy as np
import optuna
import pytest
from conftest import EPOCHS, TRIALS, command, copy_databases, mlflow_at, start
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from search.config.hyperparameters import REFERENCE


@pytest.fixture
def tracking(finished: dict[str, Any]) -> Iterator[MlflowClient]:
    with mlflow_at(finished["folder"]) as client:
        yield client


def test_every_trial_is_a_nested_run_with_the_contracts_params(finished: dict[str, Any]) -> None:
    for trial in finished["trials"]:
        params = finished["runs"][trial.number].data.params
        units = trial.params["hidden_units"]
        assert params == {
            **{name: str(value) for name, value in trial.params.items()},
            "epochs": str(EPOCHS),
            "batch_size": "128",
            "validation_split": "0.1",
            "split": "stratified",
            "optimizer": "adam",
            "activation": "relu",
            "output_activation": "softmax",
            "loss": "sparse_categorical_crossentropy",
            "seed": str(trial.user_attrs["seed"]),
            "dataset": params["dataset"],
            "train_samples": "1800",
            "validation_samples": "200",
            "test_samples": "400",
            "num_classes": "10",
            "trainable_parameters": str(784 * units + units + units * 10 + 10),
        }
        assert params["dataset"].endswith("digits.npz")


def test_every_run_names_its_dataset(finished: dict[str, Any]) -> None:
    for run in finished["runs"].values():
        (dataset,) = run.inputs.dataset_inputs
        assert dataset.dataset.name == "digits.npz"


def test_the_first_trial_is_the_reference(finished: dict[str, Any]) -> None:
    assert finished["trials"][0].params == REFERENCE


def test_the_states_of_a_search_are_all_complete_or_pruned(finished: dict[str, Any]) -> None:
    states = {trial.state for trial in finished["trials"]}
    assert states <= {TrialState.COMPLETE, TrialState.PRUNED}
    pruned = [t for t in finished["trials"] if t.state is TrialState.PRUNED]
    assert all(len(trial.intermediate_values) < EPOCHS for trial in pruned)


def test_the_winner_has_its_curves_its_test_and_its_file(finished: dict[str, Any]) -> None:
    run, client = finished["winner"], finished["client"]
    for name in ("train_loss", "train_accuracy"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [0, 1, 2]
    assert run.data.metrics["test_loss"] > 0
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == [
        "confusion_matrix.png",
        "evaluation.json",
        "mistakes.png",
        "mnist_model.h5",
    ]


@pytest.mark.parametrize("name", ["MNIST_DNN_Model/Production", "MNIST_DNN_Model@production"])
def test_the_production_model_loads_by_name_and_scores_what_was_logged(
    finished: dict[str, Any], tracking: MlflowClient, digits: Path, name: str
) -> None:
    model = mlflow.keras.load_model(f"models:/{name}")
    assert type(model).__name__ == "Functional"
    assert type(model.optimizer).__name__ == "Adam"
    with np.load(digits) as data:
        x = data["x_test"].reshape(-1, 784).astype("float32") / 255
        accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == data["y_test"])
    assert accuracy == pytest.approx(finished["winner"].data.metrics["test_accuracy"], abs=1e-6)


def test_runs_can_be_searched_by_test_accuracy(finished: dict[str, Any]) -> None:
    found = finished["client"].search_runs(
        [finished["parent"].info.experiment_id],
        filter_string="metrics.test_accuracy > 0.8",
        order_by=["metrics.test_accuracy DESC"],
    )
    assert [run.info.run_id for run in found] == [finished["winner"].info.run_id]


def test_the_user_reads_a_line_a_trial_and_a_summary(finished: dict[str, Any]) -> None:
    lines = finished["out"].splitlines()
    trials = [line for line in lines if line.startswith("trial ")]
    assert len(trials) == TRIALS
    assert all("val_accuracy" in line and "best 0." in line for line in trials)
    text = finished["out"]
    assert f"{TRIALS} finished trials" in text
    assert "Registered as MNIST_DNN_Model version 1" in text
    assert f"test accuracy {finished['winner'].data.metrics['test_accuracy']:.4f}" in text
    assert "mlflow ui\n" in text
    assert "optuna-dashboard sqlite:///study.db" in text


def test_rerun_after_the_end_changes_nothing(finished: dict[str, Any]) -> None:
    before = invariants.dump(finished["folder"])
    code, out, err = command(finished["folder"], *finished["options"])
    assert (code, err) == (0, "")
    assert "Already registered as MNIST_DNN_Model version 1" in out
    assert invariants.dump(finished["folder"]) == before


@pytest.mark.slow
def test_a_larger_budget_adds_the_difference(finished: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(finished["folder"] / "digits.npz", tmp_path)
    copy_databases(finished["folder"], tmp_path)  # others look at the study itself
    more = (*finished["options"][:-1], str(TRIALS + 2), "--workers", "1")
    code, _, err = in_process.command(tmp_path, *more, "--report", "none", "--baselines", "none")
    assert (code, err) == (0, "")
    found = invariants.check(tmp_path, TRIALS + 2)
    old = {t.number: (t.params, t.value) for t in finished["trials"]}
    assert {t.number: (t.params, t.value) for t in found["trials"] if t.number in old} == old


def fingerprint(folder: Path) -> dict[int, Any]:
    """What every place of a study tried and how it went, without times."""
    study = optuna.load_study(study_name="mnist-dnn", storage=f"sqlite:///{folder / 'study.db'}")
    return {
        trial.user_attrs["place"]: (
            trial.state,
            trial.params,
            trial.value,
            trial.user_attrs["seed"],
            [{k: v for k, v in e.items() if k != "time_ms"} for e in trial.user_attrs["history"]],
        )
        for trial in study.get_trials()
        if trial.state is not TrialState.FAIL
    }


IN_EACH = """
import contextlib, json, sys
from search import cli

options, *folders = sys.argv[1:]
for folder in folders:
    with contextlib.chdir(folder):
        assert cli.main(json.loads(options)) == 0
"""


@pytest.mark.slow
def test_a_run_and_a_killed_and_resumed_one_are_the_same_to_the_last_digit(
    tmp_path: Path, digits: Path
) -> None:
    options = ("--dataset", str(digits), "--epochs", "2", "--n-trials", "4", "--workers", "1")
    options += ("--report", "none", "--baselines", "none", "--hidden-units", "64")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    process = start(killed, *options)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial    1"):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    both = forks.Python(["-c", IN_EACH, json.dumps(options), str(whole), str(killed)], cwd=tmp_path)
    out, err = both.communicate(timeout=300)
    assert (both.returncode, err) == (0, ""), out

    results = []
    for folder in (whole, killed):
        found = invariants.check(folder, 4)
        results.append((fingerprint(folder), found["winner"].data.metrics["test_accuracy"]))
    assert results[0] == results[1]


@pytest.mark.slow
def test_real_mnist_reaches_97_percent_with_a_short_search(tmp_path: Path) -> None:
    options = ("--hidden-units", "256", "--learning-rate", "0.002", "--dropout-rate", "0.2")
    options += ("--epochs", "3", "--n-trials", "1", "--workers", "1")
    options += ("--report", "none", "--baselines", "none")
    code, _, err = command(tmp_path, *options, timeout=600)
    assert (code, err) == (0, "")
    found = invariants.check(tmp_path, 1)
    runs = found["client"].search_runs(
        [found["parent"].info.experiment_id],
        filter_string="metrics.test_accuracy > 0.97",
        order_by=["metrics.test_accuracy DESC"],
    )
    assert [run.info.run_id for run in runs] == [found["winner"].info.run_id]
    assert found["runs"][0].data.params["train_samples"] == "54000"
    assert found["runs"][0].data.params["trainable_parameters"] == "203530"
