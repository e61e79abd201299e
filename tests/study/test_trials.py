"""Which trials are lost, and which slots are missing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from test_sqlite import SETTINGS

from search.config.settings import StudyConfig
from search.study import storage, trials
from search.study.trials import (
    fail_trial,
    given_up,
    history_attr,
    history_of,
    missing_slots,
    owner_of_this_process,
)

of_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no Linux")


def is_lost(**owner: Any) -> bool:
    """Whether a running trial of a study in a file, with such an owner, is lost."""
    attrs = {"owner": {**owner_of_this_process(), **owner}}
    trial = create_trial(state=TrialState.RUNNING, user_attrs=attrs)
    return trials.is_lost(optuna.create_study(), trial)


def test_a_trial_of_a_living_process_is_not_lost() -> None:
    assert not is_lost()


def test_a_trial_of_a_dead_process_is_lost() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert is_lost(pid=process.pid)


def test_a_trial_of_a_process_that_nobody_has_waited_for_is_lost() -> None:
    process = subprocess.Popen(["true"], stdout=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # now it is a zombie
    started = trials.psutil.Process(process.pid).create_time()
    assert is_lost(pid=process.pid, started=started)
    process.wait()


@of_linux
def test_a_trial_whose_pid_now_belongs_to_a_later_process_is_lost() -> None:
    ticks, boot = owner_of_this_process()["ticks"].split()
    assert is_lost(ticks=f"{int(ticks) - 1} {boot}")
    assert is_lost(ticks=f"{ticks} another-start")
    assert is_lost(
        started=owner_of_this_process()["started"] - 60, ticks=None
    )  # an earlier version's


@of_linux
def test_a_trial_of_a_living_process_is_not_lost_where_the_clock_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    booted = trials.psutil.boot_time()
    owner = owner_of_this_process()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 90)
    assert owner_of_this_process()["started"] == pytest.approx(owner["started"] + 90, abs=2)
    assert not is_lost(**owner)


def test_a_trial_of_another_host_in_a_file_is_lost() -> None:
    assert is_lost(host="elsewhere", pid=1, started=0.0)  # this host is the one that runs the study


def test_a_trial_without_an_owner_is_lost() -> None:
    trial = create_trial(state=TrialState.RUNNING)
    assert trials.is_lost(optuna.create_study(), trial)


def test_a_lost_trial_ends_as_failed_with_its_reason(in_folder: Path) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    study.ask()
    (trial,) = study.get_trials()
    fail_trial(study, trial, "the reason")
    (trial,) = study.get_trials()
    assert (trial.state, trial.user_attrs) == (TrialState.FAIL, {"failure": "the reason"})


def test_the_missing_slots_are_those_that_no_finished_trial_has() -> None:
    study = optuna.create_study(direction="maximize")
    assert missing_slots(study, 3) == [0, 1, 2]
    for slot, state in (
        (0, TrialState.COMPLETE),
        (1, TrialState.FAIL),
        (2, TrialState.PRUNED),
        (3, TrialState.FAIL),
        (3, TrialState.COMPLETE),
        (4, TrialState.RUNNING),
    ):
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, user_attrs={"place": slot}))
    assert missing_slots(study, 6) == [1, 4, 5]
    assert missing_slots(study, 4) == [1]
    assert missing_slots(study, 1) == []


def test_a_slot_is_finished_by_two_failures_of_its_own_but_not_by_lost_trials() -> None:
    study = optuna.create_study(direction="maximize")
    for slot, by_itself in ((0, True), (1, False), (0, False), (1, True), (2, None), (2, None)):
        attributes = {"place": slot, "failed_by_itself": by_itself}
        attrs = {name: value for name, value in attributes.items() if value is not None}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    assert missing_slots(study, 4) == [0, 1, 2, 3]
    for slot in (3, 0, 3):
        attrs = {"place": slot, "failed_by_itself": True}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    assert {slot: trial.number for slot, trial in given_up(study).items()} == {0: 7, 3: 8}
    assert missing_slots(study, 4) == [1, 2]
    assert missing_slots(study, 2) == []


def test_a_lowered_budget_that_is_met_misses_nothing() -> None:
    study = optuna.create_study(direction="maximize")
    for slot in (0, 1, 2, 4):
        state = TrialState.PRUNED
        study.add_trial(create_trial(state=state, user_attrs={"place": slot}))
    assert missing_slots(study, 4) == []
    assert missing_slots(study, 5) == [3]


def test_a_history_in_one_attribute_is_read_as_before() -> None:
    entries = [{"epoch": epoch} for epoch in range(250)]
    old = create_trial(state=TrialState.PRUNED, user_attrs={"history": entries})
    assert history_of(old) == entries
    blocks = {history_attr(at): entries[at : at + 100] for at in (200, 0, 100)}
    assert list(blocks) == ["history_2", "history", "history_1"]
    assert history_of(create_trial(state=TrialState.PRUNED, user_attrs=blocks)) == entries
    assert history_of(create_trial(state=TrialState.FAIL)) == []
