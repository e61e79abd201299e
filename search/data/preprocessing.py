"""Preprocessing of the training data: the stratified split and normalization."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.memory import CHUNK
from search.errors import InputError

ENOUGH = 20  # a class with this many examples must also be in the validation part
_FEWEST = 16  # features at a time: NumPy adds the rows of one alone in another order
_DEVIATIONS = 1e-7, 1e19  # Keras divides by at least 1e-7; a variance must fit into float32


@dataclass(frozen=True)
class Normalization:
    """Mean and variance of every feature of the training part, float32 of shape (features,).

    A constant feature has variance 1 here, so that other values in later data stay small.
    """

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """`x` of shape (n, features), normalized as `keras.layers.Normalization` does."""
        return np.asarray((x - self.mean) / np.sqrt(self.variance), np.float32)


def stratified(y: NDArray[np.int32], size: int, seed: int) -> NDArray[np.bool_]:
    """A mask of about `size` validation examples, a random sample with the class proportions of y.

    Every class keeps at least one training example; as far as `size` allows, every class with
    ENOUGH examples has a validation example.
    """
    counts = np.bincount(y)
    share = counts * (size / len(y))
    most = np.maximum(counts - 1, 0)
    least = np.minimum(counts >= ENOUGH, most)
    take = np.clip(np.floor(share).astype(int), least, most)
    size = min(size, int(most.sum()))
    while (missing := size - int(take.sum())) != 0:  # where the rounding error is largest
        step = 1 if missing > 0 else -1
        open_to_it = np.flatnonzero(take < most if step > 0 else take > 0)
        gain = (share - take)[open_to_it] * step
        take[open_to_it[np.argsort(-gain, kind="stable")[: abs(missing)]]] += step
    order = np.lexsort((np.random.default_rng(seed).random(len(y)), y))  # by class, then at random
    rank = np.empty(len(y), int)
    rank[order] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(rank < take[y], bool)


def fit(name: str, x: NDArray[np.float32]) -> Normalization:
    """The normalization for the training part `x`. Raises InputError if float32 can't hold it."""
    mean, deviation, largest = _statistics(x)
    constant = deviation <= 2 * np.finfo(np.float32).eps * largest
    deviation[constant] = 1
    wrong = np.flatnonzero((deviation < _DEVIATIONS[0]) | (deviation > _DEVIATIONS[1]))
    if len(wrong):
        low, high = _DEVIATIONS
        raise InputError(
            f"--dataset {name}: every feature must have a standard deviation from {low:g} to "
            f"{high:g} to be normalized, but feature {wrong[0]} has {deviation[wrong[0]]:.3g}; "
            "give it another unit, or --normalize none"
        )
    return Normalization(mean.astype(np.float32), (deviation**2).astype(np.float32))


def _statistics(x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Mean, standard deviation and largest absolute value of every feature.

    Of some features at a time, because NumPy works on copies in float64; to the same digits.
    """
    width = max(_FEWEST, CHUNK // max(1, 8 * len(x)))
    parts = []
    for first in range(0, x.shape[1], width):
        some = x[:, first : first + width]
        largest = np.maximum(some.max(axis=0), -some.min(axis=0))
        parts.append((some.mean(axis=0, dtype=float), some.std(axis=0, dtype=float), largest))
    mean, deviation, largest = (np.concatenate(values) for values in zip(*parts, strict=True))
    return mean, deviation, largest
