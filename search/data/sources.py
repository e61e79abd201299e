"""Where data come from: the bundled MNIST, Keras' datasets, .npz files."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.settings import KERAS_DATASETS
from search.errors import InputError, one_line

MNIST = Path(__file__).parent / "datasets" / "mnist.npz"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def is_own(name: str) -> bool:
    """Whether the dataset `name` is a file of the user's own, in an order and in units of its own.

    MNIST and Keras' datasets are images, 0 to 255, in a random order.
    """
    return name != "mnist" and name not in KERAS_DATASETS


def read_file(path: Path, name: str) -> dict[str, NDArray[Any]]:
    """The four arrays in an .npz file; objects are never unpickled."""
    refuse = refusal(name)
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
            arrays = {key: archive[key] for key in ARRAYS}
        damaged = [key for key in ARRAYS if not isinstance(arrays[key], np.ndarray)]
        if damaged:
            raise refuse("must be a whole .npz file", f"no array in {damaged[0]}", "np.savez")
        return arrays
    except InputError:
        raise
    except OSError as error:
        if error.strerror:
            raise refuse("must be a readable .npz file", error.strerror.lower(), "path") from None
        raise refuse("must be a whole .npz file", one_line(error), "np.savez") from None
    except Exception as error:
        if "allow_pickle" in str(error):
            raise refuse("must hold arrays of numbers", "an array of objects", "numeric") from None
        # zlib.error, struct.error, SyntaxError, ...: any damaged archive
        raise refuse("must be a whole .npz file", one_line(error), "np.savez") from None


_REMEDIES = {
    "np.savez": "write it with np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)",
    "path": "check the path",
    "numeric": "convert it with .astype('float32') and .astype('int64') before saving",
    "labels": "number the classes 0, 1, 2, ... without a gap, each with training examples",
    "rows": "check how the arrays were made",
}


def refusal(name: str) -> Callable[[str, str, str], InputError]:
    """What makes the error for a dataset: the rule, what was found, which of the remedies."""

    def refuse(rule: str, found: str, remedy: str) -> InputError:
        return InputError(f"--dataset {name}: {rule}, but has {found}; {_REMEDIES[remedy]}")

    return refuse


def read_keras(name: str) -> dict[str, NDArray[Any]]:
    """The four arrays of one of Keras' datasets, which it downloads."""
    import keras

    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # the download raises whatever the network does
        raise InputError(
            f"--dataset {name}: Keras must be able to download it, but {one_line(error)}; "
            "connect to the internet once, or give the path of an .npz file"
        ) from None
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
