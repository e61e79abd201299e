"""Optuna's database is complete or absent, a study has one runner, a lost trial is known."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import database, storage
from search.config import InputError, RunError, StudyConfig

SETTINGS = {"epochs": 5, "dataset": "mnist (0123456789ab)"}


def python(code: str, folder: Path) -> "subprocess.Popen[str]":
    """A process of its own that runs `code` in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def killed_after(code: str, folder: Path, line: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `code` until it has printed `line`; at the end it is killed, if it was not before."""
    process = python(code, folder)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == line
        yield process
    finally:
        process.kill()
        process.communicate()


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


# ---- creating ----------------------------------------------------------------------------------

FILL = """
import signal, sqlite3
from pathlib import Path
from search.storage import create_sqlite

def fill(url):
    database = sqlite3.connect(url.removeprefix("sqlite:///"))
    database.execute("CREATE TABLE studies (half INTEGER)")
    database.commit()
    print("half", flush=True)
    signal.pause()

create_sqlite(Path("study.db"), fill)
"""


def test_a_database_whose_making_was_killed_does_not_exist_and_is_made_again(
    in_folder: Path,
) -> None:
    with killed_after(FILL, in_folder, "half") as process:
        assert [path.name for path in in_folder.glob("*unfinished")] == [".study.db.unfinished"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (in_folder / "study.db").exists()
    study = storage.open_study(StudyConfig(), SETTINGS)
    assert study.user_attrs["settings"] == SETTINGS
    assert (in_folder / "study.db").exists()
    assert list(in_folder.glob("*unfinished*")) == []


def test_a_database_whose_making_failed_does_not_exist(in_folder: Path) -> None:
    def fill(url: str) -> None:
        Path(url.removeprefix("sqlite:///")).write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        database.create_sqlite(in_folder / "study.db", fill)
    assert {path.name for path in in_folder.iterdir()} <= {".study.db.creation.lock"}


def test_an_existing_database_is_not_made_again(in_folder: Path) -> None:
    (in_folder / "study.db").write_text("mine")
    database.create_sqlite(in_folder / "study.db", lambda url: pytest.fail(url))
    assert (in_folder / "study.db").read_text() == "mine"


def test_two_processes_at_once_end_with_one_database(in_folder: Path) -> None:
    code = """
import os, optuna
from search import database, storage
print("ready", flush=True)
name = input()
opened = storage.open_storage("sqlite:///study.db")
optuna.create_study(study_name=name, storage=opened)
print(os.stat("study.db").st_ino)
"""
    processes = [python(code, in_folder) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for name, process in zip("ab", processes, strict=True):
        assert process.stdin is not None
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    inode = f"{(in_folder / 'study.db').stat().st_ino}\n"
    assert [out for out, _ in results] == [inode, inode]
    assert sorted(optuna.get_all_study_names("sqlite:///study.db")) == ["a", "b"]


@pytest.mark.parametrize("name", ["a {b} {0}", "100% a%s", "a%20b", "a#b"])
def test_a_path_of_braces_spaces_and_percents_works(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = in_folder / name / f"{name}.db"
    path.parent.mkdir()
    monkeypatch.chdir(path.parent)
    config = StudyConfig(storage=f"sqlite:///{path.name.replace('%', '%25')}")
    storage.check(config)
    study = storage.open_study(config, SETTINGS)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    storage.link(study, study.trials[0], "abc", config.storage)
    storage.check(config)
    storage.check_same(config, SETTINGS)
    with pytest.raises(InputError, match="epochs: 5 -> 6"):
        storage.check_same(config, {**SETTINGS, "epochs": 6})
    again = storage.open_study(config, SETTINGS)
    assert again.trials[0].user_attrs == {"mlflow_run_id": "abc"}
    assert {p.name.lstrip(".").split(".db")[0] for p in path.parent.iterdir()} == {name}
    assert [p.name for p in in_folder.iterdir()] == [name]


# ---- connections -------------------------------------------------------------------------------


def pragmas(path: Path) -> tuple[str, int, int]:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        names = ("journal_mode", "busy_timeout", "synchronous")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    engine.dispose()
    return str(values[0]), int(str(values[1])), int(str(values[2]))


def test_connections_to_tuned_files_only_are_in_wal_mode_and_wait_60_seconds(
    in_folder: Path,
) -> None:
    with closing(sqlite3.connect("untouched.db")) as database:
        database.execute("CREATE TABLE t (x)")
    storage.open_storage("sqlite:///study.db")
    normal, full = 1, 2
    (in_folder / "link.db").symlink_to("study.db")
    assert pragmas(in_folder / "study.db") == ("wal", 60_000, normal)
    assert pragmas(in_folder / "link.db") == ("wal", 60_000, normal)
    assert pragmas(in_folder / "untouched.db") == ("delete", 5_000, full)


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
        with pytest.raises(InputError, match="made by another program"):
            refuse(StudyConfig(), SETTINGS)
    assert dump(in_folder / "study.db") == before


# ---- the sole runner ---------------------------------------------------------------------------

HOLD = """
import signal
from search.config import StudyConfig
from search.storage import sole_runner

with sole_runner(StudyConfig()):
    print("held", flush=True)
    signal.pause()
"""


def test_a_study_has_one_runner_until_that_is_gone(in_folder: Path) -> None:
    with killed_after(HOLD, in_folder, "held") as holder:
        with pytest.raises(RunError) as caught, storage.sole_runner(StudyConfig()):
            pytest.fail("two processes run one study")
        message = str(caught.value)
        assert "\n" not in message
        assert f"is being run by {socket.gethostname()}, pid {holder.pid};" in message
        assert "wait for it, or give another --study-name" in message
        with storage.sole_runner(StudyConfig(study_name="another")):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        for _ in range(2):
            with storage.sole_runner(StudyConfig()):
                pass


# ---- trials ------------------------------------------------------------------------------------


def running(**mark: Any) -> FrozenTrial:
    attrs = {"owner": {**storage.owner(), **mark}}
    return create_trial(state=TrialState.RUNNING, user_attrs=attrs)


def test_a_trial_of_a_living_process_is_not_lost() -> None:
    assert not storage.is_lost(running())


def test_a_trial_of_a_dead_process_is_lost() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert storage.is_lost(running(pid=process.pid))


def test_a_trial_of_a_process_that_nobody_has_waited_for_is_lost() -> None:
    process = subprocess.Popen(["true"], stdout=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # now it is a zombie
    started = storage.psutil.Process(process.pid).create_time()
    assert storage.is_lost(running(pid=process.pid, started=started))
    process.wait()


def test_a_trial_whose_pid_now_belongs_to_a_later_process_is_lost() -> None:
    assert storage.is_lost(running(started=storage.owner()["started"] - 60))


def test_a_trial_of_another_host_is_not_lost_as_far_as_we_know() -> None:
    assert not storage.is_lost(running(host="elsewhere", pid=1, started=0.0))


def test_a_trial_that_nobody_signed_is_lost() -> None:
    assert storage.is_lost(create_trial(state=TrialState.RUNNING))


def test_a_lost_trial_ends_as_failed_with_its_reason(in_folder: Path) -> None:
    study = storage.open_study(StudyConfig(), SETTINGS)
    study.ask()
    (trial,) = study.get_trials()
    storage.fail(study, trial, "the reason")
    (trial,) = study.get_trials()
    assert (trial.state, trial.user_attrs) == (TrialState.FAIL, {"failure": "the reason"})


def test_the_missing_places_are_those_that_no_finished_trial_has() -> None:
    study = optuna.create_study(direction="maximize")
    assert storage.missing_places(study, 3) == [0, 1, 2]
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
    assert storage.missing_places(study, 6) == [1, 4, 5]
    assert storage.missing_places(study, 1) == []
