"""The trials of a study in outline: what samplers and pruners need, each trial read once.

Optuna reads whole trials, which consist mainly of their history. Workers do not need it.
"""

import copy
import json
from bisect import insort
from collections import defaultdict
from collections.abc import Collection, Container, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage, _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from search.study.postgres import retry_if_cut
from search.study.storage import BY_ITSELF, OWNER, SLOT

_OF_FINISHED = (SLOT, BY_ITSELF)  # user attributes
_OF_RUNNING = (*_OF_FINISHED, OWNER)
_PROPOSED = "tpe:relative_params:"  # system attributes with the proposals of TPE
_number = attrgetter("number")
_AT_ONCE = 500  # trials, so that the first read of a long study takes little memory
_PARAM, _VALUE = models.TrialParamModel, models.TrialValueModel
_REPORT = models.TrialIntermediateValueModel


class OutlineStorage(_CachedStorage):
    """Optuna's storage for workers: `get_all_trials` returns outlines.

    An outline has no dates, and of the user attributes only SLOT, BY_ITSELF and, while it runs,
    OWNER. A running one has no intermediate values. `get_trial` still reads the whole trial.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._outlines: dict[int, Outlines] = {}

    def outlines(self, study_id: int) -> "Outlines":
        """The outlines of one study, as far as they have been read."""
        if study_id not in self._outlines:
            self._outlines[study_id] = Outlines(self._backend.engine, study_id)
        return self._outlines[study_id]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The outlines of the trials in `states` (default: all), ordered by number."""
        with self._lock:
            trials = self.outlines(study_id).read(states)
        return copy.deepcopy(trials) if deepcopy else trials


def outlines_of(study: optuna.Study) -> "Outlines | None":
    """The outlines of a worker's study; None if its storage reads whole trials."""
    storage = study._storage
    return storage.outlines(study._study_id) if isinstance(storage, OutlineStorage) else None


def _read_cells(
    connection: sqlalchemy.Connection,
    trials: list[int],
    model: Any,
    *columns: Any,
    where: Any = True,
) -> dict[int, list[Any]]:
    """The `columns` of a table by the trial's id, in the order of the table's primary key."""
    query = (
        sqlalchemy.select(model.trial_id, *columns)
        .where(model.trial_id.in_(trials), where)
        .order_by(*model.__table__.primary_key)
    )
    found: dict[int, list[Any]] = defaultdict(list)
    for trial_id, *cells in connection.execute(query):
        found[trial_id].append(cells)
    return found


class Outlines:
    """The outlines of one study. A finished trial does not change, so it is read once."""

    def __init__(self, engine: sqlalchemy.Engine, study_id: int) -> None:
        self._engine = engine
        self._study_id = study_id
        # By state, and all under None; ordered by number.
        self._finished: dict[TrialState | None, list[FrozenTrial]] = defaultdict(list)
        self._by_slot: dict[int | None, list[FrozenTrial]] = defaultdict(list)
        self._known: set[int] = set()  # their ids
        self._all_known_up_to = -1  # an id: all trials up to it are finished and known
        self._spaces: dict[tuple[tuple[str, str], ...], dict[str, BaseDistribution]] = {}
        self._distinct: dict[int, FrozenTrial] = {}
        self.columns = Columns()

    def distinct(self) -> list[FrozenTrial]:
        """The first of all COMPLETE and PRUNED trials with the same distributions, by number."""
        return sorted(self._distinct.values())

    def read(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Read new trials; returns those in `states` (default: all), ordered by number."""
        wanted = [state for state in TrialState if states is None or state in states]
        unfinished = self._read_new([state for state in wanted if not state.is_finished()])
        finished = [state for state in wanted if state.is_finished()]
        if states is None or len(finished) == 1:
            found = list(self._finished[None if states is None else finished[0]])
        else:
            found = [t for t in self._finished[None] if t.state in finished] if finished else []
        for trial in unfinished:
            insort(found, trial, key=_number)
        return found

    def at(self, slot: int) -> list[FrozenTrial]:
        """Read new trials; returns the running and finished ones of a slot, failed ones too."""
        running = self._read_new([TrialState.RUNNING])
        found = [trial for trial in running if trial.user_attrs.get(SLOT) == slot]
        return sorted([*self._by_slot.get(slot, ()), *found], key=_number)

    @retry_if_cut
    def _read_new(self, unfinished: Collection[TrialState]) -> list[FrozenTrial]:
        """Read newly finished trials; returns the current ones in the states `unfinished`."""
        trial = models.TrialModel
        query = (
            sqlalchemy.select(trial.trial_id, trial.number, trial.state)
            .where(trial.study_id == self._study_id, trial.trial_id > self._all_known_up_to)
            .order_by(trial.trial_id)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
            new = [r for r in rows if r.state.is_finished() and r.trial_id not in self._known]
            for start in range(0, len(new), _AT_ONCE):
                self._add(self._outlines(connection, new[start : start + _AT_ONCE], finished=True))
            others = [row for row in rows if row.state in unfinished]
            found = self._outlines(connection, others, finished=False)
        for row in rows:
            if not row.state.is_finished():
                break
            self._all_known_up_to = row.trial_id
        return found

    def _add(self, trials: list[FrozenTrial]) -> None:
        for trial in trials:
            self._known.add(trial._trial_id)
            for key in (None, trial.state):
                insort(self._finished[key], trial, key=_number)
            self._by_slot[trial.user_attrs.get(SLOT)].append(trial)
            if trial.state is not TrialState.FAIL:
                self.columns.add(trial)
                first = self._distinct.setdefault(id(trial.distributions), trial)
                self._distinct[id(trial.distributions)] = min(first, trial)

    def _outlines(
        self, connection: sqlalchemy.Connection, rows: Sequence[Any], *, finished: bool
    ) -> list[FrozenTrial]:
        """The outlines of the trials whose id, number and state are `rows`."""
        if not rows:
            return []
        ids = [row.trial_id for row in rows]
        user, system = models.TrialUserAttributeModel, models.TrialSystemAttributeModel
        own = user.key.in_(_OF_FINISHED if finished else _OF_RUNNING)
        proposals = system.key.startswith(_PROPOSED, autoescape=True)
        read = partial(_read_cells, connection, ids)
        params = read(_PARAM, _PARAM.param_name, _PARAM.param_value, _PARAM.distribution_json)
        values = read(_VALUE, _VALUE.value, _VALUE.value_type)
        user_attrs = read(user, user.key, user.value_json, where=own)
        where = ~proposals if finished else True
        system_attrs = read(system, system.key, system.value_json, where=where)
        reports: dict[int, list[Any]] = {}
        if finished:
            cells = (_REPORT.step, _REPORT.intermediate_value, _REPORT.intermediate_value_type)
            reports = read(_REPORT, *cells)
        found = []
        for trial_id, number, state in rows:
            space = self._space(params[trial_id])
            found.append(
                FrozenTrial(
                    number=number,
                    state=state,
                    value=None,
                    values=[_VALUE.stored_repr_to_value(*v) for v in values[trial_id]] or None,
                    datetime_start=None,
                    datetime_complete=None,
                    params={n: space[n].to_external_repr(v) for n, v, _ in params[trial_id]},
                    distributions=space,
                    user_attrs={key: json.loads(text) for key, text in user_attrs[trial_id]},
                    system_attrs={key: json.loads(text) for key, text in system_attrs[trial_id]},
                    intermediate_values={
                        step: _REPORT.stored_repr_to_intermediate_value(value, kind)
                        for step, value, kind in reports.get(trial_id, ())
                    },
                    trial_id=trial_id,
                )
            )
        return found

    def _space(self, params: Sequence[Sequence[Any]]) -> dict[str, BaseDistribution]:
        """The distributions of a trial's params; equal ones share an object."""
        key = tuple((name, text) for name, _, text in params)
        if key not in self._spaces:
            self._spaces[key] = {name: json_to_distribution(text) for name, text in key}
        return self._spaces[key]


class Columns:
    """COMPLETE and PRUNED trials as arrays, indexed by a trial's number; NaN where it has no value.

    value, reported: of COMPLETE trials only; reported by step. params: in internal representation.
    """

    def __init__(self) -> None:
        self.finished = np.zeros(0, dtype=bool)
        self.value = np.zeros(0)
        self.reported: dict[int, NDArray[np.float64]] = {}
        self.params: dict[str, NDArray[np.float64]] = {}

    def add(self, trial: FrozenTrial) -> None:
        """Add a trial; they may finish in any order."""
        number = trial.number
        if number >= len(self.value):
            self._grow(max(64, number))
        self.finished[number] = True
        for name, distribution in trial.distributions.items():
            internal = distribution.to_internal_repr(trial.params[name])
            self._column(self.params, name)[number] = internal
        if trial.state is TrialState.COMPLETE:
            self.value[number] = trial.value
            for step, value in trial.intermediate_values.items():
                self._column(self.reported, step)[number] = value

    def _column(self, columns: dict[Any, NDArray[np.float64]], key: Any) -> NDArray[np.float64]:
        if key not in columns:
            columns[key] = np.full(len(self.value), np.nan)
        return columns[key]

    def _grow(self, more: int) -> None:
        def grown(column: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.pad(column, (0, more), constant_values=np.nan)

        self.finished = np.pad(self.finished, (0, more))
        self.value = grown(self.value)
        self.reported = {step: grown(column) for step, column in self.reported.items()}
        self.params = {name: grown(column) for name, column in self.params.items()}
