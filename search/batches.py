"""Examples that come in batches, as a tf.data.Dataset: read whole, or a random sample of them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import InputError, one_line

MOST_EXAMPLES = 10_000_000  # that a tf.data.Dataset of unknown size may have
SAMPLE, NUMBERS = 200_000, 50_000_000  # the most examples of a sample, and features of all of them
_MOST_CLASSES = 100_000  # different labels up to which they are counted
_BATCH = 1024  # of single examples
Batch = tuple[NDArray[Any], NDArray[Any]]
Refuse = Callable[[str, str, str], InputError]  # of a rule, what was found, and the remedy


def read(part: str, pipeline: Any, limit: int, refuse: Refuse) -> Batch:
    """All examples and labels of a tf.data.Dataset that `check` has passed.

    part: what it is called. limit: bytes that they may have. Raises what `refuse` makes for what
    can't be read.
    """
    spec, count = pipeline.element_spec, cardinality(pipeline)
    known = all(s.shape.num_elements() is not None for s in spec)
    needed = count * sum(s.shape.num_elements() * s.dtype.size for s in spec) if known else 0
    rule = f"{part} must fit into half of the free memory, {limit / 1e9:.1f} GB"
    remedy = (
        "take fewer or smaller examples, for example with .take(), or a machine with more memory"
    )
    if needed > limit:
        raise refuse(rule, f"it needs {needed / 1e9:.1f} GB", remedy)
    found: list[Batch] = []
    size = 0
    for x, y in elements(part, pipeline, refuse):
        found.append((x, y))
        size += x.nbytes + y.nbytes
        if size > limit:
            raise refuse(rule, f"it needs more than {size / 1e9:.1f} GB", remedy)
    try:
        return _joined(found)
    except ValueError as error:
        raise _of_several_shapes(part, error, refuse) from None


def sampled(
    part: str, pipeline: Any, limit: int, seed: int, refuse: Refuse
) -> "tuple[Sample, Batch]":
    """A random sample of a tf.data.Dataset, which is read once, and what it found; as `read`."""
    sample = Sample(limit, seed)
    try:
        for x, y in elements(part, pipeline, refuse):
            sample.add(x, y)
        return sample, sample.found()
    except ValueError as error:
        raise _of_several_shapes(part, error, refuse) from None


def elements(part: str, pipeline: Any, refuse: Refuse) -> Iterator[Batch]:
    """The batches of a tf.data.Dataset that `check` has passed; at least one."""
    count, ends = 0, cardinality(pipeline) >= 0
    batches = pipeline if has_batches(pipeline) else pipeline.batch(_BATCH)
    try:
        for x, y in batches.as_numpy_iterator():
            if len(x) != len(y):
                rule = f"{part} must have a label for each example of a batch"
                raise refuse(rule, f"has {len(y)} for {len(x)}", "check the pipeline")
            yield x, y
            count += len(x)
            if count > MOST_EXAMPLES and not ends:
                found = f"more than {MOST_EXAMPLES:,} examples and no end yet"
                remedy = "leave out .repeat(), or state its size with assert_cardinality"
                raise refuse(f"{part} must have an end", found, remedy)
    except InputError:
        raise
    except Exception as error:  # anything that the user's pipeline raises
        why = f"{type(error).__name__}: {one_line(error)}"
        rule = f"{part} must be a dataset that can be read"
        raise refuse(rule, f"it raised {why}", "fix it") from None
    if not count:
        raise refuse(f"{part} must have examples", "it is empty", "check the pipeline")


def check(part: str, pipeline: Any, refuse: Refuse) -> None:
    """Raise what `refuse` makes unless it is a tf.data.Dataset of examples and labels, and ends."""
    spec = getattr(pipeline, "element_spec", None)
    rule = f"{part} must be a tf.data.Dataset of (examples, labels)"
    if spec is None or not hasattr(pipeline, "as_numpy_iterator"):
        raise refuse(rule, f"got a value of type {type(pipeline).__name__}", "return one")
    if not isinstance(spec, tuple) or len(spec) != 2 or not all(hasattr(s, "dtype") for s in spec):
        raise refuse(rule, "its elements are others", "map each to a pair of tensors")
    if cardinality(pipeline) == -1:
        remedy = "leave out .repeat(), or end it with .take()"
        raise refuse(f"{part} must have an end", "it is infinite", remedy)
    if any(s.shape.rank is None for s in spec):
        rule = f"{part} must have examples of known rank"
        raise refuse(rule, "it is unknown", "use ensure_shape")


def has_batches(pipeline: Any) -> bool:
    """Whether the elements are batches, not single examples.

    One example with several labels has two known lengths that differ: of its features and of its
    labels.
    """
    x, y = (spec.shape for spec in pipeline.element_spec)
    if y.rank != 1 or not x.rank:
        return bool(y.rank)
    return None in (x[0], y[0]) or x[0] == y[0]


def cardinality(pipeline: Any) -> int:
    """The number of elements; -1 if it is infinite, -2 if it is unknown, as in tf.data."""
    return int(pipeline.cardinality().numpy())


def described(pipeline: Any) -> str:
    """What the elements are, and how many, in words that no version of TensorFlow changes."""
    kinds = " ".join(f"{s.dtype.name}{s.shape}" for s in pipeline.element_spec)
    return f"{kinds} {cardinality(pipeline)}"


def digest(parts: Iterable[Batch]) -> str:
    """Of the examples and their labels in all parts, in any order."""
    rows = (a.tobytes() + b.tobytes() for x, y in parts for a, b in zip(x, y, strict=True))
    total = sum(int.from_bytes(hashlib.sha256(row).digest()) for row in rows)
    return f"{total % 2**256:x}"


def _of_several_shapes(part: str, error: ValueError, refuse: Refuse) -> InputError:
    rule = f"{part} must have examples of one shape"
    return refuse(rule, one_line(error), "resize or pad them")


def _joined(parts: list[Batch]) -> Batch:
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


class Sample:
    """A random sample of the examples that it is given, and one of every class that it lacks then.

    By algorithm R (Vitter 1985), seeded. limit: the bytes that it may have, beside SAMPLE and
    NUMBERS. seen, batches, largest: how many examples and batches there were, and the size of the
    largest batch. counts: of each label, if labels are whole numbers.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self.seen = self.batches = self.largest = 0
        self.counts: Counter[int] = Counter()
        self._limit = limit
        self._most = 0
        self._random = np.random.default_rng(seed)
        self._parts: list[Batch] = []
        self._full = False  # then it is one part, of its own memory
        self._firsts: dict[int, Batch] = {}  # of every class, its first example

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Add a batch, examples of shape (n, ...) and labels; ValueError where shapes differ."""
        if self.seen == 0 and x.size:
            bytes_each = max(1, (x.nbytes + y.nbytes) // len(x))
            most = min(SAMPLE, NUMBERS * len(x) // x.size, self._limit // bytes_each)
            self._most = max(1, most)
        self.batches += 1
        self.largest = max(self.largest, len(x))
        if y.ndim == 1 and y.dtype.kind in "iu" and len(self.counts) <= _MOST_CLASSES:
            self._count(x, y)
        room = max(0, min(len(x), self._most - self.seen))
        if room:
            self._parts.append((x[:room], y[:room]))
        if room < len(x):
            self._replace(x[room:], y[room:], self.seen + room)
        self.seen += len(x)

    def _count(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        found = np.unique(y, return_index=True, return_counts=True)
        for label, first, count in zip(*(part.tolist() for part in found), strict=True):
            if label not in self.counts and len(self._firsts) < self._most:
                self._firsts[label] = x[first : first + 1].copy(), y[first : first + 1].copy()
            self.counts[label] += count

    def _replace(self, x: NDArray[Any], y: NDArray[Any], before: int) -> None:
        """Let each example, after `before` others, take a random place of the sample or none."""
        if not self._full:
            self._full, self._parts = True, [_joined(self._parts)]
        places = self._random.integers(0, np.arange(before, before + len(x)) + 1)
        chosen = places < self._most
        sample_x, sample_y = self._parts[0]
        sample_x[places[chosen]], sample_y[places[chosen]] = x[chosen], y[chosen]

    def found(self) -> Batch:
        """The sample, of at least one example; all examples in their order if that many fit."""
        lacking: list[Batch] = []
        if self._full:
            there = set(np.unique(self._parts[0][1]).tolist())
            lacking = [first for label, first in self._firsts.items() if label not in there]
        return _joined(self._parts + lacking)
