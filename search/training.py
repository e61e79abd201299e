"""The hot loop: a whole epoch inside one TensorFlow graph, under Keras' own `fit`.

A Python loop over 422 small steps spends much of an epoch between the steps. Here one `train_step`
is a whole epoch: it loops over the mini-batches in the graph, so `fit`, its metrics and every
callback still work. Networks of equal architecture share one compiled graph: the training set,
learning rate and dropout rate are variables of it, and so are the seeds.
"""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from search.data import UINT8_SCALE, Images, Labels

_VALIDATION_BATCH = 2_000
_COMPILED_GRAPHS = 8  # architectures kept; a graph and its variables take a few MB
_CLEAR_EVERY = 10  # trainings

Examples = tuple[Images, Labels]
History = dict[str, list[float]]


class TrainingDiverged(Exception):
    """A loss, a metric or a weight became NaN or infinite."""


def one_thread_each(trainings: int) -> None:
    """Give TensorFlow a thread for each of so many trainings at once, in as many threads.

    Has no effect on TensorFlow once it has run.
    """
    global _alone
    _alone = trainings == 1
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(trainings)


def train(
    model: keras.Sequential,
    examples: Examples,
    *,
    validation: Examples | None = None,
    epochs: int,
    batch_size: int,
    seed: int,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> History:
    """Train `model` in place, as `fit` would, and return the history: a list an epoch a metric.

    examples, validation: x of shape (n, features), uint8 (scaled here) or float32; y of shape (n,).
    seed: decides the order of the examples in every epoch and the dropout masks.
    Raises TrainingDiverged, and whatever a callback raises.
    """
    _clear_now_and_then()
    graph = _graph_for(model, examples[0].dtype, batch_size)
    graph.take(model, examples, seed)
    try:
        history = graph.fit(
            tf.data.Dataset.from_tensors(0),  # one step an epoch; `take` brought the examples
            epochs=epochs,
            shuffle=False,
            verbose=0,
            validation_data=None if validation is None else _batched(*validation),
            callbacks=[_StopAtNaN(), *callbacks],
        )
    finally:
        graph.give(model)
    return {name: [float(value) for value in values] for name, values in history.history.items()}


def evaluate(model: keras.Model, examples: Examples) -> dict[str, float]:
    """The loss and the metrics of `model` on `examples`."""
    batches = _batched(*examples).map(lambda x, y: (_scaled(x), y))
    logs = model.evaluate(batches, verbose=0, return_dict=True)
    return {name: float(value) for name, value in logs.items()}


def epoch_order(examples: int, seed: int, epoch: int) -> Any:
    """The order in which epoch `epoch` (from 0) visits the examples: an int32 permutation."""
    return tf.random.experimental.stateless_shuffle(tf.range(examples), seed=[seed, epoch])


class EpochInGraph(keras.Sequential):  # type: ignore[misc]
    """A network whose `train_step` runs one epoch on the training set that it has taken."""

    batch_size: int

    def prepare(self, dtype: Any, batch_size: int) -> None:
        """Add what an epoch needs: examples, the size of a step, the seed, the epoch's number."""
        self.batch_size = batch_size
        empty = np.zeros((0, *self.input_shape[1:]), dtype)
        self._x = tf.Variable(empty, shape=(None, *self.input_shape[1:]))
        self._y = tf.Variable(np.zeros(0, np.int32), shape=(None,))
        self._seed = tf.Variable(0, dtype=tf.int32)
        self._epoch = tf.Variable(0, dtype=tf.int32)

    def take(self, model: keras.Sequential, examples: Examples, seed: int) -> None:
        """Become `model`: its weights and rates, a fresh optimizer, its randomness from `seed`."""
        self._x.assign(examples[0])
        self._y.assign(examples[1])
        for mine, theirs in zip(self.layers, model.layers, strict=True):
            if isinstance(mine, _Dropout):
                mine.set(theirs.rate, seed)
            else:
                for target, source in zip(mine.weights, theirs.weights, strict=True):
                    target.assign(source)
        for variable in self.optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self.optimizer.learning_rate.assign(model.optimizer.learning_rate)
        self._seed.assign(seed)
        self._epoch.assign(0)

    def give(self, model: keras.Sequential) -> None:
        """Hand what was learnt back to `model`, its optimizer's state included."""
        self._x.assign(self._x[:0])
        self._y.assign(self._y[:0])
        for mine, theirs in zip(self.layers, model.layers, strict=True):
            if not isinstance(mine, _Dropout):
                for source, target in zip(mine.weights, theirs.weights, strict=True):
                    target.assign(source)
        model.optimizer.build(model.trainable_variables)
        for source, target in zip(self.optimizer.variables, model.optimizer.variables, strict=True):
            target.assign(source)

    def train_step(self, data: Any) -> Any:
        """One epoch; `data` only counts it."""
        x, y = self._x.read_value(), self._y.read_value()
        examples = tf.shape(y)[0]
        order = epoch_order(examples, self._seed, self._epoch)
        self._epoch.assign_add(1)
        step = super().train_step

        def train_on(first: Any) -> Any:
            batch = order[first : first + self.batch_size]  # the last one may be smaller
            step((_scaled(tf.gather(x, batch)), tf.gather(y, batch)))
            return first + self.batch_size

        tf.while_loop(
            lambda first: first < examples,
            lambda first: (train_on(first),),
            (tf.constant(0),),
            parallel_iterations=1,
        )
        return self.get_metrics_result()

    def test_step(self, data: Any) -> Any:
        """One validation batch."""
        x, y = data
        return super().test_step((_scaled(x), y))


class FusedAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Keras' Adam, a variable's whole update in TensorFlow's one kernel for it.

    The same numbers (Kingma and Ba 2015) in a third of the time.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update `variable`, its momentum and its velocity."""
        dtype = variable.dtype
        step = tf.cast(self.iterations + 1, dtype)
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=_handle(variable),
            m=_handle(self._momentums[index]),
            v=_handle(self._velocities[index]),
            beta1_power=tf.pow(tf.constant(self.beta_1, dtype), step),
            beta2_power=tf.pow(tf.constant(self.beta_2, dtype), step),
            lr=tf.cast(learning_rate, dtype),
            beta1=tf.constant(self.beta_1, dtype),
            beta2=tf.constant(self.beta_2, dtype),
            epsilon=tf.constant(self.epsilon, dtype),
            grad=gradient,
        )


def _handle(variable: Any) -> Any:
    """The resource behind a TensorFlow or a Keras variable."""
    return variable.handle if isinstance(variable, tf.Variable) else variable.value.handle


class _Dropout(keras.layers.Layer):  # type: ignore[misc]
    """Dropout (Srivastava et al. 2014) whose rate and seed are variables of a compiled graph.

    Keras' layer draws a float32 an activation and selects by it, a tenth of a step's time. Sixteen
    random bits an activation and a product take half as long; the rate is rounded to 1/65536.
    """

    def build(self, input_shape: Any) -> None:
        self._threshold = tf.Variable(0, dtype=tf.int32)
        self._state = tf.Variable([0, 0], dtype=tf.int32)

    def set(self, rate: float, seed: int) -> None:
        self._threshold.assign(min(round(rate * 2**16), 2**16 - 1))
        self._state.assign([seed, 0])

    def call(self, inputs: Any, training: bool = False) -> Any:
        if not training:
            return inputs
        seed = self._state.assign_add([0, 1])
        size = tf.size(inputs)
        words = tf.random.stateless_uniform(
            [(size + 1) // 2], seed=seed, minval=None, maxval=None, dtype=tf.int32
        )
        bits = tf.reshape(tf.bitcast(words, tf.uint16), [-1])[:size]
        kept = tf.reshape(bits, tf.shape(inputs)) >= tf.cast(self._threshold, tf.uint16)
        scale = 1 / (1 - tf.cast(self._threshold, tf.float32) / 2**16)
        return inputs * (tf.cast(kept, tf.float32) * scale)


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


class _OfThread(threading.local):
    """What no two threads may share: a graph holds the state of one training."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[str, EpochInGraph] = OrderedDict()
        self.trained = 0  # networks


_mine = _OfThread()
_alone = True  # no other thread of this process trains


def _clear_now_and_then() -> None:
    """TensorFlow keeps a kernel for every variable ever made, and Keras' networks are cycles that
    Python collects late: without this a worker grows by a megabyte a network of MNIST's size."""
    if _mine.trained % _CLEAR_EVERY == _CLEAR_EVERY - 1 and _alone:
        keras.backend.clear_session()  # of all threads, also of one that builds a network
    _mine.trained += 1


def _graph_for(model: keras.Sequential, dtype: Any, batch_size: int) -> EpochInGraph:
    """The compiled graph of `model`'s architecture, the least recently used one dropped."""
    key = _architecture(model, dtype, batch_size)
    graphs = _mine.graphs
    if key not in graphs:
        while len(graphs) >= _COMPILED_GRAPHS:
            graphs.popitem(last=False)
        graphs[key] = _compile(model, dtype, batch_size)
    graphs.move_to_end(key)
    return graphs[key]


def _architecture(model: keras.Sequential, dtype: Any, batch_size: int) -> str:
    def without_numbers(config: Any) -> Any:
        if isinstance(config, dict):
            return {
                key: without_numbers(value)
                for key, value in config.items()
                if key not in ("rate", "seed")
            }
        return [without_numbers(item) for item in config] if isinstance(config, list) else config

    return json.dumps(
        [batch_size, np.dtype(dtype).name, without_numbers(model.get_config())], default=str
    )


def _compile(model: keras.Sequential, dtype: Any, batch_size: int) -> EpochInGraph:
    layers = [
        _Dropout(name=layer.name)
        if isinstance(layer, keras.layers.Dropout)
        else layer.__class__.from_config(layer.get_config())
        for layer in model.layers
    ]
    graph = EpochInGraph([keras.Input(model.input_shape[1:]), *layers])
    graph.prepare(dtype, batch_size)
    graph.compile(optimizer=FusedAdam(), loss=model.loss, metrics=["accuracy"], jit_compile=False)
    # Variables that the first trace of an epoch made would cost a second one.
    graph.optimizer.build(graph.trainable_variables)
    graph.compute_metrics(None, tf.zeros(1, tf.int32), graph(tf.zeros((1, *graph.input_shape[1:]))))
    return graph


def _batched(x: Images, y: Labels) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(_VALIDATION_BATCH)


def _scaled(x: Any) -> Any:
    """What `data.scaled` does, in the graph."""
    return tf.cast(x, tf.float32) * UINT8_SCALE if x.dtype == tf.uint8 else x
