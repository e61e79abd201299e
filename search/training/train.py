"""Train and evaluate: Keras' own `fit`, with a whole epoch inside one TensorFlow graph.

A Python loop over 422 small steps spends much of an epoch between the steps. In `epoch`, one
`train_step` is a whole epoch that loops over the mini-batches in the graph, so `fit`, its metrics
and all callbacks still work.
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
from numpy.typing import NDArray

from search.data.function import Pipeline, seed_generators
from search.data.sources import Images, Labels
from search.task import DEFAULT_OBJECTIVE, Metric
from search.training.epoch import VALIDATION_BATCH, EpochInGraph, scaled, tensor_of
from search.training.fused import Examples, Plan, TrainingSet, has_variable_rate, plan_of, resizable
from search.training.metrics import measure
from search.training.network import is_of_layers

_CLEAR_EVERY = 10  # trainings
_PLATEAU = {"monitor": "val_loss", "patience": 2, "factor": 0.3}  # Keras' suit 100s of epochs
History = dict[str, list[float]]


class TrainingDiverged(Exception):
    """A loss, a metric or a weight became NaN or infinite."""


def use_one_thread_each(trainings: int) -> None:
    """Let TensorFlow use one thread for each of `trainings` concurrent trainings.

    It allocates a GPU's memory only as needed. No effect once TensorFlow has started.
    """
    global _alone
    _alone = trainings == 1
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(trainings)
        for device in tf.config.list_physical_devices("GPU"):  # other workers may use it as well
            tf.config.experimental.set_memory_growth(device, True)


def gpu_name() -> str | None:
    """The name of the GPU that this process trains on; None if TensorFlow finds none."""
    found = tf.config.list_physical_devices("GPU")
    if not found:
        return None
    details = tf.config.experimental.get_device_details(found[0])
    return str(details.get("device_name", found[0].name))


def train(
    model: keras.Sequential,
    examples: TrainingSet,
    hp: Mapping[str, Any],
    *,
    epochs: int,
    seed: int,
    shape: tuple[int, ...] = (),
    validation: Examples | None = None,
    objective: Metric = DEFAULT_OBJECTIVE,
    class_weights: NDArray[np.float32] | None = None,
    only: int | None = None,
    rates: Sequence[float] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> History:
    """Train `model` in place, as `fit` would, and return the history: for each metric, its epochs.

    examples, validation: x of shape (n, features), uint8 (scaled here) or float32; y of shape (n,)
    or (n, labels). Or of the examples a pipeline, read again in every epoch, whose order is its
    own. hp: a value for every hyperparameter of the training. shape: of one example, not flattened,
    for augmentation. seed: determines the order of the examples in every epoch, the dropout masks
    and the augmentation. Early stopping monitors the `objective` of `validation`, plateaus its
    loss; without it they are off.
    class_weights: of shape (classes,), the weight of an example in the training loss by its class.
    only: stop after this many of the `epochs`, which remain the length of a schedule.
    rates: the learning rate of every epoch, as set by the plateaus of an earlier training.
    Raises TrainingDiverged, and any exception of a callback.
    """
    _clear_regularly()
    graph = graph_for(model, plan_of(hp, examples, shape, weighs=class_weights is not None))
    batches = 0  # `take` sets the examples
    if isinstance(examples, Pipeline):
        batches = batches_of(examples, hp["batch_size"], seed, model.input_shape[-1])
    graph.take(model, examples, hp, seed, epochs, validation, class_weights)
    try:
        history = graph.fit(
            tf.data.Dataset.from_tensors(batches).repeat(),
            epochs=only or epochs,
            steps_per_epoch=1,
            shuffle=False,
            verbose=0,
            callbacks=[
                _StopAtNaN(),
                *_monitors(hp, objective, validation is not None),
                *([keras.callbacks.LearningRateScheduler(lambda e, _: rates[e])] if rates else []),
                *callbacks,
            ],
        )
    finally:
        graph.give(model)
    return {name: [float(value) for value in values] for name, values in history.history.items()}


def _monitors(
    hp: Mapping[str, Any], objective: Metric, validated: bool
) -> list[keras.callbacks.Callback]:
    """The callbacks that monitor the validation set; they run before those that record an epoch."""
    callbacks: list[keras.callbacks.Callback] = []
    if validated and hp["schedule"] == "plateau":
        callbacks.append(keras.callbacks.ReduceLROnPlateau(**_PLATEAU))
    if validated and hp["early_stopping"]:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                objective.name,
                mode="max" if objective.maximize else "min",
                patience=hp["early_stopping"],
                restore_best_weights=True,
            )
        )
    return callbacks


def evaluate(
    model: keras.Model, examples: tuple[Any, Labels], *, keep: bool = True
) -> tuple[NDArray[np.float32] | None, dict[str, float]]:
    """What `model` gives for `examples` of classes, if it is to be kept; its loss and its accuracy.

    examples: x as the model takes it, but flat uint8 is scaled; y of shape (n,).
    """
    batches = _batched(*examples)
    if getattr(examples[0], "dtype", None) == np.uint8 and examples[0].ndim == 2:
        batches = batches.map(lambda x, y: (scaled(x), y))
    loss, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()
    in_graph = tf.function(
        lambda x, y: measure(model, x, y, (loss, accuracy)), batches.element_spec, autograph=False
    )
    kept = []
    for x, y in batches:
        outputs = in_graph(x, y)
        if keep:
            kept.append(outputs.numpy())
    found = {"loss": float(loss.result()), "accuracy": float(accuracy.result())}
    return np.concatenate(kept) if keep else None, found


class _StopAtNaN(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        for name, value in (logs or {}).items():
            if not np.isfinite(value):
                raise TrainingDiverged(f"{name} became {value} in epoch {epoch}")
        # Keras clips probabilities, so a loss can stay finite although a weight did not.
        for total in self.model.sums_of_weights.numpy():
            if not np.isfinite(total):
                raise TrainingDiverged(f"weights became {total} in epoch {epoch}")


_alone = True  # no other thread of this process trains
_trained = 0  # networks


def _clear_regularly() -> None:
    """TensorFlow keeps a kernel for every variable, and Keras' networks are reference cycles that
    Python collects late: without this a worker grows by a megabyte per network of MNIST's size."""
    global _trained
    if _trained % _CLEAR_EVERY == _CLEAR_EVERY - 1 and _alone:
        keras.backend.clear_session()  # of all threads, even one that is building a network
    _trained += 1


def _batched(x: Images, y: Labels) -> tf.data.Dataset:
    values = x if isinstance(x, dict) else tensor_of(x)  # a dict: rows of a table
    return tf.data.Dataset.from_tensor_slices((values, y)).batch(VALIDATION_BATCH)


# ---- pipelines -----------------------------------------------------------------------------------


def batches_of(pipeline: Pipeline, batch_size: int, seed: int, features: int) -> tf.data.Dataset:
    """A new dataset of its batches, x of shape (n, features), y of shape (n,) or (n, labels).

    batch_size: for a pipeline without batches. seed: of what NumPy and Python draw while it is
    read, and of the order of the examples `more` and where they come.
    """
    size, scale = pipeline.size(batch_size), pipeline.normalization
    shape = pipeline.task.target_shape

    def prepared(x: Any, y: Any) -> tuple[Any, Any]:
        """As the arrays of a `Dataset` are, to the same digits."""
        x, y = tf.cast(tf.reshape(x, [-1, features]), pipeline.dtype), tf.reshape(y, [-1, *shape])
        if scale is not None:
            x = (x - scale.mean) / np.sqrt(scale.variance)
        if not pipeline.task.is_number:
            return x, tf.cast(y, tf.int32 if pipeline.task.classes else tf.float32)
        y = tf.cast(tf.cast(y, tf.float32), tf.float64)
        return x, tf.cast((y - pipeline.task.mean) / pipeline.task.deviation, tf.float32)

    found = pipeline.call()
    seed_generators(seed)
    found = (found if pipeline.batch_size else found.batch(size)).map(prepared)
    if pipeline.more is not None:
        more = tf.data.Dataset.from_tensor_slices(pipeline.more)
        more = more.shuffle(len(pipeline.more[1]), seed).batch(size)
        found = tf.data.Dataset.sample_from_datasets(
            [found, more], [float(count) for count in pipeline.steps(size)], seed=seed
        )
    return found


# ---- the cache of graphs -------------------------------------------------------------------------

_GRAPHS = 8  # cached per thread; a graph and its variables take a few MB


class _OfThread(threading.local):
    """The cache of one thread: a graph holds the state of one training."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[str, EpochInGraph] = OrderedDict()


_of_thread = _OfThread()


def graph_for(model: keras.Sequential, plan: Plan) -> EpochInGraph:
    """The cached graph for networks like `model`; drops the least recently used one."""
    source = getattr(model, "source", "")  # of a custom model, whose layers' code may change
    key = source + _architecture(model) + json.dumps([astuple(plan), astuple(model.task)])
    graphs = _of_thread.graphs
    if key not in graphs:
        while len(graphs) >= _GRAPHS:
            graphs.popitem(last=False)
        graphs[key] = EpochInGraph(model, plan)
    graphs.move_to_end(key)
    return graphs[key]


_REFERENCES = ("keras_history", "input_layers", "output_layers")  # to layers, by their names


def _architecture(model: keras.Sequential) -> str:
    """The configuration without seeds, names, variable rates and sizes: equal if they can share."""
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
    hidden = resizable(model)
    for entry in config["layers"]:
        if (name := entry["config"].get("name")) in hidden:
            del entry["build_config"]  # the number of inputs
            if hidden[name]:
                del entry["config"]["units"]
    return json.dumps(alike(config), default=str)


def _leave_out_rates(config: dict[str, Any], network: keras.Model) -> None:
    """Remove the dropout rates that are variables of a graph from the network's configuration."""
    layers = {layer.name: layer for layer in network.layers}
    for entry in config.get("layers", ()):
        layer = layers.get(entry["config"].get("name"))
        if is_of_layers(layer):
            _leave_out_rates(entry["config"], layer)
        elif has_variable_rate(layer):
            del entry["config"]["rate"]
