"""What tests of the gate share: small studies that register a model, and the versions there are."""

from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from search.config.settings import StudyConfig
from search.promotion.gate import Decision
from search.report.progress import Result

NAME = "MNIST_DNN_Model"
GOOD = {"epochs": 12, "learning_rate": "0.01"}
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
