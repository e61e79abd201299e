"""A study by another objective than accuracy: in its direction, in both stores, to the end."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import invariants
import numpy as np
import pytest
from conftest import mlflow_at, small_dataset
from in_process import command
from sklearn.linear_model import Ridge

from search import StudyConfig
from search.data.load import load_dataset, load_for_study
from search.errors import InputError
from search.preflight import choose_objective
from search.promotion.baselines import compute
from search.task import METRICS
from search.training.simple_models import Limit

OPTIONS = ("--dataset", "clouds.npz", "--epochs", "2", "--hidden-units", "8", "--workers", "1")


@pytest.fixture
def folder(in_folder: Path, clouds: Path) -> Path:
    (in_folder / "clouds.npz").write_bytes(clouds.read_bytes())
    return in_folder


@pytest.mark.slow
def test_a_study_goes_by_its_objective_and_keeps_it(folder: Path) -> None:
    options = (*OPTIONS, "--early-stopping", "1", "--finalists", "1", "--repeats", "2")
    begun = ("--objective", "val_loss", "--timeout", "1e-9")
    assert "no trial of study mnist-dnn completed" in command(folder, *options, *begun)[2]
    code, out, err = command(folder, *options, "--n-trials", "3")
    assert (code, err) == (0, "")
    found = invariants.check(folder, 3)
    losses = [trial.value for trial in found["trials"] if trial.value is not None]
    assert found["study"].best_value == min(losses)
    assert f"best {min(losses):.4f}\n" in out
    assert "val_accuracy" not in out
    shown = json.loads(command(folder, "show", "--json")[1])
    assert (shown["objective"], shown["direction"]) == ("val_loss", "minimize")
    assert [row["value"] for row in shown["top"]] == sorted(losses)
    assert command(folder, "doctor")[0] == 0
    assert "the same to the last digit: val_loss " in command(folder, "reproduce")[1]
    assert "val_loss" in (folder / "report.html").read_text()
    for other in ("val_auc", "val_f1"):
        code, _, err = command(folder, *options, "--objective", other, "--n-trials", "5")
        assert code == 2
        assert f"objective: val_loss -> {other}; give another --study-name" in err


@pytest.fixture
def cancer(in_folder: Path) -> Path:
    """Scikit-learn's breast cancer data, of the malignant ones only every fourth."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    kept = (y == 1) | (np.arange(len(y)) % 4 == 0)
    x, y = x[kept], y[kept]
    np.savez(
        in_folder / "cancer.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:]
    )
    return in_folder


@pytest.mark.slow
def test_rare_classes_are_weighed_and_measured(cancer: Path) -> None:
    options = ("--dataset", "cancer.npz", "--hidden-units", "16", "--epochs", "3", "--workers", "1")
    options = (*options, "--class-weight", "balanced", "--objective", "val_balanced_accuracy")
    code, out, err = command(cancer, *options, "--n-trials", "1")
    assert (code, err) == (0, "")
    found = invariants.check(cancer, 1)
    assert found["runs"][0].data.params["class_weight"] == "balanced"
    assert found["study"].user_attrs["settings"]["class_weight"] == "balanced"
    assert "the same to the last digit" in command(cancer, "reproduce")[1]
    assert "class_weight balanced" in command(cancer, "show")[1]
    metrics = found["winner"].data.metrics
    assert f"test balanced accuracy {metrics['test_balanced_accuracy']:.4f}" in out
    path = found["client"].download_artifacts(
        found["winner"].info.run_id, "evaluation.json", str(cancer)
    )
    classes = json.loads(Path(path).read_text())["classes"]
    recalls = [score["recall"] for score in classes]
    assert np.mean(recalls) == pytest.approx(metrics["test_balanced_accuracy"])
    assert "Each class on the test examples" in (cancer / "report.html").read_text()
    config = StudyConfig(dataset="cancer.npz", class_weight="balanced")
    data = load_for_study(config, None)
    limit = Limit(time.monotonic() + 60, threading.Event())
    simple = compute(data, METRICS["val_balanced_accuracy"], 0, limit, "balanced").baselines
    assert found["study"].user_attrs["baselines"][1]["metrics"] == simple[1].metrics
    without = [o for o in options if o not in ("--class-weight", "balanced")]
    for given in ((*options, "--class-weight", "none"), without):
        code, _, err = command(cancer, *given, "--n-trials", "1")
        assert code == 2 and "class_weight: balanced -> none" in err


@pytest.fixture
def diabetes(in_folder: Path) -> Path:
    """Scikit-learn's diabetes data: 442 patients, ten features, progression after a year."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_diabetes(return_X_y=True)
    y = y + 0.5  # as it is, all numbers are whole
    np.savez(
        in_folder / "diabetes.npz", x_train=x[:350], y_train=y[:350], x_test=x[350:], y_test=y[350:]
    )
    return in_folder


NUMBERS = ("--dataset", "diabetes.npz", "--hidden-units", "16", "--workers", "1", "--epochs", "2")


@pytest.mark.slow
def test_a_regression_to_the_model_in_production(diabetes: Path) -> None:
    options = (*NUMBERS, "--learning-rate", "0.003:0.01", "--n-trials", "1")
    code, out, err = command(diabetes, *options)
    assert (code, err) == (0, "")
    assert "a number to predict (" in out and "random split" in out
    found = invariants.check(diabetes, 1)
    sentence = sentence_of(found, out)
    trial, run = found["trials"][0], found["runs"][0]
    assert found["study"].metric_names == ["val_rmse"]
    assert "num_classes" not in run.data.params
    assert run.data.params["loss"] == "mean_squared_error"
    assert run.data.params["output_activation"] == "linear"
    (last,) = trial.user_attrs["history"][-1:]
    names = ("train_loss", "train_mae", "val_loss", "val_mae", "val_rmse", "val_r2")
    assert tuple(last)[2:] == names
    with np.load("diabetes.npz") as data, mlflow_at(diabetes):
        import mlflow.keras

        model = mlflow.keras.load_model("models:/MNIST_DNN_Model@production")
        x, y = data["x_test"].astype("float32"), data["y_test"]
        error = model.predict(x, verbose=0)[:, 0] - y
    assert type(model.layers[-1]).__name__ == "Rescaling"
    metrics = found["winner"].data.metrics
    assert metrics["test_rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    assert metrics["test_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert metrics["test_r2"] == pytest.approx(1 - np.mean(error**2) / y.var(), rel=1e-4)
    assert metrics["test_rmse"] < 1.2 * y.std()
    page = (diabetes / "report.html").read_text()
    assert "Predictions of the winner" in page and "Confusion matrix" not in page
    files = {entry.path for entry in found["client"].list_artifacts(found["winner"].info.run_id)}
    assert {"residuals.png", "evaluation.json"} < files
    before = invariants.dump(diabetes)
    assert sentence in command(diabetes, *options)[1]
    assert invariants.dump(diabetes) == before
    assert command(diabetes, "doctor")[0] == 0
    assert "the same to the last digit: val_rmse" in command(diabetes, "reproduce")[1]

    again = (*NUMBERS, "--task", "regression", "--study-name", "again", "--report", "none")
    code, out, err = command(diabetes, *again, "--n-trials", "1", "--baselines", "none")
    assert (code, err) == (0, "")
    tags = found["client"].get_model_version("MNIST_DNN_Model", "2").tags
    assert tags["gate.objective"] == "val_rmse"
    better = float(tags["gate.test_rmse"]) < float(tags["gate.champion_test_rmse"])
    assert tags["promoted"] == str(better).lower()
    assert 0 < float(tags["gate.bootstrap_p_value"]) <= 1
    assert float(tags["gate.difference_low"]) <= float(tags["gate.difference_high"])
    assert "paired bootstrap, 95 % interval of the difference " in out


def sentence_of(found: dict[str, Any], out: str) -> str:
    """How the regression is compared by its objective, in the unit of its target, everywhere."""
    data = load_dataset("diabetes.npz", 0.1, split="random", normalize=True)
    (x, y), (x_val, y_val) = data.train, data.validation
    errors = (Ridge().fit(x, y).predict(x_val) - y_val) * data.task.deviation
    lines = out.splitlines()
    shown = re.fullmatch(
        r"baselines: mean [\d.]+, ridge regression ([\d.]+) \(validation RMSE\)", lines[2]
    )
    assert shown is not None, out
    assert float(shown[1]) == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-3)
    assert f"\nridge regression       val_rmse {shown[1]}\n" in out

    metrics = found["parent"].data.metrics
    names = ("loss", "mae", "rmse", "r2")
    assert {f"baseline_mean_{part}_{name}" for part in ("val", "test") for name in names} <= {
        *metrics
    }
    against = json.loads(command(Path.cwd(), "show", "--json")[1])["against_baseline"]
    assert (against["baseline"], against["metric"]) == ("ridge regression", "test_rmse")
    assert against["value"] == pytest.approx(found["winner"].data.metrics["test_rmse"])
    assert against["baseline_value"] == metrics["baseline_ridge_regression_test_rmse"]
    assert against["significant"]  # a network of so few epochs predicts little but the mean
    sentence = (
        "The network is significantly worse than ridge regression on the test examples: RMSE "
        f"{against['value']:.5g} against {against['baseline_value']:.5g}, paired bootstrap "
        f"p = {against['p_value']:.2g}."
    )
    assert sentence in lines
    assert sentence in command(Path.cwd(), "show")[1]
    assert sentence in Path("report.html").read_text()
    return sentence


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--label-smoothing", "0.1"), "--label-smoothing needs classes, but the task of "),
        (("--split", "stratified"), "--split stratified needs classes, but the task of "),
        (("--class-weight", "balanced"), "--class-weight balanced needs classes, but the task of "),
        (("--objective", "val_auc"), "--objective must be a metric of the task, for regression "),
        (("--task", "classification"), "--dataset diabetes.npz: y_train must hold whole numbers"),
    ],
)
def test_what_makes_no_sense_in_a_regression_is_refused(
    diabetes: Path, options: tuple[str, ...], why: str
) -> None:
    code, out, err = command(diabetes, *NUMBERS, *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {why}") and err.count("\n") == 1
    assert [path.name for path in diabetes.iterdir()] == ["diabetes.npz"]


def test_an_objective_of_another_task_is_refused(folder: Path) -> None:
    code, out, err = command(folder, *OPTIONS, "--objective", "val_rmse")
    assert (code, out) == (2, "")
    assert err.startswith("error: --objective must be a metric of the task, for classification ")
    assert [path.name for path in folder.iterdir()] == ["clouds.npz"]


def test_an_objective_of_more_outputs_than_fit_into_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = small_dataset(x_test=np.zeros((40, 5), np.float32))
    assert choose_objective(StudyConfig(objective="val_f1"), data, None).name == "val_f1"
    monkeypatch.setattr("search.preflight.MOST_OUTPUTS", 100)
    assert choose_objective(StudyConfig(), data, None).name == "val_accuracy"
    with pytest.raises(InputError, match=r"40 examples of 3 classes have more; give --objective"):
        choose_objective(StudyConfig(objective="val_f1"), data, None)
