"""Each way to train in the graph is Keras' own, to float precision; graphs are shared correctly."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import default_network
from test_train import BATCH, CLASSES, FEATURES, RAGGED, WHOLE, examples, moved, same

from search.config import custom_model
from search.config.parameter import Choice
from search.data.memory import shared
from search.training import fused
from search.training import train as training
from search.training.epoch import _leaves, epoch_order, tensor_of
from search.training.network import build_network, check_probabilities
from search.training.train import _of_thread, evaluate

RATE = 0.01
Tried = dict[str, Any]


def tried(**changed: Any) -> Tried:
    return default_network(
        **{"hidden_units": 16, "dropout_rate": 0.0, "learning_rate": RATE, **changed}
    )


def build(what: Tried, shape: tuple[int, ...] = (FEATURES,)) -> keras.Sequential:
    return build_network(what, shape, CLASSES, seed=3)


def train(net: keras.Sequential, what: Tried, data: Any, epochs: int = 1, **more: Any) -> Any:
    options = {"epochs": epochs, "seed": 7, "shape": (FEATURES,), **more}
    return training.train(net, data, {**what, "batch_size": BATCH}, **options)


def plain_fit(net: keras.Sequential, data: Any, epochs: int = 1, labels: Any = None) -> None:
    """Keras' own loop over the same examples in the same order."""
    x, y = data
    y = y if labels is None else labels
    for epoch in range(epochs):
        order = epoch_order(len(x), 7, epoch).numpy()
        net.fit(x[order], y[order], batch_size=BATCH, shuffle=False, verbose=0)


def close(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether weights are the same but for the rounding of other kernels."""
    pairs = zip(ours, theirs, strict=True)
    return all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


@pytest.fixture
def no_graphs() -> None:
    _of_thread.graphs.clear()


# ---- the same as Keras' own loop -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": "adamw", "weight_decay": 0.5},
        {"optimizer": "adam", "weight_decay": 0.5},
        {"optimizer": "nadam"},
        {"optimizer": "nadam", "weight_decay": 0.5},
        {"optimizer": "sgd", "learning_rate": 0.1},
        {"optimizer": "sgd", "weight_decay": 0.5, "learning_rate": 0.1},
        {"batch_normalization": True, "hidden_layers": 2},
        {"hidden_layers": 3, "activation": "gelu"},
    ],
    ids=str,
)
def test_a_training_learns_what_the_plain_loop_learns(no_graphs: None, changed: Tried) -> None:
    what = tried(**changed)
    train(build(tried(**{**changed, "learning_rate": 0.3})), what, examples(WHOLE))  # used before
    ours, theirs = build(what), build(what)
    before = ours.get_weights()
    train(ours, what, examples(RAGGED), epochs=2)
    plain_fit(theirs, examples(RAGGED), epochs=2)
    assert len(_of_thread.graphs) == 1
    assert moved(before, ours.get_weights())
    assert close(ours.get_weights(), theirs.get_weights())
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) == 100


def test_weights_decay_and_biases_do_not(no_graphs: None) -> None:
    def after(decay: float) -> list[Any]:
        what = tried(weight_decay=decay, learning_rate=1e-4)
        net = build(what)
        train(net, what, examples(WHOLE), epochs=4)
        return net.get_weights()

    def sizes(weights: list[Any]) -> list[float]:
        return [float(np.abs(weight).mean()) for weight in weights]

    kernel, bias, *_ = (a / b for a, b in zip(sizes(after(1.0)), sizes(after(0.0)), strict=True))
    assert kernel == pytest.approx((1 - 1e-4) ** 200, rel=0.02)
    assert bias > 0.99


@pytest.mark.slow
def test_label_smoothing_is_keras_own(no_graphs: None) -> None:
    what = tried(label_smoothing=0.3)
    data = examples(WHOLE)
    ours, theirs = build(what), build(what)
    history = train(ours, what, data, validation=examples(99, 1))
    smooth = keras.losses.CategoricalCrossentropy(label_smoothing=0.3)
    theirs.compile(keras.optimizers.Adam(RATE), loss=smooth)
    plain_fit(theirs, data, labels=np.eye(CLASSES, dtype=np.float32)[data[1]])
    assert same(ours.get_weights(), theirs.get_weights())
    unsmoothed = ours.evaluate(*examples(99, 1), verbose=0, return_dict=True)["loss"]
    assert history["val_loss"][0] == pytest.approx(unsmoothed, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start", "up"), [("cosine", 0.0, 0.05), ("one_cycle", 0.04, 0.3)])
def test_a_schedule_is_keras_own_over_all_steps(
    no_graphs: None, name: str, start: float, up: float
) -> None:
    what = tried(schedule=name)
    steps = 3 * 50
    ours, theirs = build(what), build(what)
    rates: list[float] = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: rates.append(float(watch.model.optimizer.learning_rate))
    )
    train(ours, what, examples(WHOLE), epochs=3, callbacks=[watch])
    schedule = keras.optimizers.schedules.CosineDecay(
        start * RATE, steps * (1 - up), warmup_target=RATE, warmup_steps=steps * up
    )
    theirs.compile(keras.optimizers.Adam(schedule), loss=theirs.loss)
    plain_fit(theirs, examples(WHOLE), epochs=3)
    assert rates == pytest.approx([float(schedule(step)) for step in (49, 99, 149)], rel=1e-4)
    assert rates[2] < rates[0] / 10
    assert close(ours.get_weights(), theirs.get_weights())
    assert float(ours.optimizer.learning_rate) == pytest.approx(RATE)  # to train on with


def test_a_training_that_ends_early_is_the_start_of_the_whole_one() -> None:
    what = tried(schedule="one_cycle", dropout_rate=0.2)
    whole = train(build(what), what, examples(RAGGED), epochs=5)
    start = train(build(what), what, examples(RAGGED), epochs=5, only=2)
    assert start["loss"] == whole["loss"][:2]


def test_early_stopping_gives_back_the_best_weights() -> None:
    what = tried(early_stopping=2, learning_rate=0.1)
    held_out = examples(200, 1)
    net = build(what)
    history = train(net, what, examples(150), epochs=60, validation=held_out)
    accuracies = history["val_accuracy"]
    assert len(accuracies) == accuracies.index(max(accuracies)) + 3 < 60
    found = evaluate(net, held_out)
    assert found["accuracy"] == pytest.approx(max(accuracies))
    assert accuracies[-1] < max(accuracies)


# ---- randomness and graphs -----------------------------------------------------------------------


def test_every_dropout_layer_draws_masks_of_its_own(no_graphs: None) -> None:
    what = tried(hidden_layers=2, dropout_rate=0.5)
    net = build(what)
    train(net, what, examples(WHOLE))
    (kept,) = _of_thread.graphs.values()
    masks = []
    for layer in _leaves(kept.network):
        if isinstance(layer, fused.Dropout):
            layer.set(0.5, 7, len(masks))
            masks.append(np.asarray(layer(np.ones((64, 16), np.float32), training=True)))
    assert len(masks) == 2
    assert (masks[0] != masks[1]).any()
    assert 0.4 < np.mean(masks[0] == 0) < 0.6


IMAGES = {"shape": (4, 5)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shift", "affine", "elastic"])
def test_augmentation_reproduces_and_changes_the_training_alone(kind: str) -> None:
    held_out = examples(99, 1)

    def losses(seed: int = 7, **changed: Any) -> Any:
        what = tried(**changed)
        net = build(what, (4, 5))
        history = train(net, what, examples(RAGGED), 2, validation=held_out, seed=seed, **IMAGES)
        last = evaluate(net, held_out)["loss"]
        assert history["val_loss"][-1] == pytest.approx(last, rel=1e-6)
        return history["loss"]

    distorted = losses(augmentation=kind, augmentation_strength=1.0)
    assert losses(augmentation=kind, augmentation_strength=1.0) == distorted
    assert losses(augmentation=kind, augmentation_strength=1.0, seed=8) != distorted
    assert losses() != distorted
    nearly = losses(augmentation=kind, augmentation_strength=1e-7)
    assert nearly == pytest.approx(losses(), rel=1e-3)


@pytest.mark.slow
def test_what_is_only_a_number_shares_a_graph_and_what_is_not_does_not(no_graphs: None) -> None:
    def one(**changed: Any) -> int:
        what = tried(**changed)
        train(build(what, (4, 5)), what, examples(WHOLE), **IMAGES)
        return len(_of_thread.graphs)

    base: Tried = {"weight_decay": 0.1, "label_smoothing": 0.1, "schedule": "cosine"}
    base |= {"augmentation": "shift", "augmentation_strength": 1.0}
    assert one(**base) == 1
    numbers = {"weight_decay": 0.2, "label_smoothing": 0.2, "augmentation_strength": 0.5}
    assert one(**{**base, **numbers, "learning_rate": 0.2, "dropout_rate": 0.3}) == 1
    others: list[Tried] = [{"schedule": "one_cycle"}, {"augmentation": "affine"}]
    others += [{"optimizer": "sgd"}, {"weight_decay": 0.0}, {"activation": "elu"}]
    for count, other in enumerate(others, start=2):
        assert one(**{**base, **other}) == count


# ---- models of the user's own --------------------------------------------------------------------


def noisy(hyperparameters: Tried, shape: tuple[int, ...], classes: int) -> keras.Model:
    """A network with two branches, a network within it, and randomness other than dropout.

    One of its dropouts drops whole examples, which the graph's own layer does not.
    """
    inputs = keras.Input(shape)
    whole = keras.layers.Dropout(hyperparameters["whole"], noise_shape=(None, 1))
    inner = keras.Sequential(
        [keras.layers.Dense(8), keras.layers.Dropout(hyperparameters["drop"]), whole]
    )
    one = inner(keras.layers.GaussianNoise(0.3)(inputs))
    other = keras.layers.SpatialDropout1D(hyperparameters["spatial"])(
        keras.layers.Reshape((FEATURES, 1))(inputs)
    )
    merged = keras.layers.Concatenate()([one, keras.layers.Flatten()(other)])
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(merged))


@keras.saving.register_keras_serializable("tests")
class Scaled(keras.Model):  # type: ignore[misc]
    """A model of a class of its own, with a weight beside its layers."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.inner = keras.layers.Dense(5)
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.inner(x * self.scale)


class Unknown(keras.layers.Layer):  # type: ignore[misc]
    """A layer that nobody could load."""


@pytest.fixture
def own() -> Callable[..., keras.Sequential]:
    space = {name: Choice((0.1,)) for name in ("drop", "spatial", "whole")}
    made = custom_model.CustomModel("here:noisy", noisy, space, "0")  # type: ignore[arg-type]

    def make(seed: int = 3, **rates: float) -> keras.Sequential:
        what = {**tried(), "drop": 0.1, "spatial": 0.1, "whole": 0.1, **rates}
        return build_network(what, (FEATURES,), CLASSES, seed, custom=made)

    return make


@pytest.mark.slow
def test_a_custom_model_reproduces_whatever_was_trained_before(
    own: Callable[..., keras.Sequential],
) -> None:
    def losses(seed: int = 3) -> Any:
        return train(own(seed), tried(), examples(RAGGED), epochs=3)["loss"]

    first = losses()
    keras.utils.set_random_seed(99)
    train(own(5, drop=0.5), tried(), examples(WHOLE))
    assert losses() == first
    assert losses(seed=4) != first


@pytest.mark.slow
def test_custom_models_share_a_graph_unless_a_rate_is_built_into_it(
    no_graphs: None, own: Callable[..., keras.Sequential]
) -> None:
    for drop in (0.1, 0.4):
        train(own(drop=drop), tried(), examples(WHOLE))
    assert len(_of_thread.graphs) == 1
    for count, built_in in enumerate(("spatial", "whole"), start=2):
        train(own(**{built_in: 0.4}), tried(), examples(WHOLE))
        assert len(_of_thread.graphs) == count


Layers = list[keras.layers.Layer]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers",
    [
        lambda other: [
            keras.layers.Reshape((FEATURES, 1)),
            keras.layers.TimeDistributed(keras.layers.Dropout(0.9 if other else 0.1)),
            keras.layers.Flatten(),
        ],
        lambda other: [
            keras.layers.Activation(kind, name=kind) for kind in ("tanh" if other else "relu",)
        ],
    ],
    ids=["a wrapped dropout's rate", "a value that is a layer's name"],
)
def test_networks_that_differ_share_no_graph(
    no_graphs: None, layers: Callable[[bool], Layers]
) -> None:
    for count, other in enumerate((False, True), start=1):

        def made(_: Any, shape: Any, classes: int, other: bool = other) -> keras.Model:
            last = keras.layers.Dense(classes, activation="softmax")
            return keras.Sequential([keras.Input(shape), *layers(other), last])

        found = custom_model.CustomModel("here:made", made, {}, "0")
        net = build_network(tried(), (FEATURES,), CLASSES, 3, custom=found)
        train(net, tried(), examples(WHOLE))
        assert len(_of_thread.graphs) == count


def test_a_network_within_that_has_weights_of_its_own_learns(no_graphs: None) -> None:
    def made(_: Any, shape: Any, classes: int) -> keras.Model:
        last = keras.layers.Dense(classes, activation="softmax")
        return keras.Sequential([keras.Input(shape), Scaled(), last])

    found = custom_model.CustomModel("here:made", made, {}, "0")
    ours, theirs = (build_network(tried(), (FEATURES,), CLASSES, 3, custom=found) for _ in "ab")
    before = ours.get_weights()
    train(ours, tried(), examples(WHOLE))
    plain_fit(theirs, examples(WHOLE))
    assert moved(before, ours.get_weights())
    assert close(ours.get_weights(), theirs.get_weights())


def test_a_custom_model_learns_and_is_plain_keras(
    own: Callable[..., keras.Sequential], tmp_path: Path
) -> None:
    net = own(spatial=0.0, whole=0.0)
    before = net.get_weights()
    history = train(net, tried(), examples(WHOLE), epochs=3)
    assert moved(before[:1], net.get_weights()[:1])
    assert history["accuracy"][-1] > history["accuracy"][0]
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    x, _ = examples(20)
    assert np.allclose(loaded.predict(x, verbose=0), net.predict(x, verbose=0), atol=1e-6)


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
    net = build_network(tried(), (FEATURES,), CLASSES, 3, custom=found)
    before = state(net)
    with contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said):
        check_probabilities(found, net)
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
        build_network(tried(), (FEATURES,), CLASSES, 3, custom=found)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_tensor_of_shared_examples_is_in_their_memory(kind: type) -> None:
    x = shared(np.ones((32, 16), kind))
    tensor = tensor_of(x)
    x[5, 3] = 9
    assert tensor.numpy()[5, 3] == 9
    assert tensor.dtype == tf.as_dtype(kind)


def test_examples_whose_memory_tensorflow_cannot_use_are_copied() -> None:
    x = shared(np.arange(999, dtype=np.uint8))[3:].reshape(-1, 12)
    for rows in (x, np.asfortranarray(x), x[:0], np.frombuffer(b"abcdefgh", np.uint8)[None]):
        np.testing.assert_array_equal(tensor_of(rows).numpy(), rows)
