"""Samplers and pruners, seeded by slots.

Optuna's samplers carry their random state from trial to trial, so a resumed study would repeat its
proposals. Here every trial has its own sampler, seeded by the study's seed and the trial's slot. A
study proposes the same whether it runs in one go, is resumed, or replaces lost trials.
"""

import binascii
import bisect
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, PartialFixedSampler, QMCSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.config.parameter import Choice, Parameter, Value
from search.config.settings import StudyConfig
from search.config.space import Space
from search.study import tpe
from search.study.outline import outlines_of
from search.study.storage import SLOT


def seeds(seed: int, slot: int) -> tuple[int, int]:
    """The seeds of the trial in `slot`: of its proposal, and of its training."""
    first, second = np.random.SeedSequence([seed, slot]).generate_state(2)
    return int(first) % 2**31, int(second) % 2**31


def repeat_seed(seed: int, slot: int, repeat: int) -> int:
    """The seed of repeat `repeat`, from 0, of the trial in `slot`."""
    (state,) = np.random.SeedSequence([seed, slot, repeat + 1]).generate_state(1)
    return int(state) % 2**31


def budget(config: StudyConfig) -> int:
    """The number of slots to finish: `config.n_trials`, for a grid at most its size."""
    if config.sampler == "grid":
        return min(config.n_trials, config.space.grid_size())
    return config.n_trials


def sampler(config: StudyConfig, slot: int) -> BaseSampler:
    """The sampler of the trial in `slot`; slot 0 gets the reference configuration."""
    seed, _ = seeds(config.seed, slot)
    if config.sampler == "grid":
        return _fixed(config.space.grid_point(slot), RandomSampler(seed))
    reference = config.space.reference()
    if slot == 0 and reference is not None:
        return _fixed(reference, RandomSampler(seed))
    if config.sampler == "tpe":
        return _tpe(seed, conditional=config.space.is_conditional())
    if config.sampler == "qmc":
        return _SlotQMC(config.space, slot, config.seed)
    return RandomSampler(seed)


def _fixed(params: Mapping[str, Value], base: BaseSampler) -> BaseSampler:
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        return PartialFixedSampler(dict(params), base)


def _tpe(seed: int, *, conditional: bool) -> BaseSampler:
    """conditional: whether params depend on others; each group of them is a joint model then."""
    if not conditional:
        return tpe.Sampler(seed=seed)
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        return tpe.Sampler(seed=seed, multivariate=True, group=True)


class _SlotQMC(QMCSampler):
    """A scrambled Sobol sequence that is indexed by the trial's slot, not by a stored counter."""

    def __init__(self, space: Space, slot: int, seed: int) -> None:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self._distributions = distributions(space)
        self._slot = slot

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {name: dist for name, dist in self._distributions.items() if not dist.single()}

    def _find_sample_id(self, study: Any, search_space: Any) -> int:
        return self._slot


def distributions(space: Space) -> Mapping[str, BaseDistribution]:
    """Optuna's distributions of all hyperparameters of `space` that are searched."""
    return {name: _distribution(parameter) for name, parameter in space.searched().items()}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.values)
    low, high, step, log = parameter.low, parameter.high, parameter.step, parameter.log
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=1 if step is None else int(step))
    return FloatDistribution(low, high, log=log, step=step)


_REDUCTION = 3  # one in so many trials survives a rung of halving


def pruner(config: StudyConfig) -> BasePruner:
    """The pruner that `config` names; all compare the objective epoch by epoch."""
    makers: dict[str, Callable[[], BasePruner]] = {
        "percentile": lambda: _Percentile(25, n_startup_trials=5),
        "median": lambda: _Percentile(50, n_startup_trials=5),
        "halving": _Halving,
        "hyperband": lambda: _SlotHyperband(config.trial_epochs),
        "none": optuna.pruners.NopPruner,
    }
    return makers[config.pruner]()


class Judged:
    """A running trial for its pruner, at the same cost after every epoch.

    The pruners need the last value and the best one so far; Optuna would pass them all values.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial
        minimizes = trial.study.direction is StudyDirection.MINIMIZE
        self._best: Callable[..., int] = min if minimizes else max
        self._seen = FrozenTrial(
            number=trial.number,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=trial.datetime_start,
            datetime_complete=None,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs={},  # read by the pruners that need them
            intermediate_values={},
            trial_id=trial._trial_id,
        )

    def report(self, value: float, step: int) -> None:
        """Record the value after an epoch; `step` is the epoch, from 0."""
        self._trial.report(value, step)
        values = self._seen.intermediate_values
        best = self._best(values, key=lambda epoch: values[epoch], default=step)
        self._seen.intermediate_values = {best: values.get(best, value), step: value}

    def should_prune(self) -> bool:
        """Whether to prune the trial after the epoch reported last."""
        study = self._trial.study
        return bool(study.pruner.prune(study, self._seen))


class _Percentile(PercentilePruner):
    """Optuna's percentile pruner, computed from the arrays of a worker's outlines."""

    def prune(self, study: Any, trial: FrozenTrial) -> bool:
        outlines = outlines_of(study)
        if outlines is None:
            return super().prune(study, trial)
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < self._n_startup_trials:
            return False
        minimizes = study.direction is StudyDirection.MINIMIZE
        values = list(trial.intermediate_values.values())
        best = np.nanmin(values) if minimizes else np.nanmax(values)
        if np.isnan(best):
            return True
        others = outlines.columns.reported.get(trial.last_step or 0)
        if others is None:
            return False
        if minimizes:
            return bool(best > np.nanpercentile(others, self._percentile))
        return bool(best < np.nanpercentile(others, 100 - self._percentile))


class _Halving(SuccessiveHalvingPruner):
    """Successive halving without failed trials, whose slots other trials have taken."""

    def __init__(self) -> None:
        super().__init__(min_resource=1, reduction_factor=_REDUCTION)

    def prune(self, study: Any, trial: FrozenTrial) -> bool:
        if not _is_at_rung(trial.last_step, 0):
            return False
        trial.system_attrs = study._storage.get_trial_system_attrs(trial._trial_id)
        return super().prune(_WithoutFailures(study), trial)  # type: ignore[arg-type]


def _is_at_rung(step: int | None, rate: int) -> bool:
    """Whether halving compares trials after the epoch `step`: 1, 3, 9 and so on, from `3 ** rate`.

    It never prunes elsewhere, but Optuna would read the whole study to find that out.
    """
    rung: int = _REDUCTION**rate
    while step is not None and rung < step:
        rung *= _REDUCTION
    return step == rung


class _WithoutFailures:
    """The part of a study that successive halving reads."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._storage = study._storage
        self.direction = study.direction

    def get_trials(self, deepcopy: bool = True) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=deepcopy)
        return [trial for trial in trials if trial.state is not TrialState.FAIL]


class _SlotHyperband(HyperbandPruner):
    """Hyperband whose brackets depend on a trial's slot, not its number; failed ones have none."""

    def __init__(self, epochs: int) -> None:
        super().__init__(min_resource=1, max_resource=epochs, reduction_factor=_REDUCTION)
        self._brackets: dict[int, int] = {}  # by slot
        # At once, so that already the first proposal of a resumed study knows its bracket.
        self._try_initialization(None)  # type: ignore[arg-type]

    def prune(self, study: Any, trial: FrozenTrial) -> bool:
        if not _is_at_rung(trial.last_step, self._get_bracket_id(study, trial)):
            return False
        trial.system_attrs = study._storage.get_trial_system_attrs(trial._trial_id)
        return super().prune(study, trial)

    def _get_bracket_id(self, study: Any, trial: FrozenTrial) -> int:
        slot = trial.user_attrs.get(SLOT)
        if slot is None or trial.state is TrialState.FAIL:
            return -1
        if slot not in self._brackets:  # asked of all trials at each rung
            share = binascii.crc32(f"place {slot}".encode()) % self._total_trial_allocation_budget
            ends = list(itertools.accumulate(self._trial_allocation_budgets))
            self._brackets[slot] = bisect.bisect(ends, share)
        return self._brackets[slot]
