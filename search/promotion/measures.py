"""The metrics of a task on the test examples, exactly, of one sample or of many resamples.

Each is computed from how often every example counts: once, or as often as a resample drew it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from search.task import THRESHOLD, Metric, Task

_Array = NDArray[Any]  # of floats
Measurer = Callable[[_Array], _Array]  # counts of shape (n, resamples) -> the metric of each


def measure(task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any]) -> float:
    """The metric of a model: y of shape (n,), or of labels (n, labels); outputs (n, outputs).

    The outputs are those of the registered model: probabilities, or numbers in the target's unit.
    """
    return float(measurer(task, metric, y, outputs)(np.ones((len(y), 1)))[0])


def measure_all(task: Task, y: NDArray[Any], outputs: NDArray[Any]) -> dict[str, float]:
    """All metrics of the task, by name, as `test_loss`."""
    return {f"test_{m.stem}": measure(task, m, y, outputs) for m in task.metrics}


def is_right(task: Task, y: NDArray[Any], outputs: NDArray[Any]) -> NDArray[np.bool_]:
    """Which examples a model predicts right: their class, or all of their labels."""
    if task.labels:
        return np.asarray(((outputs > THRESHOLD) == (y > THRESHOLD)).all(axis=1))
    return np.asarray(outputs.argmax(axis=1) == y)


def measurer(task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any]) -> Measurer:
    """The metric of a model as a function of counts: how often each resample drew each example.

    The counts have shape (n, resamples), the result (resamples,). The definitions are those of
    `training.metrics`, but the AUC is exact; a class that a resample lacks does not count in it.
    """
    return _BY_TARGET[task.decides.target](task, metric, y, outputs)


def _of_class(task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any]) -> Measurer:
    if metric.stem == "auc":
        return _area_of((y == label, outputs[:, label]) for label in np.unique(y))
    if metric.stem == "loss":
        return _mean_of(-np.log(_clipped(outputs[np.arange(len(y)), y])))
    if metric.stem == "accuracy":
        return _mean_of(is_right(task, y, outputs))
    predicted = outputs.argmax(axis=1)
    return lambda counts: _of_classes(metric, y, predicted, task.classes, counts)


def _of_labels(task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any]) -> Measurer:
    from scipy.sparse import csr_array  # its product with counts is several times faster

    there = y > THRESHOLD
    if metric.stem == "auc":
        return _area_of((there[:, label], outputs[:, label]) for label in range(task.labels))
    if metric.stem == "loss":
        given = _clipped(outputs)
        return _mean_of(-np.log(np.where(there, given, 1 - given)).mean(axis=1))
    if metric.stem == "accuracy":
        return _mean_of(is_right(task, y, outputs))
    labelled, called = (csr_array(of.T, dtype=np.float32) for of in (there, outputs > THRESHOLD))
    right, either = labelled.multiply(called).tocsr(), labelled + called
    return lambda counts: _f1_of_labels(right, either, counts)


def _of_number(task: Task, metric: Metric, y: NDArray[Any], outputs: NDArray[Any]) -> Measurer:
    numbers = y.astype(float), outputs[:, 0].astype(float)
    return lambda counts: _of_numbers(task, metric, *numbers, counts)


_BY_TARGET = {"class": _of_class, "labels": _of_labels, "number": _of_number}


def _clipped(probabilities: NDArray[Any]) -> _Array:
    return np.asarray(np.clip(probabilities.astype(float), 1e-7, 1 - 1e-7))  # as Keras does


def _mean_of(values: NDArray[Any]) -> Measurer:
    """The mean of these values of the examples."""
    numbers = values.astype(float)
    return lambda counts: np.asarray(numbers @ counts / counts.sum(axis=0))


def _area_of(each: Iterable[tuple[NDArray[np.bool_], NDArray[Any]]]) -> Measurer:
    """The macro AUC: for each class or label, which examples are of it and their scores for it."""
    ranked = [_ranked(is_own, scores) for is_own, scores in each]
    return lambda counts: _areas(ranked, counts)


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


def _f1_of_labels(right: Any, either: Any, counts: _Array) -> _Array:
    """The mean F1 of all labels, 0 for one that neither occurs nor is predicted.

    right, either: sparse, of shape (labels, n): 1 where a label is predicted rightly; 1 where it
    occurs or is predicted, 2 where both.
    """
    rights, eithers = right @ counts, np.asarray(either @ counts, float)
    return np.asarray((2 * rights / np.maximum(eithers, 1)).mean(axis=0))


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


@dataclass(frozen=True)
class _Ranked:
    """The examples of a class or label, `own`, among the others in the order of their score for it.

    The places where own examples stand cut the others into groups: `groups`, of shape (groups, n),
    sums the counts of each. below, not_above: for each own example, in how many groups all others
    have a lower score, and in how many none has a higher one; they differ by ties.
    """

    own: NDArray[np.intp]
    groups: Any
    below: NDArray[np.intp]
    not_above: NDArray[np.intp]


def _ranked(is_own: NDArray[np.bool_], scored: NDArray[Any]) -> _Ranked:
    from scipy.sparse import csr_array  # its product with counts is several times faster

    own, other = np.flatnonzero(is_own), np.flatnonzero(~is_own)
    other = other[np.argsort(scored[other], kind="stable")]
    scores, asked = scored[other], scored[own]
    below, not_above = (np.searchsorted(scores, asked, side) for side in _SIDES)
    cuts = np.unique([*below, *not_above, 0])
    group = np.searchsorted(cuts, np.arange(len(other)), "right") - 1
    ones = np.ones(len(other), np.float32)
    groups = csr_array((ones, (group, other)), shape=(len(cuts), len(is_own)))
    return _Ranked(own, groups, np.searchsorted(cuts, below), np.searchsorted(cuts, not_above))


_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def _areas(ranked: list[_Ranked], counts: _Array) -> _Array:
    """The macro one-vs-rest area under the ROC curve, by its rank statistic with ties as a half."""
    resamples = counts.shape[1]
    total, known = np.zeros(resamples), np.zeros(resamples)
    for one in ranked:
        sums = one.groups @ counts
        others = np.zeros((len(sums) + 1, resamples), sums.dtype)  # in all groups before each
        np.cumsum(sums, axis=0, out=others[1:])
        drawn, ranks = counts[one.own], others[one.below] + others[one.not_above]
        won = np.einsum("ij,ij->j", drawn, ranks, dtype=float) / 2
        pairs = drawn.sum(axis=0, dtype=float) * others[-1]
        total += np.where(pairs > 0, won / np.maximum(pairs, 1), 0)
        known += pairs > 0
    return np.where(known > 0, total / np.maximum(known, 1), 0.5)


def _mean_where(counted: NDArray[np.bool_], parts: _Array, wholes: _Array) -> _Array:
    shares = np.where(counted, parts / np.where(counted, wholes, 1), 0)
    return np.asarray(shares.sum(axis=0) / np.maximum(counted.sum(axis=0), 1))
