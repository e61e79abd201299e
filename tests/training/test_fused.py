"""The layers that a graph shares among rates, seeds and sizes."""

from typing import Any

import numpy as np
import pytest
from test_epoch import build, train, tried
from test_train import WHOLE, examples

from search.training import fused
from search.training.epoch import _leaves
from search.training.train import _of_thread


@pytest.fixture
def no_graphs() -> None:
    _of_thread.graphs.clear()


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


def test_the_size_of_a_layer_is_variable_unless_another_may_depend_on_it() -> None:
    def of(**changed: Any) -> list[bool]:
        return list(fused.resizable(build(tried(**changed))).values())

    assert of(hidden_layers=2) == [False, True, True]  # from the output back
    assert of(hidden_layers=2, batch_normalization=True) == of(hidden_units=1) == []
