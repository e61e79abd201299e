"""Train a trial again: on a fresh seed, or as it was to compare every epoch to the last digit."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from search.config import custom_model
from search.config.data_settings import TABLE_SETTINGS
from search.config.hyperparameters import complete, describe
from search.config.settings import StudyConfig, differences
from search.data.dataset import Dataset
from search.data.load import load_for_study
from search.errors import InputError, RunError
from search.imports import undisturbed
from search.study import ranking, sampling, storage
from search.study.storage import ENVIRONMENT, METADATA, SEED, SETTINGS, SLOT
from search.study.trials import history_of, metrics_in, now_ms, read_trial
from search.tracking.schema import Metadata
from search.training import environment
from search.workers.trial import reason_of, train_network
from search.workers.worker import Worker


def repeat(worker: Worker, number: int, repeat: int) -> dict[str, Any]:
    """Train the configuration of trial `number` on a fresh seed; writes to neither store.

    Returns what the trial stores of it: seed, history, start and end (ms), and the failure if
    the training diverged.
    """
    from search.training.train import TrainingDiverged

    trial = read_trial(worker.study, number)
    seed = sampling.repeat_seed(worker.config.seed, trial.user_attrs[SLOT], repeat)
    kept: dict[str, Any] = {"seed": seed, "history": [], "began": now_ms()}
    try:
        kept["value"] = train_again(
            worker.config, worker.dataset, trial, worker.metadata, seed, kept["history"]
        )
    except TrainingDiverged as error:
        kept["failure"] = reason_of(error)
    except Exception as error:
        raise RunError(
            f"trial {number} could not be trained again ({reason_of(error)}); fix the cause "
            "and run the same command again"
        ) from error
    return {**kept, "ended": now_ms()}


def train_again(
    config: StudyConfig,
    dataset: Dataset,
    trial: FrozenTrial,
    metadata: Metadata,
    seed: int,
    history: list[dict[str, float]],
    only: int | None = None,
) -> float:
    """Train the configuration of `trial`, appending each epoch to `history`.

    metadata: what all trials of the study share. only: end after so many epochs. Returns the
    objective of the final weights.
    """
    from search.training.network import network_for

    tried = complete(trial.params, metadata["params"])
    network = network_for(dataset, tried, seed, config.custom_model)
    best = train_network(config, dataset, tried, network, seed, history, only=only)
    return history[best][dataset.task.objective(config.objective).name]


@dataclass(frozen=True)
class Reproduction:
    """A trial trained again.

    objective: the metric that the study goes by. values: of every epoch; value: of the weights that
    it ends with. differences: one line per epoch and metric that differ, empty if all are the same
    to the last digit. changed: the differences of the environment; None if the original one was not
    recorded.
    """

    trial: int
    objective: str
    values: list[float]
    value: float
    differences: list[str]
    changed: list[str] | None


@undisturbed()
def reproduce(
    config: StudyConfig, number: int | None, moved: str | None, report: Callable[[str], None]
) -> Reproduction:
    """Train trial `number` again, or the winner, as many epochs as it had; changes nothing.

    All settings come from the study; `moved` is the dataset's new path, if it has one. Raises
    InputError if there is no such study or trial, or if the dataset differs.
    """
    try:
        storage.check(config)
        with storage.loaded(config) as study:
            trial = _find(study, number)
            config = _settings_of(study, config, moved)
            settings, metadata = study.user_attrs[SETTINGS], study.user_attrs[METADATA]
    except storage.ERRORS as error:
        raise storage.failure(error) from error
    dataset = load_for_study(config, settings)
    if dataset.digest[:12] not in settings["dataset"]:
        raise InputError(
            f"--dataset must be the data of the study, {settings['dataset']}, but "
            f"{config.dataset} has the digest {dataset.digest[:12]}; name the right file"
        )
    config = replace(config, model=_model_of(settings))
    history = history_of(trial)
    report(f"{dataset}")
    report(
        f"trial {trial.number} of study {config.study_name}: {describe(trial.params)}  "
        f"seed {trial.user_attrs[SEED]}  {len(history)} epochs"
    )
    value, now, diverged = _train(config, dataset, trial, metadata, len(history))
    recorded = trial.user_attrs.get(ENVIRONMENT)
    return Reproduction(
        trial=trial.number,
        objective=config.objective,
        values=[entry[config.objective] for entry in now],
        value=value,
        differences=diverged + list(_differences(history, now)),
        changed=differences(recorded, environment.here()) if recorded else None,
    )


def _settings_of(study: optuna.Study, config: StudyConfig, moved: str | None) -> StudyConfig:
    """The configuration with the settings that the study has stored."""
    settings, params = study.user_attrs[SETTINGS], study.user_attrs[METADATA]["params"]
    return replace(
        config,
        dataset=moved or params["dataset"],
        split=None,
        task="auto",
        normalize="auto",
        test=params.get("test"),
        objective=storage.objective(study).name,
        class_weight=settings.get("class_weight", "none"),
        **{key: settings[key] for key in ("validation_split", "seed", "epochs")},
        **{key: settings[key] for key in (*TABLE_SETTINGS, "image_size") if key in settings},
    )


def _train(
    config: StudyConfig, dataset: Dataset, trial: FrozenTrial, metadata: Metadata, epochs: int
) -> tuple[float, list[dict[str, float]], list[str]]:
    """Train the trial again; returns its value, its epochs and whether it diverged, in a line."""
    from search.workers.tasks import load_trial

    load_trial()
    from search.training.train import TrainingDiverged, use_one_thread_each

    use_one_thread_each(1)  # as a worker does
    now: list[dict[str, float]] = []
    try:
        value = train_again(config, dataset, trial, metadata, trial.user_attrs[SEED], now, epochs)
    except TrainingDiverged as error:
        return math.nan, now, [f"epoch {len(now)}: {error}"]
    return value, now, []


def _differences(history: list[dict[str, float]], now: list[dict[str, float]]) -> Iterator[str]:
    for old, new in zip(history, now, strict=False):
        for metric in metrics_in(old):
            if old[metric] != new[metric]:
                epoch = int(old["epoch"])
                yield f"epoch {epoch}: {metric} is {new[metric]!r}, expected {old[metric]!r}"


def _model_of(settings: Mapping[str, Any]) -> str | None:
    """The study's own model, if any. Raises InputError where its source has changed."""
    if "model" not in settings:
        return None
    name = str(settings["model"]).split(" ")[0]
    custom_model.check(name, settings["model"])
    return name


def _find(study: optuna.Study, number: int | None) -> FrozenTrial:
    """Trial `number`, or the winner. Raises InputError."""
    trials = study.get_trials(deepcopy=False)
    trial = ranking.winner(study)
    if number is not None:
        if not 0 <= number < len(trials):
            raise InputError(
                f"--trial must be a trial of the study, 0 to {len(trials) - 1}, but got {number}; "
                "look with python study.py show"
            )
        trial = trials[number]
    if trial is None:
        raise InputError(
            f"reproduce needs a trial that completed, but study {study.study_name} has none; "
            "name another one with --trial"
        )
    if not trial.state.is_finished() or not history_of(trial):
        raise InputError(
            f"--trial must have ended after at least one epoch, but trial {trial.number} is "
            f"{trial.state.name} without one; name another"
        )
    return trial
