"""A random sample of batches: what it keeps, counts and draws; a digest in any order."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from search import batches
from search.batches import Sample, digest


def sampled(x: NDArray[Any], y: NDArray[Any], size: int, most: int, seed: int = 0) -> Sample:
    """A sample of at most `most` of the examples, which come in batches of this size."""
    sample = Sample(most * (x[0].nbytes + y[0].nbytes), seed)
    for first in range(0, len(x), size):
        sample.add(x[first : first + size], y[first : first + size])
    return sample


def test_what_fits_is_kept_in_its_order() -> None:
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10) % 3
    sample = sampled(x, y, 4, most=10)
    np.testing.assert_array_equal(sample.found()[0], x)
    np.testing.assert_array_equal(sample.found()[1], y)
    assert (sample.seen, sample.batches, sample.largest) == (10, 3, 4)
    assert dict(sample.counts) == {0: 4, 1: 3, 2: 3}


@pytest.mark.parametrize("size", [1, 7, 100])
def test_each_example_is_as_likely_in_the_sample(size: int) -> None:
    x, y = np.arange(40)[:, None], np.zeros(40)
    drawn = np.zeros(40)
    for seed in range(400):
        found, labels = sampled(x, y, size, most=10, seed=seed).found()
        assert len(np.unique(found)) == len(labels) == 10
        drawn[found[:, 0]] += 1
    assert drawn.sum() == 4000
    assert np.abs(drawn - 100).max() < 5 * np.sqrt(100 * 0.75)
    np.testing.assert_array_equal(x[:, 0], np.arange(40))  # whoever gave them keeps them


def test_a_class_that_the_sample_lacks_is_in_it_once() -> None:
    x = np.arange(1000.0)[:, None]
    y = np.where(np.arange(1000) == 500, 7, np.arange(1000) % 2)
    found, labels = sampled(x, y, 64, most=5).found()
    assert sorted(set(labels.tolist())) == [0, 1, 7]
    assert 5 < len(labels) <= 7
    assert found[labels == 7].tolist() == [[500.0]]


def test_numbers_and_features_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "NUMBERS", 12)
    assert len(sampled(np.zeros((9, 4)), np.zeros(9), 2, most=9).found()[0]) == 3
    monkeypatch.setattr(batches, "SAMPLE", 2)
    assert len(sampled(np.zeros((9, 4)), np.zeros(9), 2, most=9).found()[0]) == 2
    assert sampled(np.zeros((9, 4)), np.zeros(9), 2, most=9).counts == {}


def test_examples_of_other_shapes_are_refused() -> None:
    sample = sampled(np.zeros((3, 2)), np.zeros(3), 3, most=3)
    with pytest.raises(ValueError, match="shape"):
        sample.add(np.zeros((300, 5)), np.zeros(300))


def test_a_digest_is_that_of_the_examples_in_any_order() -> None:
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    order = np.random.default_rng(0).permutation(6)
    expected = digest([(x, y)])
    assert digest([(x[order[:2]], y[order[:2]]), (x[order[2:]], y[order[2:]])]) == expected
    assert digest([(x, y[::-1])]) != expected
    assert digest([(x[1:], y[1:])]) != expected
