"""A worker reads of a study what proposals and prunings depend on, every finished trial once."""

import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import Engine
from test_sqlite import SETTINGS

from search import StudyConfig
from search.study import storage
from search.study.outline import OutlineStorage
from search.study.storage import BY_ITSELF
from search.study.trials import FINISHED, SlottedStudy, given_up, read_trial, trials_in_slot

DISTRIBUTIONS = {
    "units": IntDistribution(8, 512, step=8),
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "activation": CategoricalDistribution(("relu", "gelu", None)),
}
PARAMS = {"units": 64, "rate": 0.1 - 1e-16, "activation": None}
KEPT = {"place", BY_ITSELF}


@pytest.fixture
def study(in_folder: Path) -> Iterator[optuna.Study]:
    """As the main process has it."""
    study = storage.open_study(StudyConfig(), SETTINGS)
    yield study
    storage.close_study(study)


@pytest.fixture
def seen(study: optuna.Study) -> Iterator[SlottedStudy]:
    """As a worker has it."""
    backend = storage.open_storage("sqlite:///study.db")
    seen = SlottedStudy(study_name=study.study_name, storage=OutlineStorage(backend))
    yield seen
    storage.close_study(seen)


def add(study: optuna.Study, state: TrialState, **changed: Any) -> FrozenTrial:
    """A trial with all that a trial can keep."""
    number = len(study.get_trials(deepcopy=False))
    kept: dict[str, Any] = {
        "state": state,
        "value": 0.1 * number if state in FINISHED else None,
        "params": PARAMS,
        "distributions": DISTRIBUTIONS,
        "user_attrs": {"place": number, "owner": {"pid": 1}, "history": [{"loss": 1.0}]},
        "system_attrs": {f"{_RELATIVE_PARAMS_KEY}:0": "{}", "completed_rung_0": 0.5},
        "intermediate_values": {0: 0.1 + number, 1: math.inf},
        **changed,
    }
    study.add_trial(create_trial(**kept))
    return study.get_trials(deepcopy=False)[-1]


def test_an_outline_is_the_trial_without_what_no_proposal_depends_on(
    study: optuna.Study, seen: SlottedStudy
) -> None:
    for state in TrialState:
        add(study, state)
    add(study, TrialState.COMPLETE, params={}, distributions={}, value=-math.inf)
    add(study, TrialState.FAIL, user_attrs={"place": 0, BY_ITSELF: True, "failure": "x"})
    every = study.get_trials(deepcopy=False)
    assert [outline.number for outline in seen.get_trials()] == list(range(7))
    for trial, outline in zip(every, seen.get_trials(deepcopy=False), strict=True):
        finished = trial.state.is_finished()
        for name in ("number", "state", "values", "params", "distributions", "_trial_id"):
            assert getattr(outline, name) == getattr(trial, name), name
        assert list(outline.params) == list(trial.params)
        names = KEPT if finished else KEPT | {"owner"}
        assert outline.user_attrs == {k: v for k, v in trial.user_attrs.items() if k in names}
        assert outline.intermediate_values == (trial.intermediate_values if finished else {})
        rung = {"completed_rung_0": 0.5}
        assert outline.system_attrs == (rung if finished else trial.system_attrs)
        assert read_trial(seen, trial.number) == trial
    for states in [(state,) for state in TrialState] + [FINISHED, list(TrialState)]:
        found = [trial.number for trial in seen.get_trials(deepcopy=False, states=states)]
        assert found == [trial.number for trial in every if trial.state in states]


def test_a_finished_trial_is_read_once_in_whatever_order_the_trials_finish(
    study: optuna.Study, seen: SlottedStudy
) -> None:
    statements: list[str] = []

    def executed(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    sqlalchemy.event.listen(Engine, "before_cursor_execute", executed)
    try:
        early, late = study.ask(), study.ask()
        for trial, rate in ((early, 0.2), (late, 0.3)):
            trial.suggest_float("rate", 0, 1)
            trial.report(rate, 4)
        reads = []
        for finish in (None, late, None, early, None):
            if finish is not None:
                study.tell(finish, float(finish.number))
            statements.clear()
            complete = seen.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            reads.append(([trial.number for trial in complete], len(statements)))
    finally:
        sqlalchemy.event.remove(Engine, "before_cursor_execute", executed)
    whole = 1 + 5  # params, value, intermediate values, user and system attributes
    assert reads == [([], 1), ([1], whole), ([1], 1), ([0, 1], whole), ([0, 1], 1)]
    again = seen.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    assert all(one is other for one, other in zip(again, complete, strict=True))
    columns = seen._storage.outlines(seen._study_id).columns  # type: ignore[attr-defined]
    assert columns.finished[:3].tolist() == [True, True, False]
    assert columns.value[:2].tolist() == [0, 1]
    assert seen._storage.outlines(seen._study_id).distinct() == again[:1]  # type: ignore[attr-defined]
    assert columns.reported[4][:2].tolist() == [0.2, 0.3]
    assert columns.params["rate"][:2].tolist() == [t.params["rate"] for t in again]


def test_arrays_have_no_values_of_params_not_suggested_and_trials_not_complete(
    study: optuna.Study, seen: SlottedStudy
) -> None:
    add(study, TrialState.PRUNED)
    add(study, TrialState.FAIL)
    add(study, TrialState.COMPLETE, params={}, distributions={}, value=0.5)
    seen.get_trials(deepcopy=False)
    outlines = seen._storage.outlines(seen._study_id)  # type: ignore[attr-defined]
    assert np.flatnonzero(outlines.columns.finished).tolist() == [0, 2]
    assert np.flatnonzero(~np.isnan(outlines.columns.value)).tolist() == [2]
    for column in outlines.columns.params.values():
        assert np.flatnonzero(~np.isnan(column)).tolist() == [0]
    assert [trial.number for trial in outlines.distinct()] == [0, 2]


def test_a_slot_knows_its_trials_and_who_gave_it_up(
    study: optuna.Study, seen: SlottedStudy
) -> None:
    failed = {"place": 3, BY_ITSELF: True}
    add(study, TrialState.FAIL, user_attrs=failed)
    add(study, TrialState.COMPLETE, user_attrs={"place": 4})
    add(study, TrialState.RUNNING, user_attrs={"place": 3, "owner": {"pid": 7}})
    for reader in (study, seen):
        (running,) = trials_in_slot(reader, 3)
        assert (running.number, running.user_attrs["owner"]) == (2, {"pid": 7})
        assert [trial.number for trial in trials_in_slot(reader, 4)] == [1]
        assert trials_in_slot(reader, 5) == []
        assert given_up(reader) == {}
    add(study, TrialState.FAIL, user_attrs=failed)
    assert given_up(seen)[3].number == 3


def test_histories_cost_a_worker_no_memory(study: optuna.Study, seen: SlottedStudy) -> None:
    history = [{"epoch": epoch, "loss": 0.5} for epoch in range(4000)]
    for number in range(5):
        attrs = {"place": number, "history": history}
        add(study, TrialState.COMPLETE, user_attrs=attrs)
    tracemalloc.start()
    assert len(seen.get_trials(deepcopy=False)) == 5
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
