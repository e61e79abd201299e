"""Train a trial again from what its study holds, and compare every epoch to the last digit."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import FrozenTrial

from search.config import custom_model
from search.config.hyperparameters import describe
from search.config.settings import StudyConfig, differences
from search.data.dataset import load_dataset
from search.errors import InputError
from search.imports import undisturbed
from search.study import ranking, storage
from search.study.storage import ENVIRONMENT, METADATA, SEED, SETTINGS
from search.study.trials import history_of
from search.training import environment

_COMPARED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Reproduction:
    """A trial trained again.

    values: val_accuracy of every epoch; value: of the weights that it ends with. differences: what
    of which epoch differs, empty where all is the same to the last digit. changed: what of the
    environment is another one than then; None where that was not recorded.
    """

    trial: int
    values: list[float]
    value: float
    differences: list[str]
    changed: list[str] | None


@undisturbed()
def reproduce(
    config: StudyConfig, number: int | None, moved: str | None, say: Callable[[str], None]
) -> Reproduction:
    """Train trial `number` again, or the winner, as many epochs as it had; changes nothing.

    All settings come from the study; `moved` is the dataset's new path, if it has one. Raises
    InputError if there is no such study or trial, or if the dataset differs.
    """
    try:
        storage.check(config)
        study = storage.load_study(config)
        trials = study.get_trials(deepcopy=False)
        trial = ranking.winner(study) if number is None else _find(trials, number)
    except storage.ERRORS as error:
        raise storage.failure(error) from error
    if trial is None:
        raise InputError(
            f"reproduce needs a trial that completed, but study {config.study_name} has none; "
            "name another one with --trial"
        )
    settings, seed = study.user_attrs[SETTINGS], trial.user_attrs[SEED]
    name = moved or study.user_attrs[METADATA]["params"]["dataset"]
    dataset = load_dataset(
        name,
        settings["validation_split"],
        split=settings.get("split", "last"),
        seed=settings["seed"],
        normalize="normalize" in settings,
    )
    if dataset.digest[:12] not in settings["dataset"]:
        raise InputError(
            f"--dataset must be the data of the study, {settings['dataset']}, but "
            f"{name} has the digest {dataset.digest[:12]}; name the right file"
        )
    model = _model_of(settings)
    then = history_of(trial)
    say(f"{dataset}")
    say(
        f"trial {trial.number} of study {study.study_name}: {describe(trial.params)}  "
        f"seed {seed}  {len(then)} epochs"
    )

    from search.workers.tasks import load_trial

    load_trial()
    from search.training.train import TrainingDiverged, use_one_thread_each
    from search.workers.trial import train_again

    use_one_thread_each(1)  # as a worker does
    config = replace(config, epochs=settings["epochs"], model=model)
    now: list[dict[str, float]] = []
    recorded = trial.user_attrs.get(ENVIRONMENT)
    diverged, value = [], math.nan
    try:
        facts = study.user_attrs[METADATA]
        value = train_again(config, dataset, trial, facts, seed, now, only=len(then))
    except TrainingDiverged as error:
        diverged.append(f"epoch {len(now)}: {error}")
    return Reproduction(
        trial=trial.number,
        values=[entry["val_accuracy"] for entry in now],
        value=value,
        differences=[
            *diverged,
            *(
                f"epoch {int(old['epoch'])}: {metric} {new[metric]!r} in place of {old[metric]!r}"
                for old, new in zip(then, now, strict=False)
                for metric in _COMPARED
                if old[metric] != new[metric]
            ),
        ],
        changed=differences(recorded, environment.here()) if recorded else None,
    )


def _model_of(settings: Mapping[str, Any]) -> str | None:
    """The study's own model, if any. Raises InputError where its source has changed."""
    if "model" not in settings:
        return None
    name = str(settings["model"]).split(" ")[0]
    custom_model.check(name, settings["model"])
    return name


def _find(trials: list[FrozenTrial], number: int) -> FrozenTrial:
    if not 0 <= number < len(trials):
        raise InputError(
            f"--trial must be a trial of the study, 0 to {len(trials) - 1}, but got {number}; "
            "look with python study.py show"
        )
    trial = trials[number]
    if not trial.state.is_finished() or not history_of(trial):
        raise InputError(
            f"--trial must have ended after at least one epoch, but trial {number} is "
            f"{trial.state.name} without one; name another"
        )
    return trial
