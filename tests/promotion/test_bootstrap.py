"""The paired bootstrap finds differences that are there, and none where there is none."""

import time

import numpy as np
import pytest
from test_measures import of_classes, of_numbers

from search.promotion.bootstrap import RESAMPLES, compare
from search.promotion.comparison import SIGNIFICANT
from search.task import METRICS


@pytest.mark.parametrize("name", ["val_auc", "val_f1", "val_balanced_accuracy", "val_loss"])
def test_a_model_is_not_better_than_itself(name: str) -> None:
    task, y, outputs = of_classes(3)
    found = compare(task, METRICS[name], y, outputs, outputs.copy(), 0, 200)
    assert (found.p_value, found.low, found.high) == (1, 0, 0)
    assert found.challenger == found.champion


@pytest.mark.parametrize("name", ["val_auc", "val_balanced_accuracy", "val_loss"])
def test_a_model_that_knows_nothing_is_worse(name: str) -> None:
    task, y, outputs = of_classes(3)
    other = np.random.default_rng(9).permutation(outputs)
    found = compare(task, METRICS[name], y, outputs, other, 0, 500)
    assert found.p_value == pytest.approx(2 / 501)
    assert METRICS[name].sign * (found.challenger - found.champion) > 0
    assert found.low < found.challenger - found.champion < found.high
    assert found.low * found.high > 0
    swapped = compare(task, METRICS[name], y, other, outputs, 0, 500)
    assert swapped.p_value == found.p_value
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_without_a_difference_one_in_twenty_is_significant() -> None:
    task, y, _ = of_numbers(100)
    random = np.random.default_rng(0)
    significant = 0
    for seed in range(200):
        one, other = (y[:, None] + random.normal(0, 10, (2, len(y), 1))).astype(np.float32)
        found = compare(task, METRICS["val_rmse"], y, one, other, seed, 200)
        significant += found.p_value < SIGNIFICANT
    assert 2 <= significant <= 24


def test_the_seed_decides() -> None:
    task, y, outputs = of_numbers(60)
    other = np.roll(outputs, 1)
    found = [compare(task, METRICS["val_mae"], y, outputs, other, seed, 100) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_ten_thousand_examples_take_seconds() -> None:
    task, y, outputs = of_classes(10, 10_000)
    started = time.process_time()
    compare(task, METRICS["val_auc"], y, outputs, outputs[:, ::-1], 0, RESAMPLES // 10)
    assert time.process_time() - started < 6  # on a slow machine
