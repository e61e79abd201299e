"""A network whose `train_step` is a whole epoch, in one graph that similar networks share.

Learning rate, dropout rate, weight decay, label smoothing, class weights, augmentation strength,
training set and seeds are variables of the graph, so that only a change of the graph itself
requires a new one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from search.data.function import Pipeline
from search.data.preparation import UINT8_SCALE
from search.data.sources import Images, Labels
from search.training import augmentation
from search.training.fused import SCHEDULES, Dropout, clone, fused
from search.training.metrics import compiled_metric, validation_metrics
from search.training.network import decay_weights, image_shape, is_of_layers

_ALIGNED = 64  # bytes, of TensorFlow's own memory; its kernels end the process for less
_OTHER_STREAM = 0x2545F491  # so that augmentation and dropout draw different numbers
Examples = tuple[Images, Labels]
TrainingSet = Examples | Pipeline


@dataclass(frozen=True)
class Plan:
    """Everything, beside the network, that changes the graph.

    dtype: of the examples; streams: whether each step gets its batch. decays, smooths, weighs:
    whether there is weight decay, label smoothing, weights of the classes.
    schedule: None if the learning rate is constant within an epoch. augmentation: None, or its kind
    for images of `shape`.
    """

    dtype: str
    streams: bool
    batch_size: int
    optimizer: str
    decays: bool
    smooths: bool
    weighs: bool
    schedule: str | None
    augmentation: str | None
    shape: tuple[int, ...] | None


def plan_of(
    hp: Mapping[str, Any], examples: TrainingSet, shape: tuple[int, ...], *, weighs: bool = False
) -> Plan:
    """The plan for training with the hyperparameters `hp` on `examples` of this shape."""
    distorted = hp["augmentation"] != "none"
    if streams := isinstance(examples, Pipeline):
        dtype, size = examples.dtype, examples.size(hp["batch_size"])
    else:
        dtype, size = examples[0].dtype.name, hp["batch_size"]
        if distorted:  # which draws as many random numbers as a batch has examples
            size = min(size, len(examples[0]))
    return Plan(
        dtype=dtype,
        streams=streams,
        batch_size=size,
        optimizer=hp["optimizer"],
        decays=hp["weight_decay"] > 0,
        smooths=hp["label_smoothing"] > 0,
        weighs=weighs,
        schedule=hp["schedule"] if hp["schedule"] in SCHEDULES else None,
        augmentation=hp["augmentation"] if distorted else None,
        shape=image_shape(shape) if distorted else None,
    )


class EpochInGraph(keras.Model):  # type: ignore[misc]
    """A network like `model`, whose training step is an epoch on the training set it has taken."""

    def __init__(self, model: keras.Sequential, plan: Plan) -> None:
        super().__init__()
        self.network = keras.models.clone_model(model, clone_function=clone, recursive=True)
        self._plan = plan
        self._validates = False  # true while the graph of a validation batch is traced
        self._of_validation = validation_metrics(model.task)
        shape = model.input_shape[1:]
        self._x = tf.Variable(np.zeros((0, *shape), plan.dtype), shape=(None, *shape))
        labels = np.int32 if model.task.classes else np.float32
        target = model.task.target_shape
        self._y = tf.Variable(np.zeros((0, *target), labels), shape=(None, *target))
        self._weights = tf.Variable(np.ones(model.task.classes if plan.weighs else 0, np.float32))
        self._seed, self._epoch, self._steps = (tf.Variable(0, dtype=tf.int32) for _ in range(3))
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
        optimizer.build(self.trainable_variables)
        self.compute_metrics(None, tf.zeros((1, *target), labels), outputs)
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
        class_weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Take over the weights and rates of `model`, with a new optimizer state and this seed.

        epochs: the length of a schedule. class_weights: of shape (classes,), if the plan `weighs`.
        """
        if class_weights is not None:
            self._weights.assign(class_weights)
        if isinstance(examples, Pipeline):
            steps = sum(examples.steps(self._plan.batch_size))
        else:
            self._x.assign(tensor_of(examples[0]))
            self._y.assign(examples[1])
            steps = -(-len(examples[0]) // self._plan.batch_size)
        dropouts = 0
        for own, theirs in zip(_leaves(self.network), _leaves(model), strict=True):
            if isinstance(own, Dropout):
                own.set(theirs.rate, seed, dropouts)
                dropouts += 1
            else:
                _assign(theirs.variables, own.variables)
        for variable, value in zip(self.optimizer.variables, self._fresh, strict=True):
            variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))
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
        self._x.assign(self._x[:0])
        self._y.assign(self._y[:0])
        for own, theirs in zip(_leaves(self.network), _leaves(model), strict=True):
            if not isinstance(own, Dropout):
                _assign(own.variables, theirs.variables)
        model.optimizer.build(model.trainable_variables)
        _assign(self.optimizer.variables, model.optimizer.variables)
        model.optimizer.learning_rate.assign(self._rate)

    def train_step(self, data: Any) -> Any:
        """One epoch: of a pipeline, over the batches in `data`, which is ignored otherwise."""
        if self._plan.streams:
            return self._train_on_all(iter(data))
        x, y = self._x.read_value(), self._y.read_value()
        examples = tf.shape(y)[0]
        order = epoch_order(examples, self._seed, self._epoch)
        self._epoch.assign_add(1)
        size = self._plan.batch_size

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
        return self.get_metrics_result()

    def _train_on_all(self, batches: Any) -> Any:
        """One step on every batch of an iterator over a tf.data.Dataset."""

        def train_on(batch: Any) -> Any:
            x, y = batch.get_value()
            if self._plan.augmentation is not None:
                x = tf.gather(x, tf.range(self._plan.batch_size) % tf.size(y))
            self._train_on(x, y)
            return (batches.get_next_as_optional(),)

        first = batches.get_next_as_optional()
        tf.while_loop(lambda batch: batch.has_value(), train_on, (first,), parallel_iterations=1)
        return self.get_metrics_result()

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

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Those of validation data only for them: in training, they would only be traced."""
        found: list[keras.metrics.Metric] = super().metrics
        return [m for m in found if self._validates or m is not self._of_validation]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As Keras; `fit` calls it after every epoch, with the validation data."""
        self._of_validation.reset_state()
        return super().evaluate(*args, **kwargs)

    def test_step(self, data: Any) -> Any:
        """One validation batch."""
        x, y = data
        self._validates = True
        try:
            return super().test_step((scaled(x), y))
        finally:
            self._validates = False

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The metrics so far; of validation data, all those of the task."""
        if self._validates:
            self._of_validation.update_state(y, y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)

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
        target.assign(source)


def _leaves(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a network, including those of nested networks."""
    for layer in model.layers:
        if is_of_layers(layer):
            yield from _leaves(layer)
        else:
            yield layer
