"""The network: hyperparameters -> a compiled Keras model, which takes flat examples."""

import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from search.config.custom_model import CustomModel
from search.data.dataset import Dataset
from search.data.preparation import UINT8_SCALE
from search.task import Task
from search.training.table_layers import embeddings, encoding

MOMENTUM = 0.9  # of sgd, Nesterov's
_EMBEDDINGS = 200  # added to the seed, as each layer has its own
_seeding = threading.Lock()


def build_network(
    hp: Mapping[str, Any],
    shape: tuple[int, ...],
    task: Task,
    seed: int,
    custom: CustomModel | None = None,
    embedded: tuple[int, ...] = (),
) -> keras.Sequential:
    """The compiled network with the hyperparameters `hp`: all that matter, by name.

    shape: of one example; the network takes flat examples, float32 of shape (n, features), and
    returns probabilities of shape (n, classes or labels), or in a regression standardized numbers
    of shape (n, 1). custom: the custom model (`--model`), if any. embedded: the vocabulary sizes of
    the last features, which are indices; the layers get their embeddings. The initial weights
    depend on `seed` alone.
    """
    front: list[keras.Model] = []
    example = keras.Input((math.prod(shape),), name="example")
    if embedded:
        front = [embeddings(math.prod(shape), embedded, seed + _EMBEDDINGS)]
        shape = front[0].output_shape[1:]
    if custom is None:
        layers = list(_layers(hp, shape, task, seed))
        name = f"{hp['architecture']}_network"
    else:
        layers = [keras.layers.Reshape(shape), _custom_network(custom, hp, shape, task, seed)]
        name = "own_network"
    model = keras.Sequential([example, *front, *layers], name=name)
    model.task = task
    if custom is not None:
        model.source = custom.fingerprint
    model.compile(
        optimizer=_optimizer(hp),
        loss=task.decides.loss,
        metrics=[task.decides.compiled],
        jit_compile=False,  # XLA on the CPU is several times slower than TensorFlow's kernels
    )
    return model


def network_for(
    dataset: Dataset, hp: Mapping[str, Any], seed: int, custom: CustomModel | None
) -> keras.Sequential:
    """The compiled network for `dataset`, as `build_network` builds it."""
    return build_network(hp, dataset.sample_shape, dataset.task, seed, custom, dataset.embeddings)


def network_to_register(network: keras.Sequential, dataset: Dataset) -> keras.Model:
    """The network, trained on `dataset`, as it is registered: it takes raw values.

    Those are flat examples; images of pixels from 0 to 255; or rows of a table, whose values may be
    missing. But for those of a table it returns NaN for NaN: the result of a kernel for NaN depends
    on the processor, as ReLU may return 0, so the input times zero is added to the outputs: 0 for
    finite numbers, NaN for NaN and infinity. In a regression the last layer gives the target's own
    unit. The layers and the optimizer are shared.
    """
    task = dataset.task
    if dataset.columns is not None:
        inputs, outputs = encoding(dataset.columns)
        return _registered(network, inputs, _applied(network, outputs), task)
    shape = dataset.sample_shape if dataset.pixels else network.input_shape[1:]
    example = keras.Input(shape, name="example")
    outputs = flat = example
    if dataset.pixels:
        scale = keras.layers.Rescaling(float(UINT8_SCALE), name="scale")
        outputs = flat = keras.layers.Flatten(name="flat_example")(scale(example))
    if dataset.normalization is not None:
        layer = keras.layers.Normalization(name="normalization")
        layer.build((None, *network.input_shape[1:]))
        layer.adapt_mean.assign(dataset.normalization.mean)
        layer.adapt_variance.assign(dataset.normalization.variance)
        layer.finalize_state()
        outputs = layer(outputs)
    outputs = _applied(network, outputs)
    zero = keras.layers.Dense(
        1, use_bias=False, kernel_initializer="zeros", trainable=False, name="zero_or_nan"
    )
    checked = keras.layers.Add(name=f"{task.decides.output}_or_nan")([outputs, zero(flat)])
    return _registered(network, example, checked, task)


def _applied(network: keras.Sequential, values: Any) -> Any:
    for layer in network.layers:
        values = layer(values)
    return values


def _registered(network: keras.Sequential, inputs: Any, outputs: Any, task: Task) -> keras.Model:
    if task.is_number:
        outputs = keras.layers.Rescaling(task.deviation, task.mean, name="prediction")(outputs)
    model = keras.Model(inputs, outputs, name=network.name)
    metrics = [task.decides.compiled]
    model.compile(network.optimizer, network.loss, metrics=metrics, jit_compile=False)
    return model


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels of an example of this shape, grey or colour."""
    height, width, *channels = shape
    return height, width, channels[0] if channels else 1


def _layers(
    hp: Mapping[str, Any], shape: tuple[int, ...], task: Task, seed: int
) -> Iterator[keras.layers.Layer]:
    """Convolutional blocks for a cnn, hidden layers with dropout, and the output.

    Every layer has its own seed. The weights are initialized as in Glorot and Bengio 2010, Keras'
    default.
    """
    if hp["architecture"] == "cnn":
        yield keras.layers.Reshape(image_shape(shape), name="image")
        for block in range(hp["conv_blocks"]):
            yield from _activated(
                hp,
                keras.layers.Conv2D,
                hp["filters"] * 2**block,
                3,
                padding="same",
                kernel_initializer=keras.initializers.GlorotUniform(seed + 100 + block),
                name=f"convolution_{block + 1}",
            )
            yield keras.layers.MaxPooling2D(padding="same", name=f"pooling_{block + 1}")
        yield keras.layers.Flatten(name="flat")
    for layer in range(hp["hidden_layers"]):
        suffix = f"_{layer + 1}" if layer else ""
        yield from _activated(
            hp,
            keras.layers.Dense,
            hp["hidden_units"],
            kernel_initializer=keras.initializers.GlorotUniform(seed + layer + bool(layer)),
            name=f"hidden{suffix}",
        )
        yield keras.layers.Dropout(hp["dropout_rate"], seed=seed + layer, name=f"dropout{suffix}")
    yield keras.layers.Dense(
        task.outputs,
        activation=task.decides.output_activation,
        kernel_initializer=keras.initializers.GlorotUniform(seed + 1),
        name=task.decides.output,
    )


def _activated(
    hp: Mapping[str, Any], kind: Any, *arguments: Any, name: str, **options: Any
) -> Iterator[keras.layers.Layer]:
    """A layer with its activation and, if enabled, batch normalization between them."""
    if not hp["batch_normalization"]:
        yield kind(*arguments, activation=hp["activation"], name=name, **options)
        return
    yield kind(*arguments, use_bias=False, name=name, **options)  # the normalization has one
    yield keras.layers.BatchNormalization(name=f"{name}_normalization")
    yield keras.layers.Activation(hp["activation"], name=f"{name}_activation")


def _optimizer(hp: Mapping[str, Any]) -> keras.optimizers.Optimizer:
    """The optimizer; its learning rate is the highest of the schedule."""
    rate, decay = hp["learning_rate"], hp["weight_decay"]
    if hp["optimizer"] == "sgd":
        optimizer = keras.optimizers.SGD(rate, momentum=MOMENTUM, nesterov=True)
    elif hp["optimizer"] == "adamw":
        optimizer = keras.optimizers.AdamW(rate, weight_decay=decay)
    else:
        kind = keras.optimizers.Nadam if hp["optimizer"] == "nadam" else keras.optimizers.Adam
        optimizer = kind(rate)
    if decay:
        decay_weights(optimizer, decay)
    return optimizer


def decay_weights(optimizer: keras.optimizers.Optimizer, decay: Any) -> None:
    """Set the weight decay, a number or a variable, of all weights but biases and scales."""
    optimizer.weight_decay = decay
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])


def _custom_network(
    custom: CustomModel, hp: Mapping[str, Any], shape: tuple[int, ...], task: Task, seed: int
) -> keras.Model:
    """The network of a custom model. Raises ValueError if it can't be trained and saved."""
    name, classes = custom.name, task.outputs
    with _seeding:  # layers without a seed draw one from Python's global generator
        keras.utils.set_random_seed(seed)
        network = custom.build({name: hp[name] for name in custom.space}, shape, classes)
    if not is_of_layers(network):
        raise ValueError(
            f"{name} must return a keras.Sequential or a functional keras.Model, but returned a "
            f"{type(network).__name__}"
        )
    _check_loads(name, network)
    try:
        gives = tuple(network.compute_output_shape((None, *shape)))
    except Exception as error:  # anything that its layers raise
        raise ValueError(
            f"{name} must return a model that takes examples of shape {shape}, but it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if gives != (None, classes):
        what = "a number" if task.is_number else f"a probability for each of {task}"
        raise ValueError(
            f"{name} must return a model that gives {what}, shape (None, {classes}), but it gives "
            f"{gives}"
        )
    return network


def check_output(custom: CustomModel, network: keras.Sequential) -> None:
    """Raise ValueError if the output of a custom model's network does not fit its task."""
    last = network.layers[-1]
    while is_of_layers(last):
        last = last.layers[-1]
    activation = getattr(getattr(last, "activation", None), "__name__", "linear")
    if isinstance(last, keras.layers.Softmax | keras.layers.ReLU):
        activation = type(last).__name__
    if not network.task.is_number:
        _check_probabilities(custom, network, activation)
    elif activation != "linear":
        raise ValueError(
            f"{custom.name} must return a model whose output is not bounded, since the task is "
            f"regression, but it ends with {activation}; end it with keras.layers.Dense(1)"
        )


def _check_probabilities(custom: CustomModel, network: keras.Sequential, activation: str) -> None:
    """Raise ValueError if the network of a custom model does not return probabilities.

    Those of classes have the sum 1; those of labels are independent, so a softmax is wrong.
    Tested with a few random examples; this changes neither its variables nor the state of any
    random generator.
    """
    examples = np.random.default_rng(0).random((4, *network.input_shape[1:]), np.float32)
    try:
        given, _ = network.stateless_call(
            network.trainable_variables, network.non_trainable_variables, examples, training=False
        )
    except Exception:  # anything that its layers raise: training will report it
        return
    rows = np.asarray(given, np.float32)
    sums = rows.sum(axis=1)
    if network.task.labels:
        rule, fits = "from 0 to 1 and independent", activation.lower() != "softmax"
        fits &= bool(np.all(rows <= 1 + 1e-3))
    else:
        rule, fits = "with sum 1 and none negative", np.allclose(sums, 1, rtol=0, atol=1e-3)
    if not (np.all(rows >= 0) and fits):
        right = network.task.decides.output_activation
        raise ValueError(
            f"{custom.name} must return a model that gives probabilities, {rule}, but it gives "
            f"{rows.min():.4g} to {rows.max():.4g} with sum {sums[0]:.4g}; end it with a {right}, "
            f'for example keras.layers.Dense({rows.shape[1]}, activation="{right}")'
        )


def is_of_layers(network: Any) -> bool:
    """Whether it is a network defined by its layers alone, sequential or functional."""
    return isinstance(network, keras.Sequential) or (
        isinstance(network, keras.Model) and hasattr(network, "operations")
    )


def _check_loads(name: str, network: keras.Model) -> None:
    """Raise ValueError if the saved network could not be loaded again."""
    for layer in network._flatten_layers():
        kind = type(layer)
        if kind is keras.layers.Lambda:
            raise ValueError(
                f"{name} must return a model that can be loaded, but Keras loads no Lambda layer, "
                "which may hold any code; write a layer class instead"
            )
        registered = ">" in keras.saving.get_registered_name(kind)
        if not registered and kind.__module__.split(".")[0] != "keras":
            raise ValueError(
                f"{name} must return a model that can be loaded, but the class {kind.__name__} is "
                "not registered; write @keras.saving.register_keras_serializable() above it"
            )


def trainable_parameters(model: keras.Model) -> int:
    """The number of trainable parameters."""
    return sum(int(weight.shape.num_elements()) for weight in model.trainable_weights)
