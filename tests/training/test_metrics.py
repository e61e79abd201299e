"""The metrics that the graph counts are scikit-learn's."""

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from search.task import Task
from search.training.metrics import (
    AbsoluteError,
    OfClasses,
    OfLabels,
    OfNumbers,
    SubsetAccuracy,
    validation_metrics,
)

sklearn = pytest.importorskip("sklearn.metrics")


def in_batches(metric: keras.metrics.Metric, y: NDArray, predicted: NDArray) -> dict[str, float]:
    for first in range(0, len(y), 300):
        metric.update_state(y[first : first + 300], predicted[first : first + 300])
    found = metric.result()
    named = found if isinstance(found, dict) else {metric.name: found}
    return {name: float(value) for name, value in named.items()}


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_of_classes(classes: int, sharpness: float) -> None:
    random = np.random.default_rng(classes)
    y = random.choice(classes, 1000, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    logits = random.normal(size=(1000, classes)) + np.eye(classes)[y]
    scores = np.exp(sharpness * (logits - logits.max(axis=1, keepdims=True)))
    probabilities = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    found = in_batches(OfClasses(classes), y.astype(np.int32), probabilities)
    predicted = probabilities.argmax(axis=1)
    each = [sklearn.roc_auc_score(y == k, probabilities[:, k]) for k in range(classes)]
    assert found == pytest.approx(
        {
            "auc": np.mean(each),
            "f1": sklearn.f1_score(y, predicted, average="macro"),
            "balanced_accuracy": sklearn.balanced_accuracy_score(y, predicted),
        },
        abs=2e-4,
    )


def test_classes_that_do_not_occur_do_not_count() -> None:
    y = np.array([0, 0, 1], np.int32)
    probabilities = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.2, 0.8, 0]], np.float32)
    found = in_batches(OfClasses(3), y, probabilities)
    f1 = sklearn.f1_score(y, [0, 1, 1], average="macro")
    assert found == pytest.approx({"auc": 1, "f1": f1, "balanced_accuracy": 0.75})


def test_of_one_class_alone_the_area_is_a_half() -> None:
    y, probabilities = np.zeros(4, np.int32), np.full((4, 2), 0.5, np.float32)
    found = in_batches(OfClasses(2), y, probabilities)
    assert found == {"auc": 0.5, "f1": 1, "balanced_accuracy": 1}


def test_many_classes_take_little_memory() -> None:
    metric = OfClasses(20_000)
    assert sum(np.prod(v.shape) for v in metric.variables) < 10_000_000


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
def test_of_labels(sharpness: float) -> None:
    random = np.random.default_rng(1)
    y = (random.random((1000, 5)) < [0.03, 0.2, 0.5, 0.7, 0]).astype(np.float32)
    logits = sharpness * (random.normal(size=y.shape) + y - 0.5)
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    found = in_batches(OfLabels(5), y, probabilities)
    found |= in_batches(SubsetAccuracy(), y, probabilities)
    called, each = probabilities > 0.5, range(4)  # no example has the last label
    assert found == pytest.approx(
        {
            "auc": np.mean([sklearn.roc_auc_score(y[:, k], probabilities[:, k]) for k in each]),
            "f1": sklearn.f1_score(y, called, average="macro", zero_division=0),
            "accuracy": sklearn.accuracy_score(y, called),
        },
        abs=2e-4,
    )


def test_of_numbers_in_the_unit_of_the_target() -> None:
    random = np.random.default_rng(0)
    y = random.normal(size=1000).astype(np.float32)
    predicted = (y + random.normal(size=1000) / 2).astype(np.float32)[:, None]
    task = Task("regression", 1, mean=50, deviation=8)
    found = in_batches(validation_metrics(task), y, predicted)
    found |= in_batches(AbsoluteError(8), y, predicted)
    target, given = y * 8 + 50, predicted[:, 0] * 8 + 50
    assert found == pytest.approx(
        {
            "rmse": sklearn.root_mean_squared_error(target, given),
            "r2": sklearn.r2_score(target, given),
            "mae": sklearn.mean_absolute_error(target, given),
        },
        rel=1e-4,
    )


def test_of_equal_targets_r2_is_0() -> None:
    found = in_batches(OfNumbers(1), np.ones(4, np.float32), np.zeros((4, 1), np.float32))
    assert found == {"rmse": 1, "r2": 0}
