"""What tests of the gate share: small studies that register a model, and the versions there are."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from search import pipeline
from search.config.settings import StudyConfig
from search.promotion.gate import Decision
from search.report.progress import Result

NAME = "MNIST_DNN_Model"
GOOD = {"epochs": 12, "learning_rate": "0.01", "study_name": "better"}
BAD = {"epochs": 1, "learning_rate": "0.0001"}


def config(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {
        "epochs": 1,
        "n_trials": 1,
        "workers": 1,
        "hidden_units": "16",
        "report": "none",
        "baselines": "none",
    }
    return StudyConfig(dataset=str(dataset), **{**settings, **changed})


def versions(client: MlflowClient) -> dict[int, Any]:
    found = client.search_model_versions(f"name = '{NAME}'")
    return {int(v.version): client.get_model_version(NAME, v.version) for v in found}


def in_production(client: MlflowClient) -> int:
    """The one version in production, by alias and by stage."""
    number = int(client.get_model_version_by_alias(NAME, "production").version)
    stages = [n for n, v in versions(client).items() if v.current_stage == "Production"]
    assert stages == [number]
    return number


def verdict(result: Result) -> Decision:
    assert result.winner is not None
    return result.winner.verdict


def let_a_good_model_follow_a_poor_one(folder: Path, dataset: Path) -> None:
    """Run both studies in `folder`, and keep how they ended for `results`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = [pipeline.run(config(dataset, **settings)) for settings in (BAD, GOOD)]
    (folder / "results.pickle").write_bytes(pickle.dumps(ended))


def results(folder: Path) -> tuple[Result, Result]:
    """How the study of the poor model ended, and that of the good one."""
    poor, good = pickle.loads((folder / "results.pickle").read_bytes())
    return poor, good


def register_by_hand(
    client: MlflowClient, version: int, run_id: str | None = None, source: str | None = None
) -> int:
    """Put the model of `version` into production once more, as a version without our tags.

    source: where its files are, if not where they were. Returns the new version.
    """
    source = source or client.get_model_version(NAME, str(version)).source
    new = client.create_model_version(NAME, source, run_id)
    client.set_registered_model_alias(NAME, "production", new.version)
    return int(new.version)


def unregister(client: MlflowClient, version: int) -> None:
    """Delete a version, so that the next run of its study registers its model anew."""
    client.delete_model_version(NAME, str(version))
