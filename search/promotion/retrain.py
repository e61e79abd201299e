"""Retrain the winner on training and validation data, test it once, log it with its lineage."""

import contextlib
import importlib
import json
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Run
from numpy.typing import NDArray

from search.config.hyperparameters import complete, unusual
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.load import class_weights
from search.promotion.baselines import BestBaseline
from search.promotion.comparison import compare_with_baseline
from search.promotion.evaluation import outputs_fit, outputs_of
from search.promotion.measures import measure_all
from search.promotion.pictures import DATA, MISTAKES, save_evaluation
from search.promotion.served_model import log_model
from search.study.storage import BEST_BASELINE, METADATA, SEED, SETTINGS, UID, objective
from search.study.trials import best_epoch, history_of, now_ms, read_trial
from search.tracking.runs import Tracking
from search.tracking.schema import (
    BASELINE,
    COMMIT,
    DATASET,
    MODEL_URI,
    NOT_MADE,
    NUMBER,
    STUDY,
    STUDY_UID,
)
from search.training import environment

if TYPE_CHECKING:
    import keras
    import optuna
    from mlflow.tracking import MlflowClient
    from optuna.trial import FrozenTrial

_PINNED = ("tensorflow", "keras", "numpy")


def lineage(study: "optuna.Study", trial: "FrozenTrial", dataset: Dataset) -> dict[str, str]:
    """The origin of a model of `trial`: `schema.LINEAGE`, the commit only if there is one.

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
        f"lineage.{objective(study).name}": repr(trial.value),
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
    """Retrain trial `number` on training and validation data, test it and log it; returns the run.

    The test examples are used here and by the gate only. The retraining counts if its run is
    FINISHED and names the logged model in its tag `model_uri`.
    """
    from search.training.network import network_to_register
    from search.training.train import evaluate  # not at the top: the main process needs no Keras

    loading = threading.Thread(target=_load, daemon=True)  # while TensorFlow trains
    loading.start()
    trial, metadata = read_trial(study, number), study.user_attrs["facts"]
    origin = lineage(study, trial, dataset)
    run_id = tracking.create_run(parent, f"retrain-trial-{number:04d}", number, origin)
    tracking.log_start(run_id, trial, metadata)
    network, history = _train(config, dataset, trial, complete(trial.params, metadata["params"]))
    model = network_to_register(network, dataset)
    if dataset.task.classes:  # loss and accuracy in float32, as in the epochs
        examples = dataset.raw_test, dataset.y_test
        outputs, found = evaluate(model, examples, keep=outputs_fit(dataset))
    else:
        outputs, found = outputs_of(model, dataset), {}
    test = {} if outputs is None else measure_all(dataset.task, dataset.y_test, outputs)
    test.update({f"test_{name}": value for name, value in found.items()})
    if (best := study.user_attrs.get(BEST_BASELINE)) is not None:
        against = compare_with_baseline(model, dataset, outputs, BestBaseline(**best), config.seed)
        tracking.client.set_tag(run_id, BASELINE, json.dumps(against))
    loading.join()
    with tracking.active(run_id), _silence():
        model_uri, model_id = log_model(model, dataset, origin, _requirements())
        # Afterwards: a model being logged is given the run's metrics of the first epoch, by logging
        # those points again.
        tracking.log_result(run_id, history, test, model_id)
        _log_files(model, dataset, outputs, tracking.client, run_id)
        tracking.client.set_tag(run_id, MODEL_URI, model_uri)
    return run_id


def _train(
    config: StudyConfig, dataset: Dataset, trial: "FrozenTrial", hyperparameters: Mapping[str, Any]
) -> tuple["keras.Sequential", list[dict[str, float]]]:
    """Train as the trial was trained, to its best epoch and with its learning rates.

    Returns the network and its history.
    """
    from search.training.network import network_for
    from search.training.train import train

    earlier, seed = history_of(trial), trial.user_attrs["seed"]
    stopping = bool(hyperparameters["early_stopping"])
    goal = dataset.task.objective(config.objective)
    epochs = best_epoch(earlier, goal, stopping=stopping) + 1
    network = network_for(dataset, hyperparameters, seed, config.custom_model)
    curves = train(
        network,
        dataset.everything,
        hyperparameters,
        epochs=config.trial_epochs,
        seed=seed,
        shape=dataset.sample_shape,
        class_weights=class_weights(config, dataset),
        only=epochs,
        rates=[entry["learning_rate"] for entry in earlier if "learning_rate" in entry],
    )
    now = now_ms()
    by_epoch = [{name: curve[epoch] for name, curve in curves.items()} for epoch in range(epochs)]
    return network, [
        {"epoch": epoch, "time_ms": now, **dataset.task.measured(logs)}
        for epoch, logs in enumerate(by_epoch)
    ]


def _log_files(
    model: "keras.Model",
    dataset: Dataset,
    outputs: NDArray[Any] | None,
    client: "MlflowClient",
    run_id: str,
) -> None:
    """Log the model as HDF5 and its evaluation, once `log_model` is done.

    Writing HDF5 (Keras 3.15) drops the optimizer from the model's own compile configuration, and a
    .keras file written afterwards would lack it.
    """
    with tempfile.TemporaryDirectory() as folder:
        if dataset.columns is None:  # HDF5 can't hold the operations on columns
            model.save(Path(folder) / "mnist_model.h5")
        failure = save_evaluation(model, dataset, Path(folder), outputs)
        client.log_artifacts(run_id, folder)
    if failure is not None:
        client.set_tag(run_id, NOT_MADE, failure)


def _requirements() -> list[str]:
    return [f"{name}=={environment.version(name)}" for name in _PINNED]


def _load() -> None:
    """Import what saving a model needs; an error is reported when it is saved."""
    with contextlib.suppress(Exception):
        for module in ("mlflow.keras", "matplotlib.backends.backend_agg", "matplotlib.figure"):
            importlib.import_module(module)
        requirements_utils = importlib.import_module("mlflow.utils.requirements_utils")
        requirements_utils.warn_dependency_requirement_mismatches(_requirements())  # lists packages


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress Keras' warning that HDF5 is a legacy format, and its progress bars."""
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
        whole = run.info.status == "FINISHED" and MODEL_URI in tags
        if named and whole and tags.get(NUMBER) == str(number):
            return run
    return None


def test_pictures(tracking: Tracking, run: Run) -> tuple[str | None, bytes | None]:
    """What `save_evaluation` wrote of the retraining `run`: the data and the mistakes' picture."""
    client, run_id = tracking.client, run.info.run_id
    present = {entry.path for entry in client.list_artifacts(run_id)} & {DATA, MISTAKES}
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: Path(client.download_artifacts(run_id, name, folder)).read_bytes()
            for name in present
        }
    return found[DATA].decode() if DATA in found else None, found.get(MISTAKES)


def find_commit() -> str | None:
    """The commit of the checkout that this package's source lies in, if it is one."""
    from mlflow.utils.git_utils import get_git_commit

    found: str | None = get_git_commit(str(Path(__file__).parent))
    return found
