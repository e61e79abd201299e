"""Optuna's database is complete or absent, a study has one runner, a lost trial is known."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import as_nobody, of_root
from filelock import FileLock
from optuna.trial import TrialState, create_trial
from test_sqlite import SETTINGS, dump, killed_after

from search.config.settings import StudyConfig
from search.errors import InputError, RunError
from search.study import storage, trials
from search.study.lock import promotion_lock, study_lock
from search.study.trials import fail_trial, given_up, missing_slots, owner_of_this_process

# ---- the study ---------------------------------------------------------------------------------


def test_a_study_keeps_its_settings_and_a_uid_and_opening_it_again_changes_nothing(
    in_folder: Path,
) -> None:
    config = StudyConfig()
    study = storage.open_study(config, SETTINGS)
    assert study.study_name == "mnist-dnn"
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.user_attrs["settings"] == SETTINGS
    assert len(study.user_attrs["study_uid"]) == 32
    before = dump(in_folder / "study.db")
    storage.check(config)
    storage.check_same(config, SETTINGS)
    assert storage.open_study(config, SETTINGS).user_attrs == study.user_attrs
    assert dump(in_folder / "study.db") == before


def test_another_study_in_the_database_has_another_uid(in_folder: Path) -> None:
    uids = {
        storage.open_study(StudyConfig(study_name=name), SETTINGS).user_attrs["study_uid"]
        for name in ("one", "other")
    }
    assert len(uids) == 2


def test_a_study_of_other_settings_is_refused_and_left_alone(in_folder: Path) -> None:
    storage.open_study(StudyConfig(), SETTINGS)
    before = dump(in_folder / "study.db")
    with pytest.raises(InputError, match="epochs: 5 -> 6"):
        storage.open_study(StudyConfig(), {**SETTINGS, "epochs": 6})
    assert dump(in_folder / "study.db") == before


def test_a_study_whose_making_was_killed_before_it_had_settings_is_adopted(
    in_folder: Path,
) -> None:
    optuna.create_study(
        study_name="mnist-dnn",
        storage=storage.open_storage("sqlite:///study.db"),
        direction="maximize",
    )
    storage.check_same(StudyConfig(), SETTINGS)
    study = storage.open_study(StudyConfig(), SETTINGS)
    assert study.user_attrs["settings"] == SETTINGS
    assert study.user_attrs["study_uid"]


def test_a_study_of_another_program_is_not_adopted(in_folder: Path) -> None:
    study = optuna.create_study(
        study_name="mnist-dnn",
        storage=storage.open_storage("sqlite:///study.db"),
        direction="maximize",
    )
    study.optimize(lambda trial: 1.0, n_trials=1)
    before = dump(in_folder / "study.db")
    for refuse in (storage.check_same, storage.open_study):
        with pytest.raises(InputError, match="created by another program"):
            refuse(StudyConfig(), SETTINGS)
    assert dump(in_folder / "study.db") == before


# ---- the sole runner ---------------------------------------------------------------------------

HOLD = """
import signal
from search.config.settings import StudyConfig
from search.study.lock import study_lock

with study_lock(StudyConfig()):
    print("held", flush=True)
    signal.pause()
"""


def test_a_study_has_one_runner_until_that_is_gone(in_folder: Path) -> None:
    with killed_after(HOLD, in_folder, "held") as holder:
        with pytest.raises(RunError) as caught, study_lock(StudyConfig()):
            pytest.fail("two processes run one study")
        message = str(caught.value)
        assert "\n" not in message
        assert f"is being run by {socket.gethostname()}, pid {holder.pid};" in message
        assert "wait for it, or give another --study-name" in message
        with study_lock(StudyConfig(study_name="another")):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        for _ in range(2):
            with study_lock(StudyConfig()):
                pass


SERVERS = {"storage": "mysql://127.0.0.1/study", "tracking_uri": "http://127.0.0.1:1"}


@of_root
@pytest.mark.parametrize("first", ["this", "other"])
def test_two_users_of_a_host_take_turns_at_studies_and_models_on_servers(
    temporary: Path, first: str
) -> None:
    config = StudyConfig(**SERVERS)

    def take() -> None:
        with study_lock(config), promotion_lock(config):
            pass

    if first == "this":
        take()
    as_nobody(take)
    take()

    def be_refused() -> None:
        with pytest.raises(RunError, match=f"is being run by .*, pid {pid};"):
            take()

    with study_lock(config):
        pid = os.getpid()
        as_nobody(be_refused)


@of_root
def test_two_users_of_one_file_take_turns_also_where_an_earlier_lock_is_not_writable(
    temporary: Path,
) -> None:
    folder = temporary / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    config = StudyConfig(storage=f"sqlite:///{folder}/study.db")

    def take() -> None:
        with study_lock(config):
            pass

    take()
    as_nobody(take)
    (lock,) = folder.iterdir()
    os.chown(lock, 0, 0)
    lock.chmod(0o644)  # as an earlier version left it
    as_nobody(take)
    lock.unlink()
    refused = pytest.raises(AssertionError, match=r"InputError.* must be writable, but is not")
    with FileLock(lock, mode=0o644), refused:
        as_nobody(take)
    take()


# ---- trials ------------------------------------------------------------------------------------


of_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no Linux")


def is_lost(**mark: Any) -> bool:
    """Whether a running trial of a study in a file, with such an owner, is lost."""
    attrs = {"owner": {**owner_of_this_process(), **mark}}
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
    mark = owner_of_this_process()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 90)
    assert owner_of_this_process()["started"] == pytest.approx(mark["started"] + 90, abs=2)
    assert not is_lost(**mark)


def test_a_trial_of_another_host_in_a_file_is_lost() -> None:
    assert is_lost(host="elsewhere", pid=1, started=0.0)  # this host is the one that runs the study


def test_a_trial_that_nobody_signed_is_lost() -> None:
    trial = create_trial(state=TrialState.RUNNING)
    assert trials.is_lost(optuna.create_study(), trial)


def test_a_lost_trial_ends_as_failed_with_its_reason(in_folder: Path) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    study.ask()
    (trial,) = study.get_trials()
    fail_trial(study, trial, "the reason")
    (trial,) = study.get_trials()
    assert (trial.state, trial.user_attrs) == (TrialState.FAIL, {"failure": "the reason"})


def test_the_missing_places_are_those_that_no_finished_trial_has() -> None:
    study = optuna.create_study(direction="maximize")
    assert missing_slots(study, 3) == [0, 1, 2]
    for place, state in (
        (0, TrialState.COMPLETE),
        (1, TrialState.FAIL),
        (2, TrialState.PRUNED),
        (3, TrialState.FAIL),
        (3, TrialState.COMPLETE),
        (4, TrialState.RUNNING),
    ):
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, user_attrs={"place": place}))
    assert missing_slots(study, 6) == [1, 4, 5]
    assert missing_slots(study, 4) == [1]
    assert missing_slots(study, 1) == []


def test_a_slot_is_finished_by_two_failures_of_its_own_but_not_by_lost_trials() -> None:
    study = optuna.create_study(direction="maximize")
    for place, by_itself in ((0, True), (1, False), (0, False), (1, True), (2, None), (2, None)):
        marks = {"place": place, "failed_by_itself": by_itself}
        attrs = {name: value for name, value in marks.items() if value is not None}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    assert missing_slots(study, 4) == [0, 1, 2, 3]
    for place in (3, 0, 3):
        attrs = {"place": place, "failed_by_itself": True}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    assert {slot: trial.number for slot, trial in given_up(study).items()} == {0: 7, 3: 8}
    assert missing_slots(study, 4) == [1, 2]
    assert missing_slots(study, 2) == []


def test_a_lowered_budget_that_is_met_misses_nothing() -> None:
    study = optuna.create_study(direction="maximize")
    for place in (0, 1, 2, 4):
        state = TrialState.PRUNED
        study.add_trial(create_trial(state=state, user_attrs={"place": place}))
    assert missing_slots(study, 4) == []
    assert missing_slots(study, 5) == [3]


def test_the_schemas_version_is_what_optuna_says() -> None:
    assert storage._alembic_head() == optuna.storages.RDBStorage("sqlite://").get_head_version()
