"""The network has the layers and the optimizer of its hyperparameters."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from conftest import default_network, small_dataset
from test_epoch import tried
from test_train import CLASSES, FEATURES, TASK

from search.config import custom_model
from search.data.preparation import Normalization
from search.task import Task
from search.training.network import (
    build_network,
    check_output,
    network_to_register,
    trainable_parameters,
)


def test_512_units_on_784_pixels_have_407050_trainable_parameters() -> None:
    network = build_network(
        default_network(), shape=(28, 28), task=Task("classification", 10), seed=0
    )
    assert trainable_parameters(network) == 407_050
    assert sum(weights.size for weights in network.get_weights()) == 407_050


def test_the_layers_are_dense_relu_dropout_dense_softmax() -> None:
    network = build_network(
        default_network(24, 0.3, 0.004), shape=(5,), task=Task("classification", 3), seed=0
    )
    assert type(network) is keras.Sequential
    assert (network.input_shape, network.output_shape) == ((None, 5), (None, 3))
    hidden, dropout, output = network.layers
    assert [type(layer) for layer in network.layers] == [
        keras.layers.Dense,
        keras.layers.Dropout,
        keras.layers.Dense,
    ]
    assert (hidden.units, output.units) == (24, 3)
    assert (hidden.activation.__name__, output.activation.__name__) == ("relu", "softmax")
    assert dropout.rate == 0.3


def test_it_is_compiled_with_plain_adam_and_the_loss_for_integer_labels() -> None:
    network = build_network(
        default_network(24, 0.3, 0.004), shape=(5,), task=Task("classification", 3), seed=0
    )
    assert type(network.optimizer) is keras.optimizers.Adam
    assert float(network.optimizer.learning_rate) == pytest.approx(0.004)
    assert network.loss == "sparse_categorical_crossentropy"
    x, y = np.eye(5, dtype=np.float32), np.array([0, 1, 2, 0, 1])
    expected = -np.log(network.predict(x, verbose=0)[np.arange(5), y]).mean()
    measured = network.evaluate(x, y, verbose=0, return_dict=True)
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    hits = network.predict(x, verbose=0).argmax(axis=1) == y
    assert measured["accuracy"] == pytest.approx(hits.mean())


def test_its_output_is_a_probability_for_every_class() -> None:
    network = build_network(
        default_network(24, 0.3, 0.004), shape=(5,), task=Task("classification", 3), seed=0
    )
    probabilities = network.predict(np.random.default_rng(0).normal(size=(9, 5)), verbose=0)
    assert probabilities.shape == (9, 3)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(9), rel=1e-5)
    assert probabilities.min() > 0


def weights(seed: int, dropout: float = 0.2) -> list[bytes]:
    network = build_network(
        default_network(24, dropout, 0.004), shape=(5,), task=Task("classification", 3), seed=seed
    )
    return [array.tobytes() for array in network.get_weights()]


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    first = weights(3)
    keras.utils.set_random_seed(99)
    assert weights(3) == first
    assert weights(3, dropout=0.4) == first
    hidden, _, output, _ = weights(4)
    assert hidden != first[0]
    assert output != first[2]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_registered_model_takes_raw_values_and_gives_nan_for_what_is_no_number(
    tmp_path: Path, ending: str, activation: str
) -> None:
    network = build_network(
        default_network(24, activation=activation),
        shape=(5,),
        task=Task("classification", 3),
        seed=0,
    )
    scale = Normalization(np.arange(5, dtype=np.float32), np.full(5, 4, np.float32))
    network_to_register(network, small_dataset(normalization=scale)).save(
        tmp_path / f"model.{ending}"
    )
    loaded = keras.saving.load_model(tmp_path / f"model.{ending}")
    x = np.random.default_rng(0).normal(3, 2, size=(8, 5)).astype(np.float32)
    expected = network.predict(scale.apply(x), verbose=0)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-5)
    x[0, 1], x[1, 0], x[2, 4] = np.nan, np.inf, -np.inf
    answered = loaded.predict(x, verbose=0)
    assert np.isnan(answered[:3]).all()
    np.testing.assert_allclose(answered[3:], expected[3:], rtol=1e-5)


def test_without_normalization_the_registered_model_gives_the_same_to_the_last_digit() -> None:
    network = build_network(default_network(24), shape=(5,), task=Task("classification", 3), seed=0)
    registered = network_to_register(network, small_dataset())
    x = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    np.testing.assert_array_equal(registered.predict(x, verbose=0), network.predict(x, verbose=0))
    assert trainable_parameters(registered) == trainable_parameters(network)
    assert registered.optimizer is network.optimizer


# ---- models of the user's own --------------------------------------------------------------------


class Unknown(keras.layers.Layer):  # type: ignore[misc]
    """A layer that nobody could load."""


class Jumps(keras.layers.Layer):  # type: ignore[misc]
    """Draws, in and out of training, from a generator of its own and from Keras'."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generator = keras.random.SeedGenerator(1)

    def call(self, x: Any) -> Any:
        noise = keras.random.normal((CLASSES,), seed=self.generator)
        return x + noise + keras.random.normal((CLASSES,))


keras.saving.register_keras_serializable("here")(Jumps)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (keras.layers.Softmax, None),
        (lambda: keras.layers.Activation("linear"), "but it gives -"),
        (lambda: keras.layers.Activation("sigmoid"), "; end it with a softmax, for example"),
    ],
)
def test_a_custom_model_that_gives_no_probabilities_is_refused_and_the_check_changes_nothing(
    last: Any, said: str | None
) -> None:
    def made(_: Any, shape: Any, classes: int) -> keras.Model:
        dense = keras.layers.Dense(classes)
        return keras.Sequential([keras.Input(shape), dense, Jumps(), last()])

    def state(net: keras.Model) -> list[Any]:
        shared = keras.src.random.seed_generator.global_seed_generator().state
        return [v.numpy().tolist() for v in (*net.variables, shared)]

    found = custom_model.CustomModel("here:made", made, {}, "0")
    net = build_network(tried(), (FEATURES,), TASK, 3, custom=found)
    before = state(net)
    with contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said):
        check_output(found, net)
    assert state(net) == before


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda *_: 3, "must return a keras.Sequential or a functional keras.Model"),
        (
            lambda _, shape, __: keras.Sequential([keras.Input(shape), keras.layers.Dense(2)]),
            r"a probability for each of 4 classes, shape \(None, 4\), but it gives \(None, 2\)",
        ),
        (
            lambda *_: keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]),
            r"takes examples of shape \(20,\)",
        ),
        (
            lambda _, shape, __: keras.Sequential([keras.Input(shape), Unknown()]),
            "class Unknown is not registered; write @keras.saving.register_keras_serializable",
        ),
        (
            lambda _, s, __: keras.Sequential([keras.Input(s), keras.layers.Lambda(abs)]),
            "Keras loads no Lambda layer, which may hold any code; write a layer class instead",
        ),
    ],
)
def test_a_custom_model_that_does_not_fit_says_so(made: Any, said: str) -> None:
    found = custom_model.CustomModel("here:made", made, {}, "0")
    with pytest.raises(ValueError, match=said):
        build_network(tried(), (FEATURES,), TASK, 3, custom=found)


@pytest.mark.parametrize(
    ("outputs", "ending", "said"),
    [
        (4, "sigmoid", None),
        (4, "softmax", r"from 0 to 1 and independent, .* end it with a sigmoid"),
        (
            4,
            None,
            r'end it with a sigmoid, for example keras.layers.Dense\(4, activation="sigmoid"',
        ),
        (3, "sigmoid", r"a probability for each of 4 labels, shape \(None, 4\), but it gives"),
    ],
)
def test_a_custom_model_of_labels_ends_with_a_sigmoid(
    outputs: int, ending: str | None, said: str | None
) -> None:
    def made(_: Any, shape: Any, labels: int) -> keras.Model:
        assert labels == 4
        return keras.Sequential([keras.Input(shape), keras.layers.Dense(outputs, ending)])

    found = custom_model.CustomModel("here:made", made, {}, "0")
    with contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said):
        check_output(
            found, build_network(tried(), (FEATURES,), Task("multilabel", 4), 3, custom=found)
        )


@pytest.mark.parametrize("ending", ["softmax", "sigmoid", "relu"])
def test_a_custom_model_whose_numbers_are_bounded_is_refused(ending: str) -> None:
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, ending)])
    network.task = Task("regression", 1)
    custom = SimpleNamespace(name="mine:build")
    with pytest.raises(ValueError, match=f"mine:build .* regression, but it ends with {ending}"):
        check_output(custom, network)  # type: ignore[arg-type]
