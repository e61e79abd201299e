"""TPE with the proposals of Optuna's, to the last digit, but fast in long studies.

Optuna's sampler walks through all trials several times for each proposal. This one reads the arrays
of `outline` and computes the densities by the same operations in a cache-friendly order. Only this
module depends on the internals of Optuna's sampler; its tests compare the proposals of both.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedCategoricalDistributions
from optuna.samplers._tpe.sampler import default_gamma
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.study.outline import Columns, Outlines, outlines_of

_Array = NDArray[np.float64]
_NEGLIGIBLE = -700  # exp(-700) vanishes in a sum with 1 in it; smaller arguments are much slower
_FEW = 8  # NumPy sums fewer numbers sequentially, others pairwise


class Sampler(TPESampler):
    """Optuna's TPE sampler, for a study of one value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._parzen_estimator_cls = _Estimator

    def infer_relative_search_space(
        self, study: Any, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As Optuna's, but of the trials with the same distributions only the first is read."""
        outlines = outlines_of(study)
        known: Any = study if outlines is None else _Distinct(study, outlines)
        return super().infer_relative_search_space(known, trial)

    def _sample(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        outlines = outlines_of(study)
        if outlines is None:
            return super()._sample(study, trial, search_space)
        running = study._get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = [other for other in running if other.number != trial.number]
        columns = outlines.columns
        complete = np.flatnonzero(~np.isnan(columns.value))
        n_below = default_gamma(int(columns.finished.sum()))
        if len(complete) < n_below:  # pruned trials are among the best ones, too
            return super()._sample(study, trial, search_space)
        values = columns.value[complete]  # higher is better from here on
        if study.direction is StudyDirection.MINIMIZE:
            values = -values
        last = np.partition(values, -n_below)[-n_below]
        better, equal = complete[values > last], complete[values == last]
        below = np.sort([*better, *equal[: n_below - len(better)]])
        above = columns.finished.copy()
        above[below] = False
        estimators = (
            self._estimator(study, search_space, columns, below, []),
            self._estimator(study, search_space, columns, np.flatnonzero(above), others),
        )
        samples = estimators[0].sample(self._rng.rng, self._n_ei_candidates)
        chosen = self._compare(samples, self._compute_acquisition_func(samples, *estimators))
        return {name: kind.to_external_repr(chosen[name]) for name, kind in search_space.items()}

    def _estimator(
        self,
        study: Any,
        search_space: dict[str, BaseDistribution],
        columns: Columns,
        numbers: NDArray[np.intp],
        running: list[FrozenTrial],
    ) -> _ParzenEstimator:
        """The density of the trials `numbers` and `running`, in the order of their numbers."""
        missing = np.full(len(columns.value), np.nan)
        seen = np.stack([columns.params.get(name, missing)[numbers] for name in search_space])
        asked = ~np.isnan(seen).any(axis=0)
        seen, numbers = seen[:, asked], numbers[asked]
        for trial in running:
            own = self._get_internal_repr([trial], search_space, study)
            after = int(np.searchsorted(numbers, trial.number))
            if all(map(len, own.values())):
                seen = np.insert(seen, after, [own[name][0] for name in search_space], axis=1)
                numbers = np.insert(numbers, after, trial.number)
        return self._parzen_estimator_cls(
            dict(zip(search_space, seen, strict=True)),
            search_space,
            self._parzen_estimator_parameters,
        )


class _Distinct:
    """The part of a study from which search spaces are inferred."""

    def __init__(self, study: Any, outlines: Outlines) -> None:
        self._study = study
        self._outlines = outlines
        self._study_id = study._study_id

    def _is_multi_objective(self) -> bool:
        return bool(self._study._is_multi_objective())

    def _get_trials(self, **options: Any) -> list[FrozenTrial]:
        self._study._get_trials(**options)  # reads the new trials
        return self._outlines.distinct()


class _Estimator(_ParzenEstimator):
    """Optuna's estimator, with the density computed sample by sample, in the cache."""

    def log_pdf(self, samples_dict: dict[str, _Array]) -> _Array:
        """The logarithm of the density at each sample."""
        mixture, at = self._mixture_distribution, self._transform(samples_dict)
        log_weights = np.log(mixture.weights)
        choices: list[tuple[NDArray[np.int64], _Array]] = []
        numeric: list[tuple[_Array, tuple[_Array, ...]]] = []
        for index, kind in enumerate(mixture.distributions):
            values = at[:, index]
            if isinstance(kind, _BatchedCategoricalDistributions):
                choices.append((values.astype(np.int64), np.log(kind.weights).T))
                continue
            values = np.log(values) if kind.is_log else values
            low, high = kind.adapted_low, kind.adapted_high
            if kind.step or values.min() < low or values.max() > high:  # by rounding
                return super().log_pdf(samples_dict)
            limits = (low - kind.mu) / kind.sigma, (high - kind.mu) / kind.sigma
            mass = _truncnorm._log_gauss_mass(*limits)
            numeric.append((values, (kind.mu, kind.sigma, mass, np.log(kind.sigma))))
        if len(numeric) >= _FEW:
            return super().log_pdf(samples_dict)
        sums, largest = np.empty(len(at)), np.empty(len(at))
        terms, of_numeric, part = np.empty((3, len(log_weights)))
        for row in range(len(at)):
            terms[:] = of_numeric[:] = 0
            for chosen, logs in choices:
                terms += logs[chosen[row]]
            for values, (mu, sigma, mass, log_sigma) in numeric:
                np.subtract(values[row], mu, out=part)
                part /= sigma
                np.square(part, out=part)
                part *= -0.5
                part -= _truncnorm._norm_pdf_logC
                part -= mass
                part -= log_sigma
                of_numeric += part
            terms += of_numeric
            terms += log_weights
            largest[row] = terms.max()
            terms -= largest[row]
            np.maximum(terms, _NEGLIGIBLE, out=terms)
            np.exp(terms, out=terms)
            sums[row] = terms.sum()
        return np.asarray(np.log(sums) + largest)
