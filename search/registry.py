"""The winner: train it anew on all training data, test it once, register it, promote it.

Every step leaves a mark that the next start finds, so a run killed between any two of them is
continued there, and a finished one is left alone.
"""

import contextlib
import importlib.metadata
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from filelock import FileLock
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature

from search import evaluation
from search.config import StudyConfig, sqlite_path
from search.contract import METRICS, NUMBER, STUDY, STUDY_UID, Facts
from search.data import Dataset, scaled
from search.database import lock_file
from search.production import ALIAS, aliased
from search.space import Hyperparameters
from search.tracking import Tracking

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STAGE = "Production"
_MODEL_URI, _PROMOTED = "model_uri", "promoted"
_PINNED = ("tensorflow", "keras", "numpy")


@dataclass(frozen=True)
class Winner:
    """The retrained best trial and where it is registered."""

    trial: int
    run_id: str
    version: int
    test_loss: float
    test_accuracy: float
    new: bool


def retrain(
    config: StudyConfig,
    dataset: Dataset,
    tracking: Tracking,
    parent: str,
    trial: "FrozenTrial",
    facts: Facts,
) -> str:
    """Train `trial`'s configuration on training and validation data and log it; returns the run.

    The test images are evaluated here and nowhere else. The run ends FINISHED, and names the
    logged model in its tag `model_uri`, or it does not count.
    """
    from search import model, training  # not at the top: the main process only registers

    run_id = tracking.create_run(parent, f"retrain-trial-{trial.number:04d}", trial.number)
    tracking.log_start(run_id, trial, facts)
    hyperparameters = Hyperparameters(**trial.params)
    seed = trial.user_attrs["seed"]
    network = model.build(hyperparameters, dataset.features, dataset.classes, seed)
    losses = training.train(
        network,
        (dataset.x_all, dataset.y_all),
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
    )
    now = int(time.time() * 1000)
    history = [
        {"epoch": epoch, "time_ms": now, **{METRICS[k]: losses[k][epoch] for k in losses}}
        for epoch in range(config.epochs)
    ]
    test = training.evaluate(network, (dataset.x_test, dataset.y_test))
    probabilities = network.predict(scaled(dataset.x_test), batch_size=2_000, verbose=0)
    judged = evaluation.evaluate(probabilities, dataset.y_test, dataset.classes)
    tracking.log_result(
        run_id, history, {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
    )
    with tracking.active(run_id), _silence():
        example = scaled(dataset.x_all[:2])
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=_KerasFlavor,
            model=network,
            signature=infer_signature(example, network.predict(example, verbose=0)),
            input_example=example,
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in _PINNED],
        )
        with tempfile.TemporaryDirectory() as folder:
            # Last, because writing HDF5 (Keras 3.15) drops the optimizer from the model's own
            # compile configuration, and a .keras file written afterwards would lack it.
            legacy = Path(folder) / "mnist_model.h5"
            network.save(legacy)
            evaluation.save(judged, dataset, Path(folder))
            tracking.client.log_artifacts(run_id, folder)
        tracking.client.set_tag(run_id, _MODEL_URI, info.model_uri)
    return run_id


class _KerasFlavor:
    """`mlflow.keras`, whose save_model (3.17) fails on an input example without its folder."""

    __name__ = "mlflow.keras"

    @staticmethod
    def save_model(path: str, **arguments: Any) -> None:
        os.makedirs(path)
        mlflow.keras.save_model(path=path, **arguments)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Saving makes Keras warn that HDF5 is a legacy format, and draw progress bars."""
    import keras
    from absl import logging

    verbosity, interactive = logging.get_verbosity(), keras.config.is_interactive_logging_enabled()
    logging.set_verbosity(logging.ERROR)
    keras.config.disable_interactive_logging()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if interactive:
            keras.config.enable_interactive_logging()


def find_retrained(tracking: Tracking, runs: list[Run], number: int) -> Run | None:
    """The finished retraining of trial `number` among a study's nested runs."""
    for run in runs:
        tags = run.data.tags
        named = (run.info.run_name or "").startswith("retrain-")
        complete = run.info.status == "FINISHED" and _MODEL_URI in tags
        if named and complete and tags.get(NUMBER) == str(number):
            return run
    return None


def test_pictures(tracking: Tracking, run: Run) -> tuple[str | None, bytes | None]:
    """What `evaluation.save` wrote of the retraining `run`: the data and the mistakes' picture."""
    present = {entry.path for entry in tracking.client.list_artifacts(run.info.run_id)}

    def read(name: str, folder: str) -> bytes | None:
        if name not in present:
            return None
        return Path(tracking.client.download_artifacts(run.info.run_id, name, folder)).read_bytes()

    with tempfile.TemporaryDirectory() as folder:
        data, mistakes = read(evaluation.DATA, folder), read(evaluation.MISTAKES, folder)
    return None if data is None else data.decode(), mistakes


def find_version(tracking: Tracking, config: StudyConfig, run_id: str) -> ModelVersion | None:
    """The model version that was registered from `run_id`."""
    found = tracking.client.search_model_versions(f"run_id = '{run_id}'")
    versions = [version for version in found if version.name == config.model_name]
    return versions[0] if versions else None


def is_promoted(version: ModelVersion | None) -> bool:
    """Whether registering and promoting `version` was carried through to the end."""
    return version is not None and _PROMOTED in version.tags


def register(tracking: Tracking, config: StudyConfig, run: Run, uid: str, *, new: bool) -> Winner:
    """Register the model of `run` and make it the one in production, as far as it is not yet."""
    client = tracking.client
    number = int(run.data.tags[NUMBER])
    version = find_version(tracking, config, run.info.run_id)
    if not is_promoted(version):
        with _promoting(config):
            if version is None:
                with contextlib.suppress(MlflowException):  # it exists
                    client.create_registered_model(config.model_name)
                model_uri = run.data.tags[_MODEL_URI]
                model_id = model_uri.removeprefix("models:/")
                version = client.create_model_version(
                    config.model_name,
                    source=client.get_logged_model(model_id).artifact_location,
                    run_id=run.info.run_id,
                    model_id=model_id,
                    tags={STUDY: config.study_name, STUDY_UID: uid, NUMBER: str(number)},
                )
            client.set_registered_model_alias(config.model_name, ALIAS, version.version)
            _follow_alias(tracking, config.model_name)
            client.set_model_version_tag(config.model_name, version.version, _PROMOTED, "true")
    assert version is not None
    return Winner(
        trial=number,
        run_id=run.info.run_id,
        version=int(version.version),
        test_loss=run.data.metrics["test_loss"],
        test_accuracy=run.data.metrics["test_accuracy"],
        new=new,
    )


def wrong_stages(tracking: Tracking, name: str) -> list[tuple[ModelVersion, str]]:
    """The versions whose stage does not follow the alias, each with the stage it should have.

    The alias is one row, so one version by construction. Stages are one column a version, and two
    processes that promote at once leave two.
    """
    production = aliased(tracking.client, name)
    if production is None:
        return []  # nothing to follow
    versions = tracking.client.search_model_versions(f"name = '{name}'")
    wanted = [(v, STAGE if v.version == production.version else "Archived") for v in versions]
    wrong = [
        (version, stage)
        for version, stage in wanted
        if version.current_stage != stage and STAGE in (stage, version.current_stage)
    ]
    return sorted(wrong, key=lambda pair: pair[1] != STAGE)


def follow_alias(tracking: Tracking, config: StudyConfig) -> None:
    """Give the stage Production to the version with the alias, and to no other."""
    with _promoting(config):
        _follow_alias(tracking, config.model_name)


def _follow_alias(tracking: Tracking, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # stages are deprecated, and asked for
        for version, stage in wrong_stages(tracking, name):
            tracking.client.transition_model_version_stage(name, version.version, stage)


def _promoting(config: StudyConfig) -> FileLock:
    """One process of this host promotes at a time."""
    path = sqlite_path(config.tracking_uri)
    if path is None:
        key = sha256(config.tracking_uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"registry-{key}"
    return FileLock(lock_file(path, config.model_name), timeout=120)
