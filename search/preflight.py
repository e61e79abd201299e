"""Everything that a run checks before it creates anything, and the settings that follow from it."""

import math
import multiprocessing
from collections.abc import Mapping
from typing import Any

from search.config.hyperparameters import needs_images
from search.config.settings import AUTO, StudyConfig
from search.data.dataset import Dataset, check_images
from search.data.load import load_for_study
from search.data.sources import is_own
from search.errors import InputError
from search.report import publish
from search.study import storage
from search.task import MOST_OUTPUTS, Metric, objective_of
from search.tracking.address import check_experiment, check_tracking

_STEPS, _MOST = 100, 20  # optimizer steps that a trial needs; the most epochs for that
_SMALLEST_BATCH, _LARGEST_BATCH, _STEPS_OF_EPOCH = 32, 1024, 200  # of --batch-size auto


def check_main_module() -> None:
    """Raise InputError in a child process that is only importing the main module.

    Workers do not import it, but other children of a script may, to find their target function.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing does
        raise InputError(
            "run() must not be called when the main module is imported, as a child process of "
            "multiprocessing does; put the call under: if __name__ == '__main__':"
        )


def preflight(config: StudyConfig) -> tuple[StudyConfig, Dataset, dict[str, Any]]:
    """The configuration with its epochs, the dataset and the study's settings, all checked."""
    storage.check(config)
    stored = storage.stored_settings(config)
    dataset = load_for_study(config, stored)
    config = config.resolved(
        epochs=choose_epochs(config, dataset, stored),
        objective=choose_objective(config, dataset, stored).name,
        batch_size=choose_batch_size(config, dataset, stored),
    )
    check_images(dataset, needs_images(config.space))
    if dataset.problem is not None and stored is None:
        raise InputError(dataset.problem)
    name = f"{dataset.name.rstrip('/').rsplit('/', 1)[-1]} ({dataset.digest[:12]})"
    normalized = dataset.normalization is not None
    settings = config.settings(
        name,
        split=dataset.split,
        normalized=normalized,
        source=dataset.source,
        task=dataset.task.kind,
    )
    check_tracking(config.tracking_uri)
    check_experiment(config)
    if config.scheduler is not None:
        _check_scheduler(config.scheduler)
    if config.report != "none":
        publish.check_report(config, config.report)
    storage.check_same(config, settings)
    return config, dataset, settings


def _check_scheduler(address: str) -> None:
    try:
        from search.workers.scheduler import check_scheduler
    except ImportError as error:
        raise InputError(
            f"--scheduler needs Dask's distributed, which is not installed ({error}); "
            "pip install -e '.[cluster]'"
        ) from None
    check_scheduler(address)


# ---- settings that follow from the data ------------------------------------------------------


def choose_epochs(config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None) -> int:
    """The epochs of a trial: as in the settings, or else as in the existing study.

    With a thousand examples, 5 epochs are 40 steps, too few to tell trials apart. On scikit-learn's
    digits, 10 epochs gain 0.009 test accuracy (mean of four splits of 50 trials).
    """
    known = (stored or {}).get("epochs")
    if config.epochs is None and isinstance(known, int):
        return known
    if config.epochs is not None or not is_own(config.dataset):
        return config.trial_epochs
    steps = math.ceil(dataset.train_examples / 128)
    return min(_MOST, max(config.trial_epochs, math.ceil(_STEPS / steps)))


def choose_batch_size(
    config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None
) -> str:
    """The space of the batch size: as in the settings, or for auto as in the existing study.

    Of a new one 32, which small data need for enough steps; doubled while an epoch has more than
    200, up to 1024.
    """
    if config.batch_size != AUTO:
        return config.batch_size
    if stored is not None and "batch_size" in stored:
        return str(stored["batch_size"])
    size = _SMALLEST_BATCH
    while size < _LARGEST_BATCH and dataset.train_size > size * _STEPS_OF_EPOCH:
        size *= 2
    return str(size)


def choose_objective(
    config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None
) -> Metric:
    """The objective: as in the settings, or else as in the existing study, or the task's default.

    Raises InputError if it is not a metric of the task.
    """
    known = None if stored is None else objective_of(stored).name
    chosen = dataset.task.objective(
        known or "auto" if config.objective == "auto" else config.objective
    )
    outputs = len(dataset.x_test) * dataset.task.outputs
    if outputs > MOST_OUTPUTS and chosen.name not in ("val_accuracy", "val_loss"):
        raise InputError(
            f"--objective {chosen.name} needs at most {MOST_OUTPUTS:,} outputs for the test set",
            f"{len(dataset.x_test):,} examples of {dataset.task.outputs:,} classes have more",
            "give --objective val_accuracy, or a smaller test set",
        )
    return chosen
