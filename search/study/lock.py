"""Who may run a study, promote a model or create a database file: one process at a time.

Every lock is the operating system's or the database server's, so it is released when its holder
ends, however that happens.
"""

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from search.config.settings import StudyConfig
from search.config.urls import is_postgresql, sqlite_path
from search.errors import InputError, RunError
from search.study.postgres import ServerLock, server_lock

_LONGEST_NAME = 255  # bytes of a file name, on every common file system


def lock_file(path: Path, purpose: str = "creation") -> Path:
    """The hidden file next to `path` that is locked for `purpose`."""
    name = f".{path.name}.{purpose}.lock"
    if len(name.encode()) > _LONGEST_NAME:
        name = f".{sha256(name.encode()).hexdigest()}.lock"
    return path.with_name(name)


def host_wide(key: str) -> Path:
    """The path for a `file_lock` that is no file's: one of this host, shared by all its users."""
    return Path(tempfile.gettempdir()) / "search-locks" / sha256(key.encode()).hexdigest()[:16]


def _beside(url: str, kind: str) -> Path:
    """The path for a `file_lock` of the database at `url`: its file, or one that stands for it."""
    path = sqlite_path(url)
    return host_wide(f"{kind} {url}") if path is None else path.resolve()


@contextlib.contextmanager
def file_lock(path: Path, purpose: str = "creation", *, timeout: float = 120) -> Iterator[Path]:
    """Hold the lock for `purpose` of the file `path`; yields the lock's own file.

    Every user who can write in the folder can take it, whoever created the file. Raises InputError
    if the permissions of an existing file forbid it, Timeout if it is held for `timeout` seconds.
    """
    file = lock_file(path, purpose)
    try:
        _share(file)
        lock = FileLock(file, timeout=timeout)
        lock.acquire()
    except (PermissionError, BlockingIOError, FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"the lock file {str(file)!r} must be writable, but is not ({type(error).__name__}); "
            "let its owner change its and its folder's permissions, or remove it while nobody "
            "runs a study there"
        ) from None
    try:
        yield file
    finally:
        lock.release()


def _share(file: Path) -> None:
    """Create the lock's `file` so that all who can write in its folder can open it."""
    with contextlib.suppress(FileExistsError):
        file.parent.mkdir()
        file.parent.chmod(0o777)  # no sticky bit: it would let only a file's owner remove it
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        if not os.access(file, os.R_OK | os.W_OK):
            _remove_free(file)
        return
    folder = file.parent.stat()
    with contextlib.suppress(PermissionError):  # we are not in the folder's group
        os.fchown(descriptor, -1, folder.st_gid)
    os.fchmod(descriptor, folder.st_mode & 0o666)
    os.close(descriptor)


def _remove_free(file: Path) -> None:
    """Remove a lock's file that can't be written to. Raises BlockingIOError if it is locked.

    We lock it first, so nobody holds it; those who wait for it will lock the new file.
    """
    import fcntl  # not on Windows

    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()


# ---- one process runs a study --------------------------------------------------------------------


class TakenOver(RunError):
    """Another process runs the study."""


@contextlib.contextmanager
def study_lock(config: StudyConfig) -> Iterator[Callable[[], None]]:
    """Hold the lock of the study, on which one process at a time works. Raises TakenOver.

    A PostgreSQL study is locked by its server, any other by a file. Yields a function that renews
    a lock that was lost, e.g. because the server was restarted; it raises TakenOver if another
    process has taken the lock meanwhile.
    """
    with contextlib.ExitStack() as stack:
        if is_postgresql(config.storage):
            lock = _server_lock(config)
            stack.callback(lock.release)

            def renew() -> None:
                if not lock.is_held() and not lock.acquire(wait=False):
                    raise _taken_over(config, lock.find_holder())

            renew()
            yield renew
            return
        beside = _beside(config.storage, "study")
        try:
            file = stack.enter_context(file_lock(beside, config.study_name, timeout=0))
        except Timeout:
            holder = None
            with contextlib.suppress(OSError):
                holder = lock_file(beside, config.study_name).read_text()
            raise _taken_over(config, holder) from None
        file.write_text(_signature())
        try:
            yield lambda: None
        finally:
            with contextlib.suppress(OSError):
                os.truncate(file, 0)


def holds_study(config: StudyConfig) -> bool:
    """Whether this process holds the lock of the study."""
    return find_holder(config) == _signature()


def find_holder(config: StudyConfig) -> str | None:
    """Host and pid of the process that holds the lock of the study; None if there is none."""
    if is_postgresql(config.storage):
        return _server_lock(config).find_holder()
    file = lock_file(_beside(config.storage, "study"), config.study_name)
    try:
        holder, signed = file.read_text(), file.stat().st_mtime
    except OSError:
        return None
    host, _, pid = holder.partition(", pid ")
    if host != _host():
        return holder or None
    try:  # a killed holder leaves its signature, and its pid may belong to a later process
        return holder if psutil.Process(int(pid)).create_time() <= signed else None
    except psutil.NoSuchProcess:
        return None


def _server_lock(config: StudyConfig) -> ServerLock:
    return ServerLock(config.storage, f"study {config.study_name}", _signature())


def _host() -> str:
    return socket.gethostname()[:40]  # PostgreSQL keeps 63 characters of a signature


def _signature() -> str:
    return f"{_host()}, pid {os.getpid()}"


def _taken_over(config: StudyConfig, holder: str | None) -> TakenOver:
    return TakenOver(
        f"study {config.study_name} is being run by {holder or 'another process'}; wait for it, or "
        "give another --study-name"
    )


# ---- one process promotes a model ----------------------------------------------------------------

_promoting: set[tuple[int, str]] = set()  # threads of this process and the locks that they hold


@contextlib.contextmanager
def promotion_lock(config: StudyConfig) -> Iterator[None]:
    """Hold the lock of the registered model: one process compares and promotes at a time.

    It holds among the processes of this host and those on the study's PostgreSQL server. Reentrant,
    because a worker's death during the comparison leads to `Stores.sync`, which repairs stages.
    """
    name = f"model {config.model_name} of {config.tracking_uri}"
    mine = threading.get_ident(), name
    if mine in _promoting:
        yield
        return
    with _promotion_file_lock(config), server_lock(config.storage, name):
        _promoting.add(mine)
        try:
            yield
        finally:
            _promoting.remove(mine)


def check_promotion_lock(config: StudyConfig) -> None:
    """Raise InputError if this user can't take the lock of the registered model."""
    with contextlib.suppress(Timeout), _promotion_file_lock(config, timeout=0):
        pass  # a Timeout shows that it can be taken, too


def _promotion_file_lock(config: StudyConfig, timeout: float = 600) -> AbstractContextManager[Path]:
    return file_lock(_beside(config.tracking_uri, "registry"), config.model_name, timeout=timeout)
