"""The paired bootstrap: is the difference of two models on the same test examples significant?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.promotion.measures import measure, measurer
from search.task import Metric, Task

RESAMPLES = 10_000
_AT_ONCE = 320_000  # counts, which fit into a processor's cache


@dataclass(frozen=True)
class PairedBootstrap:
    """Two models on the same test examples, compared by a metric.

    challenger, champion: their values. p_value: two-sided, of the null hypothesis that neither is
    better. low, high: the 95 % confidence interval of challenger - champion (percentiles of the
    resamples; Efron and Tibshirani 1993, chapters 13 and 16).
    """

    challenger: float
    champion: float
    p_value: float
    low: float
    high: float


def compare(
    task: Task,
    metric: Metric,
    y: NDArray[Any],
    challenger: NDArray[Any],
    champion: NDArray[Any],
    seed: int,
    resamples: int = RESAMPLES,
) -> PairedBootstrap:
    """Compare the outputs of two models for the test examples y, of shape (n,) or (n, labels).

    Every resample draws n examples with replacement, by `seed`, the same for both models. The
    p-value is twice the share of resamples in which the better model is not better, the sample
    itself counted as one of them, so that it is never 0.
    """
    one, other = (measurer(task, metric, y, outputs) for outputs in (challenger, champion))
    drawn = _drawn(len(y), resamples, seed)
    differences = np.concatenate([one(counts) - other(counts) for counts in drawn])
    rounding = 1e-12 * max(float(np.abs(differences).max()), 1e-300)
    against = min((differences <= rounding).sum(), (differences >= -rounding).sum())
    low, high = np.percentile(differences, [2.5, 97.5])
    return PairedBootstrap(
        challenger=measure(task, metric, y, challenger),
        champion=measure(task, metric, y, champion),
        p_value=min(1.0, 2 * (int(against) + 1) / (resamples + 1)),
        low=float(low),
        high=float(high),
    )


def _drawn(examples: int, resamples: int, seed: int) -> Iterator[NDArray[Any]]:
    """How often each resample drew each example, of shape (examples, some of the resamples).

    As floats; float32, which is faster, where sums of counts are exact in it.
    """
    kind = np.float32 if examples < 2**24 else np.float64
    random = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // examples)
    for first in range(0, resamples, at_once):
        size = min(at_once, resamples - first)
        drawn = random.integers(0, examples, (examples, size)) * size + np.arange(size)
        counts = np.bincount(drawn.ravel(), minlength=examples * size)
        yield counts.reshape(examples, size).astype(kind)
