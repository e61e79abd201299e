"""Keras layers for the rows of a table: embeddings, and the encoding as part of a saved model."""

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

if TYPE_CHECKING:
    from search.data.columns import Columns

_MOST = 50  # dimensions of an embedding


def embeddings(features: int, vocabularies: tuple[int, ...], seed: int) -> keras.Model:
    """A layer that replaces the last features, which are indices, by trainable embeddings.

    vocabularies: the number of different indices of each. The dimension is 1.6 n^0.56 for n
    indices, fastai's rule of thumb (Howard and Gugger 2020), at most 50.
    """
    row = keras.Input((features,), name="row")
    first = features - len(vocabularies)
    parts = [row[:, :first]] if first else []
    for index, count in enumerate(vocabularies):
        layer = keras.layers.Embedding(
            count,
            min(_MOST, round(1.6 * count**0.56)),
            embeddings_initializer=keras.initializers.RandomUniform(-0.05, 0.05, seed + index),
            name=f"embedding_{index + 1}",
        )
        parts.append(layer(row[:, first + index]))
    joined = keras.layers.Concatenate(name="joined")(parts) if len(parts) > 1 else parts[0]
    return keras.Model(row, joined, name="embeddings")


def encoding(columns: "Columns") -> tuple[dict[str, Any], Any]:
    """The inputs of a model of raw rows, by name, and their encoding, as `Columns.encode` does it.

    Inputs: numbers, float32 of shape (n, numbers), NaN where missing; words, strings of shape (n,
    words). Either is left out if there is none.
    """
    inputs: dict[str, Any] = {}
    parts: list[Any] = []
    if columns.numbers:
        inputs["numbers"] = numbers = keras.Input((len(columns.numbers),), name="numbers")
        missing = keras.ops.isnan(numbers)
        layer = keras.layers.Normalization(name="normalization")
        layer.build((None, len(columns.numbers)))
        layer.adapt_mean.assign(columns.mean)
        layer.adapt_variance.assign(columns.variance)
        layer.finalize_state()
        parts.append(layer(keras.ops.where(missing, columns.median, numbers)))
        if columns.indicated:
            chosen = keras.ops.take(missing, np.array(columns.indicated), axis=1)
            parts.append(keras.ops.cast(chosen, "float32"))
    if columns.words:
        inputs["words"] = words = keras.Input((len(columns.words),), dtype="string", name="words")
        for index in (*columns.one_hot, *columns.embedded):
            parts.append(_looked_up(columns, index, words[:, index]))
    joined = keras.layers.Concatenate(name="encoded")(parts) if len(parts) > 1 else parts[0]
    return inputs, joined


def _looked_up(columns: "Columns", index: int, words: Any) -> Any:
    one_hot = index in columns.one_hot
    lookup = keras.layers.StringLookup(
        vocabulary=list(columns.vocabularies[index]),
        mask_token=None,
        output_mode="one_hot" if one_hot else "int",
        name=f"lookup_{index + 1}",
    )
    if one_hot:
        return lookup(words)
    return keras.ops.cast(keras.ops.expand_dims(lookup(words), -1), "float32")
