"""Whoever can write in a folder can take its locks, and their files have names that fit."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from search import InputError
from search.study.lock import file_lock, host_wide, lock_file


def test_a_locks_file_keeps_an_ordinary_name_and_a_long_one_fits_every_file_system() -> None:
    path = Path("there/study.db")
    assert lock_file(path, "mnist-dnn") == Path("there/.study.db.mnist-dnn.lock")
    longest = lock_file(path, "n" * 240)
    assert longest.name == f".study.db.{'n' * 240}.lock"
    longer = [lock_file(path, "n" * 250 + end).name for end in "ab"]
    assert all(len(name) <= 255 and name.startswith(".") for name in longer)
    assert longer[0] != longer[1]


@pytest.fixture
def private_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.parametrize(("folder", "mode"), [(0o755, 0o644), (0o775, 0o664), (0o777, 0o666)])
def test_who_can_write_in_a_folder_can_take_its_locks(
    in_folder: Path, private_umask: None, folder: int, mode: int
) -> None:
    in_folder.chmod(folder)
    with file_lock(in_folder / "study.db") as file:
        assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_lock_of_the_host_lies_where_every_user_can_take_it(
    in_folder: Path, private_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(in_folder))
    with file_lock(host_wide("a server"), "model") as file:
        assert stat.S_IMODE(file.stat().st_mode) == 0o666
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o777
    monkeypatch.setattr(tempfile, "tempdir", str(in_folder / "other"))
    (in_folder / "other").mkdir()
    (in_folder / "other" / "search-locks").write_text("a file")
    with (
        pytest.raises(InputError, match=r"^the lock file '.*' must be writable, but is not"),
        file_lock(host_wide("a server"), "model"),
    ):
        pass
