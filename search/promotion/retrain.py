"""The winner: train it anew on all training data, test it once, log its model with its lineage."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow.entities import Run

from search.config.hyperparameters import complete, unusual
from search.config.settings import StudyConfig
from search.data.dataset import Dataset, scaled
from search.promotion.evaluation import DATA, MISTAKES, save_evaluation
from search.study.storage import METADATA, SEED, SETTINGS, UID
from search.study.trials import METRICS, best_epoch, history_of, read_trial
from search.tracking.runs import Tracking
from search.tracking.schema import COMMIT, DATASET, MODEL_URI, NOT_MADE, NUMBER, STUDY, STUDY_UID
from search.training import environment

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

_PINNED = ("tensorflow", "keras", "numpy")


def lineage(study: "optuna.Study", trial: "FrozenTrial", dataset: Dataset) -> dict[str, str]:
    """Whence a model of `trial` is: `contract.LINEAGE`, the commit only where there is one.

    lineage.settings is the fingerprint of the study's settings, a SHA-256 of their JSON.
    """
    settings = json.dumps(study.user_attrs[SETTINGS], sort_keys=True)
    shared = study.user_attrs[METADATA]["params"]
    commit = find_commit()
    return {
        STUDY: study.study_name,
        STUDY_UID: study.user_attrs[UID],
        NUMBER: str(trial.number),
        "lineage.hyperparameters": json.dumps({**unusual(shared), **trial.params}),
        "lineage.val_accuracy": repr(trial.value),
        "lineage.seed": str(trial.user_attrs[SEED]),
        "lineage.settings": sha256(settings.encode()).hexdigest(),
        DATASET: dataset.digest,
        "lineage.environment": json.dumps(environment.here()),
        **({} if commit is None else {COMMIT: commit}),
    }


def retrain(
    config: StudyConfig,
    dataset: Dataset,
    tracking: Tracking,
    parent: str,
    study: "optuna.Study",
    number: int,
) -> str:
    """Train trial `number` anew on training and validation data and log it; returns the run.

    The test images are evaluated here, and by the gate. The run ends FINISHED, and names the
    logged model in its tag `model_uri`, or it does not count.
    """
    from mlflow.models import Model, infer_signature

    from search.training.network import build_network, network_to_register
    from search.training.train import (
        evaluate,
        train,  # not at the top: the main process does without Keras
    )

    loading = threading.Thread(target=_load, daemon=True)  # while TensorFlow trains
    loading.start()
    trial = read_trial(study, number)
    whence = lineage(study, trial, dataset)
    run_id = tracking.create_run(parent, f"retrain-trial-{number:04d}", number, whence)
    tracking.log_start(run_id, trial, study.user_attrs[METADATA])
    tried = complete(trial.params, study.user_attrs[METADATA]["params"])
    then, seed = history_of(trial), trial.user_attrs[SEED]
    epochs = best_epoch(then, stopping=bool(tried["early_stopping"])) + 1
    network = build_network(tried, dataset.sample_shape, dataset.classes, seed, config.custom_model)
    losses = train(
        network,
        (dataset.x_all, dataset.y_all),
        tried,
        epochs=config.trial_epochs,
        seed=seed,
        shape=dataset.sample_shape,
        only=epochs,
        rates=[entry["learning_rate"] for entry in then if "learning_rate" in entry],
    )
    now = int(time.time() * 1000)
    curves = {METRICS[name]: values for name, values in losses.items() if name in METRICS}
    history = [
        {"epoch": epoch, "time_ms": now, **{name: curves[name][epoch] for name in curves}}
        for epoch in range(epochs)
    ]
    model = network_to_register(network, dataset.normalization)
    test = evaluate(model, (dataset.x_test, dataset.y_test))
    tracking.log_result(
        run_id, history, {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
    )
    loading.join()
    with tracking.active(run_id), _silence():
        example = scaled(dataset.x_test[:2])
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=_KerasFlavor,
            metadata=whence,
            validate_serving_input=False,  # by loading the model once more, which takes a second
            model=model,
            signature=infer_signature(example, np.asarray(model(example))),
            input_example=example,
            pip_requirements=_requirements(),
        )
        with tempfile.TemporaryDirectory() as folder:
            # Last, because writing HDF5 (Keras 3.15) drops the optimizer from the model's own
            # compile configuration, and a .keras file written afterwards would lack it.
            legacy = Path(folder) / "mnist_model.h5"
            model.save(legacy)
            failure = save_evaluation(model, dataset, Path(folder))
            tracking.client.log_artifacts(run_id, folder)
        if failure is not None:
            tracking.client.set_tag(run_id, NOT_MADE, failure)
        tracking.client.set_tag(run_id, MODEL_URI, info.model_uri)
    return run_id


def _requirements() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in _PINNED]


def _load() -> None:
    """Load what saving a model takes; what fails here is told when it is saved."""
    with contextlib.suppress(Exception):
        importlib.import_module("mlflow.keras")
        importlib.import_module("matplotlib.backends.backend_agg")
        requirements_utils = importlib.import_module("mlflow.utils.requirements_utils")
        requirements_utils.warn_dependency_requirement_mismatches(_requirements())  # lists packages


class _KerasFlavor:
    """`mlflow.keras`, whose save_model (3.17) fails on an input example without its folder."""

    __name__ = "mlflow.keras"

    @staticmethod
    def save_model(path: str, **arguments: Any) -> None:
        os.makedirs(path)
        del arguments["validate_serving_input"]  # meant for `log`, which hands on all it gets
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
        complete = run.info.status == "FINISHED" and MODEL_URI in tags
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
        data, mistakes = read(DATA, folder), read(MISTAKES, folder)
    return None if data is None else data.decode(), mistakes


def find_commit() -> str | None:
    """The commit of the checkout that this package's source lies in, if it is one."""
    from mlflow.utils.git_utils import get_git_commit

    found: str | None = get_git_commit(str(Path(__file__).parent))
    return found
