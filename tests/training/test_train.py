"""The epoch in the graph learns what a plain Keras loop learns, to float precision."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import default_network
from numpy.typing import NDArray

from search.data.function import Pipeline
from search.data.preparation import Normalization, scaled
from search.task import Task
from search.training import epoch as graph
from search.training import train as training
from search.training.fused import Examples, plan_of
from search.training.network import build_network
from search.training.train import (
    VALIDATION_BATCH,
    History,
    TrainingDiverged,
    batches_of,
    evaluate,
    gpu_name,
    graph_for,
    use_one_thread_each,
)

FEATURES, CLASSES, BATCH = 20, 4, 32
TASK = Task("classification", CLASSES)
WHOLE, RAGGED = 50 * BATCH, 49 * BATCH + 7  # both are 50 steps an epoch
FEW = 3 * BATCH + 7  # 4 steps
Weights = list[NDArray[Any]]


def examples(count: int, seed: int = 0) -> Examples:
    random = np.random.default_rng(seed)
    y = random.integers(0, CLASSES, count).astype(np.int32)
    x = random.normal(size=(count, FEATURES)) + np.eye(CLASSES, FEATURES)[y] * 2
    return x.astype(np.float32), y


def network(dropout: float = 0.0, rate: float = 0.001, units: int = 16) -> keras.Sequential:
    return build_network(default_network(units, dropout, rate), (FEATURES,), TASK, seed=3)


def train(
    net: keras.Sequential, data: Examples, batch_size: int = BATCH, **options: Any
) -> History:
    """Train a default network with its own rates."""
    return training.train(
        net, data, default_network(batch_size=batch_size), **{"epochs": 1, "seed": 7, **options}
    )


def plain_fit(net: keras.Sequential, data: Examples, epochs: int, seed: int = 7) -> Any:
    """Keras' own loop over the same examples in the same order."""
    x, y = data
    losses = []
    for epoch in range(epochs):
        order = graph.epoch_order(len(x), seed, epoch).numpy()
        history = net.fit(x[order], y[order], batch_size=BATCH, shuffle=False, verbose=0)
        losses.append(history.history["loss"][0])
    return losses


def moved(before: Weights, after: Weights) -> bool:
    return all(np.abs(b - a).max() > 0.01 for b, a in zip(before, after, strict=True))


def same(one: Weights, other: Weights) -> bool:
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_the_steps_are_those_of_the_plain_loop_after_other_rates_used_the_graph(
    graphs: OrderedDict[str, Any],
) -> None:
    train(network(dropout=0.5, rate=0.1), examples(WHOLE))
    ours, plain = network(rate=0.01), network(rate=0.01)
    plain.run_eagerly = True  # a graph takes longer to trace than four steps take
    before = ours.get_weights()
    assert same(before, plain.get_weights())
    history = train(ours, examples(4 * BATCH))
    losses = plain_fit(plain, examples(4 * BATCH), epochs=1)
    assert len(graphs) == 1
    assert moved(before, ours.get_weights())
    assert same(ours.get_weights(), plain.get_weights())
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    assert int(ours.optimizer.iterations) == int(plain.optimizer.iterations) == 4


@pytest.mark.slow
def test_50_steps_an_epoch_are_those_of_the_plain_loop_each_epoch_in_an_order_of_its_own() -> None:
    ours, plain = network(), network()
    before = ours.get_weights()
    history = train(ours, examples(RAGGED), epochs=3)
    losses = plain_fit(plain, examples(RAGGED), epochs=3)
    assert moved(before, ours.get_weights())
    assert same(ours.get_weights(), plain.get_weights())
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    assert int(ours.optimizer.iterations) == int(plain.optimizer.iterations) == 150
    orders = [graph.epoch_order(RAGGED, 7, epoch).numpy() for epoch in range(3)]
    assert all(sorted(order) == list(range(RAGGED)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 3
    assert list(graph.epoch_order(100, 7, 0)) != list(graph.epoch_order(100, 8, 0))


def test_the_last_smaller_batch_is_trained_on() -> None:
    x, y = examples(BATCH + 1)
    last = graph.epoch_order(len(x), 7, 0).numpy()[-1]
    changed = x.copy()
    changed[last] += 5
    one, other = network(), network()
    train(one, (x, y))
    train(other, (changed, y))
    assert int(one.optimizer.iterations) == 2
    assert not same(one.get_weights(), other.get_weights())


def test_validation_is_measured_after_every_epoch_as_keras_measures_it() -> None:
    ours, held_out = network(rate=0.01), examples(2 * VALIDATION_BATCH + 1, seed=1)
    history = train(ours, examples(WHOLE), validation=held_out, epochs=2)
    names = {"loss", "accuracy", *(metric.name for metric in TASK.metrics)}
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(names, 2)
    expected = ours.evaluate(*held_out, verbose=0, return_dict=True)
    outputs, found = evaluate(ours, held_out)
    assert found == pytest.approx(expected, rel=1e-5)
    assert outputs == pytest.approx(ours.predict(held_out[0], verbose=0), rel=1e-5)
    assert evaluate(ours, held_out, keep=False) == (None, found)
    assert history["val_loss"][-1] == pytest.approx(expected["loss"], rel=1e-5)
    assert history["val_accuracy"][-1] == pytest.approx(expected["accuracy"], rel=1e-5)
    assert history["val_accuracy"][-1] > 0.5


def test_equal_architectures_share_one_graph_whatever_their_rates_and_sizes(
    graphs: OrderedDict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    epoch_order = graph.epoch_order

    def counting(*arguments: Any) -> Any:
        traced.append(arguments)  # Python runs when the epoch is traced, not when it is trained
        return epoch_order(*arguments)

    monkeypatch.setattr(graph, "epoch_order", counting)
    for dropout, rate, units, size in (
        (0.0, 0.001, 16, 32),
        (0.4, 0.002, 40, 16),
        (0.1, 0.1, 2, 99),
    ):
        train(network(dropout, rate, units), examples(RAGGED), size, epochs=2)
    assert len(graphs) == len(traced) == 1
    keep(activation="elu")
    keep(hidden_layers=2)
    keep(hidden_units=1)
    assert len(graphs) == 4


def keep(**changed: Any) -> None:
    hp = default_network(**{"hidden_units": 16, **changed})
    net = build_network(hp, (FEATURES,), TASK, seed=3)
    graph_for(net, plan_of(hp, examples(RAGGED), (FEATURES,)))


def test_the_graph_not_used_for_longest_is_dropped_first(
    graphs: OrderedDict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_GRAPHS", 3)
    for layers in range(1, 4):
        keep(hidden_layers=layers)
    first, second = list(graphs)[:2]
    keep(hidden_layers=1)
    keep(hidden_layers=4)
    assert len(graphs) == 3
    assert first in graphs
    assert second not in graphs


def test_the_same_seed_gives_the_same_history_to_the_last_bit_after_other_trials() -> None:
    def run(**options: Any) -> tuple[History, list[bytes]]:
        net = network(dropout=0.3)
        history = train(net, examples(RAGGED), validation=examples(99, 1), epochs=2, **options)
        return history, [weight.tobytes() for weight in net.get_weights()]

    first = run()
    train(network(dropout=0.5, rate=0.1), examples(WHOLE, seed=5), seed=8)
    assert run() == first
    assert run(seed=8) != first


def test_dropout_drops_in_training_by_its_rate_and_seed() -> None:
    histories = [
        train(network(dropout), examples(WHOLE), validation=examples(99, 1))
        for dropout in (0.0, 0.5, 0.9)
    ]
    losses = [history["loss"][0] for history in histories]
    assert losses == sorted(losses)
    assert losses[2] > 1.2 * losses[0]


@pytest.mark.slow
def test_bytes_train_as_their_scaled_floats() -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (RAGGED, FEATURES)).astype(np.uint8)
    y = (x[:, 0] // 64).astype(np.int32)
    one, other = network(), network()
    as_bytes = train(one, (x, y), validation=(x, y), epochs=2)
    as_floats = train(other, (scaled(x), y), validation=(scaled(x), y), epochs=2)
    assert as_bytes.keys() == as_floats.keys()
    for name, values in as_bytes.items():
        assert values == pytest.approx(as_floats[name], rel=1e-5)
    assert same(one.get_weights(), other.get_weights())
    assert evaluate(one, (x, y))[1] == pytest.approx(evaluate(one, (scaled(x), y))[1], rel=1e-5)


@pytest.mark.parametrize("factor", [np.inf, 1e30])
def test_a_training_that_diverges_says_so(factor: float) -> None:
    x, y = examples(WHOLE)
    with pytest.raises(TrainingDiverged, match=r"became .* in epoch 0"):
        train(network(rate=10.0), ((x * factor).astype(np.float32), y), epochs=3)


def test_a_divergence_leaves_the_next_training_unaffected() -> None:
    expected = train(network(), examples(WHOLE))
    x, y = examples(WHOLE)
    with pytest.raises(TrainingDiverged):
        train(network(rate=10.0), (x * np.float32(1e30), y))
    assert train(network(), examples(WHOLE)) == expected


def test_an_exception_in_a_callback_leaves_the_next_training_unaffected() -> None:
    class Stop(Exception):
        pass

    def stop(epoch: int, logs: dict[str, float]) -> None:
        if epoch == 1:
            raise Stop

    expected = train(network(0.2), examples(WHOLE), epochs=3)
    net = network(0.2)
    with pytest.raises(Stop):
        callback = keras.callbacks.LambdaCallback(on_epoch_end=stop)
        train(net, examples(WHOLE), epochs=3, callbacks=[callback])
    assert int(net.optimizer.iterations) == 100
    assert train(network(0.2), examples(WHOLE), epochs=3) == expected


WHERE_THIS_PACKAGE_IS_NOT = """
import sys
for name in list(sys.modules):
    if name.split(".")[0] == "search":
        del sys.modules[name]
sys.modules["search"] = None
import keras, numpy as np
assert keras.saving.get_custom_objects() == {}
net = keras.saving.load_model("net.keras")
assert type(net) is keras.Sequential and type(net.optimizer) is keras.optimizers.Adam
assert int(net.optimizer.iterations) == 100
np.save("prediction.npy", net.predict(np.load("x.npy"), verbose=0))
x, y = np.load("x.npy"), np.zeros(50)
net.fit(x, y, verbose=0)
assert int(net.optimizer.iterations) == 102
"""


@pytest.mark.slow
def test_the_trained_model_is_plain_keras_and_loads_where_this_package_is_not(
    tmp_path: Path,
) -> None:
    net = network(dropout=0.2)
    train(net, examples(RAGGED), epochs=2)
    assert type(net) is keras.Sequential
    assert type(net.optimizer) is keras.optimizers.Adam
    assert {type(layer).__module__.split(".")[0] for layer in net.layers} == {"keras"}
    assert int(net.optimizer.iterations) == 100
    moments = net.optimizer.variables[2:]
    assert len(moments) == 8
    assert all(np.abs(moment.numpy()).max() > 0 for moment in moments)

    x, _ = examples(50, seed=2)
    net.save(tmp_path / "net.keras")
    np.save(tmp_path / "x.npy", x)
    process = forks.Python(["-c", WHERE_THIS_PACKAGE_IS_NOT], cwd=tmp_path)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    expected = np.asarray(net(x))
    assert np.allclose(np.load(tmp_path / "prediction.npy"), expected, rtol=1e-5, atol=1e-6)
    assert len(set(expected.argmax(axis=1))) > 1


# ---- pipelines -----------------------------------------------------------------------------------


class Given(Pipeline):
    """A pipeline that is here, so no function is called."""

    def call(self, part: str = "train") -> Any:
        return self.__dict__["given"]


def pipeline(given: tf.data.Dataset, count: int, size: int | None = BATCH, **more: Any) -> Given:
    described = {"name": "mine:load", "digest": "", "seed": 0, "spec": "", "held": "", "counts": {}}
    known = {"examples": count, "batch_count": -(-count // BATCH), "dtype": "float32"}
    found = Given(**{**described, **known, "batch_size": size, "task": TASK, **more})
    object.__setattr__(found, "given", given)
    return found


def in_the_order_of(data: Examples, seed: int = 7) -> tf.data.Dataset:
    """A pipeline whose epochs have the batches of those in memory."""
    x, y = data
    epochs = itertools.count()

    def read() -> Iterator[Examples]:
        order = graph.epoch_order(len(x), seed, next(epochs)).numpy()
        for first in range(0, len(x), BATCH):
            batch = order[first : first + BATCH]
            yield x[batch], y[batch].astype(np.int64)

    kinds = tf.TensorSpec((None, *x.shape[1:]), x.dtype), tf.TensorSpec((None,), np.int64)
    return tf.data.Dataset.from_generator(read, output_signature=kinds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"schedule": "one_cycle", "weight_decay": 0.1, "label_smoothing": 0.1, "dropout_rate": 0.3},
        {"augmentation": "affine", "schedule": "plateau", "early_stopping": 1, "optimizer": "sgd"},
    ],
    ids=str,
)
def test_a_pipeline_trains_to_the_digits_of_its_arrays(changed: dict[str, Any]) -> None:
    data, validation = examples(2 * BATCH + 7), examples(50, seed=1)
    hp = {**default_network(16), "batch_size": BATCH, **changed}
    weights = np.array([1, 2, 1, 3], np.float32) if "weight_decay" in changed else None
    held_out = validation if "early_stopping" in changed else None
    found = []
    for given in (data, pipeline(in_the_order_of(data), len(data[1]))):
        net = build_network(hp, (5, 4), TASK, seed=3)
        history = training.train(
            net,
            given,
            hp,
            epochs=3,
            seed=7,
            shape=(5, 4),
            validation=held_out,
            class_weights=weights,
        )
        found.append((history, [w.tolist() for w in net.get_weights()]))
    assert found[0] == found[1]


def test_a_pipeline_is_read_again_and_to_its_end_in_every_epoch() -> None:
    x, y = examples(4 * BATCH)
    read: list[int] = []

    def one_more_batch_in_each_epoch() -> Iterator[Examples]:
        read.append(0)
        for batch in range(len(read)):
            read[-1] += 1
            part = slice(batch * BATCH, (batch + 1) * BATCH)
            yield x[part], y[part]

    kinds = tf.TensorSpec((None, FEATURES), np.float32), tf.TensorSpec((None,), np.int32)
    growing = tf.data.Dataset.from_generator(one_more_batch_in_each_epoch, output_signature=kinds)
    net = network(0.2)
    train(net, pipeline(growing, BATCH), epochs=4)
    assert read == [1, 2, 3, 4]
    assert int(net.optimizer.iterations) == 1 + 2 + 3 + 4


def test_single_examples_come_in_batches_prepared_as_arrays_are() -> None:
    x = np.random.default_rng(0).normal(size=(10, 2, 3)) * 1e3
    y = np.random.default_rng(1).normal(size=(10, 1)) * 1e3
    scale = Normalization(*np.float32([[3] * 6, [7] * 6]))
    task = Task("regression", 1, mean=0.1, deviation=3.3)
    source = tf.data.Dataset.from_tensor_slices((x, y[:, 0]))
    alone = pipeline(source, 10, None, task=task, normalization=scale)
    read = list(batches_of(alone, 4, 0, 6).as_numpy_iterator())
    assert [len(part) for _, part in read] == [4, 4, 2]
    flat = scale.apply(x.reshape(10, 6).astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([part for part, _ in read]), flat)
    numbers = ((y[:, 0].astype(np.float32).astype(float) - 0.1) / 3.3).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([part for _, part in read]), numbers)


def test_the_winner_sees_the_validation_part_in_every_epoch_as_well() -> None:
    x, y = np.arange(12, dtype=np.uint8)[:, None], np.zeros(12, np.int64)
    source = tf.data.Dataset.from_tensor_slices((x[:8], y[:8])).batch(2)
    more = (x[8:], y[8:].astype(np.int32))
    both = pipeline(source, 8, 2, batch_count=4, dtype="uint8", more=more)
    assert both.steps(2) == (4, 2)
    mixed = batches_of(both, 128, 3, 1)
    epochs = [[part.ravel().tolist() for part, _ in mixed.as_numpy_iterator()] for _ in range(2)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(12))
        assert epoch[-2:] != [[8, 9], [10, 11]]  # not in the end, in their order
    again = batches_of(both, 128, 3, 1).as_numpy_iterator()
    assert [part.ravel().tolist() for part, _ in again] == epochs[0]


# ---- GPUs ----------------------------------------------------------------------------------------


def test_a_worker_takes_of_a_gpus_memory_only_what_it_needs(
    grown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("set_intra_op_parallelism_threads", "set_inter_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, name, lambda count: None)
    use_one_thread_each(1)
    assert grown == ["/physical_device:GPU:0", "/physical_device:GPU:1"]
    assert gpu_name() == "NVIDIA H100"
