"""The steps of a run: a server that stays away ends it, and the next run completes it."""

from pathlib import Path
from typing import Any

import invariants
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search import pipeline, session
from search.config.settings import StudyConfig
from search.errors import RunError

TRIALS = 2


@pytest.fixture
def config(in_folder: Path, clouds: Path) -> StudyConfig:
    return small(clouds)


def small(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {"epochs": 1, "n_trials": TRIALS, "workers": 1, "hidden_units": "8"}
    return StudyConfig(
        dataset=str(dataset), report="none", baselines="none", **{**settings, **changed}
    )


def retrainings(found: dict[str, Any]) -> list[str]:
    return sorted(r.info.status for r in found["children"] if r.info.run_name.startswith("retrain"))


@pytest.mark.slow
def test_an_error_while_registering_is_one_line_and_the_next_run_completes_it(
    config: StudyConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("the server is down")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_PATIENCE", 1)
        patch.setattr(MlflowClient, "set_registered_model_alias", refuse)
        with pytest.raises(RunError, match="the server is down") as caught:
            pipeline.run(config)
    assert "\n" not in str(caught.value)
    assert invariants.check(Path.cwd(), TRIALS, registered=False)["parent"].info.status == "FAILED"
    pipeline.run(config)
    assert retrainings(invariants.check(Path.cwd(), TRIALS)) == ["FINISHED"]
