"""A network whose `train_step` is a whole epoch, in one graph that similar networks share.

Learning rate, dropout rate, weight decay, label smoothing, class weights, augmentation strength,
training set, batch size, seeds and the number of hidden units are variables of the graph, so that
only a change of the graph itself requires a new one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from search.data.function import Pipeline
from search.data.preparation import UINT8_SCALE
from search.data.sources import Images
from search.training import augmentation
from search.training.fused import (
    SCHEDULES,
    Dropout,
    Examples,
    Plan,
    TrainingSet,
    batch_size_of,
    clone,
    fused,
    of_any_shape,
)
from search.training.metrics import compiled_metric, measure, reset, results, validation_metrics
from search.training.network import decay_weights, is_of_layers

VALIDATION_BATCH = 2_000  # examples
_ALIGNED = 64  # bytes, of TensorFlow's own memory; its kernels end the process for less
_OTHER_STREAM = 0x2545F491  # so that augmentation and dropout draw different numbers


class EpochInGraph(keras.Model):  # type: ignore[misc]
    """A network like `model`, whose training step is an epoch on the training set it has taken."""

    train_function: Any

    def __init__(self, model: keras.Sequential, plan: Plan) -> None:
        super().__init__()
        self.network = clone(model)
        self._plan = plan
        self._held_out = 0  # validation examples
        self._of_validation = validation_metrics(model.task)
        shape = model.input_shape[1:]
        self._x = tf.Variable(np.zeros((0, *shape), plan.dtype), shape=(None, *shape))
        labels = np.int32 if model.task.classes else np.float32
        target = model.task.target_shape
        self._y = tf.Variable(np.zeros((0, *target), labels), shape=(None, *target))
        self._validation_x, self._validation_y = (
            tf.Variable(empty, shape=empty.shape) for empty in (self._x, self._y)
        )
        self._weights = tf.Variable(np.ones(model.task.classes if plan.weighs else 0, np.float32))
        self._seed, self._epoch, self._steps, self._batch_size = (
            tf.Variable(0, dtype=tf.int32) for _ in range(4)
        )
        self._rate, self._decay, self._smoothing, self._strength = (
            tf.Variable(0.0) for _ in range(4)
        )
        optimizer = fused(model.optimizer)
        if plan.decays:
            decay_weights(optimizer, self._decay)
        metrics = [compiled_metric(model.task)]
        self.compile(optimizer, model.loss, metrics=metrics, jit_compile=False)
        # Variables created during the first trace of an epoch would require a second trace.
        outputs = self(tf.zeros((1, *shape)))
        with tf.variable_creator_scope(of_any_shape):
            optimizer.build(self.trainable_variables)
        self.compute_metrics(None, tf.zeros((1, *target), labels), outputs)
        self.sums_of_weights = tf.Variable(np.zeros(len(self.trainable_variables), np.float32))
        # All start as zeros except scalars such as Nadam's product of momentums.
        self._fresh = [0 if len(v.shape) else float(v.numpy()) for v in optimizer.variables]

    def call(self, x: Any, training: bool = False) -> Any:
        """Probabilities, or standardized numbers."""
        return self.network(x, training=training)

    def take(
        self,
        model: keras.Sequential,
        examples: TrainingSet,
        hp: Mapping[str, Any],
        seed: int,
        epochs: int,
        validation: Examples | None = None,
        class_weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Take over the weights and rates of `model`, with a new optimizer state and this seed.

        epochs: the length of a schedule. validation: what is measured after every epoch.
        class_weights: of shape (classes,), if the plan `weighs`.
        """
        if class_weights is not None:
            self._weights.assign(class_weights)
        size = batch_size_of(hp, examples)
        self._batch_size.assign(size)
        if isinstance(examples, Pipeline):
            steps = sum(examples.steps(size))
        else:
            self._x.assign(tensor_of(examples[0]))
            self._y.assign(examples[1])
            steps = -(-len(examples[0]) // size)
        self._held_out = 0 if validation is None else len(validation[1])
        if validation is not None:
            self._validation_x.assign(tensor_of(validation[0]))
            self._validation_y.assign(validation[1])
        dropouts = 0
        for own, theirs in zip(_leaves(self.network), _leaves(model), strict=True):
            if isinstance(own, Dropout):
                own.set(theirs.rate, seed, dropouts)
                dropouts += 1
            else:
                _assign(theirs.variables, own.variables)
        model.optimizer.build(model.trainable_variables)
        states = zip(self.optimizer.variables, model.optimizer.variables, self._fresh, strict=True)
        for own, theirs, value in states:
            own.value.assign(tf.fill(theirs.shape, tf.cast(value, own.dtype)))
        self.optimizer.learning_rate.assign(model.optimizer.learning_rate)
        self._rate.assign(model.optimizer.learning_rate)
        self._decay.assign(hp["weight_decay"])
        self._smoothing.assign(hp["label_smoothing"])
        self._strength.assign(hp.get("augmentation_strength", 0))
        self._seed.assign(seed)
        self._epoch.assign(0)
        self._steps.assign(steps * epochs)

    def give(self, model: keras.Sequential) -> None:
        """Copy the trained weights and the optimizer's state back to `model`.

        Its learning rate is the original one, so that it can be trained further.
        """
        for examples in (self._x, self._y, self._validation_x, self._validation_y):
            examples.assign(examples[:0])
        for own, theirs in zip(_leaves(self.network), _leaves(model), strict=True):
            if not isinstance(own, Dropout):
                _assign(own.variables, theirs.variables)
        _assign(self.optimizer.variables, model.optimizer.variables)
        model.optimizer.learning_rate.assign(self._rate)

    def make_train_function(self, force: bool = False) -> None:
        """Make what `fit` calls for a step, which is an epoch and its validation."""
        if self.train_function is not None and not force:
            return
        train = tf.function(lambda iterator: self.train_step(next(iterator)), autograph=False)
        validate = tf.function(self._validate, autograph=False)

        def epoch(iterator: Any) -> dict[str, Any]:
            logs: dict[str, Any] = train(iterator)
            for first in range(0, self._held_out, VALIDATION_BATCH):
                measured = validate(tf.constant(first))
                logs |= {f"val_{name}": value for name, value in measured.items()}
            return logs

        self.train_function = epoch

    def train_step(self, data: Any) -> dict[str, Any]:
        """One epoch: of a pipeline, over the batches in `data`, which is ignored otherwise."""
        counted = [metric for metric in self.metrics if metric is not self._of_validation]
        reset(counted)
        if self._plan.streams:
            self._train_on_all(iter(data))
        else:
            self._train_on_examples()
        self.sums_of_weights.assign(
            [tf.cast(tf.reduce_sum(weight), tf.float32) for weight in self.trainable_variables]
        )
        found = results(counted)
        reset(self.metrics)
        return found

    def _train_on_examples(self) -> None:
        x, y = self._x.read_value(), self._y.read_value()
        examples = tf.shape(y)[0]
        order = epoch_order(examples, self._seed, self._epoch)
        self._epoch.assign_add(1)
        size = self._plan.batch_size or self._batch_size.read_value()

        def train_on(first: Any) -> Any:
            batch = whole = order[first : first + size]  # the last one may be smaller
            if self._plan.augmentation is not None:
                whole = tf.gather(order, tf.range(first, first + size) % examples)
            self._train_on(tf.gather(x, whole), tf.gather(y, batch))
            return first + size

        tf.while_loop(
            lambda first: first < examples,
            lambda first: (train_on(first),),
            (tf.constant(0),),
            parallel_iterations=1,
        )

    def _train_on_all(self, batches: Any) -> None:
        """One step on every batch of an iterator over a tf.data.Dataset."""

        def train_on(batch: Any) -> Any:
            x, y = batch.get_value()
            if self._plan.augmentation is not None:
                x = tf.gather(x, tf.range(self._plan.batch_size) % tf.size(y))
            self._train_on(x, y)
            return (batches.get_next_as_optional(),)

        first = batches.get_next_as_optional()
        tf.while_loop(lambda batch: batch.has_value(), train_on, (first,), parallel_iterations=1)

    def _train_on(self, x: Any, y: Any) -> None:
        """One step on a batch; for augmentation x is filled up to the size of a whole one."""
        if self._plan.schedule is not None:
            done = tf.cast(self.optimizer.iterations, tf.float32)
            share = done / tf.cast(self._steps, tf.float32)
            factor = SCHEDULES[self._plan.schedule](share)
            self.optimizer.learning_rate.assign(self._rate * factor)
        x = scaled(x)
        if self._plan.augmentation is not None:
            x = self._augmented(x)[: tf.size(y)]
        weights = (tf.gather(self._weights, y),) if self._plan.weighs else ()
        super().train_step((x, y, *weights))

    def _validate(self, first: Any) -> dict[str, Any]:
        """Validate on the batch from the example `first`; returns the metrics so far."""
        batch = slice(first, first + VALIDATION_BATCH)
        x, y = scaled(self._validation_x[batch]), self._validation_y[batch]
        measure(self, x, y, self.metrics)
        return results(self.metrics)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the weights, as Keras does for early stopping, also where the units are others."""
        _assign(weights, self.weights)

    def reset_metrics(self) -> None:
        """Nothing to do: the graph does it."""

    def get_metrics_result(self) -> dict[str, Any]:
        """Nothing: Keras asks after every batch, and `train_step` returns those of the epoch."""
        return {}

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss, in training with label smoothing (Szegedy et al. 2016) if there is any.

        Validation and test losses use the original labels, so that they can be compared.
        """
        if not training or not self._plan.smooths:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        classes = y_pred.shape[-1]
        labels = tf.one_hot(y, classes) * (1 - self._smoothing) + self._smoothing / classes
        losses = keras.losses.categorical_crossentropy(labels, y_pred)
        if sample_weight is not None:
            losses *= sample_weight
        return tf.reduce_mean(losses) + sum(self.losses)

    def _augmented(self, flat: Any) -> Any:
        images = tf.reshape(flat, [self._plan.batch_size, *(self._plan.shape or ())])
        seed = tf.stack([self._seed ^ _OTHER_STREAM, tf.cast(self.optimizer.iterations, tf.int32)])
        kind, strength = str(self._plan.augmentation), self._strength
        return tf.reshape(augmentation.augment(kind, images, strength, seed), tf.shape(flat))


def epoch_order(examples: int, seed: int, epoch: int) -> Any:
    """The order in which epoch `epoch` (from 0) visits the examples: an int32 permutation."""
    return tf.random.experimental.stateless_shuffle(tf.range(examples), seed=[seed, epoch])


def tensor_of(x: Images) -> Any:
    """`x` as a tensor in the same memory, where TensorFlow can use that; else a copy."""
    if x.flags.writeable and x.flags.c_contiguous and x.size and x.ctypes.data % _ALIGNED == 0:
        return tf.experimental.dlpack.from_dlpack(x.__dlpack__())
    return tf.constant(x)


def scaled(x: Any) -> Any:
    """The same as `data.dataset.scaled`, in the graph."""
    return tf.cast(x, tf.float32) * UINT8_SCALE if x.dtype == tf.uint8 else x


def _assign(sources: Any, targets: Any) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.value.assign(source)  # Keras would refuse another shape


def _leaves(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a network, including those of nested networks."""
    for layer in model.layers:
        if is_of_layers(layer):
            yield from _leaves(layer)
        else:
            yield layer
