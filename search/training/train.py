"""The hot loop: a whole epoch inside one TensorFlow graph, under Keras' own `fit`.

A Python loop over 422 small steps spends much of an epoch between the steps. `graph` makes one
`train_step` of a whole epoch, which loops over the mini-batches in the graph, so `fit`, its metrics
and every callback still work.
"""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from search.data.dataset import Images, Labels
from search.training.epoch import EpochInGraph, Examples, Plan, has_variable_rate, plan_of, scaled
from search.training.network import is_of_layers

_VALIDATION_BATCH = 2_000
_CLEAR_EVERY = 10  # trainings
_PLATEAU = {"monitor": "val_loss", "patience": 2, "factor": 0.3}  # Keras' are for 100s of epochs
History = dict[str, list[float]]


class TrainingDiverged(Exception):
    """A loss, a metric or a weight became NaN or infinite."""


def use_one_thread_each(trainings: int) -> None:
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


def gpu_name() -> str | None:
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


_GRAPHS = 8  # kept; a graph and its variables take a few MB


# ---- graphs are kept -----------------------------------------------------------------------------


class _OfThread(threading.local):
    """What no two threads may share: a graph holds the state of one training."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[str, EpochInGraph] = OrderedDict()


_of_thread = _OfThread()


def graph_for(model: keras.Sequential, plan: Plan) -> EpochInGraph:
    """The graph for networks like `model`, the least recently used one dropped."""
    source = getattr(model, "source", "")  # of the user's own layers, whose code may change
    key = source + _architecture(model) + json.dumps(astuple(plan))
    graphs = _of_thread.graphs
    if key not in graphs:
        while len(graphs) >= _GRAPHS:
            graphs.popitem(last=False)
        graphs[key] = EpochInGraph(model, plan)
    graphs.move_to_end(key)
    return graphs[key]


_REFERENCES = ("keras_history", "input_layers", "output_layers")  # to layers, by their names


def _architecture(model: keras.Sequential) -> str:
    """What networks that can share a graph have alike: all but seeds, variable rates, names."""
    names: dict[str, str] = {}

    def alike(config: Any, key: str = "", kind: str = "") -> Any:
        if isinstance(config, dict):
            kind = config.get("class_name", kind)
            return {k: alike(v, k, kind) for k, v in config.items() if k != "seed"}
        if isinstance(config, list | tuple):
            return [alike(item, key, kind) for item in config]
        named = key in _REFERENCES or (key == "name" and kind != "DTypePolicy")
        if named and isinstance(config, str):
            return names.setdefault(config, f"#{len(names)}")
        return config

    config = model.get_config()
    _leave_out_rates(config, model)
    return json.dumps(alike(config), default=str)


def _leave_out_rates(config: dict[str, Any], network: keras.Model) -> None:
    """Take the dropout rates that are variables of a graph out of the network's configuration."""
    layers = {layer.name: layer for layer in network.layers}
    for entry in config.get("layers", ()):
        layer = layers.get(entry["config"].get("name"))
        if is_of_layers(layer):
            _leave_out_rates(entry["config"], layer)
        elif has_variable_rate(layer):
            del entry["config"]["rate"]
