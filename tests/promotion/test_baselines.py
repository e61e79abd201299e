"""Baselines, beside scikit-learn's own models and metrics on the same arrays."""

import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, Ridge

from search.data.dataset import Dataset
from search.promotion import baselines
from search.promotion.baselines import BestBaseline, Computation, compute, pack
from search.task import METRICS, describe
from search.training.simple_models import MODELS, Limit

ACCURACY, LOSS, RMSE = (METRICS[f"val_{name}"] for name in ("accuracy", "loss", "rmse"))


def in_a_minute() -> Limit:
    return Limit(time.monotonic() + 60, threading.Event())


def dataset_of(kind: str, x: Any, y: Any) -> Dataset:
    """The examples in random order: 60 % to train on, a fifth each to validate and to test."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order]
    a, b = len(x) * 6 // 10, len(x) * 8 // 10
    task, targets = describe(kind, y[:b], a)
    return Dataset(
        *("mine", "0", x[:b], targets, x[b:], y[b:]),
        train_size=a,
        sample_shape=(x.shape[1],),
        task=task,
    )


def wine() -> Dataset:
    x, y = load_wine(return_X_y=True)
    return dataset_of("classification", (x - x.mean(axis=0)) / x.std(axis=0), y.astype(np.int32))


def diabetes() -> Dataset:
    return dataset_of("regression", *load_diabetes(return_X_y=True))


def test_labels_have_their_majority_and_a_logistic_regression_each() -> None:
    x, y = load_wine(return_X_y=True)
    labels = np.stack([y == 0, y != 1, x[:, 0] > 13], axis=1).astype(np.float32)
    data = dataset_of("multilabel", (x - x.mean(axis=0)) / x.std(axis=0), labels)
    found = compute(data, METRICS["val_auc"], 0, in_a_minute())
    assert found.failures == []
    majority, logistic = found.baselines
    assert (majority.name, logistic.name) == ("majority labels", "logistic regression")
    most = data.train[1].mean(axis=0) > 0.5
    right = (data.validation[1] == most).all(axis=1).mean()
    assert (majority.metrics["val_accuracy"], majority.metrics["val_auc"]) == (right, 0.5)
    fits = [LogisticRegression(max_iter=1000).fit(data.x_all, column) for column in data.y_all.T]
    given = np.stack([fit.predict_proba(data.x_test)[:, 1] for fit in fits], axis=1)
    auc = metrics.roc_auc_score(data.y_test, given)
    assert logistic.metrics["test_auc"] == pytest.approx(auc, abs=1e-3)
    assert found.best is not None and found.best.name == "logistic regression"
    assert found.best.outputs(len(data.y_test)) == pytest.approx(given, abs=0.02)
    best = compute(data, ACCURACY, 0, in_a_minute()).best
    assert best is not None
    expected = ((given > 0.5) == data.y_test).all(axis=1)
    np.testing.assert_array_equal(best.correct(len(expected)), expected)


def test_classification_has_the_majority_class_and_logistic_regression() -> None:
    data = wine()
    found = compute(data, ACCURACY, 0, in_a_minute())
    assert found.failures == []
    majority, logistic = found.baselines
    assert (majority.name, logistic.name) == ("majority class", "logistic regression")
    most = np.bincount(data.train[1]).argmax()
    assert majority.metrics["val_accuracy"] == (data.validation[1] == most).mean()
    assert majority.metrics["val_auc"] == 0.5
    for fitted_to, (x, y), part in (
        (data.train, data.validation, "val"),
        ((data.x_all, data.y_all), (data.x_test, data.y_test), "test"),
    ):
        model = LogisticRegression(max_iter=1000).fit(*fitted_to)
        given, called = model.predict_proba(x), model.predict(x)
        expected = {
            "loss": metrics.log_loss(y, given),
            "accuracy": (called == y).mean(),
            "auc": metrics.roc_auc_score(y, given, multi_class="ovr"),
            "f1": metrics.f1_score(y, called, average="macro"),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, called),
        }
        theirs = {f"{part}_{name}": value for name, value in expected.items()}
        ours = {name: logistic.metrics[name] for name in theirs}
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert ours[f"{part}_accuracy"] > 0.9
    assert (logistic.examples, logistic.converged) == (data.train_size, True)
    best = found.best
    assert best is not None and (best.name, best.metric) == (logistic.name, "val_accuracy")
    assert best.correct(len(data.y_test)).mean() == logistic.metrics["test_accuracy"]


def test_logistic_regression_weighs_the_classes_as_the_network_does() -> None:
    whole = wine()
    kept = (whole.y_all != 0) | (np.arange(len(whole.y_all)) % 4 == 0)  # class 0 is rare
    x, y = whole.x_all[kept], whole.y_all[kept]
    x = x + np.random.default_rng(0).normal(0, 3, x.shape).astype(np.float32)
    data = replace(whole, x_all=x, y_all=y, train_size=len(y) * 3 // 4)
    majority, logistic = compute(data, ACCURACY, 0, in_a_minute(), "balanced").baselines
    plain = compute(data, ACCURACY, 0, in_a_minute()).baselines
    (x, y), (x_val, y_val) = data.train, data.validation
    model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(x, y)
    theirs = metrics.log_loss(y_val, model.predict_proba(x_val), labels=range(3))
    assert logistic.metrics["val_loss"] == pytest.approx(theirs, abs=1e-3)
    assert abs(plain[1].metrics["val_loss"] - theirs) > 0.01
    assert majority == plain[0]


def test_regression_has_the_mean_and_ridge_regression_in_the_unit_of_the_target() -> None:
    data = diabetes()
    x, y = load_diabetes(return_X_y=True)
    y = y[np.random.default_rng(0).permutation(len(y))][: len(data.y_all)]  # not standardized
    train, validation = np.split(y, [data.train_size])
    (x, _), (x_val, _) = data.train, data.validation
    found = compute(data, RMSE, 0, in_a_minute())
    assert found.failures == []
    mean, ridge = found.baselines
    assert (mean.name, ridge.name) == ("mean", "ridge regression")
    assert mean.metrics["val_r2"] <= 0
    assert mean.metrics["val_rmse"] == pytest.approx(
        np.sqrt(((validation - train.mean()) ** 2).mean())
    )
    model = Ridge().fit(x, train)
    assert ridge.metrics["val_r2"] == pytest.approx(model.score(x_val, validation), abs=1e-3)
    error = model.predict(x_val) - validation
    assert ridge.metrics["val_loss"] == pytest.approx(  # as the network's: standardized
        (error**2).mean() / train.std() ** 2, rel=1e-3
    )
    theirs = Ridge().fit(data.x_all, y).predict(data.x_test)
    absolute = np.abs(theirs - data.y_test).mean()
    assert ridge.metrics["test_mae"] == pytest.approx(absolute, rel=1e-3)
    assert 30 < ridge.metrics["test_mae"] < ridge.metrics["test_rmse"] < mean.metrics["test_rmse"]
    best = found.best
    assert best is not None and (best.name, best.metric) == ("ridge regression", "val_rmse")
    np.testing.assert_allclose(best.outputs(len(data.y_test))[:, 0], theirs, rtol=1e-2)


def test_the_best_is_that_by_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    def certain_and_wrong(x: Any, y: Any, outputs: int, limit: Limit) -> Any:
        return lambda x: np.tile([0.0, 0.0, 1.0], (len(x), 1)), True

    monkeypatch.setitem(MODELS["classification"], "logistic regression", certain_and_wrong)
    best = compute(wine(), LOSS, 0, in_a_minute()).best
    assert best is not None and (best.name, best.metric) == ("majority class", "val_loss")
    shares = np.bincount(wine().y_all) / len(wine().y_all)
    np.testing.assert_allclose(best.outputs(len(wine().y_test)), [shares] * len(wine().y_test))


def test_of_many_outputs_the_accuracy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_KEPT", 50)
    found = compute(wine(), LOSS, 0, in_a_minute())
    assert found.best is not None and found.best.metric == "val_accuracy"
    assert "test_loss" in found.baselines[1].metrics
    assert compute(diabetes(), RMSE, 0, in_a_minute()).best is None


def test_of_more_outputs_the_accuracy_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(wine(), ACCURACY, 0, in_a_minute())
    monkeypatch.setattr(baselines, "_KEPT", 50)
    monkeypatch.setattr(baselines, "_MEASURED", 50)
    found = compute(wine(), LOSS, 0, in_a_minute())
    assert found.best == whole.best
    accuracies = ("val_accuracy", "test_accuracy")
    for one, other in zip(found.baselines, whole.baselines, strict=True):
        assert one.metrics == {name: other.metrics[name] for name in accuracies}
    assert found.baselines[1].text(LOSS).startswith("logistic regression 1.0000")


def test_the_last_features_of_a_table_are_words() -> None:
    """Of 60 words, each tells the class; the other feature does not."""

    class Columns:
        embeddings = (61,)

    random = np.random.default_rng(0)
    words = random.integers(1, 61, 1000)
    x = np.column_stack([random.normal(size=1000), words])
    data = dataset_of("classification", x, (words % 2).astype(np.int32))
    _, logistic = compute(data, ACCURACY, 0, in_a_minute()).baselines
    assert logistic.metrics["test_accuracy"] < 0.7
    data = replace(data, columns=Columns())
    _, logistic = compute(data, ACCURACY, 0, in_a_minute()).baselines
    assert logistic.metrics["test_accuracy"] > 0.9


@pytest.mark.parametrize(("limit", "value"), [("_ROWS", 50), ("_NUMBERS", 650), ("_WORK", 1950)])
def test_too_much_data_is_sampled_by_the_seed(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, limit, value)  # wine: 13 features, 3 classes
    fitted: list[tuple[Any, Any]] = []

    def fit(x: Any, y: Any, outputs: int, limit: Limit) -> Any:
        fitted.append((x, y))
        return lambda x: np.full((len(x), outputs), 1 / outputs), True

    data = wine()
    monkeypatch.setitem(MODELS, "classification", {"one": fit})
    for seed in (0, 0, 1):
        found = compute(data, ACCURACY, seed, in_a_minute())
        assert found.baselines[0].examples == 50
    (x, y), _, (again, _), _, (other, _), _ = fitted
    assert x.shape == (50, 13)
    np.testing.assert_array_equal(again, x)
    assert not np.array_equal(other, x)
    rows = [np.flatnonzero((data.train[0] == row).all(axis=1))[0] for row in x]
    assert len(set(rows)) == 50
    np.testing.assert_array_equal(data.train[1][rows], y)


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any) -> None:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(LogisticRegression, "fit", fit)
    found = compute(wine(), ACCURACY, 0, in_a_minute())
    assert [baseline.name for baseline in found.baselines] == ["majority class"]
    assert found.best is not None and found.best.name == "majority class"
    assert found.failures == [
        "the baseline logistic regression could not be computed (MemoryError: no room for it)"
    ]


@pytest.mark.parametrize("examples", [1, 8, 1001])
def test_what_is_kept_of_the_test_is_text(examples: int) -> None:
    random = np.random.default_rng(0)
    correct, outputs = random.random(examples) < 0.9, random.random((examples, 3))
    assert len(pack(correct)) < 50 + examples / 4
    kept = BestBaseline("mine", "val_accuracy", pack(correct)).correct(examples)
    np.testing.assert_array_equal(kept, correct)
    kept = BestBaseline("mine", "val_loss", pack(outputs)).outputs(examples)
    np.testing.assert_array_equal(kept, outputs.astype(np.float32))


def test_a_computation_is_waited_for_until_the_run_stops() -> None:
    computing = Computation(wine(), ACCURACY, 0)
    computing.start()
    computing.start()
    found = computing.wait(60, lambda: False)
    assert found is not None
    assert len(found.baselines) == 2
    assert computing.wait(0, lambda: True) is found


def test_a_computation_that_is_not_wanted_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def fit(_: Any, __: Any, ___: int, limit: Limit) -> Any:
        limit.stop.wait(60)
        ended.set()
        limit.is_over()

    monkeypatch.setitem(MODELS, "classification", {"slow": fit})
    computing = Computation(wine(), ACCURACY, 0)
    computing.start()
    assert computing.wait(0.01, lambda: False) is None
    assert computing.wait(60, lambda: True) is None
    computing.cancel()
    assert ended.wait(60)
    assert computing.wait(0.1, lambda: False) is None


def test_without_scikit_learn_there_is_a_line_and_no_baseline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    computing = Computation(wine(), ACCURACY, 0)
    computing.start()
    found = computing.wait(60, lambda: False)
    assert found is not None
    assert found.baselines == []
    (line,) = found.failures
    assert line.startswith("the baselines could not be computed (ModuleNotFoundError: ")
