"""Baselines: what simple models reach on the same data, to tell whether a network is worth it."""

import threading
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.dataset import Dataset
from search.data.preparation import scaled
from search.data.sources import Images
from search.errors import one_line
from search.promotion.measures import is_right, measure
from search.task import DEFAULT_OBJECTIVE, Metric, metric_among
from search.training.simple_models import Fit, Limit, Predict, Stopped, features_of, models_of

LIMIT = 60  # seconds that all of them may take
_ROWS = 200_000  # examples above which a model is fitted to a sample of them
_NUMBERS = 25_000_000  # the most features of all examples in a sample: 100 MB
_PART = 5_000_000  # features, or outputs, of all examples that are predicted at once: 40 MB
_WORK = 1_000_000_000  # the most features of all examples times outputs: about 1 s an iteration
_MEASURED = 20_000_000  # outputs above which only the accuracy is measured: 7 s for the AUC
_KEPT = 1_000_000  # the most outputs kept with a study: 4 MB


@dataclass(frozen=True)
class Baseline:
    """A simple model on the data that the network gets.

    metrics: all of the task, the `val_` ones after training on the training part, as a trial is
    trained, and the `test_` ones after training on training and validation data, as the winner is;
    of many classes and examples the accuracy alone. examples: how many of the training part it was
    fitted to. converged: False if the time limit ended a fit.
    """

    name: str
    metrics: dict[str, float]
    examples: int
    converged: bool

    def text(self, objective: Metric) -> str:
        """Its name and how good it is on the validation data."""
        metric = metric_among(self.metrics, objective)
        note = "" if self.converged else " (not converged)"
        return f"{self.name} {metric.text(self.metrics[metric.name])}{note}"


@dataclass(frozen=True)
class BestBaseline:
    """A baseline on the test examples, as a study keeps it for the comparison with its winner.

    metric: the one to compare by, a key of METRICS. packed: for the accuracy, which examples are
    predicted right, else the outputs (`pack`).
    """

    name: str
    metric: str
    packed: str

    def correct(self, examples: int) -> NDArray[np.bool_]:
        """Which of so many test examples it predicts right, if `metric` is the accuracy."""
        bits = np.frombuffer(zlib.decompress(b64decode(self.packed)), np.uint8)
        return np.unpackbits(bits, count=examples).astype(bool)

    def outputs(self, examples: int) -> NDArray[np.float32]:
        """Its outputs for so many test examples, of shape (examples, outputs), else."""
        numbers = np.frombuffer(zlib.decompress(b64decode(self.packed)), "<f4")
        return numbers.reshape(examples, -1)


def pack(values: NDArray[Any]) -> str:
    """Booleans, a bit each, or numbers, as float32, compressed to text."""
    bits = np.packbits(values) if values.dtype == bool else values.astype("<f4")
    return b64encode(zlib.compress(bits.tobytes(), 9)).decode()


@dataclass
class Found:
    """The baselines that could be computed.

    best: the best of them on the test examples; None if there is none, or if too much of it would
    have to be kept. failures: a line for each baseline that could not be computed.
    """

    baselines: list[Baseline] = field(default_factory=list)
    best: BestBaseline | None = None
    failures: list[str] = field(default_factory=list)


def compute(
    dataset: Dataset, objective: Metric, seed: int, limit: Limit, class_weight: str = "none"
) -> Found:
    """Fit and test the baselines of the dataset's task; the best is that by the `objective`.

    seed: of the sample, where there is too much data. class_weight: as for the network. Raises
    Stopped; any other error is a failure of one baseline.
    """
    from threadpoolctl import threadpool_limits  # scikit-learn requires it

    found, metric = Found(), _compared_by(dataset, objective)
    best = -np.inf
    with threadpool_limits(1), np.errstate(all="ignore"):  # the other cores are the workers'
        for name, fit in models_of(dataset.task.kind, class_weight).items():
            try:
                baseline, called = _fit_and_test(name, fit, dataset, seed, limit)
            except Stopped:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {one_line(error)}"
                found.failures.append(f"the baseline {name} could not be computed ({why})")
                continue
            found.baselines.append(baseline)
            if metric is None or metric.sign * baseline.metrics[f"test_{metric.stem}"] < best:
                continue
            best = metric.sign * baseline.metrics[f"test_{metric.stem}"]
            if metric == DEFAULT_OBJECTIVE:
                called = _is_right(dataset, called)
            found.best = BestBaseline(name, metric.name, pack(called))
    return found


def _fit_and_test(
    name: str, fit: Fit, data: Dataset, seed: int, limit: Limit
) -> tuple[Baseline, NDArray[Any]]:
    """A baseline, and what it gives for the test examples: see `_predict`."""
    x_val, y_val = data.validation
    examples, predict, first = _fit(fit, data, *data.train, seed, limit.share(2))
    metrics = _measure(data, "val", _own_unit(data, y_val), _predict(predict, data, x_val))
    limit.is_over()  # raises Stopped
    _, predict, second = _fit(fit, data, data.x_all, data.y_all, seed, limit)
    normalize = None if data.normalization is None else data.normalization.apply
    called = _predict(predict, data, data.x_test, normalize)
    metrics |= _measure(data, "test", data.y_test, called)
    return Baseline(name, metrics, examples, first and second), called


def _compared_by(data: Dataset, objective: Metric) -> Metric | None:
    """The metric of the comparison with the winner: the objective, if its outputs can be kept."""
    if objective == DEFAULT_OBJECTIVE or len(data.y_test) * data.task.outputs <= _KEPT:
        return objective
    return None if data.task.is_number else DEFAULT_OBJECTIVE


def _own_unit(data: Dataset, y: NDArray[Any]) -> NDArray[Any]:
    """Of the training or validation part: numbers in their own unit, else `y` itself."""
    task = data.task
    return y.astype(float) * task.deviation + task.mean if task.is_number else y


def _measure(data: Dataset, part: str, y: NDArray[Any], called: NDArray[Any]) -> dict[str, float]:
    """The metrics of what `_predict` returned, by name, as `val_loss` for the part `val`."""
    if called.ndim == 1:
        return {f"{part}_accuracy": float((called == y).mean())}
    return {f"{part}_{m.stem}": measure(data.task, m, y, called) for m in data.task.metrics}


def _is_right(data: Dataset, called: NDArray[Any]) -> NDArray[np.bool_]:
    """Which test examples are predicted right, by what `_predict` returned."""
    return called == data.y_test if called.ndim == 1 else is_right(data.task, data.y_test, called)


def _fit(
    fit: Fit,
    data: Dataset,
    x: Images,
    y: NDArray[Any],
    seed: int,
    limit: Limit,
) -> tuple[int, Predict, bool]:
    """Fit a model to all examples, or to a random sample of as many as there is time for.

    Returns how many these are, how the model predicts, and whether it converged.
    """
    numbers, outputs = x.shape[1], data.task.outputs
    most = min(_ROWS, _NUMBERS // numbers, _WORK // (numbers * outputs))
    if len(x) > most:
        rows = np.sort(np.random.default_rng(seed).choice(len(x), max(1, most), replace=False))
        x, y = x[rows], y[rows]
    features = features_of(scaled(x), data.embeddings)
    return len(x), *fit(features, _own_unit(data, y), outputs, limit)


def _predict(
    predict: Predict,
    data: Dataset,
    x: Images,
    normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
) -> NDArray[Any]:
    """The outputs of a model for `x`, float32 of shape (n, outputs); computed in parts.

    Where these would not fit in memory, the class called instead, of shape (n,).
    """
    outputs = data.task.outputs
    large = data.task.classes and len(x) * outputs > _MEASURED
    rows, parts = max(1, _PART // max(x.shape[1], outputs)), []
    for first in range(0, len(x), rows):
        part = scaled(x[first : first + rows])
        part = part if normalize is None else normalize(part)
        given = predict(features_of(part, data.embeddings))
        parts.append(given.argmax(axis=1) if large else given.astype(np.float32))
    return np.concatenate(parts)


class Computation:
    """Computes the baselines of a dataset in a thread of its own, beside what its caller does.

    objective, class_weight: of the study. seed: of the sample, where there is too much data.
    """

    def __init__(
        self, dataset: Dataset, objective: Metric, seed: int, class_weight: str = "none"
    ) -> None:
        self._compute = partial(compute, dataset, objective, seed, class_weight=class_weight)
        self._stop, self._done = threading.Event(), threading.Event()
        self._found = Found()
        self._started: float | None = None

    def start(self) -> None:
        """Start the thread, unless that has been done; it does not keep the process alive."""
        if self._started is None:
            self._started = time.monotonic()
            threading.Thread(target=self._run, daemon=True).start()

    def wait(self, within: float, stopping: Callable[[], bool]) -> Found | None:
        """The result, if it is there `within` so many seconds of the start, before `stopping`."""
        deadline = (self._started or 0) + within
        while not self._done.wait(min(0.1, max(0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or stopping():
                return None
        return self._found

    def cancel(self) -> None:
        """End the thread soon; its result is lost."""
        self._stop.set()

    def _run(self) -> None:
        limit = Limit(time.monotonic() + LIMIT, self._stop)
        try:
            self._found = self._compute(limit=limit)
        except Stopped:
            return
        except Exception as error:  # scikit-learn is not installed, say
            why = f"{type(error).__name__}: {one_line(error)}"
            self._found.failures.append(f"the baselines could not be computed ({why})")
        self._done.set()
