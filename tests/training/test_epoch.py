"""Each way to train in the graph is Keras' own, to float precision; graphs are shared correctly."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import default_network, small_dataset
from test_train import BATCH, CLASSES, FEATURES, FEW, RAGGED, TASK, WHOLE, examples, moved, same

from search.config import custom_model
from search.config.parameter import Choice
from search.memory import shared
from search.task import Task
from search.training import fused
from search.training import train as training
from search.training.epoch import epoch_order, tensor_of
from search.training.fused import plan_of
from search.training.network import MOMENTUM, build_network, network_to_register
from search.training.train import History, evaluate, graph_for

RATE = 0.01
SGD = functools.partial(keras.optimizers.SGD, momentum=MOMENTUM, nesterov=True)
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
    """Keras' own loop over the same examples in the same order, for a few steps."""
    x, y = data
    y = y if labels is None else labels
    net.run_eagerly = True  # a graph takes longer to trace than so few steps take
    for epoch in range(epochs):
        order = epoch_order(len(x), 7, epoch).numpy()
        net.fit(x[order], y[order], batch_size=BATCH, shuffle=False, verbose=0)


def loss_of(net: keras.Sequential, data: Any) -> float:
    """Of these examples, without a graph."""
    x, y = data
    return float(np.mean(keras.losses.sparse_categorical_crossentropy(y, net(x))))


def close(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether weights are the same but for the rounding of other kernels."""
    pairs = zip(ours, theirs, strict=True)
    return all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


# ---- the same as Keras' own loop -----------------------------------------------------------------


Trained = tuple[keras.Sequential, keras.Sequential, History]


def by_both(
    graphs: OrderedDict[str, Any], what: Tried, epochs: int = 2, labels: Any = None, **how: Any
) -> Trained:
    """Two networks with the same weights: by our training, and by Keras' own loop; our history.

    labels, how: what Keras' loop trains for, and how it is compiled, where that differs. A
    validation set and callbacks are for ours.
    """
    ours_alone = {name: how.pop(name) for name in ("validation", "callbacks") if name in how}
    train(build({**what, "learning_rate": 0.3}), what, examples(WHOLE))  # the graph is used before
    ours, theirs = build(what), build(what)
    theirs.compile(**{"optimizer": theirs.optimizer, "loss": theirs.loss, **how})
    before = ours.get_weights()
    history = train(ours, what, examples(FEW), epochs, **ours_alone)
    plain_fit(theirs, examples(FEW), epochs, labels)
    assert len(graphs) == 1
    assert moved(before, ours.get_weights())
    assert close(ours.get_weights(), theirs.get_weights())
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) == 4 * epochs
    return ours, theirs, history


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"optimizer": "adamw", "batch_normalization": True}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "nadam"}, marks=pytest.mark.slow),
        {},
    ],
    ids=str,
)
def test_a_training_learns_what_the_plain_loop_learns(
    graphs: OrderedDict[str, Any], changed: Tried
) -> None:
    by_both(graphs, tried(weight_decay=0.5, **changed))


def test_weights_decay_and_biases_do_not() -> None:
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
def test_label_smoothing_is_keras_own(graphs: OrderedDict[str, Any]) -> None:
    what = tried(optimizer="sgd", learning_rate=0.1, weight_decay=0.5, label_smoothing=0.3)
    labels = np.eye(CLASSES, dtype=np.float32)[examples(FEW)[1]]
    smooth = keras.losses.CategoricalCrossentropy(label_smoothing=0.3)
    held_out = examples(99, 1)
    ours, theirs, history = by_both(graphs, what, 2, labels, loss=smooth, validation=held_out)
    assert same(ours.get_weights(), theirs.get_weights())
    assert history["val_loss"][-1] == pytest.approx(loss_of(ours, held_out), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start", "up", "kind", "changed"),
    [
        ("cosine", 0.0, 0.05, keras.optimizers.Nadam, {"optimizer": "nadam"}),
        ("one_cycle", 0.04, 0.3, SGD, {"optimizer": "sgd", "hidden_layers": 2}),
    ],
    ids=["cosine", "one_cycle"],
)
def test_a_schedule_is_keras_own_over_all_steps(
    graphs: OrderedDict[str, Any], name: str, start: float, up: float, kind: Any, changed: Tried
) -> None:
    what = tried(schedule=name, learning_rate=0.05, activation="gelu", **changed)
    rates: list[float] = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: rates.append(float(watch.model.optimizer.learning_rate))
    )
    steps = 3 * 4
    schedule = keras.optimizers.schedules.CosineDecay(
        start * 0.05, steps * (1 - up), warmup_target=0.05, warmup_steps=steps * up
    )
    ours, *_ = by_both(graphs, what, 3, optimizer=kind(schedule), callbacks=[watch])
    assert rates == pytest.approx([float(schedule(step)) for step in (3, 7, 11)], rel=1e-4)
    assert rates[2] < rates[0] / 10
    assert float(ours.optimizer.learning_rate) == pytest.approx(0.05)  # to train on with


@pytest.mark.slow
def test_a_training_that_ends_early_is_the_start_of_the_whole_one() -> None:
    what = tried(schedule="one_cycle", dropout_rate=0.2)
    whole = train(build(what), what, examples(RAGGED), epochs=5)
    start = train(build(what), what, examples(RAGGED), epochs=5, only=2)
    assert start["loss"] == whole["loss"][:2]


@pytest.mark.slow
def test_early_stopping_gives_back_the_best_weights() -> None:
    what = tried(early_stopping=2, learning_rate=0.1)
    held_out = examples(200, 1)
    net = build(what)
    history = train(net, what, examples(150), epochs=60, validation=held_out)
    accuracies = history["val_accuracy"]
    assert len(accuracies) == accuracies.index(max(accuracies)) + 3 < 60
    _, found = evaluate(net, held_out)
    assert found["accuracy"] == pytest.approx(max(accuracies))
    assert accuracies[-1] < max(accuracies)


# ---- randomness and graphs -----------------------------------------------------------------------


IMAGES = {"shape": (4, 5)}


def losses(seed: int = 7, **changed: Any) -> Any:
    """In training, where nothing changes the examples that are validated."""
    held_out = examples(99, 1)
    what = tried(**changed)
    net = build(what, (4, 5))
    history = train(net, what, examples(FEW), 2, validation=held_out, seed=seed, **IMAGES)
    assert history["val_loss"][-1] == pytest.approx(loss_of(net, held_out), rel=1e-6)
    return history["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shift", "affine", "elastic"])
def test_augmentation_reproduces_and_changes_the_training_alone(kind: str) -> None:
    plain = losses()
    distorted = losses(augmentation=kind, augmentation_strength=1.0)
    assert losses(augmentation=kind, augmentation_strength=1.0) == distorted
    assert losses(augmentation=kind, augmentation_strength=1.0, seed=8) != distorted
    assert plain != distorted
    nearly = losses(augmentation=kind, augmentation_strength=1e-7)
    assert nearly == pytest.approx(plain, rel=1e-3)


def test_what_is_only_a_number_shares_a_graph_and_what_is_not_does_not(
    graphs: OrderedDict[str, Any],
) -> None:
    def one(**changed: Any) -> int:
        what = {**tried(**changed), "batch_size": BATCH}
        graph_for(build(what, (4, 5)), plan_of(what, examples(WHOLE), (4, 5)))
        return len(graphs)

    base: Tried = {"weight_decay": 0.1, "label_smoothing": 0.1, "schedule": "cosine"}
    base |= {"augmentation": "shift", "augmentation_strength": 1.0}
    assert one(**base) == 1
    numbers = {"weight_decay": 0.2, "label_smoothing": 0.2, "augmentation_strength": 0.5}
    assert one(**{**base, **numbers, "learning_rate": 0.2, "dropout_rate": 0.3}) == 1
    others: list[Tried] = [{"schedule": "one_cycle"}, {"augmentation": "affine"}]
    others += [{"optimizer": "sgd"}, {"weight_decay": 0.0}, {"activation": "elu"}]
    for count, other in enumerate(others, start=2):
        assert one(**{**base, **other}) == count


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_graph_for_all_sizes_gives_the_digits_of_one_for_each(
    graphs: OrderedDict[str, Any], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    what = tried(hidden_layers=2, dropout_rate=0.3, optimizer=optimizer, activation="silu")
    held_out = examples(FEW, seed=1)

    def trained(units: int, size: int) -> Any:
        sized = {**what, "hidden_units": units, "batch_size": size, "early_stopping": 1}
        net = build(sized)
        how: Any = {"epochs": 3, "seed": 7, "validation": held_out}
        history = training.train(net, examples(FEW), sized, **how)
        state = [*net.get_weights(), *(variable.numpy() for variable in net.optimizer.variables)]
        return history, [value.tobytes() for value in state]

    sizes = (16, 32), (40, 16), (3, 99)
    together = [trained(*size) for size in sizes]
    assert len(graphs) == 1
    for module in (fused, training):
        monkeypatch.setattr(module, "resizable", lambda _: {})
    assert [trained(*size) for size in sizes] == together
    assert len(graphs) == 1 + len(sizes)


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
    def of(seed: int = 3) -> Any:
        return train(own(seed), tried(), examples(FEW), epochs=3)["loss"]

    first = of()
    keras.utils.set_random_seed(99)
    train(own(5, drop=0.5), tried(), examples(WHOLE))
    assert of() == first
    assert of(seed=4) != first


def of_own(net: keras.Sequential) -> Any:
    """The graph that a network like `net` would be trained in."""
    return graph_for(net, plan_of(tried(), examples(WHOLE), (FEATURES,)))


def test_custom_models_share_a_graph_unless_a_rate_is_built_into_it(
    graphs: OrderedDict[str, Any], own: Callable[..., keras.Sequential]
) -> None:
    for drop in (0.1, 0.4):
        of_own(own(drop=drop))
    assert len(graphs) == 1
    for count, built_in in enumerate(("spatial", "whole"), start=2):
        of_own(own(**{built_in: 0.4}))
        assert len(graphs) == count


Layers = list[keras.layers.Layer]


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
    graphs: OrderedDict[str, Any], layers: Callable[[bool], Layers]
) -> None:
    for count, other in enumerate((False, True), start=1):

        def made(_: Any, shape: Any, classes: int, other: bool = other) -> keras.Model:
            last = keras.layers.Dense(classes, activation="softmax")
            return keras.Sequential([keras.Input(shape), *layers(other), last])

        found = custom_model.CustomModel("here:made", made, {}, "0")
        of_own(build_network(tried(), (FEATURES,), TASK, 3, custom=found))
        assert len(graphs) == count


@pytest.mark.slow
def test_a_network_within_that_has_weights_of_its_own_learns() -> None:
    def made(_: Any, shape: Any, classes: int) -> keras.Model:
        last = keras.layers.Dense(classes, activation="softmax")
        return keras.Sequential([keras.Input(shape), Scaled(), last])

    found = custom_model.CustomModel("here:made", made, {}, "0")
    ours, theirs = (build_network(tried(), (FEATURES,), TASK, 3, custom=found) for _ in "ab")
    before = ours.get_weights()
    train(ours, tried(), examples(FEW))
    plain_fit(theirs, examples(FEW))
    assert moved(before, ours.get_weights())
    assert close(ours.get_weights(), theirs.get_weights())


def test_a_custom_model_learns_and_is_plain_keras(
    own: Callable[..., keras.Sequential], tmp_path: Path
) -> None:
    net = own()
    before = net.get_weights()
    history = train(net, tried(), examples(WHOLE), epochs=3)
    assert moved(before[:1], net.get_weights()[:1])
    assert history["accuracy"][-1] > history["accuracy"][0]
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    x, _ = examples(20)
    assert np.allclose(loaded(x), net(x), atol=1e-6)


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
    given = np.asarray(net(x[150:]))[:, 0]
    error = (given - y[150:]) * 20
    assert history["val_loss"][-1] == pytest.approx(np.mean(error**2) / 400, rel=1e-4)
    assert history["val_mae"][-1] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert history["val_rmse"][-1] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-4)
    spread = np.var(y[150:]) * 400
    assert history["val_r2"][-1] == pytest.approx(1 - np.mean(error**2) / spread, rel=1e-3)
    registered = network_to_register(net, small_dataset(task=task, sample_shape=(FEATURES,)))
    assert np.asarray(registered(x)) == pytest.approx(np.asarray(net(x)) * 20 + 100, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_train_as_keras_fit_does_with_them(smoothing: float) -> None:
    data = examples(96, 0)
    weights = np.array([0.5, 1, 2, 4], np.float32)
    what = tried(label_smoothing=smoothing, dropout_rate=0.0)
    ours, theirs = (build_network(what, (FEATURES,), TASK, 3) for _ in "ab")
    history = training.train(ours, data, what, epochs=1, seed=1, class_weights=weights)
    (x, y), order = data, np.asarray(epoch_order(96, 1, 0))
    labels = np.eye(CLASSES, dtype=np.float32)[y] * (1 - smoothing) + smoothing / CLASSES
    theirs.compile(
        theirs.optimizer, "categorical_crossentropy", metrics=["accuracy"], run_eagerly=True
    )
    fitted = theirs.fit(
        x[order],
        labels[order],
        sample_weight=weights[y[order]],
        batch_size=what["batch_size"],
        shuffle=False,
        verbose=0,
    ).history
    assert history["loss"] == pytest.approx(fitted["loss"], rel=1e-4)
    steps = 1  # of a batch that is larger than the data
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) == steps
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
