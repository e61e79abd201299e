"""The dataset: load it, split it, scale it."""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from search.data.preprocessing import ENOUGH, Normalization, fit, held_out
from search.data.sources import ARRAYS, Images, flat, read
from search.data.task import Task
from search.errors import InputError

if TYPE_CHECKING:
    from search.data.columns import Columns, Rows

UINT8_SCALE = np.float32(1 / 255)  # a factor, since TensorFlow multiplies by the reciprocal anyway
_CHANNELS = (1, 3)
_ALL = slice(None)
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Dataset:
    """Examples and labels, ready to train on.

    x: shape (n, features). uint8 stays uint8, for a quarter of the memory, and is scaled to [0, 1]
    where it is used (`scaled`, and in the graph); all else is float32.
    y: int32 of shape (n,), from 0 to `classes` - 1.
    `x_all`, `y_all`: the training part, the first `train_size` examples, then the validation part.
    `split`: how the validation examples were chosen. With a `normalization`, `x_all` is normalized
    but `x_test` is not, because the registered model takes raw values. `repeated`: the number of
    test examples that also occur in the training data. `digest`: SHA-256 of the source arrays, or
    of a table's files. `task`: what is predicted, and the names of the classes. `columns`: those of
    a table, whose encoded rows are the examples; `test_rows`: its test rows as they are;
    `example`: two of its rows, a DataFrame.
    """

    name: str
    digest: str
    x_all: Images
    y_all: Labels
    x_test: Images
    y_test: Labels
    train_size: int
    classes: int
    sample_shape: tuple[int, ...]
    split: str = "last"
    normalization: Normalization | None = None
    repeated: int = 0
    task: Task = field(default_factory=Task)
    columns: "Columns | None" = None
    test_rows: "Rows | None" = None
    example: Any = None

    @property
    def features(self) -> int:
        """Number of features of a flat example."""
        return int(self.x_all.shape[1])

    def test_inputs(self, chosen: slice = _ALL) -> Any:
        """The test examples, or the `chosen` ones, as the registered model takes them."""
        if self.test_rows is None:
            return scaled(self.x_test[chosen])
        return self.test_rows[chosen].inputs

    @property
    def input_shapes(self) -> list[tuple[int | None, ...]]:
        """Of the registered model's inputs; None stands for the number of examples."""
        if self.columns is None:
            return [(None, self.features)]
        widths = len(self.columns.numbers), len(self.columns.words)
        return [(None, width) for width in widths if width]

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
        return (
            f"{self.name}: {counts} examples to train, validate, test ({self.split} split); "
            f"{features}, {self.classes} classes; "
            f"test examples in the training data: {self.repeated:,}"
        )

    @property
    def problem(self) -> str | None:
        """Why the split is unusable, in one line; None if it is usable.

        The training part needs examples of every class, the validation part of every class that
        has at least ENOUGH.
        """
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
        return x.astype(np.float32) * UINT8_SCALE
    return x.astype(np.float32, copy=False)


def load_dataset(
    name: str,
    validation_split: float,
    *,
    split: str = "last",
    seed: int = 0,
    normalize: bool = False,
) -> Dataset:
    """The dataset `name`: mnist, one of Keras', or the path of an .npz file.

    validation_split: fraction of the training data used for validation: with `split` "last" its
    end, as in Keras; with "stratified" a random sample, by `seed`, with the same class proportions.
    normalize: scale every feature, unless examples are images, to mean 0 and variance 1 in the
    training part. Raises InputError, in one line, if it cannot be used.
    """
    arrays = read(name)
    digest = hashlib.sha256()
    for key in ARRAYS:
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    x_train = arrays["x_train"]
    train_size = kept("--validation-split", validation_split, len(x_train), "validate")
    x_all, x_test = (flat(name, key, arrays[key]) for key in ("x_train", "x_test"))
    y_all, y_test = (arrays[key].ravel().astype(np.int32) for key in ("y_train", "y_test"))
    repeated = count_repeated(x_test, x_all)
    if split != "last":
        validates = held_out(split, y_all, len(x_all) - train_size, seed)
        order = np.argsort(validates, kind="stable")
        x_all, y_all, train_size = x_all[order], y_all[order], int((~validates).sum())
    normalization = None
    if normalize and x_all.dtype != np.uint8 and not is_image(x_train.shape[1:]):
        numbers = x_all.astype(np.float32, copy=False)
        normalization = fit(name, numbers[:train_size])
        x_all = normalization.apply(numbers)
    classes = int(y_all.max()) + 1
    return Dataset(
        name=name,
        digest=digest.hexdigest(),
        x_all=x_all,
        y_all=y_all,
        x_test=x_test,
        y_test=y_test,
        train_size=train_size,
        classes=classes,
        sample_shape=x_train.shape[1:],
        split=split,
        normalization=normalization,
        repeated=repeated,
        task=Task("classification", classes),
    )


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
