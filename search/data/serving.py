"""Rows of a table as the arrays that a model takes; and the model that MLflow serves.

A copy of this file is saved with every model of a table or of named classes, so that MLflow loads
and serves it without this package: it takes rows, a pandas DataFrame with the columns of the
signature, or examples, an array; and answers a class or labels and the probabilities, or a number.
Columns of rows may be missing, and so may values.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

PARTS: dict[str, Callable[[Any], Any]] = {
    "year": lambda dates: dates.dt.year,
    "month": lambda dates: dates.dt.month,
    "weekday": lambda dates: dates.dt.day_of_week,  # 0 is Monday
    "hour": lambda dates: dates.dt.hour,
}
SCHEMA, MODEL = "serving.json", "model.keras"
THRESHOLD = 0.5  # as in data.task, which a saved model does not have
Field = tuple[str, str | None]  # a column, or a part of the dates in it


def numbers_of(rows: pd.DataFrame, fields: Sequence[Field]) -> NDArray[np.float32]:
    """The numbers in `fields`, float32 of shape (rows, fields); NaN where there is none.

    Raises ValueError, in one line, for a value that is no number or no date.
    """
    columns = [_number(_values(rows, field), field[0]) for field in fields]
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), np.float32)


def words_of(rows: pd.DataFrame, fields: Sequence[Field]) -> NDArray[np.object_]:
    """The words in `fields`, str objects of shape (rows, fields); empty where there is none."""
    words = np.empty((len(rows), len(fields)), object)
    for index, field in enumerate(fields):
        words[:, index] = as_words(_values(rows, field))
    return words


def as_words(values: "pd.Series[Any]") -> NDArray[np.object_]:
    """Each value as a word, the same whether a file or JSON holds it: 3 and 3.0 are "3"."""
    codes, known = pd.factorize(values, use_na_sentinel=True)
    texts = np.array([*map(_word, known), ""], object)  # -1, the last one, is a missing value
    return np.asarray(texts[codes], object)


def dates_of(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Datetimes, or words in ISO 8601, those with a time zone in UTC. Raises ValueError."""
    read = pd.to_datetime(values, format="ISO8601", utc=True)
    return read.dt.tz_localize(None)


def _values(rows: pd.DataFrame, field: Field) -> "pd.Series[Any]":
    column, part = field
    if column not in rows:
        return pd.Series(np.nan, index=rows.index)
    values = rows[column]
    if part is None:
        return values
    try:
        return PARTS[part](dates_of(values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {column!r} must hold dates (ISO 8601), but {error}") from None


def _number(values: "pd.Series[Any]", column: str) -> NDArray[np.float32]:
    try:
        numbers = pd.to_numeric(values).to_numpy(float, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {column!r} must hold numbers, but {error}") from None
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    numbers[~np.isfinite(numbers)] = np.nan
    return np.asarray(numbers, np.float32)


def _word(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


# ---- the served model ----------------------------------------------------------------------------


class ServedModel:
    """A model as MLflow calls it."""

    def __init__(self, model: Any, schema: dict[str, Any]) -> None:
        self._model = model
        self._schema = schema

    def predict(self, given: Any, params: Any = None) -> pd.DataFrame:
        """For each row or example its class and the probability of every class, or its number.

        Of labels, whose probabilities are independent: a list of those above 0.5.

        given: rows of a table, a DataFrame; or examples, an array. Raises ValueError, in one line,
        for a value in a row that is no number or no date.
        """
        is_table = "numbers" in self._schema
        inputs = self._rows(given) if is_table else np.asarray(given, np.float32)
        answers = np.asarray(self._model.predict(inputs, verbose=0))
        index = given.index if is_table else None
        names = self._schema["classes"]
        if names is None:
            return pd.DataFrame({"prediction": answers[:, 0]}, index=index)
        if self._schema.get("multilabel"):
            chosen = [[names[i] for i in np.flatnonzero(row > THRESHOLD)] for row in answers]
        else:
            chosen = np.array(names, object)[answers.argmax(axis=1)]
        probabilities = {f"probability_{name}": answers[:, i] for i, name in enumerate(names)}
        return pd.DataFrame({"prediction": chosen, **probabilities}, index=index)

    def _rows(self, rows: pd.DataFrame) -> dict[str, Any]:
        numbers, words = ([tuple(f) for f in self._schema[key]] for key in ("numbers", "words"))
        return model_inputs(numbers_of(rows, numbers), words_of(rows, words))


def model_inputs(numbers: NDArray[np.float32], words: NDArray[np.object_]) -> dict[str, Any]:
    """The arrays as the Keras model takes them: those that have columns, by name."""
    inputs: dict[str, Any] = {}
    if numbers.shape[1]:
        inputs["numbers"] = numbers
    if words.shape[1]:
        import tensorflow as tf

        inputs["words"] = tf.constant(words.tolist(), tf.string, shape=words.shape)
    return inputs


def _load_pyfunc(path: str) -> ServedModel:
    """Called by MLflow with the folder that holds MODEL and SCHEMA."""
    import keras

    schema = json.loads((Path(path) / SCHEMA).read_text(encoding="utf-8"))
    return ServedModel(keras.saving.load_model(Path(path) / MODEL), schema)
