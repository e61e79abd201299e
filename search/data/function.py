"""The user's own function, `--dataset MODULE:FUNCTION`, which returns arrays or tf.data.Datasets.

    def load():
        return {"x_train": ..., "y_train": ..., "x_test": ..., "y_test": ...}

Also x_validation and y_validation, or train, test and validation as a tf.data.Dataset each, of
examples and labels, in batches or not; and class_names.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.custom_model import NAME, Function, load_function
from search.data.sources import ARRAYS, Arrays, Source
from search.errors import InputError, one_line
from search.memory import free

MOST_EXAMPLES = 10_000_000  # that a tf.data.Dataset of unknown size may have
_BATCH = 1024
_VALIDATION = ("x_validation", "y_validation")
_PIPELINES = ("train", "test", "validation")
_AS = "return a dict of x_train, y_train, x_test and y_test, or of train and test"


def is_function(name: str) -> bool:
    """Whether the dataset `name` is a function of a module."""
    return re.fullmatch(NAME, name) is not None and not os.path.lexists(name)


def read(name: str) -> Source:
    """What the function `name` returns, its tf.data.Datasets read into arrays.

    Raises InputError, in one line, for anything it raises or returns that can't be used.
    """
    function = load_function(name, "--dataset")
    try:
        returned = function.call()
    except (Exception, SystemExit) as error:  # anything that the user's code raises
        raise _refusal(
            name, "must return its data", f"it raised {_what(error)}", "fix it"
        ) from None
    if not isinstance(returned, Mapping):
        raise _refusal(name, "must return a dict", f"got {_kind(returned)}", _AS)
    kept = dict(returned)
    names = _class_names(name, kept.pop("class_names", ()))
    if set(kept) & set(_PIPELINES):
        _check_keys(name, kept, _PIPELINES[:2], _PIPELINES[2:])
        return _of_pipelines(function, kept, names)
    _check_keys(name, kept, ARRAYS, _VALIDATION)
    if len(set(kept) & set(_VALIDATION)) == 1:
        raise _refusal(
            name, "must return both of " + " and ".join(_VALIDATION), "got one of them", "add it"
        )
    try:
        arrays = {key: np.asarray(kept[key]) for key in (*ARRAYS, *_VALIDATION) if key in kept}
    except Exception as error:  # rows of several lengths, and what objects of any kind raise
        raise _refusal(name, "must return arrays", f"got {_what(error)}", "check them") from None
    return Source(arrays, names)


def _check_keys(name: str, kept: dict[Any, Any], needed: Any, more: Any) -> None:
    missing = [key for key in needed if key not in kept]
    unknown = [key for key in kept if key not in (*needed, *more)]
    if missing or unknown:
        raise _refusal(
            name,
            f"must return {', '.join(needed)}, perhaps {', '.join(more)} and class_names",
            f"has no {missing[0]}" if missing else f"has {unknown[0]!r}, too",
            _AS,
        )


def _class_names(name: str, given: Any) -> tuple[str, ...]:
    names = list(given) if isinstance(given, list | tuple | np.ndarray) else [given]
    if not all(isinstance(one, str) and one for one in names) or len(set(names)) < len(names):
        raise _refusal(
            name,
            "must return class_names as a list of texts that differ",
            f"got {one_line(ValueError(repr(given)))}",
            "give each class a name, in the order of the labels",
        )
    return tuple(map(str, names))


# ---- tf.data -------------------------------------------------------------------------------------


def _of_pipelines(function: Function, kept: dict[str, Any], names: tuple[str, ...]) -> Source:
    """The tf.data.Datasets, each read once, in its order, into half of the free memory at most."""
    arrays: Arrays = {}
    left = free() // 2
    for part in (part for part in _PIPELINES if part in kept):
        x, y = _read(function.name, part, kept[part], left)
        left -= x.nbytes + y.nbytes
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    size = sum(array.nbytes for array in arrays.values())
    note = f"tf.data read into memory once, {size / 1e6:,.1f} MB, and trained from there"
    return Source(arrays, names, note=note)


def _read(name: str, part: str, pipeline: Any, limit: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The examples and labels of a tf.data.Dataset. limit: bytes that they may have."""
    batches = _batched(name, part, pipeline, limit)
    found: list[tuple[NDArray[Any], NDArray[Any]]] = []
    size = count = 0
    try:
        for x, y in batches.as_numpy_iterator():
            found.append((x, y))
            size, count = size + x.nbytes + y.nbytes, count + len(x)
            if size > limit:
                raise _too_large(name, part, f"more than {size / 1e9:.1f} GB", limit)
            if count > MOST_EXAMPLES:
                raise _endless(name, part, f"more than {MOST_EXAMPLES:,} examples and no end yet")
    except InputError:
        raise
    except Exception as error:  # anything that the user's pipeline raises
        rule = f"{part} must be a dataset that can be read"
        raise _refusal(name, rule, f"it raised {_what(error)}", "fix it") from None
    if not found:
        raise _refusal(name, f"{part} must have examples", "it is empty", "check the pipeline")
    try:
        return np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])
    except ValueError as error:
        rule = f"{part} must have examples of one shape"
        raise _refusal(name, rule, one_line(error), "resize or pad them") from None


def _batched(name: str, part: str, pipeline: Any, limit: int) -> Any:
    """The tf.data.Dataset in batches. Raises InputError where it can't be read into `limit`."""
    spec = getattr(pipeline, "element_spec", None)
    rule = f"{part} must be a tf.data.Dataset of (examples, labels)"
    if spec is None or not hasattr(pipeline, "as_numpy_iterator"):
        raise _refusal(name, rule, f"got {_kind(pipeline)}", "return one")
    if not isinstance(spec, tuple) or len(spec) != 2 or not all(hasattr(s, "dtype") for s in spec):
        raise _refusal(name, rule, "its elements are others", "map each to a pair of tensors")
    elements = int(pipeline.cardinality().numpy())  # -1: infinite, -2: unknown, as in tf.data
    if elements == -1:
        raise _endless(name, part, "it is infinite")
    x, y = spec
    if x.shape.rank is None or y.shape.rank is None:
        raise _refusal(
            name, f"{part} must have examples of known rank", "it is unknown", "use ensure_shape"
        )
    known = all(s.shape.num_elements() is not None for s in spec)
    needed = elements * sum(s.shape.num_elements() * s.dtype.size for s in spec) if known else 0
    if needed > limit:
        raise _too_large(name, part, f"{needed / 1e9:.1f} GB", limit)
    return pipeline.batch(_BATCH) if _is_one_example(x.shape, y.shape) else pipeline


def _is_one_example(x: Any, y: Any) -> bool:
    """Whether an element of these shapes is one example, not a batch.

    One with several labels has two known lengths that differ: of its features and its labels.
    """
    if y.rank != 1 or not x.rank:
        return bool(y.rank == 0)
    return None not in (x[0], y[0]) and x[0] != y[0]


def _too_large(name: str, part: str, needed: str, limit: int) -> InputError:
    return _refusal(
        name,
        f"{part} must fit into half of the free memory, {limit / 1e9:.1f} GB",
        f"it needs {needed}",
        "take fewer or smaller examples, for example with .take(), or a machine with more memory",
    )


def _endless(name: str, part: str, found: str) -> InputError:
    return _refusal(
        name, f"{part} must have an end", found, "leave out .repeat(), or end it with .take()"
    )


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _refusal(name: str, rule: str, found: str, remedy: str) -> InputError:
    return InputError(f"--dataset {name}: {rule}", found, remedy)
