"""The user's own function, `--dataset MODULE:FUNCTION`, which returns arrays or tf.data.Datasets.

    def load():
        return {"x_train": ..., "y_train": ..., "x_test": ..., "y_test": ...}

Also x_validation and y_validation, or train, validation and test as a tf.data.Dataset each, of
examples and labels, in batches or not; and class_names.
"""

import math
import os
import random
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from search import batches
from search.config.custom_model import NAME, Function, ModelError, load_function, same_function
from search.data.preparation import Normalization
from search.data.sources import ARRAYS, Arrays, Images, Labels, Source
from search.errors import InputError, one_line
from search.memory import free
from search.task import Task

_VALIDATION = ("x_validation", "y_validation")
_PIPELINES = ("train", "validation", "test")
_AS = "return a dict of x_train, y_train, x_test and y_test, or of train, validation and test"
_calling = threading.Lock()  # the random generators that are seeded are the process's


def is_function(name: str) -> bool:
    """Whether the dataset `name` is a function of a module."""
    return re.fullmatch(NAME, name) is not None and not os.path.lexists(name)


@dataclass(frozen=True)
class Pipeline:
    """A training part that is read again in every epoch, batch by batch, and never held whole.

    The object can't be sent to another process, so each calls the function for every training.
    name, digest: the function, and the SHA-256 of its module's source. seed: of the study, by which
    NumPy draws in each call. spec: what its elements are, and its cardinality, in words. held: a
    digest of the validation part, in any order.
    examples, counts, batch_count: of the one epoch that was counted; counts: by label, of whole
    numbers. batch_size: the largest; None where it has no batches, but single examples.
    dtype, task, normalization: how the network takes the examples and labels.
    more: examples, prepared like that, that are mixed in.
    """

    name: str
    digest: str
    seed: int
    spec: str
    held: str
    examples: int
    counts: Mapping[int, int]
    batch_count: int
    batch_size: int | None
    dtype: str
    task: Task = field(default_factory=Task)
    normalization: Normalization | None = None
    more: tuple[Images, Labels] | None = None

    def size(self, batch_size: int) -> int:
        """The size of a batch; batch_size: the hyperparameter, for a pipeline without batches."""
        return self.batch_size or min(batch_size, self.examples)

    def steps(self, size: int) -> tuple[int, int]:
        """How many batches of this size an epoch has, of the pipeline and of `more`."""
        own = self.batch_count if self.batch_size else math.ceil(self.examples / size)
        return own, 0 if self.more is None else math.ceil(len(self.more[1]) / size)

    def call(self, part: str = "train") -> Any:
        """This part, a tf.data.Dataset that was never read, as the function returns it.

        Raises InputError as `read` does, and ModelError if the function has changed.
        """
        function = same_function(self.name, self.digest, "--dataset")
        return _call(function, self.seed)[part]

    def check(self) -> None:
        """Raise ModelError if the split differs when the function is called again, or read again.

        The validation part is read for that: what it lacks may be in the training part.
        """
        part, refuse = "validation", partial(_refusal, self.name)
        again = self.call(part)
        for _ in range(2):
            if batches.digest(batches.elements(part, again, refuse)) != self.held:
                raise ModelError(
                    f"--dataset {self.name}: validation must be the same in every call and epoch",
                    "it holds other examples when it is read again",
                    "draw nothing there, or shuffle by a seed with reshuffle_each_iteration=False",
                )


def read(name: str, seed: int = 0) -> tuple[Source, Pipeline | None]:
    """What the function `name` returns; of tf.data.Datasets the training part as a pipeline.

    The arrays of the training part are then a random sample of it, by `seed`; those of the others
    are read. Raises InputError, in one line, for anything it raises or returns that can't be used.
    """
    function = load_function(name, "--dataset")
    returned = _call(function, seed)
    if not isinstance(returned, Mapping):
        raise _refusal(name, "must return a dict", f"got {_kind(returned)}", _AS)
    kept = dict(returned)
    names = _class_names(name, kept.pop("class_names", ()))
    if set(kept) & set(_PIPELINES):
        _check_keys(name, kept, _PIPELINES)
        return _of_pipelines(function, kept, names, seed)
    _check_keys(name, kept, ARRAYS, _VALIDATION)
    if len(set(kept) & set(_VALIDATION)) == 1:
        raise _refusal(
            name, "must return both of " + " and ".join(_VALIDATION), "got one of them", "add it"
        )
    try:
        arrays = {key: np.asarray(kept[key]) for key in (*ARRAYS, *_VALIDATION) if key in kept}
    except Exception as error:  # rows of several lengths, and what objects of any kind raise
        raise _refusal(name, "must return arrays", f"got {_what(error)}", "check them") from None
    return Source(arrays, names, note="arrays, trained in memory"), None


def _call(function: Function, seed: int) -> Any:
    """What the function returns, with the generators of Python and NumPy seeded."""
    with _calling:
        seed_generators(seed)
        try:
            return function.call()
        except (Exception, SystemExit) as error:  # anything that the user's code raises
            rule, found = "must return its data", f"it raised {_what(error)}"
            raise _refusal(function.name, rule, found, "fix it") from None


def seed_generators(seed: int) -> None:
    """Seed those of Python and NumPy; TensorFlow's global seed is unset if there is one.

    With it, an operation without a seed, such as tf.image.random_flip_left_right in the map of a
    tf.data.Dataset, would draw the same in every epoch.
    """
    random.seed(seed)
    np.random.seed(seed)
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None:
        tensorflow.random.set_seed(None)


def _check_keys(name: str, kept: dict[Any, Any], needed: Any, more: Any = ()) -> None:
    missing = [key for key in needed if key not in kept]
    unknown = [key for key in kept if key not in (*needed, *more)]
    if missing == ["validation"]:
        raise _refusal(
            name,
            "must return validation beside train and test, since a tf.data.Dataset is not split",
            "has none",
            "return it, too, for example by .take() and .skip() before anything is shuffled",
        )
    if missing or unknown:
        raise _refusal(
            name,
            f"must return {', '.join(needed)}, perhaps {', '.join([*more, 'class_names'])}",
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


def _of_pipelines(
    function: Function, kept: dict[str, Any], names: tuple[str, ...], seed: int
) -> tuple[Source, Pipeline]:
    """Validation and test, read into half of the free memory at most; and the training part."""
    name, left = function.name, free() // 2
    arrays: Arrays = {}
    refuse = partial(_refusal, name)
    for part in _PIPELINES:
        batches.check(part, kept[part], refuse)
    for part in ("validation", "test"):
        x, y = batches.read(part, kept[part], left, refuse)
        left -= x.nbytes + y.nbytes
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    train = kept["train"]
    sample, (x, y) = batches.sampled("train", train, left, seed, refuse)
    own = sample.largest if batches.has_batches(train) else None
    pipeline = Pipeline(
        name=name,
        digest=function.digest,
        seed=seed,
        spec=batches.described(train),
        held=batches.digest([(arrays["x_validation"], arrays["y_validation"])]),
        examples=sample.seen,
        counts=dict(sample.counts),
        batch_count=sample.batches,
        batch_size=own,
        dtype="uint8" if x.dtype == np.uint8 else "float32",
    )
    note = "tf.data, trained batch by batch with Keras' fit"
    note += "" if own is None else f", in its own batches of {own:,}"
    note += "" if len(x) == sample.seen else f"; scale and baselines by a sample of {len(x):,}"
    pipeline.check()
    arrays |= {"x_train": x, "y_train": y}
    arrays = {key: arrays[key] for key in (*ARRAYS, *_VALIDATION)}
    settings = {} if own is None else {"batch_size": own}
    return Source(arrays, names, settings=settings, note=note), pipeline


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _refusal(name: str, rule: str, found: str, remedy: str) -> InputError:
    return InputError(f"--dataset {name}: {rule}", found, remedy)
