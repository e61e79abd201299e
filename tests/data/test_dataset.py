"""A dataset: its size, its split, its scale, its digest, and what is wrong with it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arrays, labelled, load
from numpy.typing import NDArray

from search.data import dataset as data
from search.data.dataset import Dataset, load_dataset
from search.data.sources import MNIST


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return load_dataset("mnist", 0.1)


def test_the_digits_are_split_into_54_6_and_10_thousand(mnist: Dataset) -> None:
    assert mnist.train[0].shape == (54_000, 784)
    assert mnist.validation[0].shape == (6_000, 784)
    assert mnist.x_test.shape == (10_000, 784)
    assert mnist.x_all.shape == (60_000, 784)
    assert [len(y) for _, y in (mnist.train, mnist.validation)] == [54_000, 6_000]
    assert (mnist.features, mnist.classes, mnist.sample_shape) == (784, 10, (28, 28))


def test_the_digits_are_scaled_to_one(mnist: Dataset) -> None:
    for x in (mnist.x_all, mnist.x_test):
        scaled = data.scaled(x)
        assert scaled.dtype == np.float32
        assert (scaled.min(), scaled.max()) == (0.0, 1.0)
    with np.load(MNIST, allow_pickle=False) as archive:
        pixels = archive["x_train"].reshape(60_000, 784)
    np.testing.assert_array_equal(mnist.x_all, pixels)
    np.testing.assert_allclose(data.scaled(mnist.x_all[:100]), pixels[:100] / 255, rtol=1e-6)


def test_the_digits_labels_are_whole_numbers(mnist: Dataset) -> None:
    for y in (mnist.y_all, mnist.y_test):
        assert y.dtype == np.int32
        assert set(np.unique(y)) == set(range(10))


def test_a_dataset_says_its_sizes(mnist: Dataset) -> None:
    assert str(mnist).startswith("mnist: 54,000 / 6,000 / 10,000 examples")


def test_the_validation_set_is_the_end_of_the_training_data(tmp_path: Path) -> None:
    x = np.arange(160, dtype=np.float32).reshape(40, 4)
    dataset = load(tmp_path, 0.25, x_train=x)
    np.testing.assert_array_equal(dataset.train[0], x[:30])
    np.testing.assert_array_equal(dataset.validation[0], x[30:])
    np.testing.assert_array_equal(dataset.validation[1], np.arange(30, 40) % 2)
    np.testing.assert_array_equal(dataset.x_all, x)


@pytest.mark.parametrize(
    ("share", "train"), [(0.1, 36), (0.5, 20), (0.01, 39), (0.97, 1), (0.3, 28), (0.26, 29)]
)
def test_the_split_rounds_as_keras_does(tmp_path: Path, share: float, train: int) -> None:
    assert load(tmp_path, share).train_size == train == int(40 * (1 - share))


def test_bytes_stay_bytes_until_they_are_scaled(tmp_path: Path) -> None:
    x = np.full((40, 2, 2), 51, dtype=np.uint8)
    dataset = load(tmp_path, x_train=x, x_test=x[:10])
    assert dataset.x_all.dtype == dataset.x_test.dtype == np.uint8
    np.testing.assert_allclose(data.scaled(dataset.x_all), np.full((40, 4), 0.2), rtol=1e-6)
    assert dataset.sample_shape == (2, 2)


def test_numbers_with_a_fraction_are_not_scaled(tmp_path: Path) -> None:
    dataset = load(tmp_path, x_train=np.full((40, 4), 255.0))
    np.testing.assert_array_equal(data.scaled(dataset.x_all), np.full((40, 4), 255.0))


def test_the_digest_depends_on_the_numbers_and_not_on_the_file(tmp_path: Path) -> None:
    first = load(tmp_path)
    again = load_dataset(os.path.relpath(tmp_path / "data.npz"), 0.5)
    assert first.digest == again.digest
    x = arrays()["x_train"]
    x[7, 3] += 1
    assert load(tmp_path, x_train=x).digest != first.digest


def test_the_digest_depends_on_the_type_and_the_shape(tmp_path: Path) -> None:
    x = np.zeros((40, 2, 2), dtype=np.float32)
    digests = {
        load(tmp_path, x_train=changed, x_test=changed[:10]).digest
        for changed in (x, x.reshape(40, 4), x.astype(np.float64), x.astype(np.int32))
    }
    assert len(digests) == 4


# ---- splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "part", "lacking"),
    [
        ((40, 40, 8), "training", "2"),
        ((10, 10, 180), "validation", ""),
        ((25, 300), "validation", "0"),
    ],
)
def test_each_part_is_checked_by_itself(
    tmp_path: Path, counts: tuple[int, ...], part: str, lacking: str
) -> None:
    problem = load(tmp_path, **labelled(*counts)).problem
    if not lacking:  # classes of ten need no validation
        assert problem is None
        return
    assert problem is not None
    assert f"the {part} part (last split" in problem
    assert f"but has none of class {lacking}; give --split stratified" in problem


def test_test_examples_that_stand_in_the_training_data_are_counted(tmp_path: Path) -> None:
    x = arrays()["x_train"]
    dataset = load(tmp_path, x_test=np.concatenate([x[3:6], x[3:4], x[:6] + 1]))
    assert dataset.repeated == 4
    assert str(dataset).endswith("test examples in the training data: 4")


# ---- scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [np.ones((40, 4), np.uint8), np.ones((40, 4, 4), np.float32), np.ones((40, 4, 4, 3), np.int32)],
    ids=lambda x: f"{x.dtype}{x.shape[1:]}",
)
def test_images_are_not_normalized(tmp_path: Path, x: NDArray[Any]) -> None:
    dataset = load(tmp_path, normalize=True, x_train=x, x_test=x[:10])
    assert dataset.normalization is None
    assert (dataset.x_all == 1).all()
