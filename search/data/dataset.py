"""The dataset: load it, check it, split it, scale it."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.settings import KERAS_DATASETS, StudyConfig
from search.data.preprocessing import ENOUGH, Normalization, fit, stratified
from search.data.sources import ARRAYS, MNIST, is_own, read_file, read_keras, refusal
from search.errors import InputError

UINT8_SCALE = np.float32(1 / 255)  # a factor: TensorFlow turns a division into one anyway
_CHANNELS = (1, 3)
_STEPS, _MOST = 100, 20  # optimizer steps that a trial needs, and the epochs that they may take
Images = NDArray[np.uint8] | NDArray[np.float32]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Dataset:
    """Examples and labels, ready to train on.

    x: shape (n, features). uint8 stays uint8, a quarter of the memory, and is scaled to [0, 1]
    where it is used (`scaled`, and in the graph); all else is float32.
    y: int32 of shape (n,), from 0 to `classes` - 1.
    `x_all`, `y_all` are the training part, the first `train_size` examples, and the validation
    part. `split` tells which examples validate. Where there is a `normalization`, `x_all` is
    normalized and `x_test` is not: the registered model takes raw values. `repeated` counts the
    test examples that are training or validation examples, too; `digest` is the SHA-256 of the
    source arrays.
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

    @property
    def features(self) -> int:
        """Numbers in one flat example."""
        return int(self.x_all.shape[1])

    @property
    def train(self) -> tuple[Images, Labels]:
        """What trials train on."""
        return self.x_all[: self.train_size], self.y_all[: self.train_size]

    @property
    def validation(self) -> tuple[Images, Labels]:
        """What trials are judged by."""
        return self.x_all[self.train_size :], self.y_all[self.train_size :]

    def __str__(self) -> str:
        sizes = self.train_size, len(self.x_all) - self.train_size, len(self.x_test)
        counts = " / ".join(f"{size:,}" for size in sizes)
        normalized = "" if self.normalization is None else ", normalized"
        return (
            f"{self.name}: {counts} examples to train, validate, test ({self.split} split); "
            f"{self.features} features{normalized}, {self.classes} classes; "
            f"test examples in the training data: {self.repeated:,}"
        )

    @property
    def problem(self) -> str | None:
        """Why the split can't be trusted, in one line; None where it can.

        The training part needs every class, and the validation part every class of which there
        are enough examples.
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
                    else "a larger --validation-split or more examples"
                )
                return (
                    f"--dataset {self.name}: the {part} part ({self.split} split, {len(labels):,} "
                    f"of {len(self.y_all):,} examples) must have examples of every class, but has "
                    f"none of class {shown}; give {remedy}"
                )
        return None


def scaled(x: Images) -> NDArray[np.float32]:
    """`x` as the network sees it: float32, uint8 from 0 to 1."""
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

    validation_split: fraction of the training data that validates: with `split` "last" its end, as
    in Keras; with "stratified" a random choice, by `seed`, with the same fraction of every class.
    normalize: scale every feature, unless examples are images, to mean 0 and variance 1 in the
    training part. Raises InputError, in one line, where it cannot be used.
    """
    if name == "mnist":
        arrays = read_file(MNIST, name)
    elif name in KERAS_DATASETS:
        arrays = read_keras(name)
    elif name.endswith(".npz") or "/" in name:
        arrays = read_file(Path(name), name)
    else:
        raise InputError(
            f"--dataset must be mnist, {', '.join(KERAS_DATASETS)} or the path of an .npz file, "
            f"but got {name!r}; check the spelling"
        )
    return _prepare(name, arrays, validation_split, split, seed, normalize)


def load_for_study(config: StudyConfig, stored: Mapping[str, Any] | None) -> Dataset:
    """The dataset; where nothing else is asked for, prepared as the study that exists has it.

    stored: the settings of that study, which may be from before there was a choice.
    """
    own = is_own(config.dataset)
    split, normalize = ("stratified" if own else "last"), own
    if stored is not None:
        split = "stratified" if stored.get("split") == "stratified" else "last"
        normalize = "normalize" in stored
    return load_dataset(
        config.dataset,
        config.validation_split,
        split=config.split or split,
        seed=config.seed,
        normalize=normalize and config.normalize == "auto",
    )


def choose_epochs(config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None) -> int:
    """The epochs of a trial: as asked for, or as the study that exists has them.

    Five of a file of a thousand examples are 40 steps, too few to tell one trial from another. On
    scikit-learn's digits ten of them gain 0.009 test accuracy (mean of four splits of 50 trials).
    """
    known = (stored or {}).get("epochs")
    if config.epochs is None and isinstance(known, int):
        return known
    if config.epochs is not None or not is_own(config.dataset):
        return config.trial_epochs
    steps = math.ceil(dataset.train_size / 128)
    return min(_MOST, max(config.trial_epochs, math.ceil(_STEPS / steps)))


def check_images(dataset: Dataset, for_images: list[str]) -> None:
    """Raise InputError where options that need images, `for_images`, meet other examples."""
    if for_images and not is_image(dataset.sample_shape):
        raise InputError(
            f"{for_images[0]} needs images, examples of shape (height, width) or (height, width, "
            f"channels), but those of {dataset.name} have the shape {dataset.sample_shape}; "
            f"leave {for_images[0].split()[0]} at its default"
        )


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether an example of this shape is a grey or a colour image."""
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in _CHANNELS)


def _prepare(
    name: str,
    arrays: dict[str, NDArray[Any]],
    validation_split: float,
    split: str,
    seed: int,
    normalize: bool,
) -> Dataset:
    refuse = refusal(name)
    for part in ("train", "test"):
        _check_part(part, arrays[f"x_{part}"], arrays[f"y_{part}"], refuse)
    digest = hashlib.sha256()
    for key in ARRAYS:
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)

    x_train, x_test = arrays["x_train"], arrays["x_test"]
    if x_train.shape[1:] != x_test.shape[1:] or (x_train.dtype == np.uint8) != (
        x_test.dtype == np.uint8
    ):
        raise refuse(
            "x_train and x_test must hold examples of one shape and type",
            f"{x_train.dtype}{x_train.shape[1:]} and {x_test.dtype}{x_test.shape[1:]}",
            "rows",
        )
    y_train, y_test = arrays["y_train"].ravel(), arrays["y_test"].ravel()
    present = np.unique(y_train)
    if len(present) < 2 or present[0] != 0 or present[-1] != len(present) - 1:
        shown = ", ".join(map(str, present[:12])) + (", ..." if len(present) > 12 else "")
        raise refuse("y_train must hold labels 0 to C-1, C >= 2", f"labels {shown}", "labels")
    if y_test.min() < 0 or y_test.max() >= len(present):
        raise refuse(
            f"y_test must hold labels 0 to {len(present) - 1}, as y_train does",
            f"labels from {y_test.min()} to {y_test.max()}",
            "labels",
        )
    train_size = int(len(x_train) * (1 - validation_split))  # Keras' own rounding
    if not 0 < train_size < len(x_train):
        raise InputError(
            f"--validation-split must leave examples to train and to validate, but "
            f"{validation_split} of {len(x_train)} leaves {train_size} and "
            f"{len(x_train) - train_size}; give a share nearer to 0.5 or more data"
        )
    x_all, y_all = _flat(x_train, "x_train", refuse), y_train.astype(np.int32)
    test = _flat(x_test, "x_test", refuse)
    repeated = _count_repeated(test, x_all)
    if split == "stratified":
        validates = stratified(y_all, len(x_all) - train_size, seed)
        order = np.argsort(validates, kind="stable")
        x_all, y_all, train_size = x_all[order], y_all[order], int((~validates).sum())
    normalization = None
    if normalize and x_all.dtype != np.uint8 and not is_image(x_train.shape[1:]):
        numbers = x_all.astype(np.float32, copy=False)
        normalization = fit(name, numbers[:train_size])
        x_all = normalization.apply(numbers)
    return Dataset(
        name=name,
        digest=digest.hexdigest(),
        x_all=x_all,
        y_all=y_all,
        x_test=test,
        y_test=y_test.astype(np.int32),
        train_size=train_size,
        classes=len(present),
        sample_shape=x_train.shape[1:],
        split=split,
        normalization=normalization,
        repeated=repeated,
    )


def _count_repeated(x_test: Images, x_train: Images) -> int:
    """How many rows of `x_test` stand in `x_train`, too, byte for byte."""
    tested = {row.tobytes() for row in x_test}
    repeated = {key for row in x_train if (key := row.tobytes()) in tested}
    return sum(row.tobytes() in repeated for row in x_test) if repeated else 0


def _check_part(
    part: str, x: NDArray[Any], y: NDArray[Any], refuse: Callable[[str, str, str], InputError]
) -> None:
    if x.dtype.kind not in "buif" or x.ndim < 2:
        raise refuse(
            f"x_{part} must hold numbers in shape (n, ...)", f"{x.dtype}{x.shape}", "numeric"
        )
    if y.dtype.kind not in "ui" or (y.ndim != 1 and (y.ndim != 2 or y.shape[1] != 1)):
        raise refuse(
            f"y_{part} must hold whole numbers in shape (n,)", f"{y.dtype}{y.shape}", "numeric"
        )
    if len(x) != len(y):
        raise refuse(
            f"x_{part} and y_{part} must be of one length", f"{len(x)} and {len(y)}", "rows"
        )
    if x.size == 0:
        raise refuse(f"x_{part} must have examples", f"none (shape {x.shape})", "rows")


def _flat(x: NDArray[Any], key: str, refuse: Callable[[str, str, str], InputError]) -> Images:
    """One row an example; float32 unless it is uint8, the usual type of images."""
    flat = x.reshape(len(x), -1)
    if x.dtype == np.uint8:
        return flat
    with np.errstate(over="ignore"):
        numbers = flat.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise refuse(f"{key} must hold finite numbers (float32)", "NaN or infinity", "rows")
    return numbers
