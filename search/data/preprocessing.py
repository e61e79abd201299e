"""What is done to examples before they are trained on: the stratified split, normalization."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.errors import InputError

ENOUGH = 20  # examples of a class, from which it has to be validated, too
_DEVIATIONS = 1e-7, 1e19  # Keras divides by 1e-7 at least; a variance has to fit into float32


@dataclass(frozen=True)
class Normalization:
    """What brings every feature to mean 0 and variance 1: float32 of shape (features,) each.

    A feature that does not vary keeps variance 1, so that another value in later data stays small.
    """

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """`x` of shape (n, features) as `keras.layers.Normalization` would give it."""
        return np.asarray((x - self.mean) / np.sqrt(self.variance), np.float32)


def stratified(y: NDArray[np.int32], size: int, seed: int) -> NDArray[np.bool_]:
    """Which of the examples validate: about `size`, chosen at random, the same share of each class.

    Every class keeps an example to train on, and as far as `size` allows every class with enough
    examples has one that validates.
    """
    counts = np.bincount(y)
    share = counts * (size / len(y))
    most = np.maximum(counts - 1, 0)
    least = np.minimum(counts >= ENOUGH, most)
    take = np.clip(np.floor(share).astype(int), least, most)
    size = min(size, int(most.sum()))
    while (missing := size - int(take.sum())) != 0:  # to where rounding has cost the most
        step = 1 if missing > 0 else -1
        open_to_it = np.flatnonzero(take < most if step > 0 else take > 0)
        gain = (share - take)[open_to_it] * step
        take[open_to_it[np.argsort(-gain, kind="stable")[: abs(missing)]]] += step
    order = np.lexsort((np.random.default_rng(seed).random(len(y)), y))  # by class, then at random
    rank = np.empty(len(y), int)
    rank[order] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(rank < take[y], bool)


def fit(name: str, x: NDArray[np.float32]) -> Normalization:
    """The normalization of the training part `x`. Raises InputError where float32 can't hold it."""
    mean, deviation = x.mean(axis=0, dtype=float), x.std(axis=0, dtype=float)
    constant = deviation <= 2 * np.finfo(np.float32).eps * np.abs(x).max(axis=0)
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
