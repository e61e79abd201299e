"""One process runs a study; whoever can write in a folder can take its locks."""

import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import as_nobody, of_root
from filelock import FileLock
from test_sqlite import killed_after

from search.config.settings import StudyConfig
from search.errors import InputError, RunError
from search.study.lock import file_lock, host_wide, lock_file, promotion_lock, study_lock

# ---- files of locks -----------------------------------------------------------------------------


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
