"""Prepare examples: hold out a validation part, scale features."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.sources import Images
from search.errors import InputError
from search.memory import statistics

UINT8_SCALE = np.float32(1 / 255)  # a factor, since TensorFlow multiplies by the reciprocal anyway
ENOUGH = 20  # a class with this many examples must also be in the validation part
_DEVIATIONS = 1e-7, 1e19  # Keras divides by at least 1e-7; a variance must fit into float32
Seed = int | tuple[int, ...]


# ---- split ---------------------------------------------------------------------------------------


def kept(option: str, fraction: float, examples: int, use: str) -> int:
    """How many of `examples` are left when a fraction is held out, with Keras' rounding.

    Raises InputError if none or all of them are.
    """
    left = int(examples * (1 - fraction))
    if not 0 < left < examples:
        raise InputError(
            f"{option} must leave examples to train and to {use}, but {fraction} of {examples} "
            f"leaves {left} and {examples - left}; give a fraction nearer to 0.5 or more data"
        )
    return left


def held_out(
    kind: str, y: NDArray[Any], size: int, seed: Seed, column: NDArray[Any] | None = None
) -> NDArray[np.bool_]:
    """A mask of about `size` examples to hold out of the training data, by `--split`.

    kind: last; random; stratified, with the class proportions of `y`; group, whole groups; or time,
    the latest. column: of shape (n,), the groups as anything hashable, or the times, sortable.
    """
    if kind == "stratified":
        return stratified(y, size, seed)
    held = np.zeros(len(y), bool)
    if kind == "group":
        _, groups = np.unique(np.asarray(column, str), return_inverse=True)
        order = np.random.default_rng(seed).permutation(groups.max() + 1)
        ends = np.cumsum(np.bincount(groups)[order])
        taken = int(np.abs(ends - size).argmin()) + 1  # the nearest, and at least one
        return np.asarray(np.isin(groups, order[:taken]), bool)
    order = np.arange(len(y))
    if kind == "random":
        order = np.random.default_rng(seed).permutation(len(y))
    elif kind == "time":
        order = np.argsort(np.asarray(column), kind="stable")
    held[order[len(y) - size :]] = True
    return held


def stratified(y: NDArray[np.int32], size: int, seed: Seed) -> NDArray[np.bool_]:
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


# ---- scale ---------------------------------------------------------------------------------------


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


def fit(name: str, x: NDArray[np.float32]) -> Normalization:
    """The normalization for the training part `x`. Raises InputError if float32 can't hold it."""
    mean, deviation, largest = statistics(x)
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


def scaled(x: Images) -> NDArray[np.float32]:
    """`x` as the network takes it: float32, with uint8 scaled to [0, 1]."""
    if x.dtype == np.uint8:
        return np.multiply(x, UINT8_SCALE, dtype=np.float32)  # without a copy as float32
    return x.astype(np.float32, copy=False)
