"""The metrics of the test examples are scikit-learn's, of one sample and of resamples."""

import numpy as np
import pytest
from numpy.typing import NDArray

from search.promotion.measures import measure, measure_all, measurer
from search.task import METRICS, Task

sklearn = pytest.importorskip("sklearn.metrics")


def of_classes(classes: int, rows: int = 400) -> tuple[Task, NDArray, NDArray]:
    random = np.random.default_rng(classes)
    y = random.integers(0, classes, rows)
    scores = random.random((rows, classes)).round(1) + 0.01 + np.eye(classes)[y] / 3  # ties
    outputs = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    return Task("classification", classes), y.astype(np.int32), outputs


def of_numbers(rows: int = 400) -> tuple[Task, NDArray, NDArray]:
    random = np.random.default_rng(0)
    y = random.normal(1000, 20, rows).astype(np.float32)
    given = (y + random.normal(0, 10, rows))[:, None].astype(np.float32)
    return Task("regression", 1, mean=1000, deviation=20), y, given


def of_labels(rows: int = 400) -> tuple[Task, NDArray, NDArray]:
    random = np.random.default_rng(0)
    y = (random.random((rows, 3)) < [0.1, 0.5, 0.8]).astype(np.float32)
    outputs = np.clip(random.normal(0.3, 0.3, y.shape).round(1) + y / 3, 0, 1)  # ties
    return Task("multilabel", 3), y, outputs.astype(np.float32)


def test_of_labels() -> None:
    task, y, outputs = of_labels()
    called, clipped = outputs > 0.5, np.clip(outputs.astype(float), 1e-7, 1 - 1e-7)
    losses = [sklearn.log_loss(y[:, k], clipped[:, k]) for k in range(3)]
    assert measure_all(task, y, outputs) == pytest.approx(
        {
            "test_loss": np.mean(losses),
            "test_accuracy": sklearn.accuracy_score(y, called),
            "test_auc": sklearn.roc_auc_score(y, outputs, average="macro"),
            "test_f1": sklearn.f1_score(y, called, average="macro"),
        }
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_of_classes(classes: int) -> None:
    task, y, outputs = of_classes(classes)
    predicted = outputs.argmax(axis=1)
    each = [sklearn.roc_auc_score(y == k, outputs[:, k]) for k in range(classes)]
    assert measure_all(task, y, outputs) == pytest.approx(
        {
            "test_loss": sklearn.log_loss(y, outputs),
            "test_accuracy": sklearn.accuracy_score(y, predicted),
            "test_auc": np.mean(each),
            "test_f1": sklearn.f1_score(y, predicted, average="macro"),
            "test_balanced_accuracy": sklearn.balanced_accuracy_score(y, predicted),
        }
    )


def test_of_numbers() -> None:
    task, y, outputs = of_numbers()
    squared = sklearn.mean_squared_error(y, outputs[:, 0])
    assert measure_all(task, y, outputs) == pytest.approx(
        {
            "test_loss": squared / 400,
            "test_mae": sklearn.mean_absolute_error(y, outputs[:, 0]),
            "test_rmse": squared**0.5,
            "test_r2": sklearn.r2_score(y, outputs[:, 0]),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    "made", [lambda: of_classes(3, 50), lambda: of_labels(50), lambda: of_numbers(50)]
)
def test_a_resample_is_measured_as_its_rows_are(made: object) -> None:
    task, y, outputs = made()  # type: ignore[operator]
    drawn = np.random.default_rng(1).integers(0, len(y), (len(y), 6))
    drawn[:, 5] = 0  # one example alone
    counts = np.stack([np.bincount(rows, minlength=len(y)) for rows in drawn.T], axis=1)
    for metric in task.metrics:
        found = measurer(task, metric, y, outputs)(counts.astype(float))
        expected = [measure(task, metric, y[rows], outputs[rows]) for rows in drawn.T]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), metric.name


def test_a_class_that_is_lacking_does_not_count() -> None:
    task, y, outputs = Task("classification", 3), np.array([0, 0]), np.eye(3)[[0, 1]]
    assert measure(task, METRICS["val_auc"], y, outputs) == 0.5
    assert measure(task, METRICS["val_balanced_accuracy"], y, outputs) == 0.5
    assert measure(task, METRICS["val_f1"], y, outputs) == pytest.approx(1 / 3)
