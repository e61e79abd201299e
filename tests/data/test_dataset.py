"""A dataset: its size, its split, its scale, its digest, and what is wrong with it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arrays, labelled, load
from numpy.typing import NDArray

from search import StudyConfig
from search.data import dataset as data
from search.data.dataset import Dataset
from search.data.load import class_weights, load_dataset
from search.data.sources import MNIST
from search.errors import InputError
from search.preflight import choose_batch_size


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


# ---- labels ----------------------------------------------------------------------------------


def labels(rows: int = 40) -> NDArray[np.int64]:
    """Three labels, of which an example has none, some or all."""
    return np.stack([np.arange(rows) // k % 2 for k in (1, 2, 4)], axis=1)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float32, bool])
def test_several_columns_of_zeros_and_ones_are_labels(tmp_path: Path, kind: Any) -> None:
    found = load(tmp_path, y_train=labels().astype(kind), y_test=labels(10))
    assert (found.task.kind, found.task.outputs, found.classes) == ("multilabel", 3, 0)
    assert found.y_all.dtype == found.y_test.dtype == np.float32
    np.testing.assert_array_equal(found.y_all, labels())
    assert found.problem is None


def test_rows_with_one_label_each_are_labels_only_if_asked(tmp_path: Path) -> None:
    y = np.eye(3, dtype=int)[np.arange(40) % 3]
    with pytest.raises(InputError, match=r"whole numbers in shape \(n,\).* --task multilabel"):
        load(tmp_path, y_train=y, y_test=y[:10])
    path = str(tmp_path / "data.npz")
    assert load_dataset(path, 0.1, split="random", task="multilabel").task.labels == 3
    load(tmp_path, y_train=labels(), y_test=labels(10))
    with pytest.raises(InputError, match="several labels are --task multilabel"):
        load_dataset(path, 0.1, task="classification")


def test_a_label_that_all_or_no_training_examples_have_is_named(tmp_path: Path) -> None:
    y = labels()
    y[:36, 2] = 0
    problem = load(tmp_path, y_train=y, y_test=labels(10)).problem
    assert problem is not None
    assert "has none with label 2; give --split random" in problem


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


# ---- splits and normalization --------------------------------------------------------------------


def test_a_stratified_split_gives_both_parts_the_same_proportion_of_every_class(
    tmp_path: Path,
) -> None:
    dataset = load(tmp_path, split="stratified", **labelled(150, 150, 30))
    assert dataset.problem is None
    assert np.bincount(dataset.train[1]).tolist() == [135, 135, 27]
    assert np.bincount(dataset.validation[1]).tolist() == [15, 15, 3]
    assert sorted(dataset.x_all[:, 0]) == list(range(330)), "every example is in one part"
    np.testing.assert_array_equal(dataset.y_all, np.digitize(dataset.x_all[:, 0], [150, 300]))
    assert "(stratified split)" in str(dataset)


def test_a_stratified_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first, same, other = (
        load(tmp_path, split="stratified", seed=seed, **labelled(50, 50)).validation[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_stratified_split_trains_on_every_class_and_validates_what_it_can(
    tmp_path: Path, share: float
) -> None:
    counts = (1000, 100, 25, 2, 1)
    dataset = load(tmp_path, share=share, split="stratified", **labelled(*counts))
    assert np.bincount(dataset.train[1], minlength=5).min() >= 1
    validated = np.bincount(dataset.validation[1], minlength=5)
    assert validated[:3].min() >= 1
    wanted = 1128 - int(1128 * (1 - share))
    assert len(dataset.validation[1]) == min(wanted, 1128 - 5)
    assert dataset.problem is None


# ---- scales ----------------------------------------------------------------------------------

SCALES = np.array([1e-3, 1, 4e3, 1e6], np.float32)


def test_features_are_normalized_by_the_training_part_alone(tmp_path: Path) -> None:
    x = arrays()["x_train"] * SCALES + SCALES * 5
    x[36:] *= 100  # validates
    dataset = load(tmp_path, normalize=True, x_train=x)
    seen, _ = dataset.train
    np.testing.assert_allclose(seen.mean(axis=0), np.zeros(4), atol=1e-3)
    np.testing.assert_allclose(seen.std(axis=0), np.ones(4), atol=1e-3)
    assert np.abs(dataset.validation[0]).min() > 10
    np.testing.assert_array_equal(dataset.x_test, arrays()["x_test"])
    assert ", normalized," in str(dataset)


def test_a_constant_feature_is_not_blown_up(tmp_path: Path) -> None:
    x = arrays()["x_train"]
    x[:, 1], x[:, 2] = 7, np.float32(0.1) + np.arange(40) % 2 * np.float32(7e-9)
    x[38, 1] = 8  # in the validation part alone
    dataset = load(tmp_path, normalize=True, x_train=x)
    assert np.abs(dataset.x_all).max() < 10


@pytest.mark.parametrize("factor", [1e-9, 1e20])
def test_a_scale_that_float32_cannot_normalize_is_refused(tmp_path: Path, factor: float) -> None:
    x = arrays()["x_train"]
    x[:, 2] *= np.float32(factor)
    with pytest.raises(
        InputError, match=r"standard deviation from 1e-07 to 1e\+19 .* feature 2 has"
    ):
        load(tmp_path, normalize=True, x_train=x)


# ---- regression ----------------------------------------------------------------------------------


def numbers(path: Path, **changed: Any) -> str:
    y = np.random.default_rng(1).normal(50, 8, size=50)
    np.savez(path, **arrays(**{"y_train": y[:40], "y_test": y[40:], **changed}))
    return str(path)


def test_numbers_are_standardized_by_the_training_part_and_stay_as_they_are_for_the_test(
    tmp_path: Path,
) -> None:
    name = numbers(tmp_path / "numbers.npz")
    data = load_dataset(name, 0.25, split="stratified", seed=3)
    assert (data.task.kind, data.task.outputs, data.classes, data.split) == (
        "regression",
        1,
        0,
        "random",
    )
    _, y = data.train
    assert y.dtype == np.float32 and data.train_size == len(y) == 30
    assert (y.mean(), y.std()) == pytest.approx((0, 1), abs=1e-5)
    with np.load(name) as source:
        restored = data.y_all * data.task.deviation + data.task.mean
        assert sorted(restored) == pytest.approx(sorted(source["y_train"]), rel=1e-5)
        assert data.y_test == pytest.approx(source["y_test"], rel=1e-6)
        assert restored.tolist() != pytest.approx(source["y_train"].tolist())  # in random order
    again = load_dataset(name, 0.25, split="random", seed=3)
    assert again.y_all.tolist() == data.y_all.tolist()
    assert load_dataset(name, 0.25, split="random", seed=4).y_all.tolist() != data.y_all.tolist()


def test_whole_numbers_are_classes_unless_the_task_is_a_regression(tmp_path: Path) -> None:
    name = numbers(tmp_path / "numbers.npz", y_train=np.arange(40) % 3, y_test=np.arange(10) % 3)
    assert load_dataset(name, 0.25).task.kind == "classification"
    data = load_dataset(name, 0.25, task="regression")
    assert (data.task.kind, data.y_test.dtype) == ("regression", np.float32)
    assert "a number to predict (" in str(data)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"y_train": np.full(40, np.nan)}, "y_train must hold finite numbers"),
        ({"y_test": np.full(10, 1e300)}, "y_test must hold finite numbers"),
        ({"y_train": np.full(40, 0.1)}, "y_train must hold numbers that differ"),
        ({"y_train": np.full(40, "0.5")}, "y_train must hold numbers in shape"),
        ({"y_train": np.ones((40, 2)) / 3}, "y_train must hold numbers in shape"),
    ],
)
def test_numbers_that_cannot_be_learned_are_refused(
    tmp_path: Path, changed: dict[str, Any], rule: str
) -> None:
    name = numbers(tmp_path / "numbers.npz", **changed)
    with pytest.raises(InputError, match=rule):
        load_dataset(name, 0.25, task="regression")


def test_balanced_class_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    y = np.repeat([0, 1, 2], [30, 6, 4])
    np.savez(tmp_path / "rare.npz", **arrays(y_train=y))
    dataset = load_dataset(str(tmp_path / "rare.npz"), 0.25, split="stratified")
    _, labels = dataset.train
    found = class_weights(StudyConfig(class_weight="balanced"), dataset)
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert found == pytest.approx(expected)
    assert class_weights(StudyConfig(), dataset) is None


@pytest.mark.parametrize(
    ("rows", "size"),
    [(1, 32), (6_400, 32), (6_401, 64), (32_000, 256), (204_800, 1024), (10**9, 1024)],
)
def test_the_batch_size_follows_from_the_number_of_examples(rows: int, size: int) -> None:
    x, y = np.zeros((1, 4), np.float32), np.zeros(1, np.int32)
    data = Dataset(*("mine", "", x, y, x, y), train_size=rows, sample_shape=(4,))
    auto = StudyConfig(batch_size="auto")
    assert choose_batch_size(auto, data, None) == str(size)
    stored = {"batch_size": "64,128"}
    assert choose_batch_size(auto, data, stored) == "64,128"
    assert choose_batch_size(StudyConfig(batch_size="8"), data, stored) == "8"


def test_a_batch_size_of_auto_is_stored_as_what_it_means() -> None:
    auto = StudyConfig(batch_size="auto")
    assert "batch_size" not in auto.space.searched()
    for means, stored in (("256", 256), ("64,128", "64,128")):
        assert auto.resolved(batch_size=means).settings("mine")["batch_size"] == stored
