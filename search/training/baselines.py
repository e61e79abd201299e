"""Baselines: what simple models reach on the same data, to tell whether a network is worth it."""

import threading
import time
import warnings
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.dataset import Dataset, scaled
from search.errors import one_line

LIMIT = 60  # seconds that all of them may take
_ROWS = 200_000  # examples above which a model is fitted to a sample of them
_NUMBERS = 50_000_000  # the most features of all examples in a sample: 400 MB
_WORK = 1_000_000_000  # the most features of all examples times outputs: about 1 s an iteration
_FIRST, _GROWTH = 10, 5  # iterations before the first look at the clock; factor from look to look
Part = tuple[NDArray[Any], NDArray[Any]]  # x of shape (n, features), y of shape (n,)
Predict = Callable[[NDArray[np.float64]], NDArray[Any]]


@dataclass(frozen=True)
class Baseline:
    """A simple model on the data that the network gets.

    metrics: the `val_` ones after training on the training part, as a trial is trained, and the
    `test_` ones after training on training and validation data, as the winner is. examples: how
    many of the training part it was fitted to. converged: False if the time limit ended a fit.
    """

    name: str
    metrics: dict[str, float]
    examples: int
    converged: bool


@dataclass
class Found:
    """The baselines that could be computed.

    correct: by name, which test examples it classifies correctly; empty in regression. failures: a
    line for each baseline that could not be computed.
    """

    baselines: list[Baseline] = field(default_factory=list)
    correct: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Stopped(Exception):
    """The run does not wait for the baselines any more."""


@dataclass(frozen=True)
class Limit:
    """When a fit ends: at a `deadline` of time.monotonic(), or once `stop` is set."""

    deadline: float
    stop: threading.Event

    def is_over(self) -> bool:
        """Whether the time is over. Raises Stopped if the result is not wanted any more."""
        if self.stop.is_set():
            raise Stopped
        return time.monotonic() > self.deadline

    def half(self) -> "Limit":
        """The limit of the first of two fits."""
        now = time.monotonic()
        return Limit(now + (self.deadline - now) / 2, self.stop)


# ---- the models: each is fitted to x and y and returns its predictions, and whether it converged -


def _fit_majority(_: NDArray[np.float64], y: NDArray[Any], limit: Limit) -> tuple[Predict, bool]:
    most = np.bincount(y).argmax()
    return lambda x: np.full(len(x), most), True


def _fit_logistic(x: NDArray[np.float64], y: NDArray[Any], limit: Limit) -> tuple[Predict, bool]:
    """L2-regularized multinomial logistic regression, with scikit-learn's defaults."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # Each block but the last ends without convergence. Not `catch_warnings`: this is a thread.
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    model = LogisticRegression(max_iter=_FIRST, warm_start=True)
    while True:
        started = time.monotonic()
        model.fit(x, y)
        if model.n_iter_.max() < model.max_iter:
            return model.predict, True
        if limit.is_over():
            return model.predict, False
        now = time.monotonic()
        rest = (limit.deadline - now) / (now - started) * model.max_iter
        model.max_iter = max(1, min(int(rest), _GROWTH * model.max_iter))


def _fit_mean(_: NDArray[np.float64], y: NDArray[Any], limit: Limit) -> tuple[Predict, bool]:
    mean = y.mean(dtype=float)
    return lambda x: np.full(len(x), mean), True


def _fit_ridge(x: NDArray[np.float64], y: NDArray[Any], limit: Limit) -> tuple[Predict, bool]:
    """L2-regularized linear regression, with scikit-learn's default strength."""
    from sklearn.linear_model import Ridge

    # least squares by iterations: no matrix of features x features
    return Ridge(solver="lsqr", tol=1e-6, max_iter=1_000).fit(x, y.astype(float)).predict, True


_MODELS: dict[str, dict[str, Callable[..., tuple[Predict, bool]]]] = {  # by kind of task
    "classification": {"majority class": _fit_majority, "logistic regression": _fit_logistic},
    "regression": {"mean": _fit_mean, "ridge regression": _fit_ridge},
}


def _scores(kind: str, predicted: NDArray[Any], y: NDArray[Any]) -> dict[str, float]:
    """The metrics of predictions, by their name without `val_` or `test_`."""
    if kind == "classification":
        return {"accuracy": float((predicted == y).mean())}
    errors = predicted - y.astype(float)
    total = float(((y - y.mean(dtype=float)) ** 2).sum())
    return {
        "rmse": float(np.sqrt((errors**2).mean())),
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - float((errors**2).sum()) / total if total else 0.0,
    }


# ---- fit and test them ---------------------------------------------------------------------------


def compute(
    kind: str,
    train: Part,
    validation: Part,
    everything: Part,
    test: Part,
    seed: int,
    limit: Limit,
    prepare: Callable[[NDArray[Any]], NDArray[Any]] = lambda x: x,
) -> Found:
    """Fit and test the baselines of a `kind` of task, "classification" or "regression".

    everything: training and validation data, to which a model is fitted again before the test.
    seed: of the sample, where there is too much data. prepare: makes a part of the test examples
    what the model takes. Raises Stopped; any other error is a failure of one baseline.
    """
    from threadpoolctl import threadpool_limits  # scikit-learn requires it

    found = Found()
    with threadpool_limits(1), np.errstate(all="ignore"):  # the other cores are the workers'
        for name, fit in _MODELS[kind].items():
            try:
                outputs = int(train[1].max()) + 1 if kind == "classification" else 1
                x, y = _sample(train, outputs, seed)
                predict, first = fit(x, y, limit.half())
                metrics = _named(
                    "val", _scores(kind, _predict(predict, validation[0]), validation[1])
                )
                predict, second = fit(*_sample(everything, outputs, seed), limit)
                predicted = _predict(predict, test[0], prepare)
            except Stopped:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {one_line(error)}"
                found.failures.append(f"the baseline {name} could not be computed ({why})")
                continue
            metrics |= _named("test", _scores(kind, predicted, test[1]))
            found.baselines.append(Baseline(name, metrics, len(x), first and second))
            if kind == "classification":
                found.correct[name] = predicted == test[1]
    return found


def _named(part: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{part}_{name}": value for name, value in scores.items()}


def _sample(part: Part, outputs: int, seed: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """The examples to fit a model to: all, or a random sample of as many as there is time for."""
    x, y = part
    most = min(_ROWS, _NUMBERS // x.shape[1], _WORK // (x.shape[1] * outputs))
    if len(x) > most:
        rows = np.sort(np.random.default_rng(seed).choice(len(x), max(1, most), replace=False))
        x, y = x[rows], y[rows]
    return scaled(x).astype(np.float64), y


def _predict(
    predict: Predict,
    x: NDArray[Any],
    prepare: Callable[[NDArray[Any]], NDArray[Any]] = lambda x: x,
) -> NDArray[Any]:
    """What a model predicts for `x`, in parts that fit in memory."""
    rows = max(1, _NUMBERS // x.shape[1])
    parts = (prepare(scaled(x[first : first + rows])) for first in range(0, len(x), rows))
    return np.concatenate([predict(part.astype(np.float64)) for part in parts])


def pack(correct: NDArray[np.bool_]) -> str:
    """Which examples are correct, as text: a bit each, compressed."""
    return b64encode(zlib.compress(np.packbits(correct).tobytes(), 9)).decode()


def unpack(text: str, examples: int) -> NDArray[np.bool_]:
    """What `pack` packed of so many examples."""
    packed = np.frombuffer(zlib.decompress(b64decode(text)), np.uint8)
    return np.unpackbits(packed, count=examples).astype(bool)


class Computation:
    """Computes the baselines of a dataset in a thread of its own, beside what its caller does.

    seed: of the sample, where there is too much data.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
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
        data, limit = self._dataset, Limit(time.monotonic() + LIMIT, self._stop)
        normalization = data.normalization
        try:
            self._found = compute(
                data.task.kind,
                data.train,
                data.validation,
                (data.x_all, data.y_all),
                (data.x_test, data.y_test),
                self._seed,
                limit,
                (lambda x: x) if normalization is None else normalization.apply,
            )
        except Stopped:
            return
        except Exception as error:  # scikit-learn is not installed, say
            why = f"{type(error).__name__}: {one_line(error)}"
            self._found.failures.append(f"the baselines could not be computed ({why})")
        self._done.set()
