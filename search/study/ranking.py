"""The best trials, by their value or, for finalists, by the mean of trainings on fresh seeds.

The best of many noisy results is partly luck, so the best trials can be trained again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from statistics import mean, stdev
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config.hyperparameters import REFERENCE
from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.study.storage import METADATA, REASON, RUN_ID, SEED
from search.study.storage import objective as objective_of
from search.task import Metric

_CHOICE = "finalists"  # user attribute of the study: trials and number of repeats compared


@dataclass(frozen=True)
class Finalist:
    """A trial trained again on fresh seeds.

    values: of the objective, one a seed, None if that training failed. mean: None if one failed.
    deviation: sample standard deviation; None for one seed or if one failed.
    """

    number: int
    values: list[float | None]
    mean: float | None
    deviation: float | None

    def text(self, objective: Metric) -> str:
        """In a line: the trial, its mean and the deviation."""
        if self.mean is None:
            return f"trial {self.number}, failed on a fresh seed"
        spread = "" if self.deviation is None else f" ± {objective.text(self.deviation)}"
        return f"trial {self.number}, mean {objective.name} {objective.text(self.mean)}{spread}"


def ranked(trials: list[FrozenTrial], objective: Metric) -> list[FrozenTrial]:
    """The COMPLETE trials, best first; ties in the order of their numbers."""
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-objective.sign * (trial.value or 0), trial.number))


def best(trials: list[FrozenTrial], objective: Metric) -> FrozenTrial | None:
    """The best COMPLETE trial; None if there is none."""
    return next(iter(ranked(trials, objective)), None)


def reference_params(study: optuna.Study) -> Mapping[str, Value]:
    """The params of the reference configuration; empty if the space does not contain it."""
    found: Mapping[str, Value] = study.user_attrs.get(METADATA, {}).get("reference", REFERENCE)
    return found


def reference(study: optuna.Study) -> FrozenTrial | None:
    """The first COMPLETE trial of the reference configuration; None if there is none."""
    wanted = reference_params(study)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in complete if trial.params == wanted), None)


def candidates(study: optuna.Study, config: StudyConfig) -> list[FrozenTrial]:
    """The `config.finalists` best COMPLETE trials, and the reference; none if that is 0."""
    if config.finalists == 0:
        return []
    trials = study.get_trials(deepcopy=False)
    chosen = ranked(trials, objective_of(study))[: config.finalists]
    first = reference(study)
    return chosen if first is None or first in chosen else [*chosen, first]


def missing(chosen: list[FrozenTrial], config: StudyConfig) -> list[tuple[int, int]]:
    """Trial and repeat of the trainings still to run, one round of all finalists at a time."""
    return [
        (trial.number, repeat)
        for repeat in range(config.repeats)
        for trial in chosen
        if repeat_attr(repeat) not in trial.user_attrs
    ]


def settle(study: optuna.Study, chosen: list[FrozenTrial], config: StudyConfig) -> None:
    """Store in the study which finalists were compared."""
    choice: dict[str, Any] = {
        "trials": [trial.number for trial in chosen],
        "repeats": config.repeats,
    }
    if not chosen:
        choice = {}
    if study.user_attrs.get(_CHOICE, {}) != choice:
        study.set_user_attr(_CHOICE, choice)


def standing(study: optuna.Study) -> list[Finalist]:
    """The finalists of the study's last run, best mean first."""
    choice = study.user_attrs.get(_CHOICE, {})
    trials, sign = study.get_trials(deepcopy=False), objective_of(study).sign
    found = []
    for number in choice.get("trials", ()):
        repeats = repeats_of(trials[number])
        values = [repeats[index].value for index in range(choice["repeats"])]
        known = [value for value in values if value is not None]
        whole = len(known) == len(values)
        found.append(
            Finalist(
                number,
                values=values,
                mean=mean(known) if whole else None,
                deviation=stdev(known) if whole and len(known) > 1 else None,
            )
        )

    def rank(finalist: Finalist) -> tuple[bool, float, float, int]:
        value = trials[finalist.number].value or 0
        failed = finalist.mean is None
        return failed, -sign * (finalist.mean or 0), -sign * value, finalist.number

    return sorted(found, key=rank)


def winner(study: optuna.Study) -> FrozenTrial | None:
    """The finalist with the best mean, or else the best trial; None if none completed."""
    trials, stood = study.get_trials(deepcopy=False), standing(study)
    return trials[stood[0].number] if stood else best(trials, objective_of(study))


# ---- repeats: a finalist's trainings on fresh seeds, stored in user attributes of its trial ------


def repeat_attr(repeat: int) -> str:
    """The key of the user attribute that holds the repeat `repeat`, from 0."""
    return f"finalist_{repeat}"


def repeats_of(trial: FrozenTrial) -> dict[int, FrozenTrial]:
    """The repeats of a finalist, each as a trial with the same number and params."""
    found = {}
    for name, kept in trial.user_attrs.items():
        if name.startswith("finalist_"):
            repeat = int(name.removeprefix("finalist_"))
            found[repeat] = _as_trial(trial, repeat, kept)
    return found


def _as_trial(trial: FrozenTrial, repeat: int, kept: Mapping[str, Any]) -> FrozenTrial:
    own = (SEED, "history", RUN_ID, REASON)
    failed = REASON in kept
    seen = create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        value=None if failed else kept.get("value", kept["history"][-1]["val_accuracy"]),
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={
            "repeat": repeat,
            "trainable_parameters": trial.user_attrs["trainable_parameters"],
            **{name: kept[name] for name in own if name in kept},
        },
    )
    seen.number = trial.number
    seen.datetime_start = datetime.fromtimestamp(kept["began"] / 1000)
    seen.datetime_complete = datetime.fromtimestamp(kept["ended"] / 1000)
    return seen
