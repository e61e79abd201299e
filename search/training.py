"""The hot loop: a whole epoch inside one TensorFlow graph, under Keras' own `fit`.

A Python loop over 422 small steps spends much of an epoch between the steps. `graph` makes one
`train_step` of a whole epoch, which loops over the mini-batches in the graph, so `fit`, its metrics
and every callback still work.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from search.data import Images, Labels
from search.graph import Examples, graph_for, plan_of, scaled

_VALIDATION_BATCH = 2_000
_CLEAR_EVERY = 10  # trainings
_PLATEAU = {"monitor": "val_loss", "patience": 2, "factor": 0.3}  # Keras' are for 100s of epochs

History = dict[str, list[float]]


class TrainingDiverged(Exception):
    """A loss, a metric or a weight became NaN or infinite."""


def one_thread_each(trainings: int) -> None:
    """Give TensorFlow a thread for each of so many trainings at once, in as many threads.

    It takes a GPU's memory only as it needs it. Has no effect on TensorFlow once it has run.
    """
    global _alone
    _alone = trainings == 1
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(trainings)
        for device in tf.config.list_physical_devices("GPU"):  # other workers may use it, too
            tf.config.experimental.set_memory_growth(device, True)


def gpu() -> str | None:
    """The name of the GPU that this process trains on, None where TensorFlow sees none."""
    found = tf.config.list_physical_devices("GPU")
    if not found:
        return None
    details = tf.config.experimental.get_device_details(found[0])
    return str(details.get("device_name", found[0].name))


def train(
    model: keras.Sequential,
    examples: Examples,
    tried: Mapping[str, Any],
    *,
    epochs: int,
    seed: int,
    shape: tuple[int, ...] = (),
    validation: Examples | None = None,
    only: int | None = None,
    rates: Sequence[float] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> History:
    """Train `model` in place, as `fit` would, and return the history: a list an epoch a metric.

    examples, validation: x of shape (n, features), uint8 (scaled here) or float32; y of shape (n,).
    tried: a value for every hyperparameter of the training. shape: of one example, not flat, which
    augmentation needs. seed: decides the order of the examples in every epoch, the dropout masks
    and the augmentation. Early stopping and plateaus go by `validation`, and are off without it.
    only: end after so many epochs of the `epochs` over which a schedule goes.
    rates: the learning rate of every epoch, as an earlier training's plateaus made them.
    Raises TrainingDiverged, and whatever a callback raises.
    """
    _clear_now_and_then()
    graph = graph_for(model, plan_of(tried, examples, shape))
    graph.take(model, examples, tried, seed, epochs)
    try:
        history = graph.fit(
            tf.data.Dataset.from_tensors(0),  # one step an epoch; `take` brought the examples
            epochs=only or epochs,
            shuffle=False,
            verbose=0,
            validation_data=None if validation is None else _batched(*validation),
            callbacks=[
                _StopAtNaN(),
                *_by_validation(tried, validation is not None),
                *([keras.callbacks.LearningRateScheduler(lambda e, _: rates[e])] if rates else []),
                *callbacks,
            ],
        )
    finally:
        graph.give(model)
    return {name: [float(value) for value in values] for name, values in history.history.items()}


def _by_validation(tried: Mapping[str, Any], validated: bool) -> list[keras.callbacks.Callback]:
    """What watches the validation set: they come before those that record an epoch."""
    callbacks: list[keras.callbacks.Callback] = []
    if validated and tried["schedule"] == "plateau":
        callbacks.append(keras.callbacks.ReduceLROnPlateau(**_PLATEAU))
    if validated and tried["early_stopping"]:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                "val_accuracy",
                mode="max",
                patience=tried["early_stopping"],
                restore_best_weights=True,
            )
        )
    return callbacks


def evaluate(model: keras.Model, examples: Examples) -> dict[str, float]:
    """The loss and the metrics of `model` on `examples`."""
    batches = _batched(*examples).map(lambda x, y: (scaled(x), y))
    logs = model.evaluate(batches, verbose=0, return_dict=True)
    return {name: float(value) for name, value in logs.items()}


class _StopAtNaN(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        for name, value in (logs or {}).items():
            if not np.isfinite(value):
                raise TrainingDiverged(f"{name} became {value} in epoch {epoch}")
        # Keras clips probabilities, so that a loss can stay finite over weights that did not.
        for weight in self.model.trainable_weights:
            total = float(tf.reduce_sum(weight.value))
            if not np.isfinite(total):
                raise TrainingDiverged(f"weights became {total} in epoch {epoch}")


_alone = True  # no other thread of this process trains
_trained = 0  # networks


def _clear_now_and_then() -> None:
    """TensorFlow keeps a kernel for every variable ever made, and Keras' networks are cycles that
    Python collects late: without this a worker grows by a megabyte a network of MNIST's size."""
    global _trained
    if _trained % _CLEAR_EVERY == _CLEAR_EVERY - 1 and _alone:
        keras.backend.clear_session()  # of all threads, also of one that builds a network
    _trained += 1


def _batched(x: Images, y: Labels) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(_VALIDATION_BATCH)
