"""What a trial records of the machine that trained it."""

from importlib.metadata import PackageNotFoundError

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


def test_the_version_of_tensorflow_is_that_of_the_package_that_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(name: str) -> str:
        if name != "tensorflow-cpu":
            raise PackageNotFoundError(name)
        return "2.21.0"

    assert environment.version("tensorflow") == tf.__version__
    monkeypatch.setattr(environment.importlib.metadata, "version", installed)
    assert environment.version("tensorflow") == "2.21.0"
    with pytest.raises(PackageNotFoundError, match="keras"):
        environment.version("keras")
