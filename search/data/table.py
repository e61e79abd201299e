"""A table, a CSV or Parquet file: read it, choose the target, split it, and encode its columns."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.config.data_settings import names_in, targets_in
from search.config.settings import StudyConfig
from search.data.columns import labels_in, numbered, numbers_in
from search.data.preparation import Seed, held_out, kept
from search.data.serving import as_words, dates_of
from search.data.sources import Labels, check_labels, check_numbers
from search.errors import InputError, nearest, one_line
from search.memory import check_fits
from search.task import KINDS, check_classes, class_names

if TYPE_CHECKING:
    import pyarrow

_MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", "?", "#N/A")
_COPIES = 3  # of a file's size that reading and encoding it take, measured on CSV files


@dataclass(frozen=True)
class Table:
    """The rows of a table, without the target and the columns to ignore.

    target: one column, or one for each label. test, test_target: the rows of the test set, if they
    have a file of their own. split_column: the column of `--split group:COLUMN` or `time:COLUMN`.
    digest: SHA-256 of the files.
    """

    frame: pd.DataFrame
    target: pd.DataFrame
    test: pd.DataFrame | None
    test_target: pd.DataFrame | None
    split_column: "pd.Series[Any] | None"
    digest: str


def read_table(config: StudyConfig, split_column: str) -> Table:
    """The table of `config`; split_column: empty if there is none. Raises InputError."""
    if config.target is None:
        raise InputError(
            f"--dataset {config.dataset}: a table must have a target, the column to predict",
            "--target is not given",
            "for example --target COLUMN",
        )
    frame = _read(config.dataset, "--dataset")
    _check_columns(config, split_column, list(frame.columns))
    test = None if config.test is None else _read(config.test, "--test")
    if test is not None:
        _check_alike(config, frame, test)
    digest = hashlib.sha256()
    for path in filter(None, (config.dataset, config.test)):
        with Path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    unused = [*targets_in(config.target, frame.columns), *names_in(config.ignore)]
    return Table(
        frame=frame.drop(columns=unused),
        target=_target(config, frame, config.dataset),
        test=None if test is None else test.drop(columns=unused, errors="ignore"),
        test_target=None if test is None else _target(config, test, str(config.test)),
        split_column=frame[split_column] if split_column else None,
        digest=digest.hexdigest(),
    )


# ---- reading -------------------------------------------------------------------------------------


def _read(path: str, option: str) -> pd.DataFrame:
    """The rows of a file. Raises InputError."""
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        found = str(error.strerror).lower()
        raise InputError(
            f"{option} must be a readable file", f"{path}: {found}", "check the path"
        ) from None
    check_fits(path, size * _COPIES, "take a sample of the rows, or write fewer columns")
    try:
        table = _arrow(path)
    except Exception as error:  # pyarrow's errors and OSError
        raise InputError(
            f"{option} {path}: must be a whole {Path(path).suffix[1:].upper()} file, UTF-8, with "
            "the columns' names in its first row and as many values in every other one",
            one_line(error),
            "write it again, for example with pandas' to_csv(path, index=False)",
        ) from None
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        found = f"{twice[0]!r} occurs twice" if twice else "one has no name"
        raise InputError(
            f"{option} {path}: the columns must have different names", found, "rename one"
        )
    if not table.num_rows:
        raise InputError(f"{option} {path}: a table must have rows", "has none", "check the file")
    frame: pd.DataFrame = table.to_pandas(date_as_object=False)
    return frame.reset_index(drop=True)


def _arrow(path: str) -> "pyarrow.Table":
    """The file as PyArrow reads it, strictly: a row of another length is an error."""
    import pyarrow
    from pyarrow import csv, parquet

    if path.lower().endswith(".parquet"):
        return parquet.read_table(path)

    with Path(path).open("rb") as file:
        header = file.readline(1_000_000).decode("utf-8-sig")
    delimiter = max(",;\t", key=header.count)  # the first one of equals
    table = csv.read_csv(
        path,
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(null_values=_MISSING, strings_can_be_null=True),
    )
    for column in table.schema:
        if pyarrow.types.is_binary(column.type):
            raise ValueError(f"column {column.name!r} is not UTF-8")
    return table


# ---- columns -------------------------------------------------------------------------------------


def _check_columns(config: StudyConfig, split_column: str, known: list[str]) -> None:
    """Raise InputError for a named column that the table does not have, or that is named twice."""
    named = {
        "--target": targets_in(str(config.target), known),
        "--ignore": names_in(config.ignore),
        "--numeric": names_in(config.numeric),
        "--categorical": names_in(config.categorical),
        "--split": [split_column] if split_column else [],
    }
    for option, columns in named.items():
        for column in columns:
            if column not in known:
                shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
                raise InputError(
                    f"{option} must name columns of {config.dataset}",
                    f"it has no {column!r}",
                    nearest(column, known, f"it has {shown}"),
                )
    for option, other in (("--numeric", "--categorical"), ("--target", "--ignore")):
        both = set(named[option]) & set(named[other])
        if both:
            raise InputError(
                f"a column must be named by one of {option} and {other}",
                f"{min(both)!r} is named by both",
                "leave one out",
            )


def _target(config: StudyConfig, frame: pd.DataFrame, path: str) -> pd.DataFrame:
    names = targets_in(str(config.target), frame.columns)
    for name in names:
        _check_complete(f"--target {name} must have a value in every row of {path}", frame[name])
    return frame[names]


def _check_complete(rule: str, values: "pd.Series[Any]") -> None:
    """Raise InputError, by this rule, if values are missing."""
    missing = int(values.isna().sum())
    if missing:
        found = f"{missing:,} of {len(values):,} are missing"
        raise InputError(rule, found, "leave these rows out")


def _check_alike(config: StudyConfig, frame: pd.DataFrame, test: pd.DataFrame) -> None:
    """Raise InputError if the test file has other columns, but for those to ignore."""
    ignored = names_in(config.ignore)
    expected, given = ([c for c in f.columns if c not in ignored] for f in (frame, test))
    for first, second, which in ((expected, given, "lacks"), (given, expected, "also has")):
        other = [name for name in first if name not in second]
        if other:
            raise InputError(
                f"--test {config.test} must have the columns of {config.dataset}",
                f"it {which} {other[0]!r}",
                nearest(other[0], second, "rename it, or name it in --ignore"),
            )


# ---- labels and parts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Which rows, by index, are for training, validation and test; and the labels of all.

    test: none where the test set has a file of its own. y: of every row, int32 labels or float32
    numbers; y_test: of the test set. names: the classes.
    """

    train: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]
    y: Labels
    y_test: Labels
    names: tuple[str, ...]


def divide(config: StudyConfig, table: Table, split: str, kind: str) -> Parts:
    """Split the rows as `held_out` does, for a task of this kind. Raises InputError."""
    how = split.partition(":")[0]
    column = None if table.split_column is None else _split_by(table.split_column, how)
    everything = np.arange(len(table.target))
    test = everything[:0]
    if table.test is None:
        words = as_words(table.target.iloc[:, 0])  # for a stratified split, of one column
        _, codes = np.unique(words.astype(str), return_inverse=True)
        size = len(words) - kept("--test-split", config.test_split, len(words), "test")
        held = _held_out(split, codes, size, (config.seed, 1), column)
        test, everything = np.flatnonzero(held), np.flatnonzero(~held)
    given = table.target.iloc[test] if table.test_target is None else table.test_target
    y, y_test, names = _targets(config, table.target, given, everything, kind)
    size = len(everything) - kept(
        "--validation-split", config.validation_split, len(everything), "validate"
    )
    chosen = None if column is None else column[everything]
    held = _held_out(split, y[everything], size, config.seed, chosen)
    return Parts(everything[~held], everything[held], test, y, y_test, names)


def _held_out(
    split: str, y: NDArray[Any], size: int, seed: Seed, column: NDArray[Any] | None
) -> NDArray[np.bool_]:
    """As `held_out`. Raises InputError if it leaves a part without rows."""
    held = held_out(split.partition(":")[0], y, size, seed, column)
    if held.all() or not held.any():
        raise InputError(
            f"--split {split} must leave groups to train, to validate and to test",
            "there are too few",
            "give another split, or a file of its own to --test",
        )
    return held


def _targets(
    config: StudyConfig,
    target: pd.DataFrame,
    tested: pd.DataFrame,
    training: NDArray[np.intp],
    kind: str,
) -> tuple[Labels, Labels, tuple[str, ...]]:
    """`target` and the target of the test set, as numbers; and the classes of the training rows,
    or the labels."""
    name = f"--target {config.target}"
    if kind == "multilabel":
        names = tuple(target.columns)
        y, y_test = labels_in(target), labels_in(tested)
        check_labels({name: y[training], f"{name} of the test set": y_test}, _refusal, names)
        return y, y_test, names
    column, other = target.iloc[:, 0], tested.iloc[:, 0]
    if not KINDS[kind].has_classes:
        y, y_test = numbers_in(column), numbers_in(other)
        check_numbers({name: y[training], f"{name} of the test set": y_test}, _refusal)
        return y, y_test, ()
    words, expected = as_words(column), as_words(other)
    names = class_names(words[training])
    check_classes(str(config.target), names, expected)
    return numbered(words, names), numbered(expected, names), names


def _split_by(values: "pd.Series[Any]", kind: str) -> NDArray[Any]:
    """The groups or times to split by."""
    if kind == "group":
        return as_words(values)
    _check_complete(f"--split time:{values.name} must have a time in every row", values)
    if pd.api.types.is_numeric_dtype(values):
        return np.asarray(values.to_numpy())
    try:
        return np.asarray(dates_of(values).to_numpy())
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--split time:{values.name} must name a column of numbers or dates (ISO 8601)",
            one_line(error),
            "name another one",
        ) from None


def _refusal(rule: str, found: str, _: str) -> InputError:
    return InputError(rule, f"has {found}", "check the column, or name another one")
