"""The registered model: what is in production is the same from a file and through a server."""

from pathlib import Path
from typing import Any

from servers import MlflowServer

from search.config.settings import StudyConfig
from search.tracking.registered_model import find_production


def test_production_is_the_same_through_a_server(finished: dict[str, Any], tmp_path: Path) -> None:
    server = MlflowServer(finished["folder"])
    try:
        through = find_production(StudyConfig(tracking_uri=server.uri))
    finally:
        server.stop()
    direct = find_production(
        StudyConfig(tracking_uri=f"sqlite:///{finished['folder'] / 'mlflow.db'}")
    )
    assert through == direct
    assert through is not None
