"""The dataset: load it, split it, scale it."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.settings import StudyConfig
from search.data.preprocessing import ENOUGH, Normalization, fit, random_part, stratified
from search.data.sources import ARRAYS, Images, flat, is_own, kind_of, read
from search.data.task import KINDS, Metric, Task, objective_of
from search.errors import InputError

UINT8_SCALE = np.float32(1 / 255)  # a factor, since TensorFlow multiplies by the reciprocal anyway
_CHANNELS = (1, 3)
_STEPS, _MOST = 100, 20  # optimizer steps that a trial needs; the most epochs for that
Labels = NDArray[np.int32] | NDArray[np.float32]


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
    test examples that also occur in the training data. `digest`: SHA-256 of the source arrays.
    `task`: what is predicted, and the names of the classes.
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
        what = f"{self.classes} classes"
        if not self.task.classes:
            what = f"a number to predict ({self.task.mean:.5g} ± {self.task.deviation:.5g})"
        return (
            f"{self.name}: {counts} examples to train, validate, test ({self.split} split); "
            f"{self.features} features{normalized}, {what}; "
            f"test examples in the training data: {self.repeated:,}"
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
    task: str = "auto",
) -> Dataset:
    """The dataset `name`: mnist, one of Keras', or the path of an .npz file.

    validation_split: fraction of the training data used for validation: with `split` "last" its
    end, as in Keras; with "random" a random sample, by `seed`; with "stratified" one with the same
    class proportions, or in a regression any. task: its kind, or auto.
    normalize: scale every feature, unless examples are images, to mean 0 and variance 1 in the
    training part. Raises InputError, in one line, if it cannot be used.
    """
    arrays = read(name, task)
    kind = kind_of(arrays["y_train"], task)
    digest = hashlib.sha256()
    for key in ARRAYS:
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    x_train = arrays["x_train"]
    train_size = int(len(x_train) * (1 - validation_split))  # Keras' own rounding
    if not 0 < train_size < len(x_train):
        raise InputError(
            f"--validation-split must leave examples to train and to validate, but "
            f"{validation_split} of {len(x_train)} leaves {train_size} and "
            f"{len(x_train) - train_size}; give a fraction nearer to 0.5 or more data"
        )
    x_all, x_test = (flat(name, key, arrays[key]) for key in ("x_train", "x_test"))
    y_type: Any = np.int32 if KINDS[kind].has_classes else np.float32
    y_all, y_test = (arrays[key].ravel().astype(y_type) for key in ("y_train", "y_test"))
    repeated = _count_repeated(x_test, x_all)
    if split != "last":
        split = split if KINDS[kind].has_classes else "random"
        validates = _random_split(split, y_all, len(x_all) - train_size, seed)
        order = np.argsort(validates, kind="stable")
        x_all, y_all, train_size = x_all[order], y_all[order], int((~validates).sum())
    normalization = None
    if normalize and x_all.dtype != np.uint8 and not is_image(x_train.shape[1:]):
        numbers = x_all.astype(np.float32, copy=False)
        normalization = fit(name, numbers[:train_size])
        x_all = normalization.apply(numbers)
    described, y_all = _described(kind, y_all, train_size)
    return Dataset(
        name=name,
        digest=digest.hexdigest(),
        x_all=x_all,
        y_all=y_all,
        x_test=x_test,
        y_test=y_test,
        train_size=train_size,
        classes=described.classes,
        sample_shape=x_train.shape[1:],
        split=split,
        normalization=normalization,
        repeated=repeated,
        task=described,
    )


def _random_split(split: str, y: NDArray[Any], size: int, seed: int) -> NDArray[np.bool_]:
    """A mask of about `size` validation examples, chosen as `split` says: random or stratified."""
    if split == "random":
        return random_part(len(y), size, seed)
    return stratified(y, size, seed)


def _described(kind: str, y: NDArray[Any], train_size: int) -> tuple[Task, NDArray[Any]]:
    """The task with the targets `y`, and `y`, standardized by the training part if it is numbers.

    Where all numbers of the training part are equal, they are divided by 1.
    """
    if KINDS[kind].has_classes:
        return Task(kind, int(y.max()) + 1), y
    mean, deviation = (float(f(y[:train_size], dtype=float)) for f in (np.mean, np.std))
    task = Task(kind, 1, mean=mean, deviation=deviation or 1.0)
    return task, ((y.astype(float) - task.mean) / task.deviation).astype(np.float32)


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
    task = config.task
    if stored is not None:
        split = stored.get("split", "last")
        normalize = "normalize" in stored
        task = stored.get("task", "classification") if task == "auto" else task
    dataset = load_dataset(
        config.dataset,
        config.validation_split,
        split=config.split or split,
        seed=config.seed,
        normalize=normalize and config.normalize == "auto",
        task=task,
    )
    _check_task(config, dataset)
    return dataset


def _check_task(config: StudyConfig, dataset: Dataset) -> None:
    """Raise InputError for options that make no sense in the task of `dataset`."""
    smooths = str(config.space.parameters["label_smoothing"]) != "0"
    for option, used, remedy in (
        ("--split stratified", config.split == "stratified", "give --split random or last"),
        ("--label-smoothing", smooths, "leave it out"),
        ("--class-weight balanced", config.class_weight == "balanced", "leave it out"),
    ):
        if used and not dataset.task.classes:
            found = f"the task of {dataset.name} is {dataset.task.kind}"
            raise InputError(f"{option} needs classes", found, remedy)


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


def choose_objective(
    config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None
) -> Metric:
    """The objective: as in the settings, or else as in the existing study, or the task's default.

    Raises InputError if it is not a metric of the task.
    """
    known = None if stored is None else objective_of(stored).name
    return dataset.task.objective(
        known or "auto" if config.objective == "auto" else config.objective
    )


def class_weights(config: StudyConfig, dataset: Dataset) -> NDArray[np.float32] | None:
    """The weight of a training example of each class, as --class-weight says; None for no weights.

    balanced: n / (classes * examples of the class), of the n examples of the training part, as
    scikit-learn's `compute_class_weight("balanced")` (King and Zeng 2001).
    """
    if config.class_weight == "none":
        return None
    _, labels = dataset.train
    counts = np.bincount(labels.astype(int), minlength=dataset.classes)
    return (len(labels) / (dataset.classes * np.maximum(counts, 1))).astype(np.float32)


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
