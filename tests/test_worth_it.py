"""Baselines in a study: computed once, shown, kept, compared with the winner."""

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import forks
import invariants
import mlflow
import numpy as np
import optuna
import pytest
from conftest import copy_databases, mlflow_at
from in_process import command
from sklearn import datasets
from sklearn.linear_model import LogisticRegression

from search import StudyConfig, run
from search.data import sources
from search.data.load import load_dataset, load_for_study
from search.data.preparation import scaled
from search.promotion import baselines
from search.promotion.baselines import Baseline, BestBaseline, Found, compute
from search.promotion.comparison import Comparison, compare_with_baseline
from search.promotion.evaluation import outputs_of
from search.report.progress import Progress, Result
from search.task import METRICS
from search.training.simple_models import MODELS, Limit

SMALL = ("--n-trials", "1", "--epochs", "2", "--hidden-units", "8", "--workers", "1")
ONE_TRIAL = (
    *("--n-trials", "1", "--epochs", "1", "--hidden-units", "8", "--workers", "1"),
    *("--report", "none"),
)
pytestmark = pytest.mark.usefixtures("no_pictures")


def write(name: str) -> str:
    """One of scikit-learn's datasets in a file, a fifth of it for the test."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y, n = x[order].astype("uint8" if name == "digits" else "float32"), y[order], len(x) * 4 // 5
    np.savez(f"{name}.npz", x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])
    return f"{name}.npz"


def logistic(file: str) -> tuple[float, float]:
    """The validation and the test accuracy of scikit-learn's logistic regression."""
    data = load_dataset(file, 0.1, split="stratified", normalize=True)
    x_test = scaled(data.x_test)
    if data.normalization is not None:
        x_test = data.normalization.apply(x_test)
    (x, y), (x_val, y_val) = data.train, data.validation
    model = LogisticRegression(max_iter=10_000)
    return (
        float(model.fit(scaled(x), y).score(scaled(x_val), y_val)),
        float(model.fit(scaled(data.x_all), data.y_all).score(x_test, data.y_test)),
    )


def baselines_of(objective: str, **settings: Any) -> Found:
    """The baselines of the data of these settings."""
    data = load_for_study(StudyConfig(**settings), None)
    return compute(data, METRICS[objective], 0, Limit(time.monotonic() + 60, threading.Event()))


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "digits"])
def test_the_baselines_of_real_data_are_the_majority_class_and_scikit_learns_regression(
    name: str, in_folder: Path
) -> None:
    file = write(name)
    found = baselines_of("val_accuracy", dataset=file)
    assert [baseline.name for baseline in found.baselines] == [
        "majority class",
        "logistic regression",
    ]
    metrics, (validation, test) = found.baselines[1].metrics, logistic(file)
    assert metrics["val_accuracy"] == pytest.approx(validation, abs=0.011)
    assert metrics["test_accuracy"] == pytest.approx(test, abs=0.011)
    assert {"val_loss", "val_f1", "test_auc", "test_balanced_accuracy"} < metrics.keys()
    assert found.best is not None and found.best.name == "logistic regression"
    right = found.best.correct(len(np.load(file)["y_test"]))
    assert right.mean() == metrics["test_accuracy"]


@pytest.mark.slow
def test_real_data_have_their_baselines_everywhere(in_folder: Path) -> None:
    given = ("--dataset", write("breast_cancer"), *SMALL)
    code, out, err = command(in_folder, *given)
    assert (code, err) == (0, "")
    validation, test = logistic("breast_cancer.npz")
    lines = out.splitlines()
    shown = re.fullmatch(
        r"baselines: majority class (0\.\d{4}), logistic regression (\d\.\d{4}) "
        r"\(validation accuracy\)",
        lines[2],
    )
    assert shown is not None, out
    assert float(shown[2]) == pytest.approx(validation, abs=0.011)
    assert f"\nlogistic regression    val_accuracy {shown[2]}\n" in out
    (sentence,) = (line for line in lines if line.startswith("The network is "))

    found = invariants.check(in_folder, 1)
    metrics = found["parent"].data.metrics
    assert f"{metrics['baseline_majority_class_val_accuracy']:.4f}" == shown[1]
    assert f"{metrics['baseline_logistic_regression_val_accuracy']:.4f}" == shown[2]
    for metric in ("val_loss", "val_f1", "test_auc", "test_balanced_accuracy"):
        assert f"baseline_logistic_regression_{metric}" in metrics
    theirs = metrics["baseline_logistic_regression_test_accuracy"]
    assert theirs == pytest.approx(test, abs=0.011)

    told = json.loads(command(in_folder, "show", "--json")[1])
    assert [baseline["name"] for baseline in told["baselines"]] == [
        "majority class",
        "logistic regression",
    ]
    against = told["against_baseline"]
    winner = found["winner"].data.metrics["test_accuracy"]
    assert against["value"] == pytest.approx(winner, abs=1e-6)
    assert against["baseline_value"] == theirs
    assert (against["metric"], against["test"]) == ("test_accuracy", "exact McNemar")
    counts = against["only_winner"], against["only_baseline"]
    p_value = Comparison(winner, theirs, *counts).p_value
    assert against["p_value"] == p_value
    examples = len(np.load("breast_cancer.npz")["y_test"])
    assert (counts[0] - counts[1]) / examples == pytest.approx(winner - theirs, abs=1e-6)
    assert f"{winner:.4f} against {theirs:.4f}, exact McNemar p = {p_value:.2g}." in sentence
    kept = BestBaseline(**found["study"].user_attrs["best_baseline"])
    assert kept.correct(examples).mean() == theirs

    assert sentence in command(in_folder, "show")[1]
    page = (in_folder / "report.html").read_text()
    assert sentence in page
    assert f"Baselines: majority class {shown[1]}, logistic regression {shown[2]}." in page
    assert '"name":"logistic regression"' in page
    assert sentence in found["parent"].data.tags["mlflow.note.content"]

    before = invariants.dump(in_folder)
    again = command(in_folder, *given)[1]
    assert lines[2] in again and sentence in again
    assert invariants.dump(in_folder) == before
    assert command(in_folder, "doctor")[0] == 0
    code, out, _ = command(in_folder, "reproduce", "--dataset", "breast_cancer.npz", "--trial", "0")
    assert (code, "the same to the last digit" in out) == (0, True)


def test_a_column_of_many_words_is_no_obstacle(in_folder: Path) -> None:
    """The word alone tells the class; above 50 different words it is an index."""
    random = np.random.default_rng(0)
    words = random.integers(0, 60, 1200)
    rows = [f"w{word},{random.normal():.3f},{'even' if word % 2 else 'odd'}" for word in words]
    Path("words.csv").write_text("\n".join(["word,size,kind", *rows]))
    found = baselines_of("val_auc", dataset="words.csv", target="kind")
    assert found.baselines[1].text(METRICS["val_auc"]) == "logistic regression 1.0000"
    assert found.best is not None
    assert (found.best.name, found.best.metric) == ("logistic regression", "val_auc")
    assert found.baselines[1].metrics["test_auc"] > 0.99


def check_none(out: str) -> None:
    """Assert that a run that printed this left no baselines."""
    assert not re.search("baseline|logistic|majority", out)
    told = json.loads(command(Path.cwd(), "show", "--json")[1])
    assert (told["baselines"], told["against_baseline"]) == ([], None)


@pytest.mark.slow
def test_mnist_has_none(in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MNIST", clouds)  # fewer examples, by the same name
    code, out, err = command(in_folder, *ONE_TRIAL)
    assert (code, err) == (0, "")
    assert "mnist: 135 / 15 / 30 examples" in out
    check_none(out)


# ---- when they are computed ----------------------------------------------------------------------


class Told(Progress):
    """Remembers what a run reported; before_retraining: it stops after its first trial."""

    def __init__(self, *, before_retraining: bool = False) -> None:
        self.found: list[list[Baseline]] = []
        self.warnings: list[str] = []
        self.trials_before = -1
        self.before_retraining = before_retraining

    def baselines(self, baselines: list[Baseline]) -> None:
        self.found.append(baselines)
        self.trials_before = len(study().trials)

    def warning(self, line: str) -> None:
        self.warnings.append(line)

    def trial(self, *_: object) -> None:
        if self.before_retraining:
            self.stop()


def study() -> optuna.Study:
    return optuna.load_study(study_name="mnist-dnn", storage="sqlite:///study.db")


def do(clouds: Path, told: Progress | None = None, **changed: Any) -> Result:
    settings = {"n_trials": 1, "epochs": 1, "hidden_units": "8", "workers": 1, "report": "none"}
    return run(StudyConfig(dataset=str(clouds), **{**settings, **changed}), told)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> tuple[Path, Told, Result]:
    """A folder in which a study by the loss ran, what it reported and its result."""
    folder, told = tmp_path_factory.mktemp("compared"), Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, told, do(clouds, told, objective="val_loss")


@pytest.mark.slow
def test_they_are_computed_before_the_first_trial_and_once(
    compared: tuple[Path, Told, Result],
    in_folder: Path,
    clouds: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, told, result = compared
    assert told.found == [result.baselines]
    assert told.trials_before == 0
    assert result.against_baseline is not None
    copy_databases(folder, in_folder)
    monkeypatch.setattr(baselines, "compute", None)
    again = Told(before_retraining=True)
    assert do(clouds, again, n_trials=2).baselines == result.baselines
    assert again.found == told.found
    assert again.warnings == []


@pytest.mark.parametrize("objective", ["val_loss", "val_auc", "val_balanced_accuracy"])
def test_they_are_compared_by_the_objective(
    objective: str, compared: tuple[Path, Told, Result], clouds: Path
) -> None:
    folder, _, result = compared
    assert result.winner is not None
    data = load_for_study(StudyConfig(dataset=str(clouds)), None)
    found = baselines_of(objective, dataset=str(clouds))
    with mlflow_at(folder):
        model = mlflow.keras.load_model("models:/MNIST_DNN_Model@production")
    assert found.best is not None
    against = compare_with_baseline(model, data, outputs_of(model, data), found.best, 0)
    metric = METRICS[objective]
    name = f"test_{metric.stem}"
    assert (against["metric"], against["test"]) == (name, "paired bootstrap")
    assert against["value"] == pytest.approx(result.winner.metrics[name], rel=1e-5)
    values = {baseline.name: baseline.metrics[name] for baseline in found.baselines}
    assert against["baseline_value"] == values[against["baseline"]]
    assert against["baseline_value"] == metric.best(values.values())
    assert "only_winner" not in against
    assert found.baselines == result.baselines
    if objective == result.config.objective:
        value = pytest.approx(against["value"], rel=1e-5)
        assert result.against_baseline == {**against, "value": value}


def test_metrics_that_mlflow_lacks_are_repaired(
    compared: tuple[Path, Told, Result], in_folder: Path
) -> None:
    copy_databases(compared[0], in_folder)
    expected = invariants.check(in_folder, 1)["parent"].data.metrics
    stored = study()
    values = stored.user_attrs["baselines"]
    values[1]["metrics"]["val_accuracy"] = 0.125
    stored.set_user_attr("baselines", values)
    code, out, _ = command(in_folder, "doctor")
    assert (code, out.splitlines()[0]) == (
        1,
        "the parent run: its metrics of the baselines differ",
    )
    assert command(in_folder, "doctor", "--fix")[0] == 0
    assert command(in_folder, "doctor")[0] == 0
    found = invariants.check(in_folder, 1)["parent"].data.metrics
    assert found == {**expected, "baseline_logistic_regression_val_accuracy": 0.125}


@pytest.mark.slow
def test_a_study_without_them_gets_them_with_its_next_trial(in_folder: Path, clouds: Path) -> None:
    given = ("--dataset", str(clouds), *ONE_TRIAL)
    code, out, err = command(in_folder, *given, "--baselines", "none")
    assert (code, err) == (0, "")
    check_none(out)
    before = invariants.dump(in_folder)
    finished = do(clouds)
    assert (finished.baselines, finished.against_baseline) == ([], None)
    assert invariants.dump(in_folder) == before
    assert len(do(clouds, n_trials=2).baselines) == 2
    invariants.check(in_folder, 2)


@pytest.mark.slow
def test_a_stop_leaves_them_to_the_next_run_and_one_that_fails_is_a_warning(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()

    def stop(_: Any, __: Any, ___: int, limit: Limit) -> Any:
        told.stop()  # the first Ctrl-C
        limit.stop.wait(60)
        limit.is_over()

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setitem(MODELS["classification"], "logistic regression", stop)
    stopped = do(clouds, told)
    assert (stopped.winner, stopped.baselines, stopped.ran) == (None, [], 0)
    assert told.found == []

    monkeypatch.setitem(MODELS["classification"], "logistic regression", fail)
    told = Told()
    result = do(clouds, told)
    assert told.warnings == [
        "the baseline logistic regression could not be computed (MemoryError: MemoryError)"
    ]
    assert [baseline.name for baseline in result.baselines] == ["majority class"]
    assert told.found == [result.baselines]
    assert result.winner is not None
    assert result.against_baseline is not None
    assert result.against_baseline["baseline"] == "majority class"
    invariants.check(in_folder, 1)


WITH_A_SLOW_ONE = """
import sys
from search import cli
from search.training.simple_models import MODELS

def fit(x, y, outputs, limit):
    print("fitting", flush=True)
    limit.stop.wait(60)

MODELS["classification"]["logistic regression"] = fit
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigterm_meanwhile_ends_the_run_in_one_line(in_folder: Path, clouds: Path) -> None:
    given = ("--dataset", str(clouds), *ONE_TRIAL, "--n-trials", "2")
    for workers in ("1", "2"):
        arguments = ["-c", WITH_A_SLOW_ONE, *given, "--workers", workers]
        process = forks.Python(arguments, cwd=in_folder)
        line = ""
        while line != "fitting\n":
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert err == "error: terminated by SIGTERM; run the same command again to go on\n"
        assert process.returncode == 143
        assert study().trials == []
    code, out, err = command(in_folder, *given)
    assert (code, err) == (0, "")
    assert "\nbaselines: majority class " in out
    invariants.check(in_folder, 2)
