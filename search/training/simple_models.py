"""Simple models on the features of a network: by frequency, and scikit-learn's linear models.

Each is fitted to x and y, and returns how it predicts and whether it converged.
"""

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST, _GROWTH = 10, 5  # iterations before the first look at the clock; factor from look to look
_MOST_WEIGHTS = 10_000_000  # of which L-BFGS keeps some 25 copies: 2 GB
_EXACT = 5_000_000  # numbers above which they stay float32, for half of the memory
Features = Any  # of shape (n, features), float64 or float32, sparse if some are one-hot words
Predict = Callable[[Features], NDArray[Any]]  # returns outputs of shape (n, outputs)
Fit = Callable[[Features, NDArray[Any], int, "Limit"], tuple[Predict, bool]]  # x, y, outputs, limit


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

    def share(self, fits: int) -> "Limit":
        """The limit of the first of so many fits."""
        now = time.monotonic()
        return Limit(now + (self.deadline - now) / fits, self.stop)


def features_of(x: NDArray[np.float32], vocabularies: tuple[int, ...]) -> Features:
    """`x` for a linear model: its last features, which are indices for embeddings, one-hot.

    vocabularies: the number of different indices of each; the result is sparse if there are any.
    """
    if not vocabularies:
        return x if x.size > _EXACT else x.astype(np.float64)
    from scipy.sparse import csr_array, hstack

    rows, first = np.arange(len(x)), x.shape[1] - len(vocabularies)
    parts = [csr_array(x[:, :first].astype(np.float64))]
    for index, size in enumerate(vocabularies, first):
        places = rows, x[:, index].astype(int)
        parts.append(csr_array((np.ones(len(x)), places), shape=(len(x), size)))
    return hstack(parts, format="csr")


def _fit_majority(_: Features, y: NDArray[Any], outputs: int, limit: Limit) -> tuple[Predict, bool]:
    """The frequency of each class, whatever the example."""
    frequencies = np.bincount(y, minlength=outputs) / len(y)
    return lambda x: np.tile(frequencies, (x.shape[0], 1)), True


def _fit_logistic(
    x: Features, y: NDArray[Any], outputs: int, limit: Limit, class_weight: str | None = None
) -> tuple[Predict, bool]:
    """L2-regularized multinomial logistic regression, with scikit-learn's defaults.

    class_weight: None, or balanced: each class weighs the same in the loss.
    """
    model, converged = _logistic(x, y, outputs, limit, class_weight)

    def predict(x: Features) -> NDArray[Any]:
        probabilities = np.zeros((x.shape[0], outputs))
        probabilities[:, model.classes_] = model.predict_proba(x)  # a sample may lack a class
        return probabilities

    return predict, converged


def _logistic(
    x: Features, y: NDArray[Any], outputs: int, limit: Limit, class_weight: str | None = None
) -> tuple[Any, bool]:
    """The model of scikit-learn, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if x.shape[1] * outputs > _MOST_WEIGHTS:
        raise MemoryError(f"{x.shape[1] * outputs:,} weights, of at most {_MOST_WEIGHTS:,}")
    # Each block but the last ends without convergence. Not `catch_warnings`: this is a thread.
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    model = LogisticRegression(max_iter=_FIRST, warm_start=True, class_weight=class_weight)
    while True:
        started = time.monotonic()
        model.fit(x, y)
        if model.n_iter_.max() < model.max_iter:
            return model, True
        if limit.is_over():
            return model, False
        now = time.monotonic()
        rest = (limit.deadline - now) / (now - started) * model.max_iter
        model.max_iter = max(1, min(int(rest), _GROWTH * model.max_iter))


def _fit_frequencies(
    _: Features, y: NDArray[Any], outputs: int, limit: Limit
) -> tuple[Predict, bool]:
    """The frequency of each label, so that its more frequent value is predicted."""
    frequencies = y.mean(axis=0)
    return lambda x: np.tile(frequencies, (x.shape[0], 1)), True


def _fit_logistic_labels(
    x: Features, y: NDArray[Any], outputs: int, limit: Limit
) -> tuple[Predict, bool]:
    """A logistic regression for each label alone (one against the rest)."""
    models: dict[int, Any] = {}
    whole = True
    for label in range(outputs):
        values, enough = y[:, label].astype(int), limit.share(outputs - label)
        if values.min() < values.max():  # else all of a sample are equal
            models[label], converged = _logistic(x, values, 1, enough)
            whole &= converged
    constant = y[0]

    def predict(x: Features) -> NDArray[Any]:
        probabilities = np.tile(constant.astype(float), (x.shape[0], 1))
        for label, model in models.items():
            probabilities[:, label] = model.predict_proba(x)[:, 1]
        return probabilities

    return predict, whole


def _fit_mean(_: Features, y: NDArray[Any], outputs: int, limit: Limit) -> tuple[Predict, bool]:
    mean = y.mean()
    return lambda x: np.full((x.shape[0], 1), mean), True


def _fit_ridge(x: Features, y: NDArray[Any], outputs: int, limit: Limit) -> tuple[Predict, bool]:
    """L2-regularized linear regression, with scikit-learn's default strength."""
    from sklearn.linear_model import Ridge

    # least squares by iterations: no matrix of features x features
    model = Ridge(solver="lsqr", tol=1e-6, max_iter=1_000).fit(x, y)
    return lambda x: model.predict(x)[:, np.newaxis], True


MODELS: dict[str, dict[str, Fit]] = {  # by kind of task
    "classification": {"majority class": _fit_majority, "logistic regression": _fit_logistic},
    "multilabel": {
        "majority labels": _fit_frequencies,
        "logistic regression": _fit_logistic_labels,
    },
    "regression": {"mean": _fit_mean, "ridge regression": _fit_ridge},
}


def models_of(kind: str, class_weight: str = "none") -> dict[str, Fit]:
    """The models of a kind of task by name, those that can weigh classes with `--class-weight`."""
    if class_weight == "none":
        return MODELS[kind]
    weighing = partial(_fit_logistic, class_weight=class_weight)
    return {**MODELS[kind], "logistic regression": weighing}
