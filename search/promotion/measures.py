"""The metrics of a task on the test examples, exactly, of one sample or of many resamples.

Each is computed from how often every example counts: once, or as often as a resample drew it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.task import Metric, Task

_Array = NDArray[np.float64]


def measure(task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any]) -> float:
    """The metric of a model: y of shape (n,), outputs of shape (n, outputs).

    The outputs are those of the registered model: probabilities, or numbers in the target's unit.
    """
    return float(measure_resamples(task, metric, y, outputs, np.ones((len(y), 1)))[0])


def measure_all(task: Task, y: NDArray[Any], outputs: NDArray[Any]) -> dict[str, float]:
    """All metrics of the task, by name, as `test_loss`."""
    return {f"test_{m.stem}": measure(task, m, y, outputs) for m in task.metrics}


def measure_resamples(
    task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any], counts: _Array
) -> _Array:
    """The metric of each resample: counts of shape (n, resamples), how often it drew each example.

    Returns shape (resamples,). The definitions are those of `training.metrics`, but the AUC is
    exact; a class that a resample lacks does not count in it.
    """
    if not task.classes:
        return _of_numbers(task, metric, y.astype(float), outputs[:, 0].astype(float), counts)
    if metric.stem == "auc":
        return _areas(y, outputs, counts)
    size = counts.sum(axis=0)
    if metric.stem == "loss":
        own = np.clip(outputs[np.arange(len(y)), y].astype(float), 1e-7, 1 - 1e-7)  # as Keras does
        return np.asarray(-np.log(own) @ counts / size)
    predicted = outputs.argmax(axis=1)
    if metric.stem == "accuracy":
        return np.asarray((predicted == y) @ counts / size)
    return _of_classes(metric, y, predicted, task.classes, counts)


def _of_numbers(task: Task, metric: Metric, y: _Array, given: _Array, counts: _Array) -> _Array:
    size, error = counts.sum(axis=0), given - y
    if metric.stem == "mae":
        return np.asarray(np.abs(error) @ counts / size)
    squared = np.square(error) @ counts
    if metric.stem == "rmse":
        return np.asarray(np.sqrt(squared / size))
    if metric.stem == "loss":  # of the standardized target, as in training
        return np.asarray(squared / size / task.deviation**2)
    centred = y - y.mean()
    spread = np.square(centred) @ counts - np.square(centred @ counts) / size
    enough = spread > 1e-12 * max(float(np.square(centred).sum()), 1e-300)
    return np.where(enough, 1 - squared / np.where(enough, spread, 1), 0.0)


def _of_classes(
    metric: Metric, y: NDArray[Any], predicted: NDArray[Any], classes: int, counts: _Array
) -> _Array:
    def by_class(rows: NDArray[Any], of: NDArray[Any]) -> _Array:
        order = np.argsort(of[rows], kind="stable")
        there, starts = np.unique(of[rows][order], return_index=True)
        found = np.zeros((classes, counts.shape[1]))
        if len(there):
            found[there] = np.add.reduceat(counts[rows[order]], starts, axis=0)
        return found

    everything = np.arange(len(y))
    right = by_class(np.flatnonzero(predicted == y), y)
    labelled = by_class(everything, y)
    if metric.stem == "balanced_accuracy":
        return _mean_where(labelled > 0, right, labelled)
    either = labelled + by_class(everything, predicted)
    return _mean_where(either > 0, 2 * right, either)


def _areas(y: NDArray[Any], outputs: NDArray[Any], counts: _Array) -> _Array:
    """The macro one-vs-rest area under the ROC curve, by its rank statistic with ties as a half."""
    total, known = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for label in np.unique(y):
        own, other = np.flatnonzero(y == label), np.flatnonzero(y != label)
        if not len(other):
            continue
        other = other[np.argsort(outputs[other, label], kind="stable")]
        scores = outputs[other, label]
        below = np.concatenate([np.zeros((1, counts.shape[1])), np.cumsum(counts[other], axis=0)])
        first, last = (np.searchsorted(scores, outputs[own, label], side) for side in _SIDES)
        ranks = (below[first] + below[last]) / 2
        drawn = counts[own]
        of_pairs = drawn.sum(axis=0) * below[-1]
        there = of_pairs > 0
        area = (drawn * ranks).sum(axis=0) / np.where(there, of_pairs, 1)
        total, known = total + np.where(there, area, 0), known + there
    return np.where(known > 0, total / np.maximum(known, 1), 0.5)


_SIDES: Any = ("left", "right")


def _mean_where(counted: NDArray[np.bool_], parts: _Array, wholes: _Array) -> _Array:
    shares = np.where(counted, parts / np.where(counted, wholes, 1), 0)
    return np.asarray(shares.sum(axis=0) / np.maximum(counted.sum(axis=0), 1))
