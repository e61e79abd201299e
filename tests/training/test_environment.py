"""What a trial records of the machine that trained it."""

import pytest
import tensorflow as tf

from search.training import environment
from search.training import train as training


def test_the_gpu_is_part_of_the_recorded_environment_where_there_is_one(
    grown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment.here.__wrapped__
    assert here()["gpu"] == "NVIDIA H100"
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    without = here()
    assert "gpu" not in without
    monkeypatch.setattr(environment, "gpu_device", lambda: None)
    monkeypatch.setattr(training, "gpu_name", None)  # is not called
    assert here() == without
