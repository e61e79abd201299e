"""The dataset: its examples, their split and their normalization."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from search.data.function import Pipeline
from search.data.preparation import ENOUGH, Normalization, scaled
from search.data.sources import Images, Labels
from search.errors import InputError
from search.task import Task

if TYPE_CHECKING:
    from search.data.columns import Columns, Rows

OWN_SPLIT = "own"  # the validation part came with the data
_CHANNELS = (1, 3)
_ALL = slice(None)


@dataclass(frozen=True)
class Dataset:
    """Examples and labels, ready to train on.

    x: shape (n, features). uint8 stays uint8, for a quarter of the memory, and is scaled to [0, 1]
    where it is used (`scaled`, and in the graph); all else is float32.
    y: int32 of shape (n,), from 0 to `classes` - 1; without classes float32, and `classes` is 0. Of
    labels it has the shape (n, labels) and is 0 or 1. Numbers are standardized in `y_all` by the
    task's mean and deviation, and in the target's own unit in `y_test`.
    `x_all`, `y_all`: the training part, the first `train_size` examples, then the validation part.
    `pipeline`: a training part that is not in memory; `train` is then a random sample of it.
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
    pipeline: Pipeline | None = None

    @property
    def classes(self) -> int:
        """The number of classes; 0 if the target is not a class."""
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
        """The examples and labels of the training part that are in memory."""
        return self.x_all[: self.train_size], self.y_all[: self.train_size]

    @property
    def train_examples(self) -> int:
        """How many examples the training part has."""
        return self.train_size if self.pipeline is None else self.pipeline.examples

    @property
    def training(self) -> tuple[Images, Labels] | Pipeline:
        """What trials train on."""
        return self.train if self.pipeline is None else self.pipeline

    @property
    def everything(self) -> tuple[Images, Labels] | Pipeline:
        """What the winner is trained on: training and validation part."""
        if self.pipeline is None:
            return self.x_all, self.y_all
        return replace(self.pipeline, more=self.validation)

    @property
    def validation(self) -> tuple[Images, Labels]:
        """The examples and labels that trials are compared on."""
        return self.x_all[self.train_size :], self.y_all[self.train_size :]

    def for_workers(self) -> "Dataset":
        """Without the sample of a pipeline, which only baselines and scale need."""
        if self.pipeline is None:
            return self
        x, y = self.validation
        return replace(self, x_all=x, y_all=y, train_size=0)

    def __str__(self) -> str:
        sizes = self.train_examples, len(self.validation[1]), len(self.x_test)
        counts = " / ".join(f"{size:,}" for size in sizes)
        features = f"{self.features} features{'' if self.normalization is None else ', normalized'}"
        if self.columns is not None:
            features = f"{self.columns} as {features}"
        whole = self.train_examples == self.train_size
        searched = "training data" if whole else f"sample of {self.train_size:,}"
        return (
            f"{self.name}: {counts} examples to train, validate, test ({self.split} split); "
            f"{features}, {self.task}; "
            f"test examples in the {searched}: {self.repeated:,}"
            f"{self.note and '; '}{self.note}"
        )

    @property
    def problem(self) -> str | None:
        """Why the split is unusable, in one line; None if it is usable.

        The training part needs examples of every class, the validation part of every class that
        has at least ENOUGH. Of every label the training part needs examples with and without it.
        """
        if self.task.labels:
            return self._constant_label
        if self.task.is_number:
            return None
        counts = np.bincount(self.y_all, minlength=self.classes)
        for part, (_, labels), needed in (
            ("training", self.train, 1),
            ("validation", self.validation, ENOUGH),
        ):
            present = np.bincount(labels, minlength=self.classes) > 0
            lacking = np.flatnonzero(~present & (counts >= needed))
            if len(lacking):
                shown = ", ".join(map(self.task.name, lacking[:8]))
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

    @property
    def _constant_label(self) -> str | None:
        _, y = self.train
        constant = np.flatnonzero((y == y[0]).all(axis=0))
        if not len(constant):
            return None
        which = "without" if y[0, constant[0]] else "with"
        return (
            f"--dataset {self.name}: the training part ({self.split} split, {len(y):,} of "
            f"{len(self.y_all):,} examples) must have examples with and without every label, but "
            f"has none {which} label {self.task.name(constant[0])}; give "
            + ("--split random" if self.split == "last" else "more examples of it")
        )


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
