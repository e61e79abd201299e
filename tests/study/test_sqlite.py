"""A database file is complete or absent, and open for many writers."""

import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import forks
import optuna
import pytest
import sqlalchemy

from search.config.settings import StudyConfig
from search.errors import InputError
from search.study import storage
from search.study.sqlite import create_sqlite
from search.study.trials import amend_trial

SETTINGS = {"epochs": 5, "dataset": "mnist (0123456789ab)"}


def python(code: str, folder: Path, *arguments: str) -> forks.Python:
    """A process of its own that runs `code` in `folder`."""
    return forks.Python(["-c", code, *arguments], cwd=folder, stdin=subprocess.PIPE)


@contextmanager
def killed_after(code: str, folder: Path, line: str) -> Iterator[forks.Python]:
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
from search.study.sqlite import create_sqlite

def fill(url):
    database = sqlite3.connect(url.removeprefix("sqlite:///"))
    database.execute("CREATE TABLE studies (half INTEGER)")
    database.commit()
    print("half", flush=True)
    signal.pause()

create_sqlite(Path("study.db"), fill)
"""


def test_a_database_whose_creation_was_killed_does_not_exist_and_is_created_again(
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


def test_a_database_whose_creation_failed_does_not_exist(in_folder: Path) -> None:
    def fill(url: str) -> None:
        Path(url.removeprefix("sqlite:///")).write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        create_sqlite(in_folder / "study.db", fill)
    assert {path.name for path in in_folder.iterdir()} <= {".study.db.creation.lock"}


def test_an_existing_database_is_not_created_again(in_folder: Path) -> None:
    (in_folder / "study.db").write_text("mine")
    create_sqlite(in_folder / "study.db", lambda url: pytest.fail(url))
    assert (in_folder / "study.db").read_text() == "mine"


def test_two_processes_at_once_end_with_one_database(in_folder: Path) -> None:
    code = """
import os, optuna
from search.study import storage
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


@pytest.mark.slow
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
    amend_trial(study, study.trials[0], "mlflow_run_id", "abc", config.storage)
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
