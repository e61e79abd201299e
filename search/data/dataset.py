"""The dataset: its examples, their split and their normalization."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from search.data.sources import Images
from search.data.task import Task
from search.errors import InputError
from search.memory import statistics

if TYPE_CHECKING:
    from search.data.columns import Columns, Rows

UINT8_SCALE = np.float32(1 / 255)  # a factor, since TensorFlow multiplies by the reciprocal anyway
OWN_SPLIT = "own"  # the validation part came with the data
_CHANNELS = (1, 3)
_ALL = slice(None)
ENOUGH = 20  # a class with this many examples must also be in the validation part
_DEVIATIONS = 1e-7, 1e19  # Keras divides by at least 1e-7; a variance must fit into float32
Labels = NDArray[np.int32] | NDArray[np.float32]
Seed = int | tuple[int, ...]


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


@dataclass(frozen=True)
class Dataset:
    """Examples and labels, ready to train on.

    x: shape (n, features). uint8 stays uint8, for a quarter of the memory, and is scaled to [0, 1]
    where it is used (`scaled`, and in the graph); all else is float32.
    y: int32 of shape (n,), from 0 to `classes` - 1. In a regression float32, and `classes` is 0:
    `y_all` is standardized by the task's mean and deviation, `y_test` is in the target's own unit.
    `x_all`, `y_all`: the training part, the first `train_size` examples, then the validation part.
    `split`: how the validation examples were chosen. With a `normalization`, `x_all` is normalized
    but `x_test` is not, because the registered model takes raw values. `repeated`: the number of
    test examples that also occur in the training data. `digest`: SHA-256 of the source arrays, or
    of a table's files. `task`: what is predicted, and the names of the classes. `pixels`: whether
    the registered model takes images, not flat, with raw pixels. `source`: the settings that the
    source depends on; `note`: how it was read. `columns`: those of a table, whose encoded rows are
    the examples; `test_rows`: its test rows as they are; `example`: two of its rows, a DataFrame.
    """

    name: str
    digest: str
    x_all: Images
    y_all: Labels
    x_test: Images
    y_test: Labels
    train_size: int
    sample_shape: tuple[int, ...]
    split: str = "last"
    normalization: Normalization | None = None
    repeated: int = 0
    task: Task = field(default_factory=Task)
    pixels: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    columns: "Columns | None" = None
    test_rows: "Rows | None" = None
    example: Any = None

    @property
    def classes(self) -> int:
        """The number of classes; 0 in a regression."""
        return self.task.classes

    @property
    def features(self) -> int:
        """Number of features of a flat example."""
        return int(self.x_all.shape[1])

    @property
    def raw_test(self) -> Any:
        """The test examples as the registered model takes them, but uint8 where it is scaled."""
        if self.test_rows is not None:
            return self.test_rows.inputs
        return self.x_test.reshape(-1, *self.sample_shape) if self.pixels else self.x_test

    def test_inputs(self, chosen: slice = _ALL) -> Any:
        """The test examples, or the `chosen` ones, as the registered model takes them."""
        if self.test_rows is not None:
            return self.test_rows[chosen].inputs
        x = self.raw_test[chosen]
        return x.astype(np.float32, copy=False) if self.pixels else scaled(x)

    @property
    def input_shapes(self) -> list[tuple[int | None, ...]]:
        """Of the registered model's inputs; None stands for the number of examples."""
        if self.columns is not None:
            widths = len(self.columns.numbers), len(self.columns.words)
            return [(None, width) for width in widths if width]
        return [(None, *self.sample_shape) if self.pixels else (None, self.features)]

    @property
    def embeddings(self) -> tuple[int, ...]:
        """The vocabulary sizes of the last features, which are indices for embeddings."""
        return () if self.columns is None else self.columns.embeddings

    @property
    def train(self) -> tuple[Images, Labels]:
        """The examples and labels that trials train on."""
        return self.x_all[: self.train_size], self.y_all[: self.train_size]

    @property
    def validation(self) -> tuple[Images, Labels]:
        """The examples and labels that trials are compared on."""
        return self.x_all[self.train_size :], self.y_all[self.train_size :]

    def __str__(self) -> str:
        sizes = self.train_size, len(self.x_all) - self.train_size, len(self.x_test)
        counts = " / ".join(f"{size:,}" for size in sizes)
        features = f"{self.features} features{'' if self.normalization is None else ', normalized'}"
        if self.columns is not None:
            features = f"{self.columns} as {features}"
        what = f"{self.classes} classes"
        if not self.task.classes:
            what = f"a number to predict ({self.task.mean:.5g} ± {self.task.deviation:.5g})"
        return (
            f"{self.name}: {counts} examples to train, validate, test ({self.split} split); "
            f"{features}, {what}; "
            f"test examples in the training data: {self.repeated:,}"
            f"{self.note and '; '}{self.note}"
        )

    @property
    def problem(self) -> str | None:
        """Why the split is unusable, in one line; None if it is usable.

        The training part needs examples of every class, the validation part of every class that
        has at least ENOUGH.
        """
        if not self.task.classes:
            return None
        counts = np.bincount(self.y_all, minlength=self.classes)
        for part, (_, labels), needed in (
            ("training", self.train, 1),
            ("validation", self.validation, ENOUGH),
        ):
            present = np.bincount(labels, minlength=self.classes) > 0
            lacking = np.flatnonzero(~present & (counts >= needed))
            if len(lacking):
                shown = ", ".join(map(self.task.name_of, lacking[:8]))
                shown += ", ..." if len(lacking) > 8 else ""
                remedy = (
                    "--split stratified"
                    if self.split == "last"
                    else "more examples"
                    if self.split == OWN_SPLIT
                    else "a larger --validation-split or more examples"
                )
                return (
                    f"--dataset {self.name}: the {part} part ({self.split} split, {len(labels):,} "
                    f"of {len(self.y_all):,} examples) must have examples of every class, but has "
                    f"none of class {shown}; give {remedy}"
                )
        return None


def scaled(x: Images) -> NDArray[np.float32]:
    """`x` as the network takes it: float32, with uint8 scaled to [0, 1]."""
    if x.dtype == np.uint8:
        return np.multiply(x, UINT8_SCALE, dtype=np.float32)  # without a copy as float32
    return x.astype(np.float32, copy=False)


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


def count_repeated(x_test: Images, x_train: Images) -> int:
    """How many rows of `x_test` also occur in `x_train`, byte for byte."""
    tested = {row.tobytes() for row in x_test}
    repeated = {key for row in x_train if (key := row.tobytes()) in tested}
    return sum(row.tobytes() in repeated for row in x_test) if repeated else 0


def check_images(dataset: Dataset, for_images: list[str]) -> None:
    """Raise InputError if options need images, `for_images`, but the examples are none."""
    if for_images and not is_image(dataset.sample_shape):
        raise InputError(
            f"{for_images[0]} needs images, examples of shape (height, width) or (height, width, "
            f"channels), but those of {dataset.name} have the shape {dataset.sample_shape}; "
            f"leave {for_images[0].split()[0]} at its default"
        )


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether an example of this shape is a grey or a colour image."""
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in _CHANNELS)


# ---- splits and normalization ------------------------------------------------------------------


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
