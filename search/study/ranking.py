"""Which trials are best: by their value, or as finalists, by the mean of fresh seeds.

The best of many noisy results is partly luck, so the best trials can be trained again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.config.hyperparameters import REFERENCE
from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.study.storage import METADATA
from search.study.trials import repeat_attr, repeats_of

_CHOICE = "finalists"  # the study's user attribute: which trials were compared, on how many seeds


@dataclass(frozen=True)
class Finalist:
    """Trial `number`, trained again: val_accuracy on each fresh seed, None where that failed.

    mean: None where one failed. deviation: the sample's, None for one seed or where one failed.
    """

    number: int
    val_accuracies: list[float | None]
    mean: float | None
    deviation: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return f"trial {self.number}, failed on a fresh seed"
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"trial {self.number}, mean val_accuracy {self.mean:.4f}{spread}"


def ranked(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The COMPLETE trials, the best first and the earlier of equals before the later."""
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-(trial.value or 0), trial.number))


def best(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The best COMPLETE trial, None where there is none."""
    return next(iter(ranked(trials)), None)


def reference_params(study: optuna.Study) -> Mapping[str, Value]:
    """What a trial of the reference configuration has for params; nothing where there is none."""
    found: Mapping[str, Value] = study.user_attrs.get(METADATA, {}).get("reference", REFERENCE)
    return found


def reference(study: optuna.Study) -> FrozenTrial | None:
    """The first COMPLETE trial of the reference configuration."""
    wanted = reference_params(study)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in complete if trial.params == wanted), None)


def candidates(study: optuna.Study, config: StudyConfig) -> list[FrozenTrial]:
    """The best COMPLETE trials, as many as `config.finalists`, and the reference."""
    if config.finalists == 0:
        return []
    chosen = ranked(study.get_trials(deepcopy=False))[: config.finalists]
    first = reference(study)
    return chosen if first is None or first in chosen else [*chosen, first]


def missing(chosen: list[FrozenTrial], config: StudyConfig) -> list[tuple[int, int]]:
    """The repeats that were not run yet: trial and repeat, a round of all finalists first."""
    return [
        (trial.number, repeat)
        for repeat in range(config.repeats)
        for trial in chosen
        if repeat_attr(repeat) not in trial.user_attrs
    ]


def settle(study: optuna.Study, chosen: list[FrozenTrial], config: StudyConfig) -> None:
    """Write into the study which trials its winner was chosen from."""
    choice: dict[str, Any] = {
        "trials": [trial.number for trial in chosen],
        "repeats": config.repeats,
    }
    if not chosen:
        choice = {}
    if study.user_attrs.get(_CHOICE, {}) != choice:
        study.set_user_attr(_CHOICE, choice)


def standing(study: optuna.Study) -> list[Finalist]:
    """The finalists of the study's last run, the best mean first; empty where there were none."""
    choice = study.user_attrs.get(_CHOICE, {})
    trials = study.get_trials(deepcopy=False)
    found = []
    for number in choice.get("trials", ()):
        repeats = repeats_of(trials[number])
        values = [repeats[index].value for index in range(choice["repeats"])]
        known = [value for value in values if value is not None]
        whole = len(known) == len(values)
        found.append(
            Finalist(
                number,
                val_accuracies=values,
                mean=mean(known) if whole else None,
                deviation=stdev(known) if whole and len(known) > 1 else None,
            )
        )
    return sorted(found, key=lambda f: (-(f.mean or 0), -(trials[f.number].value or 0), f.number))


def winner(study: optuna.Study) -> FrozenTrial | None:
    """The finalist with the best mean, or else the best trial; None where none completed."""
    trials, stood = study.get_trials(deepcopy=False), standing(study)
    return trials[stood[0].number] if stood else best(trials)
