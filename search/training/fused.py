"""Keras' Adam, dropout and dense layers with variable rates and sizes, and in faster kernels.

And the schedules, and the `Plan`, which says what is no variable and so requires another graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from search.data.function import Pipeline
from search.data.sources import Images, Labels
from search.training.network import image_shape

_STEP_BITS = 24  # of a dropout layer's counter: 16 million steps
Examples = tuple[Images, Labels]
TrainingSet = Examples | Pipeline


def _up_and_down(start: float, up: float) -> keras.optimizers.schedules.LearningRateSchedule:
    """From `start` times the learning rate up to it in a fraction `up` of the steps, then to 0."""
    return keras.optimizers.schedules.CosineDecay(
        start, decay_steps=1 - up, warmup_target=1.0, warmup_steps=up
    )


SCHEDULES = {
    "cosine": _up_and_down(0.0, up=0.05),  # Loshchilov and Hutter 2017, after a warm-up
    "one_cycle": _up_and_down(0.04, up=0.3),  # Smith 2018, the cycle of the learning rate alone
}


def fused(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """A new optimizer equal to `optimizer`, but without weight decay."""
    adam = isinstance(optimizer, keras.optimizers.Adam)  # or AdamW
    kind = FusedAdam if adam else type(optimizer)
    return kind.from_config({**optimizer.get_config(), "weight_decay": None})


class FusedAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Keras' Adam (Kingma and Ba 2015), with one TensorFlow kernel per variable.

    The same numbers in a third of the time.
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


class Dropout(keras.layers.Layer):  # type: ignore[misc]
    """Dropout (Srivastava et al. 2014) whose rate and seed are variables of a compiled graph.

    Keras' layer draws a float32 per activation and selects by it, a tenth of a step's time. Sixteen
    random bits per activation and a product take half as long; the rate is rounded to 1/65536.
    """

    def build(self, input_shape: Any) -> None:
        """Create the variables."""
        self._threshold = tf.Variable(0, dtype=tf.int32)
        self._state = tf.Variable([0, 0], dtype=tf.int32)

    def set(self, rate: float, seed: int, index: int) -> None:
        """Act as the dropout layer number `index`, from 0, of a network."""
        self._threshold.assign(min(round(rate * 2**16), 2**16 - 1))
        self._state.assign([seed, index << _STEP_BITS])

    def call(self, inputs: Any, training: bool = False) -> Any:
        """In training, `inputs` with some dropped and the others scaled up; else unchanged."""
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


class Dense(keras.layers.Dense):  # type: ignore[misc]
    """Keras' dense layer, but its variables take any number of inputs and, if hidden, of units."""

    def __init__(self, *, hidden: bool, **options: Any) -> None:
        super().__init__(**options)
        self._hidden = hidden

    def add_weight(self, shape: tuple[int, ...], **options: Any) -> Any:
        """Create the kernel or the bias."""
        known = (None, None if self._hidden else self.units)[-len(shape) :]
        with tf.variable_creator_scope(lambda make, **how: make(**{**how, "shape": known})):
            return super().add_weight(shape=shape, **options)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """What Keras computes where it knows the number of units, in the same operations."""
        if not self._hidden:
            return super().call(inputs)
        return self.activation(tf.nn.bias_add(tf.matmul(inputs, self.kernel), self.bias))


def of_any_shape(make: Any, **options: Any) -> Any:
    """For `tf.variable_creator_scope`: a variable that takes any shape of its rank."""
    value = options["initial_value"]
    value = value() if callable(value) else value
    return make(**{**options, "initial_value": value, "shape": [None] * len(value.shape)})


def clone(model: keras.Sequential) -> keras.Sequential:
    """A new network like `model`, with the layers above for those that they can replace."""
    hidden = resizable(model)

    def alike(layer: keras.layers.Layer) -> keras.layers.Layer:
        if has_variable_rate(layer):
            return Dropout(name=layer.name)
        if layer.name in hidden:
            return Dense.from_config({**layer.get_config(), "hidden": hidden[layer.name]})
        return layer.__class__.from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=alike, recursive=True)


def has_variable_rate(layer: Any) -> bool:
    """Whether it is a dropout layer whose rate can be a variable of the graph."""
    return type(layer) is keras.layers.Dropout and layer.noise_shape is None


def resizable(model: keras.Sequential) -> dict[str, bool]:
    """The dense layers of which a graph need not know the sizes, by name, and which are hidden.

    Those are the last ones of `model` with at most dropout between them; any other layer may depend
    on a size, and the output has to be known.
    """
    found: dict[str, bool] = {}
    for layer in reversed(model.layers):
        dense = type(layer) is keras.layers.Dense and layer.use_bias
        if dense and (not found or layer.units > 1):  # Keras adds a single bias in another way
            found[layer.name] = bool(found)
        elif not has_variable_rate(layer):
            break
    return found if any(found.values()) else {}


# ---- what requires another graph -----------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything, beside the network, that changes the graph.

    dtype: of the examples; streams: whether each step gets its batch. decays, smooths, weighs:
    whether there is weight decay, label smoothing, weights of the classes.
    schedule: None if the learning rate is constant within an epoch. augmentation: None, or its kind
    for batches of `batch_size` images of `shape`.
    """

    dtype: str
    streams: bool
    optimizer: str
    decays: bool
    smooths: bool
    weighs: bool
    schedule: str | None
    augmentation: str | None
    batch_size: int | None
    shape: tuple[int, ...] | None


def plan_of(
    hp: Mapping[str, Any], examples: TrainingSet, shape: tuple[int, ...], *, weighs: bool = False
) -> Plan:
    """The plan for training with the hyperparameters `hp` on `examples` of this shape."""
    distorted = hp["augmentation"] != "none"
    return Plan(
        dtype=examples.dtype if isinstance(examples, Pipeline) else examples[0].dtype.name,
        streams=isinstance(examples, Pipeline),
        optimizer=hp["optimizer"],
        decays=hp["weight_decay"] > 0,
        smooths=hp["label_smoothing"] > 0,
        weighs=weighs,
        schedule=hp["schedule"] if hp["schedule"] in SCHEDULES else None,
        augmentation=hp["augmentation"] if distorted else None,
        batch_size=batch_size_of(hp, examples) if distorted else None,
        shape=image_shape(shape) if distorted else None,
    )


def batch_size_of(hp: Mapping[str, Any], examples: TrainingSet) -> int:
    """The number of examples in a batch: of a pipeline the most, of arrays in all but the last."""
    if isinstance(examples, Pipeline):
        return examples.size(hp["batch_size"])
    return min(int(hp["batch_size"]), len(examples[0]))
