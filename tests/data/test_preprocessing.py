"""Stratified splits, and features of any scale made alike."""

from pathlib import Path

import numpy as np
import pytest
from conftest import arrays, labelled, load

from search.errors import InputError


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
