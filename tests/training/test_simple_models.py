"""Simple models, beside scikit-learn's own on the same arrays."""

import threading
import time

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression

from search.training import simple_models
from search.training.simple_models import MODELS, Limit, Stopped, features_of

fit_majority, fit_logistic = MODELS["classification"].values()


def in_a_minute() -> Limit:
    return Limit(time.monotonic() + 60, threading.Event())


def wine() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_wine(return_X_y=True)
    return (x - x.mean(axis=0)) / x.std(axis=0), y


def test_the_majority_class_gives_the_frequencies() -> None:
    predict, converged = fit_majority(None, np.array([0, 2, 2, 2]), 4, in_a_minute())
    assert converged
    np.testing.assert_array_equal(predict(np.zeros((2, 5))), [[0.25, 0, 0.75, 0]] * 2)


def test_blocks_of_iterations_converge_as_one_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = wine()
    whole = LogisticRegression(max_iter=1000).fit(x, y).predict_proba(x)
    monkeypatch.setattr(simple_models, "_FIRST", 3)
    predict, converged = fit_logistic(x, y, 3, in_a_minute())
    assert converged
    np.testing.assert_allclose(predict(x), whole, atol=0.01)


def test_a_class_without_examples_has_the_probability_0() -> None:
    x, y = wine()
    predict, _ = fit_logistic(x[y != 1], y[y != 1], 4, in_a_minute())
    assert not predict(x)[:, [1, 3]].any()
    np.testing.assert_allclose(predict(x).sum(axis=1), 1)


def test_the_time_limit_ends_a_fit_that_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple_models, "_FIRST", 2)
    x, y = wine()
    predict, converged = fit_logistic(x, y, 3, Limit(time.monotonic() - 1, threading.Event()))
    assert not converged
    assert (predict(x).argmax(axis=1) == y).mean() > 0.6


def test_a_stop_ends_a_fit_between_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple_models, "_FIRST", 1)
    limit = in_a_minute()
    limit.stop.set()
    with pytest.raises(Stopped):
        fit_logistic(*wine(), 3, limit)


def test_a_model_that_would_not_fit_into_memory_is_not_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simple_models, "_MOST_WEIGHTS", 38)
    with pytest.raises(MemoryError, match="39 weights, of at most 38"):
        fit_logistic(*wine(), 3, in_a_minute())


def test_indices_for_embeddings_are_one_hot() -> None:
    x = np.array([[0.5, 0, 2], [-1, 3, 1], [0, 1, 0]], np.float32)
    expected = np.array(
        [
            [0.5, *[1, 0, 0, 0], *[0, 0, 1]],
            [-1, *[0, 0, 0, 1], *[0, 1, 0]],
            [0, *[0, 1, 0, 0], *[1, 0, 0]],
        ]
    )
    np.testing.assert_array_equal(features_of(x, (4, 3)).toarray(), expected)
    np.testing.assert_array_equal(
        features_of(x[:, 1:], (4, 3)).toarray(), np.array(expected)[:, 1:]
    )
    assert features_of(x, ()).dtype == np.float64


def test_many_numbers_are_fitted_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = wine()
    whole = LogisticRegression(max_iter=1000).fit(x, y).predict_proba(x)
    few = x.astype(np.float32)
    monkeypatch.setattr(simple_models, "_EXACT", few.size - 1)
    assert features_of(few, ()) is few
    predict, converged = fit_logistic(few, y, 3, in_a_minute())
    assert converged
    np.testing.assert_allclose(predict(few), whole, atol=0.01)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_takes_them(kind: str) -> None:
    """Each of 60 words tells the class, or the number, and nothing else does."""
    random = np.random.default_rng(0)
    words = random.integers(0, 60, 2000)
    x = np.column_stack([random.normal(size=2000), words]).astype(np.float32)
    y, outputs = {
        "classification": (words % 3, 3),
        "multilabel": (np.column_stack([words % 2, words % 3 > 0]).astype(np.float32), 2),
        "regression": (words % 7 * 100.0, 1),
    }[kind]
    features = features_of(x, (61,))
    *_, fit = MODELS[kind].values()
    predict, converged = fit(features, y, outputs, in_a_minute())
    given = predict(features)
    assert converged and given.shape == (2000, outputs)
    if kind == "classification":
        assert (given.argmax(axis=1) == y).all()
    elif kind == "multilabel":
        assert ((given > 0.5) == y).all()
    else:
        assert np.abs(given[:, 0] - y).mean() < 15


def test_each_label_has_a_logistic_regression_of_its_own() -> None:
    x, classes = wine()
    y = np.column_stack([classes == 0, classes > 0, classes == 5]).astype(np.float32)
    frequent, logistic = MODELS["multilabel"].values()
    predict, _ = frequent(x, y, 3, in_a_minute())
    np.testing.assert_allclose(predict(x[:2]), [y.mean(axis=0)] * 2)
    predict, converged = logistic(x, y, 3, in_a_minute())
    assert converged
    for label in (0, 1):
        alone = LogisticRegression(max_iter=1000).fit(x, y[:, label]).predict_proba(x)[:, 1]
        np.testing.assert_allclose(predict(x)[:, label], alone, atol=0.01)
    assert not predict(x)[:, 2].any()  # no example has this label
