"""Each way to train in the graph is Keras' own, to float precision; graphs are shared correctly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import default_network, small_dataset
from test_train import BATCH, CLASSES, FEATURES, RAGGED, TASK, WHOLE, examples, moved, same

from search.config import custom_model
from search.config.parameter import Choice
from search.memory import shared
from search.task import Task
from search.training import train as training
from search.training.epoch import epoch_order, tensor_of
from search.training.network import build_network, network_to_register
from search.training.train import _of_thread, evaluate

RATE = 0.01
Tried = dict[str, Any]


def tried(**changed: Any) -> Tried:
    return default_network(
        **{"hidden_units": 16, "dropout_rate": 0.0, "learning_rate": RATE, **changed}
    )


def build(what: Tried, shape: tuple[int, ...] = (FEATURES,)) -> keras.Sequential:
    return build_network(what, shape, TASK, seed=3)


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


@pytest.fixture
def own() -> Callable[..., keras.Sequential]:
    space = {name: Choice((0.1,)) for name in ("drop", "spatial", "whole")}
    made = custom_model.CustomModel("here:noisy", noisy, space, "0")  # type: ignore[arg-type]

    def make(seed: int = 3, **rates: float) -> keras.Sequential:
        what = {**tried(), "drop": 0.1, "spatial": 0.1, "whole": 0.1, **rates}
        return build_network(what, (FEATURES,), TASK, seed, custom=made)

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
        net = build_network(tried(), (FEATURES,), TASK, 3, custom=found)
        train(net, tried(), examples(WHOLE))
        assert len(_of_thread.graphs) == count


def test_a_network_within_that_has_weights_of_its_own_learns(no_graphs: None) -> None:
    def made(_: Any, shape: Any, classes: int) -> keras.Model:
        last = keras.layers.Dense(classes, activation="softmax")
        return keras.Sequential([keras.Input(shape), Scaled(), last])

    found = custom_model.CustomModel("here:made", made, {}, "0")
    ours, theirs = (build_network(tried(), (FEATURES,), TASK, 3, custom=found) for _ in "ab")
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


def test_a_network_of_a_regression_learns_as_keras_and_counts_its_metrics(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, FEATURES)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] / 2).astype(np.float32)
    task = Task("regression", 1, mean=100, deviation=20)
    net = build_network(tried(), (FEATURES,), task, 3)
    history = training.train(
        net, (x[:150], y[:150]), tried(), epochs=4, seed=1, validation=(x[150:], y[150:])
    )
    assert history["loss"][-1] < history["loss"][0]
    assert history["mae"][-1] < 20
    given = net.predict(x[150:], verbose=0)[:, 0]
    error = (given - y[150:]) * 20
    assert history["val_loss"][-1] == pytest.approx(np.mean(error**2) / 400, rel=1e-4)
    assert history["val_mae"][-1] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert history["val_rmse"][-1] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-4)
    spread = np.var(y[150:]) * 400
    assert history["val_r2"][-1] == pytest.approx(1 - np.mean(error**2) / spread, rel=1e-3)
    registered = network_to_register(net, small_dataset(task=task, sample_shape=(FEATURES,)))
    assert registered.predict(x, verbose=0) == pytest.approx(
        net.predict(x, verbose=0) * 20 + 100, rel=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_train_as_keras_fit_does_with_them(smoothing: float) -> None:
    data = examples(96, 0)
    weights = np.array([0.5, 1, 2, 4], np.float32)
    what = tried(label_smoothing=smoothing, dropout_rate=0.0)
    ours, theirs = (build_network(what, (FEATURES,), TASK, 3) for _ in "ab")
    history = training.train(ours, data, what, epochs=1, seed=1, class_weights=weights)
    (x, y), order = data, np.asarray(epoch_order(96, 1, 0))
    labels = np.eye(CLASSES, dtype=np.float32)[y] * (1 - smoothing) + smoothing / CLASSES
    theirs.compile(theirs.optimizer, "categorical_crossentropy", metrics=["accuracy"])
    fitted = theirs.fit(
        x[order],
        labels[order],
        sample_weight=weights[y[order]],
        batch_size=what["batch_size"],
        shuffle=False,
        verbose=0,
    ).history
    assert history["loss"] == pytest.approx(fitted["loss"], rel=1e-4)
    assert same(ours.get_weights(), theirs.get_weights())
    plain = build_network(what, (FEATURES,), TASK, 3)
    alone = training.train(plain, data, what, epochs=1, seed=1)
    assert alone["loss"] != history["loss"]


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
