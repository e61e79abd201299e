"""Two models on the same test examples: the test of the difference, and what can't be compared."""

from pathlib import Path

import invariants
import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from registry import BAD, GOOD, NAME, config, in_production, verdict, versions

from search import pipeline
from search.promotion.comparison import Comparison


@pytest.mark.parametrize(
    ("one", "other", "p"),
    # Binomial tails by hand: 2 * (1 + 10) / 2**10, 2 * (1 + 5) / 2**5 capped at 1, 2 / 2**8.
    [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 8, 2 / 256), (1, 0, 1.0)],
)
def test_the_exact_mcnemar_test(one: int, other: int, p: float) -> None:
    assert Comparison(0.9, 0.9, one, other).p_value == pytest.approx(p)


@pytest.mark.slow
def test_the_accuracies_are_those_of_the_models(held: MlflowClient, clouds: Path) -> None:
    found = verdict(pipeline.run(config(clouds, **BAD)))
    with np.load(clouds) as data:
        x, y = data["x_test"], data["y_test"]
    right = []
    for version, accuracy in ((2, found.value), (1, found.champion_value)):
        model = mlflow.keras.load_model(f"models:/{NAME}/{version}")
        right.append(model.predict(x, verbose=0).argmax(axis=1) == y)
        assert right[-1].mean() == pytest.approx(accuracy)
    alone = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert Comparison(0, 0, *alone).p_value == found.p_value


@pytest.fixture
def damaged(in_folder: Path, client: MlflowClient, clouds: Path) -> Path:
    """The file of the model in production, which was version 1, cut in half."""
    pipeline.run(config(clouds, study_name="champion", **GOOD))
    (file,) = in_folder.rglob("model.keras")
    (in_folder / "whole").write_bytes(file.read_bytes())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


@pytest.mark.slow
def test_a_damaged_production_model_is_named_and_nothing_is_promoted(
    damaged: Path, client: MlflowClient, clouds: Path
) -> None:
    result = pipeline.run(config(clouds, **BAD))
    found = verdict(result)
    assert result.winner is not None
    assert (result.winner.version, found.promoted) == (2, False)
    assert "version 1, in production, could not be compared: it can't be loaded" in str(found)
    assert "--promote always" in str(found)
    assert "\n" not in str(found)
    assert in_production(client) == 1
    assert "gate.problem" in versions(client)[2].tags
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(config(clouds, **BAD))) == found
    assert invariants.dump(Path.cwd()) == before

    damaged.write_bytes(Path("whole").read_bytes())
    repaired = verdict(pipeline.run(config(clouds, **BAD)))
    assert (repaired.promoted, repaired.problem) == (False, None)
    assert "gate.problem" not in versions(client)[2].tags


@pytest.mark.slow
def test_a_damaged_production_model_can_be_replaced(
    damaged: Path, client: MlflowClient, clouds: Path
) -> None:
    found = verdict(pipeline.run(config(clouds, **BAD, promote="always")))
    assert found.promoted
    assert found.problem is not None
    assert in_production(client) == 2


@pytest.mark.slow
def test_a_model_of_another_kind_is_named(
    held: MlflowClient, champion: Path, clouds: Path, in_folder: Path
) -> None:
    class Other(mlflow.pyfunc.PythonModel):
        def predict(self, model_input: list[str]) -> list[str]:
            return model_input

    source = in_folder / "other"
    mlflow.pyfunc.save_model(source, python_model=Other(), pip_requirements=[])
    version = held.create_model_version(NAME, str(source))
    held.set_registered_model_alias(NAME, "production", version.version)
    found = verdict(pipeline.run(config(clouds, **GOOD)))
    assert not found.promoted
    assert "version 2, in production, could not be compared: it is not a Keras model" in str(found)
