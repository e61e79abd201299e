"""Read a dataset's arrays from the bundled MNIST, Keras or an .npz file, and check them."""

import functools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.data_settings import KERAS_DATASETS
from search.errors import InputError, one_line
from search.memory import check_fits, chunks, empty, moved, shared
from search.task import KINDS, Kind

MNIST = Path(__file__).parent / "datasets" / "mnist.npz"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
Images = NDArray[np.uint8] | NDArray[np.float32]
Labels = NDArray[np.int32] | NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
Refuse = Callable[[str, str, str], InputError]
_TARGETS = {  # kinds of NumPy's types, what they are and their shape, by kind of task
    "classification": ("ui", "whole numbers", "(n,)"),
    "multilabel": ("buif", "0 or 1 for each label", "(n, labels)"),
    "regression": ("uif", "numbers", "(n,)"),
}
_REMEDIES = {
    "np.savez": "write it with np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)",
    "path": "check the path",
    "numeric": "convert it with .astype('float32') and .astype('int64') before saving",
    "labels": "number the classes 0, 1, 2, ... without a gap, each with training examples",
    "label": "leave that label out, or give examples of both",
    "several": "several labels are --task multilabel",
    "columns": "give a column of 0 and 1 for each label, or leave --task out",
    "one-hot": "take the class of each row with .argmax(axis=1), or give --task multilabel",
    "rows": "check how the arrays were made",
}


_SMALLER = (
    "take fewer or smaller examples, a machine with more memory, or a function that returns a "
    "tf.data.Dataset, which is trained batch by batch"
)


@dataclass(frozen=True)
class Source:
    """What a dataset is made of, as it was read.

    arrays: `ARRAYS`, and x_validation and y_validation where the split is given. class_names: of
    the labels 0, 1, ..., if they have any. pixels: whether the examples are images whose raw pixels
    the registered model takes. settings: those that the arrays depend on, as stored with the study.
    note: how they were read, if that is worth a line.
    """

    arrays: Arrays
    class_names: tuple[str, ...] = ()
    pixels: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def is_own(name: str) -> bool:
    """Whether the dataset is the user's own file, with examples in any order and unit.

    MNIST and Keras' datasets are images, 0 to 255, in random order.
    """
    return name != "mnist" and name not in KERAS_DATASETS


def kind_of(y: NDArray[Any], task: str) -> str:
    """The kind of the task with the training targets `y`: `task`, unless that is auto."""
    if task != "auto":
        return task
    if _is_binary(y) and len(y) > 1 and not _is_one_hot(y):
        return "multilabel"
    fractions = y.dtype.kind == "f" and bool(np.any(y != np.floor(y)))
    return "regression" if fractions else "classification"


def _is_binary(y: NDArray[Any]) -> bool:
    """Whether `y` has several columns, of zeros and ones."""
    columns = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "buif"
    return columns and bool(((y == 0) | (y == 1)).all())


def _is_one_hot(y: NDArray[Any]) -> bool:
    return _is_binary(y) and bool((np.count_nonzero(y, axis=1) == 1).all())


def read(name: str) -> Source:
    """The arrays of mnist, one of Keras' datasets or an .npz file, as they are stored.

    Raises InputError, in one line, if it is none or can't be read.
    """
    if name == "mnist":
        return Source(_read_file(MNIST, name))
    if name in KERAS_DATASETS:
        return Source(_read_keras(name))
    if name.endswith(".npz") or "/" in name:
        return Source(_read_file(Path(name), name))
    raise InputError(
        f"--dataset must be mnist, {', '.join(KERAS_DATASETS)}, the path of an .npz file, a folder "
        f"of images or MODULE:FUNCTION, but got {name!r}; check the spelling"
    )


def flat(name: str, key: str, x: NDArray[Any]) -> Images:
    """`x`, the array `key`, with one row per example, where it can be shared by processes.

    uint8 stays as it is, all else becomes float32.

    Raises InputError for numbers that are not finite in float32.
    """
    rows = x.reshape(len(x), -1)
    if x.dtype == np.uint8:
        return shared(rows)
    with np.errstate(over="ignore"):
        numbers = shared(rows, np.float32)
    if not all(np.isfinite(numbers[part]).all() for part in chunks(numbers)):
        raise _refusal(name, f"{key} must hold finite numbers (float32)", "NaN or infinity", "rows")
    return numbers


def examples(name: str, arrays: Arrays, part: str) -> Images:
    """The flat examples of a part, with those for validation, if given, after those for training.

    Raises InputError as `flat` does.
    """
    x = flat(name, f"x_{part}", arrays[f"x_{part}"])
    if part == "test" or "x_validation" not in arrays:
        return x
    more = flat(name, "x_validation", arrays["x_validation"])
    both: Images = empty((len(x) + len(more), *x.shape[1:]), x.dtype)
    both[: len(x)], both[len(x) :] = x, more
    return both


def targets(arrays: Arrays, part: str, kind: Kind) -> NDArray[Any]:
    """The targets of the same examples: classes (int32), numbers or labels (float32)."""
    keys = [f"y_{part}"] + ["y_validation"] * (part == "train" and "y_validation" in arrays)
    given = [arrays[key].astype(np.int32 if kind.has_classes else np.float32) for key in keys]
    return shared(np.concatenate([y if kind.target == "labels" else y.ravel() for y in given]))


def _refusal(name: str, rule: str, found: str, remedy: str) -> InputError:
    """The error for the dataset `name`; remedy: a key of `_REMEDIES`."""
    return InputError(f"--dataset {name}: {rule}", f"has {found}", _REMEDIES[remedy])


def _read_file(path: Path, name: str) -> Arrays:
    """The four arrays in an .npz file; objects are never unpickled."""
    refuse = functools.partial(_refusal, name)
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            if magic == b"\x93NUMPY":
                raise refuse("must be an .npz archive", "a single array", "np.savez")
            if not magic.startswith(b"PK") or not zipfile.is_zipfile(file):
                raise refuse("must be a whole .npz file", "no archive's start or end", "np.savez")
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in ARRAYS if key not in archive]
            if missing:
                raise refuse(
                    f"must hold {', '.join(ARRAYS)}", f"no {', '.join(missing)}", "np.savez"
                )
            size = sum(archive.zip.getinfo(f"{key}.npy").file_size for key in ARRAYS)
            check_fits(name, size, _SMALLER)
            arrays = {}
            for key in ARRAYS:
                array = archive[key]
                if not isinstance(array, np.ndarray):
                    raise refuse("must be a whole .npz file", f"no array in {key}", "np.savez")
                arrays[key] = moved(array)
                del array  # before the next one is read
        return arrays
    except InputError:
        raise
    except Exception as error:  # zlib.error, struct.error, SyntaxError, ...: any damaged archive
        if isinstance(error, OSError) and error.strerror:
            raise refuse("must be a readable .npz file", error.strerror.lower(), "path") from None
        if "allow_pickle" in str(error):
            raise refuse("must hold arrays of numbers", "an array of objects", "numeric") from None
        raise refuse("must be a whole .npz file", one_line(error), "np.savez") from None


def _read_keras(name: str) -> Arrays:
    """The four arrays of a Keras dataset, which Keras downloads."""
    import keras

    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # the download raises any network error
        raise InputError(
            f"--dataset {name}: Keras must be able to download it, but {one_line(error)}; "
            "connect to the internet once, or give the path of an .npz file"
        ) from None
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def check(name: str, arrays: Arrays, kind: str) -> None:
    """Raise InputError unless the arrays are a dataset for a task of this kind.

    x is numeric, of shape (n, ...); y of shape (n,) or (n, 1): integer from 0 to classes - 1, or in
    a regression numbers; or of shape (n, labels), 0 or 1.
    """
    refuse = functools.partial(_refusal, name)
    parts = [key.removeprefix("x_") for key in arrays if key.startswith("x_")]
    for part in parts:
        _check_part(part, arrays[f"x_{part}"], arrays[f"y_{part}"], kind, refuse)
    x_train, y_train = arrays["x_train"], arrays["y_train"]
    for part in parts[1:]:
        _check_alike(part, x_train, arrays[f"x_{part}"], refuse)
    if not KINDS[kind].has_classes:
        check_all = check_numbers if kind == "regression" else check_labels
        check_all({f"y_{part}": arrays[f"y_{part}"] for part in parts}, refuse)
        return
    present = np.unique(y_train)
    if len(present) < 2 or present[0] != 0 or present[-1] != len(present) - 1:
        shown = ", ".join(map(str, present[:12])) + (", ..." if len(present) > 12 else "")
        raise refuse("y_train must hold labels 0 to C-1, C >= 2", f"labels {shown}", "labels")
    for part in parts[1:]:
        y = arrays[f"y_{part}"]
        if y.min() < 0 or y.max() >= len(present):
            raise refuse(
                f"y_{part} must hold labels 0 to {len(present) - 1}, as y_train does",
                f"labels from {y.min()} to {y.max()}",
                "labels",
            )


def _check_alike(part: str, x_train: NDArray[Any], x: NDArray[Any], refuse: Refuse) -> None:
    same_type = (x_train.dtype == np.uint8) == (x.dtype == np.uint8)
    if x_train.shape[1:] != x.shape[1:] or not same_type:
        raise refuse(
            f"x_train and x_{part} must hold examples of one shape and type",
            f"{x_train.dtype}{x_train.shape[1:]} and {x.dtype}{x.shape[1:]}",
            "rows",
        )


def check_numbers(targets: Arrays, refuse: Refuse) -> None:
    """Raise what `refuse` makes unless a network can learn these targets in float32.

    targets: by what they are called; those of the training data first.
    """
    name, y_train = next(iter(targets.items()))
    for key, y in targets.items():
        with np.errstate(over="ignore"):
            if not np.isfinite(y.astype(np.float32)).all():
                rule = f"{key} must hold finite numbers (float32)"
                raise refuse(rule, "NaN or infinity", "rows")
    if float(y_train.std(dtype=float)) <= 1e-6 * float(np.abs(y_train).max()):
        found = f"only {float(y_train.flat[0]):g}, or numbers too close to it for float32"
        raise refuse(f"{name} must hold numbers that differ", found, "rows")


def check_labels(targets: Arrays, refuse: Refuse, names: Sequence[str] = ()) -> None:
    """Raise what `refuse` makes unless these are labels of which each is given to some examples.

    targets: of shape (n, labels), by what they are called; those of the training data first.
    names: of the labels, if they have any.
    """
    name, y_train = next(iter(targets.items()))
    for key, y in targets.items():
        if y.shape[1] != y_train.shape[1]:
            rule = f"{key} must hold the labels of {name}"
            raise refuse(rule, f"{y.shape[1]} columns, and {name} has {y_train.shape[1]}", "rows")
        wrong = y[(y != 0) & (y != 1)]
        if wrong.size:
            raise refuse(f"{key} must hold 0 or 1 for each label", f"{wrong[0]:g}", "rows")
    constant = np.flatnonzero((y_train == y_train[0]).all(axis=0))
    if len(constant):
        label = constant[0]
        which = names[label] if names else f"column {label}"
        found = f"only {y_train[0, label]:g} in {which}"
        raise refuse(f"{name} must hold 0 and 1 for each label", found, "label")


def _check_part(part: str, x: NDArray[Any], y: NDArray[Any], kind: str, refuse: Refuse) -> None:
    if x.dtype.kind not in "buif" or x.ndim < 2:
        rule = f"x_{part} must hold numbers in shape (n, ...)"
        raise refuse(rule, f"{x.dtype}{x.shape}", "numeric")
    numbers, what, shape = _TARGETS[kind]
    columns = y.shape[1] if y.ndim == 2 else int(y.ndim == 1)
    if y.dtype.kind not in numbers or (columns < 2 if kind == "multilabel" else columns != 1):
        remedy = "columns" if kind == "multilabel" else "numeric"
        if _is_binary(y) and len(y) > 1:
            remedy = "one-hot" if _is_one_hot(y) else "several"
        raise refuse(f"y_{part} must hold {what} in shape {shape}", f"{y.dtype}{y.shape}", remedy)
    if len(x) != len(y):
        rule = f"x_{part} and y_{part} must be of one length"
        raise refuse(rule, f"{len(x)} and {len(y)}", "rows")
    if x.size == 0:
        raise refuse(f"x_{part} must have examples", f"none (shape {x.shape})", "rows")
