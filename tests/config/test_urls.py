"""Database URLs: which are the same database, and which file is behind one."""

from pathlib import Path

import pytest

from search.config.urls import same_database, sqlite_path


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("sqlite:///a.db", "sqlite:///./a.db"),
        ("sqlite:///a.db", "sqlite:///folder/../a.db"),
        ("sqlite+pysqlite:///a.db", "sqlite:///a.db"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_one_database_for_both_is_recognized(storage: str, tracking: str) -> None:
    assert same_database(storage, tracking)


def test_one_database_is_recognized_through_links_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.db").touch()
    Path("symbolic.db").symlink_to("a.db")
    Path("hard.db").hardlink_to("a.db")
    for other in (f"sqlite:///{tmp_path}/a.db", "sqlite:///symbolic.db", "sqlite:///hard.db"):
        assert same_database("sqlite:///a.db", other)


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("sqlite:///a.db", "sqlite:///b.db"),
        ("sqlite:///a.db", "postgresql://host/a.db"),
        ("postgresql://host/optuna", "postgresql://host/mlflow"),
        ("sqlite:///a.db", "http://localhost:5000"),
    ],
)
def test_two_databases_are_told_apart(storage: str, tracking: str) -> None:
    assert not same_database(storage, tracking)


def test_the_file_behind_a_url_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert sqlite_path("sqlite:///a.db") == tmp_path / "a.db"
    assert sqlite_path("sqlite:////var/a.db") == Path("/var/a.db")
    assert sqlite_path("postgresql://host/a") is None
