"""Large arrays in memory that the processes of this machine share, and whether they fit there.

On Linux an array lies in a file without a name (memfd_create), which is gone with the last process
that has it. Elsewhere it is an ordinary array, and every process gets a copy.
"""

import math
import mmap
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from numpy.typing import DTypeLike, NDArray

from search.errors import InputError

CHUNK = 2**26  # bytes that are worked on at once
_FEWEST = 16  # columns at a time: NumPy adds the rows of one alone in another order
_SPARE = 1.2  # times the data: one part in ten is copied now and then
_CGROUPS = (  # of a container, version 2 and 1: its limit, and what it uses
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
T = TypeVar("T")


class _Mapping(mmap.mmap):
    """A mapping of the file `descriptor`, which it owns."""

    descriptor = -1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)


@dataclass(frozen=True)
class _Handle:
    """Where another process finds an array: in the file `path`, `offset` bytes from its start."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def open(self) -> NDArray[Any]:
        """The array; what is written to it stays in this process."""
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = math.prod(self.shape)
        return np.frombuffer(mapped, self.dtype, count, self.offset).reshape(self.shape)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A new array that other processes of this machine can share, if it is not empty."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size == 0 or kind.hasobject or not hasattr(os, "memfd_create"):
        return np.empty(shape, kind)
    descriptor = os.memfd_create("dataset")
    os.ftruncate(descriptor, size)
    mapping = _Mapping(descriptor, size)
    mapping.descriptor = descriptor
    return np.frombuffer(mapping, kind).reshape(shape)


def shared(array: NDArray[Any], dtype: DTypeLike | None = None) -> NDArray[Any]:
    """`array` as it is if it can be shared and is of this type; otherwise a copy that can be."""
    if np.dtype(dtype or array.dtype) == array.dtype and _handle(array) is not None:
        return array
    copy = empty(array.shape, dtype or array.dtype)
    for part in chunks(array):
        copy[part] = array[part]
    return copy


def moved(array: NDArray[Any]) -> NDArray[Any]:
    """`array`, which must not be used again, where it can be shared.

    Its own memory is given back as it is copied, so that both together take little more than one.
    """
    owner = array if array.base is None else array.base
    whole = isinstance(owner, np.ndarray) and owner.flags.owndata and owner.size == array.size
    if not whole or not array.flags.c_contiguous or array.dtype.hasobject:
        return shared(array)
    copy = empty(array.shape, array.dtype)
    target = copy.reshape(-1)
    owner.resize(array.size, refcheck=False)  # flat
    step = max(1, CHUNK // array.itemsize)
    for first in reversed(range(0, array.size, step)):
        target[first : first + step] = owner[first:]
        owner.resize(first, refcheck=False)
    return copy


def partition(rows: NDArray[Any], last: NDArray[np.bool_]) -> None:
    """Move the rows where `last` is true to the end of `rows`, in place, each part in its order."""
    kept, position = rows[last], 0
    for part in chunks(rows):
        staying = rows[part][~last[part]]
        rows[position : position + len(staying)] = staying
        position += len(staying)
    rows[position:] = kept


def statistics(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Mean, standard deviation and largest absolute value of every column.

    Of some columns at a time, because NumPy works on copies in float64; to the same digits.
    """
    width = max(_FEWEST, CHUNK // max(1, 8 * len(x)))
    parts = []
    for first in range(0, x.shape[1], width):
        some = x[:, first : first + width]
        largest = np.maximum(some.max(axis=0), -some.min(axis=0))
        parts.append((some.mean(axis=0, dtype=float), some.std(axis=0, dtype=float), largest))
    mean, deviation, largest = (np.concatenate(values) for values in zip(*parts, strict=True))
    return mean, deviation, largest


def chunks(array: NDArray[Any]) -> Iterator[slice]:
    """Slices of the rows of `array`, of about `CHUNK` bytes each."""
    rows = max(1, CHUNK // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        yield slice(first, min(first + rows, len(array)))


def hand_over(owner: T) -> T:
    """A copy of `owner`, a dataclass, for another process: shared arrays become handles.

    They are valid while this process lives. `opened` makes them arrays again.
    """
    handles = {name: _handle(array) for name, array in _arrays(owner, np.ndarray)}
    known = {name: handle for name, handle in handles.items() if handle is not None}
    return replace(owner, **known) if known else owner  # type: ignore[type-var]


def opened(owner: T) -> T:
    """What `hand_over` was given, with the same arrays in the same memory."""
    arrays = {name: handle.open() for name, handle in _arrays(owner, _Handle)}
    return replace(owner, **arrays) if arrays else owner  # type: ignore[type-var]


def _arrays(owner: Any, kind: type) -> list[tuple[str, Any]]:
    known = fields(owner) if is_dataclass(owner) else ()
    values = ((field.name, getattr(owner, field.name)) for field in known)
    return [(name, value) for name, value in values if isinstance(value, kind)]


def _handle(array: NDArray[Any]) -> _Handle | None:
    """Where the memory of `array` is found; None if it can't be shared."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, _Mapping) or not array.flags.c_contiguous:
        return None
    path = f"/proc/{os.getpid()}/fd/{base.descriptor}"
    if not os.access(path, os.R_OK):
        return None
    start = np.frombuffer(base, np.uint8).ctypes.data
    return _Handle(path, array.ctypes.data - start, array.shape, array.dtype.str)


# ---- does it fit? ------------------------------------------------------------------------------


def free() -> int:
    """Bytes of memory that are free for this process, within the limit of its container."""
    left = [psutil.virtual_memory().available]
    for folder, limit, usage in _CGROUPS:
        try:
            most, used, stat = (
                (Path(folder) / n).read_text() for n in (limit, usage, "memory.stat")
            )
            cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
            left.append(int(most) - int(used) + int(cached[1] if cached else 0))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, min(left))


def check_fits(name: str, size: int, remedy: str) -> None:
    """Raise InputError if the dataset `name`, of `size` bytes, does not fit into free memory."""
    needed, there = size * _SPARE, free()
    if needed > there:
        raise InputError(
            f"--dataset {name} must fit into memory",
            f"it needs {needed / 1e9:,.1f} GB and {there / 1e9:,.1f} GB are free",
            remedy,
        )
