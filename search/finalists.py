"""The finalists: the best trials trained again on fresh seeds, because the best of many noisy
results is partly luck."""

from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from search import overview
from search.config import StudyConfig
from search.contract import repeats_of

_CHOICE = "finalists"  # the study's user attribute: which trials were compared, on how many seeds


@dataclass(frozen=True)
class Finalist:
    """A trial trained again: val_accuracy of every repeat, None of one that failed."""

    trial: FrozenTrial
    accuracies: list[float | None]

    @property
    def mean(self) -> float | None:
        """Mean val_accuracy of the repeats; None where one failed."""
        known = self._known()
        return mean(known) if len(known) == len(self.accuracies) else None

    @property
    def deviation(self) -> float | None:
        """Their sample standard deviation; None for one repeat, or where one failed."""
        return None if self.mean is None or len(self.accuracies) < 2 else stdev(self._known())

    def _known(self) -> list[float]:
        return [value for value in self.accuracies if value is not None]

    def __str__(self) -> str:
        if self.mean is None:
            return f"trial {self.trial.number}: failed on a fresh seed"
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"trial {self.trial.number}: mean val_accuracy {self.mean:.4f}{spread}"


def candidates(trials: list[FrozenTrial], config: StudyConfig) -> list[FrozenTrial]:
    """The best COMPLETE trials, as many as `config.finalists`, and the reference."""
    if config.finalists == 0:
        return []
    chosen = overview.ranked(trials)[: config.finalists]
    first = overview.reference(trials)
    return chosen if first is None or first in chosen else [*chosen, first]


def missing(chosen: list[FrozenTrial], config: StudyConfig) -> list[tuple[int, int]]:
    """The repeats that were not run yet: trial and repeat, a round of all finalists first."""
    return [
        (trial.number, repeat)
        for repeat in range(config.repeats)
        for trial in chosen
        if repeat not in repeats_of(trial)
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
        found.append(Finalist(trials[number], values))
    return sorted(found, key=lambda f: (-(f.mean or 0), -(f.trial.value or 0), f.trial.number))


def winner(study: optuna.Study) -> FrozenTrial | None:
    """The finalist with the best mean, or else the best trial; None where none completed."""
    stood = standing(study)
    return stood[0].trial if stood else overview.best(study.get_trials(deepcopy=False))
