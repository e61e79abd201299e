"""Baselines in a study, through the real command: shown, kept, compared with the winner."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import forks
import invariants
import numpy as np
import optuna
import pytest
from conftest import command
from sklearn import datasets
from sklearn.linear_model import LogisticRegression, Ridge

from search import StudyConfig, run
from search.data.load import load_dataset
from search.data.preparation import scaled
from search.promotion import baselines
from search.promotion.baselines import Baseline, BestBaseline
from search.promotion.comparison import Comparison
from search.report.progress import Progress, Result
from search.task import METRICS
from search.training.simple_models import MODELS, Limit

SMALL = ("--n-trials", "2", "--epochs", "2", "--hidden-units", "8,16", "--workers", "1")


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["breast_cancer", "wine", "digits"])
def test_real_data_have_their_baselines_everywhere(name: str, in_folder: Path) -> None:
    given = ("--dataset", write(name), *SMALL)
    code, out, err = command(in_folder, *given)
    assert (code, err) == (0, "")
    validation, test = logistic(f"{name}.npz")
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

    found = invariants.check(in_folder, 2)
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
    examples = len(np.load(f"{name}.npz")["y_test"])
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
    code, out, _ = command(in_folder, "reproduce", "--dataset", f"{name}.npz", "--trial", "1")
    assert (code, "the same to the last digit" in out) == (0, True)


@pytest.mark.slow
def test_a_regression_is_compared_by_its_objective_in_the_unit_of_its_target(
    in_folder: Path,
) -> None:
    given = ("--dataset", write("diabetes"), "--task", "regression", *SMALL)
    code, out, err = command(in_folder, *given)
    assert (code, err) == (0, "")
    data = load_dataset("diabetes.npz", 0.1, split="random", normalize=True, task="regression")
    (x, y), (x_val, y_val) = data.train, data.validation
    errors = (Ridge().fit(x, y).predict(x_val) - y_val) * data.task.deviation
    lines = out.splitlines()
    shown = re.fullmatch(
        r"baselines: mean [\d.]+, ridge regression ([\d.]+) \(validation RMSE\)", lines[2]
    )
    assert shown is not None, out
    assert float(shown[1]) == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-3)
    assert f"\nridge regression       val_rmse {shown[1]}\n" in out

    found = invariants.check(in_folder, 2)
    metrics = found["parent"].data.metrics
    names = ("loss", "mae", "rmse", "r2")
    assert {f"baseline_mean_{part}_{name}" for part in ("val", "test") for name in names} <= {
        *metrics
    }
    against = json.loads(command(in_folder, "show", "--json")[1])["against_baseline"]
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
    assert sentence in command(in_folder, "show")[1]
    assert sentence in (in_folder / "report.html").read_text()
    before = invariants.dump(in_folder)
    assert sentence in command(in_folder, *given)[1]
    assert invariants.dump(in_folder) == before


@pytest.mark.slow
def test_a_column_of_many_words_is_no_obstacle(in_folder: Path) -> None:
    """The word alone tells the class; above 50 different words it is an index."""
    random = np.random.default_rng(0)
    words = random.integers(0, 60, 1200)
    rows = [f"w{word},{random.normal():.3f},{'even' if word % 2 else 'odd'}" for word in words]
    Path("words.csv").write_text("\n".join(["word,size,kind", *rows]))
    given = ("--dataset", "words.csv", "--target", "kind", "--objective", "val_auc")
    code, out, err = command(in_folder, *given, *SMALL)
    assert (code, err) == (0, "")
    assert ", logistic regression 1.0000 (validation AUC)\n" in out
    against = json.loads(command(in_folder, "show", "--json")[1])["against_baseline"]
    assert (against["baseline"], against["metric"]) == ("logistic regression", "test_auc")
    assert against["baseline_value"] > 0.99


@pytest.mark.slow
def test_none_and_mnist_have_none(in_folder: Path) -> None:
    for name, options in (
        ("mine", ("--dataset", write("wine"), *SMALL, "--baselines", "none")),
        ("mnist", (*SMALL, "--n-trials", "1", "--epochs", "1", "--batch-size", "2000")),
    ):
        models = ("--study-name", name, "--model-name", name)
        code, out, err = command(in_folder, *models, *options, "--report", "none")
        assert (code, err) == (0, "")
        assert not re.search("baseline|logistic|majority", out)
        told = json.loads(command(in_folder, "show", "--json", *models)[1])
        assert (told["baselines"], told["against_baseline"]) == ([], None)


# ---- from Python, with one worker: in this process -----------------------------------------------


class Told(Progress):
    """Remembers what a run reported."""

    def __init__(self) -> None:
        self.found: list[list[Baseline]] = []
        self.warnings: list[str] = []
        self.trials_before = -1

    def baselines(self, baselines: list[Baseline]) -> None:
        self.found.append(baselines)
        self.trials_before = len(study().trials)

    def warning(self, line: str) -> None:
        self.warnings.append(line)


def study() -> optuna.Study:
    return optuna.load_study(study_name="mnist-dnn", storage="sqlite:///study.db")


def do(clouds: Path, told: Progress | None = None, **changed: Any) -> Result:
    settings = {"n_trials": 1, "epochs": 1, "hidden_units": "8", "workers": 1, "report": "none"}
    return run(StudyConfig(dataset=str(clouds), **{**settings, **changed}), told)


def test_they_are_computed_before_the_first_trial_and_once(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    result = do(clouds, told)
    assert told.found == [result.baselines]
    assert told.trials_before == 0
    assert result.against_baseline is not None
    monkeypatch.setattr(baselines, "compute", None)
    again = Told()
    assert do(clouds, again, n_trials=2).baselines == result.baselines
    assert again.found == told.found
    assert again.warnings == []


@pytest.mark.slow
def test_a_study_without_them_gets_them_with_its_next_trial(in_folder: Path, clouds: Path) -> None:
    assert do(clouds, baselines="none").against_baseline is None
    before = invariants.dump(in_folder)
    finished = do(clouds)
    assert (finished.baselines, finished.against_baseline) == ([], None)
    assert invariants.dump(in_folder) == before
    assert len(do(clouds, n_trials=2).baselines) == 2
    invariants.check(in_folder, 2)


@pytest.mark.parametrize("objective", ["val_loss", "val_auc", "val_balanced_accuracy"])
def test_they_are_compared_by_the_objective(objective: str, in_folder: Path, clouds: Path) -> None:
    result = do(clouds, objective=objective)
    metric, against = METRICS[objective], result.against_baseline
    assert against is not None and result.winner is not None
    name = f"test_{metric.stem}"
    assert (against["metric"], against["test"]) == (name, "paired bootstrap")
    assert against["value"] == pytest.approx(result.winner.metrics[name], rel=1e-5)
    values = {baseline.name: baseline.metrics[name] for baseline in result.baselines}
    assert against["baseline_value"] == values[against["baseline"]]
    assert against["baseline_value"] == metric.best(values.values())
    assert "only_winner" not in against


def test_one_that_fails_is_a_warning(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setitem(MODELS["classification"], "logistic regression", fit)
    told = Told()
    result = do(clouds, told)
    assert told.warnings == [
        "the baseline logistic regression could not be computed (MemoryError: MemoryError)"
    ]
    assert [baseline.name for baseline in result.baselines] == ["majority class"]
    assert result.winner is not None
    assert result.against_baseline is not None
    assert result.against_baseline["baseline"] == "majority class"


@pytest.mark.slow
def test_a_stop_meanwhile_leaves_them_to_the_next_run(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()

    def fit(_: Any, __: Any, ___: int, limit: Limit) -> Any:
        told.stop()  # the first Ctrl-C
        limit.stop.wait(60)
        limit.is_over()

    with monkeypatch.context() as patch:
        patch.setitem(MODELS["classification"], "logistic regression", fit)
        stopped = do(clouds, told)
    assert (stopped.winner, stopped.baselines, stopped.ran) == (None, [], 0)
    assert told.found == []
    assert len(do(clouds).baselines) == 2
    invariants.check(in_folder, 1)


@pytest.mark.slow
def test_metrics_that_mlflow_lacks_are_repaired(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(clouds)
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
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_meanwhile_ends_the_run_in_one_line(
    in_folder: Path, clouds: Path, workers: str
) -> None:
    given = ("--dataset", str(clouds), *SMALL, "--report", "none", "--workers", workers)
    process = forks.Python(["-c", WITH_A_SLOW_ONE, *given], cwd=in_folder)
    line = ""
    while line != "fitting\n":
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err == "error: terminated by SIGTERM; run the same command again to go on\n"
    assert process.returncode == 143
    code, out, err = command(in_folder, *given)
    assert (code, err) == (0, "")
    assert "\nbaselines: majority class " in out
    invariants.check(in_folder, 2)
