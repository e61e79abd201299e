"""Two models on the same test examples: the test of the difference, and what can't be compared."""

import shutil
from pathlib import Path

import invariants
import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from registry import (
    BAD,
    NAME,
    config,
    in_production,
    register_by_hand,
    results,
    unregister,
    verdict,
    versions,
)

from search import pipeline
from search.data.dataset import Dataset
from search.promotion.baselines import BestBaseline, pack
from search.promotion.comparison import Comparison, compare_with_baseline
from search.task import describe

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("one", "other", "p"),
    # Binomial tails by hand: 2 * (1 + 10) / 2**10, 2 * (1 + 5) / 2**5 capped at 1, 2 / 2**8.
    [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 8, 2 / 256), (1, 0, 1.0)],
)
def test_the_exact_mcnemar_test(one: int, other: int, p: float) -> None:
    assert Comparison(0.9, 0.9, one, other).p_value == pytest.approx(p)


def dataset_of(y: np.ndarray, kind: str) -> Dataset:
    """A dataset of which the comparison needs the test examples alone."""
    task, _ = describe(kind, y, len(y))
    x = np.zeros((len(y), 2), np.float32)
    sizes = {"train_size": 1, "sample_shape": (2,)}
    return Dataset("mine", "0", x, y, x, y, **sizes, task=task)


def test_a_model_is_compared_with_a_baseline_by_its_accuracy() -> None:
    y = np.arange(100, dtype=np.int32) % 2
    outputs = np.eye(2)[np.where(np.arange(100) < 8, 1 - y, y)]  # 8 mistakes
    baseline = BestBaseline("simple", "val_accuracy", pack(np.arange(100) < 78))  # 22 others
    found = compare_with_baseline(None, dataset_of(y, "classification"), outputs, baseline, 0)
    assert found == {
        "baseline": "simple",
        "metric": "test_accuracy",
        "value": 0.92,
        "baseline_value": 0.78,
        "test": "exact McNemar",
        "p_value": Comparison(0.92, 0.78, 22, 8).p_value,
        "significant": True,
        "only_winner": 22,
        "only_baseline": 8,
    }


@pytest.mark.parametrize(("error", "significant"), [(1.0, False), (3.0, True)])
def test_a_model_is_compared_with_a_baseline_by_the_bootstrap(
    error: float, significant: bool
) -> None:
    random = np.random.default_rng(0)
    y = random.normal(1000, 10, 200).astype(np.float32)
    mine, theirs = (
        (y + random.normal(0, size, 200))[:, np.newaxis].astype(np.float32) for size in (1, error)
    )
    baseline = BestBaseline("simple", "val_rmse", pack(theirs))
    found = compare_with_baseline(None, dataset_of(y, "regression"), mine, baseline, 0)
    for outputs, name in ((mine, "value"), (theirs, "baseline_value")):
        assert found[name] == pytest.approx(np.sqrt(((outputs[:, 0] - y) ** 2).mean()), rel=1e-4)
    assert (found["metric"], found["test"]) == ("test_rmse", "paired bootstrap")
    assert found["significant"] is significant
    assert "only_winner" not in found


@pytest.mark.slow
def test_the_accuracies_are_those_of_the_models(
    rivals: Path, held: MlflowClient, clouds: Path
) -> None:
    found = verdict(results(rivals)[1])
    with np.load(clouds) as data:
        x, y = data["x_test"], data["y_test"]
    right = []
    for version, accuracy in ((2, found.value), (1, found.champion_value)):
        model = mlflow.keras.load_model(f"models:/{NAME}/{version}")
        right.append(model.predict(x, verbose=0).argmax(axis=1) == y)
        assert right[-1].mean() == pytest.approx(accuracy)
    alone = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert Comparison(0, 0, *alone).p_value == found.p_value


@pytest.mark.slow
def test_a_damaged_production_model_is_named_and_nothing_is_promoted_unless_always(
    held: MlflowClient, clouds: Path
) -> None:
    shutil.copytree(local_file_uri_to_path(held.get_model_version(NAME, "2").source), "copy")
    (file,) = Path("copy").rglob("model.keras")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert register_by_hand(held, 2, source=str(Path("copy").resolve())) == 3
    unregister(held, 1)

    result = pipeline.run(config(clouds, **BAD))
    found = verdict(result)
    assert result.winner is not None
    assert (result.winner.version, found.promoted) == (4, False)
    assert "version 3, in production, could not be compared: it can't be loaded" in str(found)
    assert "--promote always" in str(found)
    assert "\n" not in str(found)
    assert in_production(held) == 3
    assert "gate.problem" in versions(held)[4].tags
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(config(clouds, **BAD))) == found
    assert invariants.dump(Path.cwd()) == before

    file.write_bytes(whole)
    repaired = verdict(pipeline.run(config(clouds, **BAD)))
    assert (repaired.promoted, repaired.problem) == (False, None)
    assert "gate.problem" not in versions(held)[4].tags

    file.write_bytes(whole[: len(whole) // 2])
    forced = verdict(pipeline.run(config(clouds, **BAD, promote="always")))
    assert forced.promoted
    assert forced.problem is not None
    assert in_production(held) == 4


@pytest.mark.slow
def test_a_model_of_another_kind_is_named(
    held: MlflowClient, clouds: Path, in_folder: Path
) -> None:
    class Other(mlflow.pyfunc.PythonModel):
        def predict(self, model_input: list[str]) -> list[str]:
            return model_input

    source = in_folder / "other"
    mlflow.pyfunc.save_model(source, python_model=Other(), pip_requirements=[])
    assert register_by_hand(held, 2, source=str(source)) == 3
    unregister(held, 1)
    found = verdict(pipeline.run(config(clouds, **BAD)))
    assert not found.promoted
    assert "version 3, in production, could not be compared: it is not a Keras model" in str(found)
