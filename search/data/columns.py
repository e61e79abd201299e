"""The columns of a table: the kind of each, and how its values become features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.data.serving import (
    PARTS,
    Field,
    as_words,
    dates_of,
    model_inputs,
    numbers_of,
    words_of,
)
from search.errors import InputError, one_line

FEW = 10  # different whole numbers up to which a column is a category
MANY = 50  # words from which on a category has an embedding instead of a feature per word
_MANY_CLASSES = 50  # whole numbers above which a target is a number to predict
_PLURALS = {"number": "numbers", "category": "categories", "date": "dates"}
_NEARLY_ALL = 0.9  # fraction of the rows with a word of their own from which on a column is no use


@dataclass(frozen=True)
class Rows:
    """Raw rows: numbers, float32 of shape (n, numbers), NaN where missing; words of (n, words)."""

    numbers: NDArray[np.float32]
    words: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, chosen: Any) -> "Rows":
        return Rows(self.numbers[chosen], self.words[chosen])

    @property
    def inputs(self) -> dict[str, Any]:
        """As the registered model takes them."""
        return model_inputs(self.numbers, self.words)


@dataclass(frozen=True)
class Columns:
    """How rows become features, adapted to the training part alone.

    numbers: normalized by `mean` and `variance`, where missing set to `median` first; those in
    `indicated`, by index, were missing in the training part, so a feature says where.
    words: looked up in their vocabulary, which ends with the place of unknown ones: one feature per
    word, or above MANY an index for an embedding. Missing words are the empty word.
    left_out: columns that are not used, each with the reason.
    """

    numbers: tuple[Field, ...]
    words: tuple[Field, ...]
    median: NDArray[np.float32]
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    indicated: tuple[int, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    left_out: dict[str, str]

    @property
    def one_hot(self) -> list[int]:
        """The words, by index, with a feature per word of the vocabulary."""
        return [i for i, words in enumerate(self.vocabularies) if len(words) <= MANY]

    @property
    def embedded(self) -> list[int]:
        """The words, by index, whose feature is an index; these features are the last ones."""
        return [i for i, words in enumerate(self.vocabularies) if len(words) > MANY]

    @property
    def embeddings(self) -> tuple[int, ...]:
        """The numbers of different indices of the `embedded` words, the unknown one included."""
        return tuple(len(self.vocabularies[i]) + 1 for i in self.embedded)

    @cached_property
    def features(self) -> int:
        """The number of features of a row."""
        one_hot = sum(len(self.vocabularies[i]) + 1 for i in self.one_hot)
        return len(self.numbers) + len(self.indicated) + one_hot + len(self.embedded)

    @property
    def sources(self) -> list[str]:
        """The columns of the table that are used, in the order of their first use."""
        return list(dict.fromkeys(column for column, _ in (*self.numbers, *self.words)))

    def rows(self, frame: pd.DataFrame) -> Rows:
        """The values of `frame` that are used. Raises ValueError for one of another kind."""
        return Rows(numbers_of(frame, self.numbers), words_of(frame, self.words))

    def encode(self, rows: Rows) -> NDArray[np.float32]:
        """The features of `rows`, float32 of shape (n, features): as the layers of the saved model.

        In this order: numbers, indicators, one-hot words, indices.
        """
        encoded = np.zeros((len(rows), self.features), np.float32)
        missing = np.isnan(rows.numbers)
        numbers = np.where(missing, self.median, rows.numbers)
        end = len(self.numbers)
        encoded[:, :end] = (numbers - self.mean) / np.sqrt(self.variance)
        encoded[:, end : end + len(self.indicated)] = missing[:, self.indicated]
        end += len(self.indicated)
        for index in self.one_hot:
            encoded[np.arange(len(rows)), end + self._looked_up(rows, index)] = 1
            end += len(self.vocabularies[index]) + 1
        for index in self.embedded:
            encoded[:, end] = self._looked_up(rows, index)
            end += 1
        return encoded

    def _looked_up(self, rows: Rows, index: int) -> NDArray[np.intp]:
        """The place of every word: 0 if it is unknown, as in Keras' StringLookup."""
        known = pd.Index(self.vocabularies[index])
        return np.asarray(known.get_indexer(rows.words[:, index]) + 1)

    @property
    def reasons(self) -> str:
        """The columns that are left out, each with the reason."""
        return ", ".join(f"{column} ({reason})" for column, reason in self.left_out.items())

    def __str__(self) -> str:
        dates = {column for column, part in (*self.numbers, *self.words) if part}
        kinds = {
            "number": len({c for c, part in self.numbers if not part}),
            "category": len({c for c, part in self.words if not part}),
            "date": len(dates),
        }
        counted = ", ".join(
            f"{count} {kind}" if count == 1 else f"{count} {_PLURALS[kind]}"
            for kind, count in kinds.items()
            if count
        )
        return f"{counted}, left out {self.reasons}" if self.left_out else counted


def adapt(
    frame: pd.DataFrame, numeric: Sequence[str] = (), categorical: Sequence[str] = ()
) -> Columns:
    """The columns of the training part `frame`, which has no target.

    numeric, categorical: columns whose kind the user has given. Raises ValueError, in one line,
    where a column of numbers or dates holds something else.
    """
    numbers: list[Field] = []
    words: list[Field] = []
    left_out: dict[str, str] = {}
    for column in map(str, frame.columns):
        values = frame[column]
        _check_single(column, values)
        if column in numeric:
            numbers.append((column, None))
        elif column in categorical:
            words.append((column, None))
        elif _is_date(values):
            dates = dates_of(values)
            for part, read in PARTS.items():
                _sort_in((column, part), read(dates), numbers, words, {})
        else:
            _sort_in((column, None), values, numbers, words, left_out)
    raw = numbers_of(frame, numbers)
    missing = np.isnan(raw)
    median = pd.DataFrame(raw).median().fillna(0).to_numpy(np.float32)
    filled = np.where(missing, median, raw)
    deviation = filled.std(axis=0, dtype=float)
    tiny = 2 * np.finfo(np.float32).eps * np.abs(filled).max(axis=0, initial=0)
    deviation[deviation <= tiny] = 1  # one value only
    return Columns(
        numbers=tuple(numbers),
        words=tuple(words),
        median=median,
        mean=filled.mean(axis=0, dtype=float).astype(np.float32),
        variance=np.square(deviation).astype(np.float32),
        indicated=tuple(int(i) for i in np.flatnonzero(missing.any(axis=0))),
        vocabularies=tuple(tuple(sorted(set(column))) for column in words_of(frame, words).T),
        left_out=left_out,
    )


def _check_single(column: str, values: "pd.Series[Any]") -> None:
    first = next(iter(values.dropna()), None)
    if isinstance(first, list | dict | set | np.ndarray):
        raise ValueError(
            f"column {column!r} must hold single values, but has a {type(first).__name__} in each "
            "row; name it in --ignore"
        )


def _sort_in(
    field: Field,
    values: "pd.Series[Any]",
    numbers: list[Field],
    words: list[Field],
    left_out: dict[str, str],
) -> None:
    """Put the field among the numbers, the words or what is left out."""
    given = values.dropna()
    different = given.nunique()
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if different + (len(given) < len(values)) < 2:
        left_out[field[0]] = "one value"
    elif is_number and (different > FEW or not (given % 1 == 0).all()):
        numbers.append(field)
    elif not is_number and different > max(MANY, _NEARLY_ALL * len(given)):
        left_out[field[0]] = "a different word in nearly every row"
    else:
        words.append(field)


def _is_date(values: "pd.Series[Any]") -> bool:
    """Whether all values are datetimes, or words such as 2026-11-25 and 2026-11-25T12:30."""
    if pd.api.types.is_datetime64_any_dtype(values):
        return True
    if pd.api.types.is_numeric_dtype(values) or not values.notna().any():
        return False
    words = as_words(values.dropna())
    if not all(len(word) >= 10 and word[4:5] == "-" for word in words[:1000]):
        return False
    try:
        dates_of(values)
    except (ValueError, TypeError):
        return False
    return True


# ---- the target ----------------------------------------------------------------------------------


def kind_of(targets: pd.DataFrame, task: str) -> str:
    """The kind of the task with these targets, one or several columns: `task`, unless it is auto.

    Raises InputError if several labels have one column, or another task several.
    """
    several, given = len(targets.columns) > 1, ",".join(targets.columns)
    if task not in ("auto", "multilabel") and several:
        found, remedy = f"--target {given} names several", "name one, or give --task multilabel"
        raise InputError(f"--task {task} must have one target", found, remedy)
    if task == "multilabel" and not several:
        found, remedy = f"--target {given} names one", "name more, or leave --task out"
        raise InputError("--task multilabel must have a column for each label", found, remedy)
    if task != "auto" or several:
        return "multilabel" if several else task
    target = targets.iloc[:, 0]
    numbers = pd.api.types.is_numeric_dtype(target) and not pd.api.types.is_bool_dtype(target)
    if numbers and (target.nunique() > _MANY_CLASSES or bool((target % 1 != 0).any())):
        return "regression"
    return "classification"


def numbers_in(target: "pd.Series[Any]") -> NDArray[np.float32]:
    """A target that is a number, float32 of shape (n,). Raises InputError for another value."""
    try:
        with np.errstate(over="ignore"):
            numbers = np.asarray(pd.to_numeric(target), np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--target {target.name} must hold numbers in a regression",
            one_line(error),
            "name another column, or give --task classification",
        ) from None
    return numbers


def labels_in(targets: pd.DataFrame) -> NDArray[np.float32]:
    """Columns of labels, float32 of shape (n, labels): 0 or 1, also of false and true.

    Raises InputError for another value.
    """
    words = np.stack([as_words(values) for _, values in targets.items()], axis=1)
    flags = np.select([np.isin(words, ("1", "true")), np.isin(words, ("0", "false"))], [1, 0], -1)
    if (flags < 0).any():
        row, column = np.argwhere(flags < 0)[0]
        raise InputError(
            f"--target {targets.columns[column]} must hold 0 or 1, or false or true, as one of "
            "several labels",
            f"has {words[row, column]!r}",
            "name a single column to predict classes or numbers",
        )
    return flags.astype(np.float32)


def numbered(labels: NDArray[np.object_], names: tuple[str, ...]) -> NDArray[np.int32]:
    """The index of each label among the names; -1 where it is none of them."""
    return np.asarray(pd.Index(names).get_indexer(labels), np.int32)
