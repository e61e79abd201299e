"""The dataset: load it, split it, scale it."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.settings import StudyConfig
from search.data import function, images, sources
from search.data.memory import chunks, partition
from search.data.preprocessing import ENOUGH, Normalization, fit, stratified
from search.data.sources import Images, Source, is_own
from search.errors import InputError

UINT8_SCALE = np.float32(1 / 255)  # a factor, since TensorFlow multiplies by the reciprocal anyway
OWN_SPLIT = "own"  # the validation part came with the data
_CHANNELS = (1, 3)
_STEPS, _MOST = 100, 20  # optimizer steps that a trial needs; the most epochs for that
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
    test examples that also occur in the training data. `digest`: SHA-256 of the source arrays.
    `pixels`: whether the registered model takes images, not flat, with raw pixels. `source`: the
    settings that the source arrays depend on; `note`: how they were read. `class_names`:
    empty, or the name of each class.
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
    pixels: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def features(self) -> int:
        """Number of features of a flat example."""
        return int(self.x_all.shape[1])

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
        normalized = "" if self.normalization is None else ", normalized"
        return (
            f"{self.name}: {counts} examples to train, validate, test ({self.split} split); "
            f"{self.features} features{normalized}, {self.classes} classes; "
            f"test examples in the training data: {self.repeated:,}"
            f"{self.note and '; '}{self.note}"
        )

    @property
    def raw_test(self) -> Images:
        """The test examples as the registered model takes them: `x_test`, or its images."""
        return self.x_test.reshape(-1, *self.sample_shape) if self.pixels else self.x_test

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
                shown = ", ".join(map(str, lacking[:8])) + (", ..." if len(lacking) > 8 else "")
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
    """`x` as a model takes it: float32, with uint8 scaled to [0, 1] unless it is not flat.

    A model of images scales them itself.
    """
    if x.dtype == np.uint8 and x.ndim == 2:
        return x.astype(np.float32) * UINT8_SCALE
    return x.astype(np.float32, copy=False)


def load_dataset(
    name: str,
    validation_split: float,
    *,
    split: str = "last",
    seed: int = 0,
    normalize: bool = False,
    image_size: int | None = None,
    test_split: float = 0.2,
) -> Dataset:
    """The dataset `name`: mnist, one of Keras', the path of an .npz file or a folder of images.

    validation_split: fraction of the training data used for validation: with `split` "last" its
    end, as in Keras; with "stratified" a random sample, by `seed`, with the same class proportions.
    normalize: scale every feature, unless examples are images, to mean 0 and variance 1 in the
    training part. image_size, test_split: of a folder, see `images.read`. Raises InputError, in one
    line, if it cannot be used.
    """
    source = _read(name, image_size, test_split, seed)
    arrays = source.arrays
    sources.check(name, arrays)
    digest = hashlib.sha256()
    for key in arrays:
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    x_train, given = arrays["x_train"], "x_validation" in arrays
    split = OWN_SPLIT if given else split
    train_size = len(x_train) if given else _train_size(len(x_train), validation_split)
    x_all, x_test = (sources.examples(name, arrays, part) for part in ("train", "test"))
    y_all, y_test = (sources.labels(arrays, part) for part in ("train", "test"))
    classes = int(arrays["y_train"].max()) + 1
    if source.class_names and len(source.class_names) != classes:
        raise InputError(
            f"--dataset {name}: class_names must have a name for each of {classes} classes",
            f"has {len(source.class_names)}",
            "give each class a name, in the order of the labels",
        )
    repeated = _count_repeated(x_test, x_all)
    if split == "stratified":
        validates = stratified(y_all, len(x_all) - train_size, seed)
        partition(x_all, validates)
        partition(y_all, validates)
        train_size = int((~validates).sum())
    normalization = None
    if normalize and x_all.dtype != np.uint8 and not is_image(x_train.shape[1:]):
        normalization = fit(name, scaled(x_all[:train_size]))
        for part in chunks(x_all):
            x_all[part] = normalization.apply(scaled(x_all[part]))
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
        pixels=source.pixels,
        source=source.settings,
        note=source.note,
        class_names=source.class_names,
    )


def _train_size(examples: int, validation_split: float) -> int:
    """How many of the examples train. Raises InputError if none are left for one of the parts."""
    train_size = int(examples * (1 - validation_split))  # Keras' own rounding
    if not 0 < train_size < examples:
        raise InputError(
            f"--validation-split must leave examples to train and to validate, but "
            f"{validation_split} of {examples} leaves {train_size} and "
            f"{examples - train_size}; give a fraction nearer to 0.5 or more data"
        )
    return train_size


def _read(name: str, image_size: int | None, test_split: float, seed: int) -> Source:
    """The arrays of the dataset `name`, from wherever they come."""
    if images.is_folder(name):
        return images.read(name, image_size, test_split, seed)
    if image_size is not None:
        raise InputError(
            "--image-size needs a folder of images", f"--dataset is {name}", "leave it out"
        )
    if function.is_function(name):
        return function.read(name)
    return sources.read(name)


def _count_repeated(x_test: Images, x_train: Images) -> int:
    """How many rows of `x_test` also occur in `x_train`, byte for byte."""
    tested = {row.tobytes() for row in x_test}
    repeated = {key for row in x_train if (key := row.tobytes()) in tested}
    return sum(row.tobytes() in repeated for row in x_test) if repeated else 0


def load_for_study(config: StudyConfig, stored: Mapping[str, Any] | None) -> Dataset:
    """The dataset, prepared as in the existing study unless the settings say otherwise.

    stored: the settings of that study, which may be older than these options; None for a new study.
    """
    own = is_own(config.dataset)
    split, normalize = ("stratified" if own else "last"), own
    if stored is not None:
        split = "last" if stored.get("split", "last") == "last" else "stratified"
        normalize = "normalize" in stored
    dataset = load_dataset(
        config.dataset,
        config.validation_split,
        split=config.split or split,
        seed=config.seed,
        normalize=normalize and config.normalize == "auto",
        image_size=config.image_size or (stored or {}).get("image_size"),
        test_split=config.test_split,
    )
    if config.split is not None and dataset.split == OWN_SPLIT:
        raise InputError(
            f"--split {config.split} needs data without a validation part",
            f"{config.dataset} has one",
            "leave it out",
        )
    return dataset


def choose_epochs(config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None) -> int:
    """The epochs of a trial: as in the settings, or else as in the existing study.

    With a thousand examples, 5 epochs are 40 steps, too few to tell trials apart. On scikit-learn's
    digits, 10 epochs gain 0.009 test accuracy (mean of four splits of 50 trials).
    """
    known = (stored or {}).get("epochs")
    if config.epochs is None and isinstance(known, int):
        return known
    if config.epochs is not None or not is_own(config.dataset):
        return config.trial_epochs
    steps = math.ceil(dataset.train_size / 128)
    return min(_MOST, max(config.trial_epochs, math.ceil(_STEPS / steps)))


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
