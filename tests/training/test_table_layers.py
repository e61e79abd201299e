import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import default_network, small_dataset

from search.data.columns import Columns, adapt
from search.task import Task
from search.training.network import build_network, network_to_register
from search.training.table_layers import embeddings, encoding
from search.training.train import train

RANDOM = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "age": np.where(RANDOM.random(300) < 0.1, np.nan, RANDOM.normal(40, 12, 300)),
        "income": RANDOM.lognormal(10, 1, 300),
        "job": RANDOM.choice(["nurse", "pilot", "Köchin", None], 300),
        "city": [f"city {i % 60}" for i in range(300)],
        "street": [f"street {i % 80}" for i in range(300)],
        "since": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(300), unit="D"),
    }
)
ASKED = pd.DataFrame(
    {
        "age": [30.0, np.nan, np.inf],
        "income": [np.nan, 1e9, 0],
        "job": ["astronaut", None, "Köchin"],
        "city": ["city 59", "nowhere", None],
        "street": [None, "street 1", "street 79"],
        "since": ["2030-05-05", None, "1999-12-31T23:00"],
    }
)
SETS = {"all": list(FRAME), "numbers": ["age", "income"], "words": ["job"], "indices": ["city"]}


def adapted(names: list[str]) -> tuple[Columns, keras.Model]:
    columns = adapt(FRAME[names])
    return columns, keras.Model(*encoding(columns))


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_the_layers_encode_rows_as_the_training_data_are_encoded(names: list[str]) -> None:
    columns, model = adapted(names)
    for frame in (FRAME, ASKED):
        rows = columns.rows(frame)
        layers = model.predict(rows.inputs, verbose=0)
        assert layers.shape == (len(frame), columns.features)
        np.testing.assert_allclose(layers, columns.encode(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_the_registered_model_of_rows_answers_as_the_network_on_encoded_ones(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns = adapt(FRAME[names])
    rows, task = columns.rows(FRAME), Task("classification", 2, ("no", "yes"))
    x, hp = columns.encode(rows), default_network(hidden_units=8)
    network = build_network(hp, (columns.features,), task, 0, None, columns.embeddings)
    network.set_weights([RANDOM.normal(size=weight.shape) for weight in network.get_weights()])
    path = tmp_path_factory.mktemp("model") / "model.keras"
    network_to_register(network, small_dataset(columns=columns)).save(path)
    loaded = keras.saving.load_model(path)
    inputs = {name: tf.constant(values) for name, values in rows.inputs.items()}
    np.testing.assert_allclose(loaded(inputs), network(x), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_embeddings_are_trained_and_their_first_values_depend_on_the_seed_alone() -> None:
    columns = adapt(FRAME[["age", "city", "street"]])
    x, y = columns.encode(columns.rows(FRAME)), np.arange(300, dtype=np.int32) % 2
    hp = default_network(hidden_units=4)

    def network(seed: int) -> keras.Sequential:
        task = Task("classification", 2)
        return build_network(hp, (columns.features,), task, seed, None, columns.embeddings)

    def weights(model: keras.Model) -> list[np.ndarray]:
        return [layer.numpy() for layer in model.layers[0].weights]

    first, again, other = network(1), network(1), network(2)
    assert len(weights(first)) == 2
    for one, two, three in zip(weights(first), weights(again), weights(other), strict=True):
        np.testing.assert_array_equal(one, two)
        assert (one != three).any()
    history = train(first, (x, y), hp, epochs=30, seed=0)
    assert all((one != two).any() for one, two in zip(weights(first), weights(again), strict=True))
    assert history["accuracy"][-1] > 0.9  # the city alone tells the class


def test_an_embedding_of_many_words_has_fifty_dimensions_at_most() -> None:
    model = embeddings(3, (51, 10_000), seed=0)
    assert [weight.shape for weight in model.weights] == [(51, 14), (10_000, 50)]
    assert model.output_shape == (None, 1 + 14 + 50)
