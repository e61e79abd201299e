"""Baselines, beside scikit-learn's own models on the same arrays."""

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, Ridge

from search.data.dataset import Dataset
from search.training import baselines
from search.training.baselines import Computation, Limit, Part, Stopped, compute, pack, unpack


def in_a_minute() -> Limit:
    return Limit(time.monotonic() + 60, threading.Event())


def parts(x: Any, y: Any) -> tuple[Part, Part, Part, Part]:
    """Training and validation part, both, and the test examples, in random order."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order]
    a, b = len(x) * 6 // 10, len(x) * 8 // 10
    return (x[:a], y[:a]), (x[a:b], y[a:b]), (x[:b], y[:b]), (x[b:], y[b:])


def wine() -> tuple[Part, Part, Part, Part]:
    x, y = load_wine(return_X_y=True)
    return parts((x - x.mean(axis=0)) / x.std(axis=0), y)


def test_classification_has_the_majority_class_and_logistic_regression() -> None:
    train, validation, everything, test = wine()
    found = compute("classification", train, validation, everything, test, 0, in_a_minute())
    assert found.failures == []
    majority, logistic = found.baselines
    assert (majority.name, logistic.name) == ("majority class", "logistic regression")
    most = np.bincount(train[1]).argmax()
    assert majority.metrics["val_accuracy"] == (validation[1] == most).mean()
    for fitted_to, tested, name in (
        (train, validation, "val_accuracy"),
        (everything, test, "test_accuracy"),
    ):
        theirs = LogisticRegression(max_iter=1000).fit(*fitted_to).score(*tested)
        assert logistic.metrics[name] == pytest.approx(theirs)
        assert logistic.metrics[name] > 0.9
    assert (logistic.examples, logistic.converged) == (len(train[0]), True)
    assert found.correct["logistic regression"].mean() == logistic.metrics["test_accuracy"]


def test_regression_has_the_mean_and_ridge_regression() -> None:
    train, validation, everything, test = parts(*load_diabetes(return_X_y=True))
    found = compute("regression", train, validation, everything, test, 0, in_a_minute())
    assert (found.failures, found.correct) == ([], {})
    mean, ridge = found.baselines
    assert (mean.name, ridge.name) == ("mean", "ridge regression")
    assert mean.metrics["val_r2"] <= 0
    assert mean.metrics["val_rmse"] == pytest.approx(
        np.sqrt(((validation[1] - train[1].mean()) ** 2).mean())
    )
    assert ridge.metrics["val_r2"] == pytest.approx(
        Ridge().fit(*train).score(*validation), abs=1e-3
    )
    theirs = Ridge().fit(*everything).predict(test[0])
    assert ridge.metrics["test_mae"] == pytest.approx(np.abs(theirs - test[1]).mean(), rel=1e-3)
    assert 0 < ridge.metrics["test_mae"] < ridge.metrics["test_rmse"] < mean.metrics["test_rmse"]


@pytest.mark.parametrize(("limit", "value"), [("_ROWS", 50), ("_NUMBERS", 650), ("_WORK", 1950)])
def test_too_much_data_is_sampled_by_the_seed(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, limit, value)  # wine: 13 features, 3 classes
    first, again = (compute("classification", *wine(), 0, in_a_minute()) for _ in range(2))
    assert {baseline.examples for baseline in first.baselines} == {50}
    assert first.baselines == again.baselines
    train = wine()[0]
    (x, y), (other, _) = (baselines._sample(train, 3, seed) for seed in (0, 1))
    assert x.shape == (50, 13)
    assert not np.array_equal(x, other)
    rows = [np.flatnonzero((train[0] == row).all(axis=1))[0] for row in x]
    assert len(set(rows)) == 50
    np.testing.assert_array_equal(train[1][rows], y)


def test_the_time_limit_ends_a_fit_that_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_FIRST", 2)
    over = Limit(time.monotonic() - 1, threading.Event())
    majority, logistic = compute("classification", *wine(), 0, over).baselines
    assert (majority.converged, logistic.converged) == (True, False)
    assert logistic.metrics["val_accuracy"] > majority.metrics["val_accuracy"]


def test_blocks_of_iterations_converge_as_one_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute("classification", *wine(), 0, in_a_minute())
    monkeypatch.setattr(baselines, "_FIRST", 3)
    assert compute("classification", *wine(), 0, in_a_minute()).baselines == whole.baselines


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any) -> None:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(LogisticRegression, "fit", fit)
    found = compute("classification", *wine(), 0, in_a_minute())
    assert [baseline.name for baseline in found.baselines] == ["majority class"]
    assert found.failures == [
        "the baseline logistic regression could not be computed (MemoryError: no room for it)"
    ]


def test_a_stop_ends_a_fit_between_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_FIRST", 1)
    limit = in_a_minute()
    limit.stop.set()
    with pytest.raises(Stopped):
        compute("classification", *wine(), 0, limit)


@pytest.mark.parametrize("examples", [1, 8, 1001])
def test_which_examples_are_correct_is_packed_into_text(examples: int) -> None:
    correct = np.random.default_rng(0).random(examples) < 0.9
    assert len(pack(correct)) < 50 + examples / 4
    np.testing.assert_array_equal(unpack(pack(correct), examples), correct)


def dataset() -> Dataset:
    (x, _), _, (x_all, y_all), (x_test, y_test) = wine()
    return Dataset(
        *("wine", "0", x_all, y_all.astype(np.int32), x_test, y_test.astype(np.int32)),
        train_size=len(x),
        classes=3,
        sample_shape=(13,),
    )


def test_a_computation_is_waited_for_until_the_run_stops() -> None:
    computing = Computation(dataset(), 0)
    computing.start()
    computing.start()
    found = computing.wait(60, lambda: False)
    assert found is not None
    assert len(found.baselines) == 2
    assert computing.wait(0, lambda: True) is found


def test_a_computation_that_is_not_wanted_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def fit(_: Any, __: Any, limit: Limit) -> Any:
        limit.stop.wait(60)
        ended.set()
        limit.is_over()

    monkeypatch.setitem(baselines._MODELS, "classification", {"slow": fit})
    computing = Computation(dataset(), 0)
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
    computing = Computation(dataset(), 0)
    computing.start()
    found = computing.wait(60, lambda: False)
    assert found is not None
    assert found.baselines == []
    (line,) = found.failures
    assert line.startswith("the baselines could not be computed (ModuleNotFoundError: ")
