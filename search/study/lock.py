"""Locks of files: the operating system's, so they go with their holder, however that ends."""

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

__all__ = ["Timeout", "file_lock", "host_wide", "lock_file"]
_LONGEST_NAME = 255  # bytes, of a file on every common file system


def lock_file(path: Path, purpose: str = "creation") -> Path:
    """The hidden file beside `path` whose lock guards `purpose`."""
    name = f".{path.name}.{purpose}.lock"
    if len(name.encode()) > _LONGEST_NAME:
        name = f".{sha256(name.encode()).hexdigest()}.lock"
    return path.with_name(name)


def host_wide(key: str) -> Path:
    """What `file_lock` takes for a lock of this host, for all its users, that guards no file."""
    return Path(tempfile.gettempdir()) / "search-locks" / sha256(key.encode()).hexdigest()[:16]


@contextlib.contextmanager
def file_lock(
    path: Path, purpose: str = "creation", *, timeout: float = 120, reentrant: bool = False
) -> Iterator[Path]:
    """Hold the lock beside `path` that guards `purpose`; gives its file.

    Whoever can write in the folder can take it, whichever user made the file. reentrant: a thread
    that has it can take it again. Raises InputError where another user's file forbids it, Timeout
    where it is still held after `timeout` seconds.
    """
    file = lock_file(path, purpose)
    try:
        _share(file)
        lock = FileLock(file, timeout=timeout, is_singleton=reentrant)
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
    """Make a lock's `file`, which all who can write in its folder can open, whatever the umask."""
    with contextlib.suppress(FileExistsError):
        file.parent.mkdir()
        file.parent.chmod(0o777)  # without the sticky bit, which keeps a file for its owner
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        if not os.access(file, os.R_OK | os.W_OK):
            _remove_free(file)
        return
    folder = file.parent.stat()
    with contextlib.suppress(PermissionError):  # the folder's group is not one of ours
        os.fchown(descriptor, -1, folder.st_gid)
    os.fchmod(descriptor, folder.st_mode & 0o666)
    os.close(descriptor)


def _remove_free(file: Path) -> None:
    """Remove a lock's file that can't be written to. Raises BlockingIOError where it is held.

    It goes while we hold its lock, so that nobody else does; who waits for it takes the new one.
    """
    import fcntl  # not on Windows

    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()


class TakenOver(RunError):
    """Another process runs the study."""


def holds_study(config: StudyConfig) -> bool:
    """Whether this process holds the study."""
    return find_holder(config) == _signature()


def find_holder(config: StudyConfig) -> str | None:
    """Host and pid of the process that holds the study, None where none does."""
    if is_postgresql(config.storage):
        return _server_lock(config).find_holder()
    file = lock_file(_beside(config), config.study_name)
    try:
        holder, signed = file.read_text(), file.stat().st_mtime
    except OSError:
        return None
    host, _, pid = holder.partition(", pid ")
    if host != _host():
        return holder or None
    try:
        return holder if psutil.Process(int(pid)).create_time() <= signed else None
    except psutil.NoSuchProcess:
        return None


@contextlib.contextmanager
def study_lock(config: StudyConfig) -> Iterator[Callable[[], None]]:
    """Hold the study: one process runs it at a time. Raises TakenOver where another does.

    A file's lock is the operating system's and a PostgreSQL study's is the server's, so either goes
    with its holder, however that ends. Gives what takes the lock again where it went without that,
    as by a restart of the server; it raises TakenOver where another process was faster.
    """
    with _held_on_server(config) if is_postgresql(config.storage) else _held_here(config) as again:
        yield again


def _host() -> str:
    return socket.gethostname()[:40]  # PostgreSQL keeps 63 characters of a holder


def _signature() -> str:
    return f"{_host()}, pid {os.getpid()}"


def _taken(config: StudyConfig, holder: str | None) -> "TakenOver":
    return TakenOver(
        f"study {config.study_name} is being run by {holder or 'another process'}; wait for it, or "
        "give another --study-name"
    )


# ---- by the database server ----------------------------------------------------------------------


def _server_lock(config: StudyConfig) -> ServerLock:
    return ServerLock(config.storage, f"study {config.study_name}", _signature())


@contextlib.contextmanager
def _held_on_server(config: StudyConfig) -> Iterator[Callable[[], None]]:
    lock = _server_lock(config)

    def take() -> None:
        if not lock.is_held() and not lock.acquire(wait=False):
            raise _taken(config, lock.find_holder())

    take()
    try:
        yield take
    finally:
        lock.release()


# ---- by a file -----------------------------------------------------------------------------------


def _beside(config: StudyConfig) -> Path:
    path = sqlite_path(config.storage)
    return host_wide(f"study {config.storage}") if path is None else path.resolve()


@contextlib.contextmanager
def _held_here(config: StudyConfig) -> Iterator[Callable[[], None]]:
    beside = _beside(config)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(file_lock(beside, config.study_name, timeout=0))
        except Timeout:
            holder = None
            with contextlib.suppress(OSError):
                holder = lock_file(beside, config.study_name).read_text()
            raise _taken(config, holder) from None
        file.write_text(_signature())
        try:
            yield lambda: None
        finally:
            with contextlib.suppress(OSError):
                os.truncate(file, 0)


_promoting: set[tuple[int, str]] = set()  # threads of this process and the locks that they have


def check_promotion_lock(config: StudyConfig) -> None:
    """Raise InputError where this user can't take the lock that `promote` needs."""
    with (
        contextlib.suppress(Timeout),
        _promotion_file_lock(config, timeout=0),
    ):  # held: so it can be taken
        pass


def _promotion_file_lock(
    config: StudyConfig, *, timeout: float = 600
) -> AbstractContextManager[Path]:
    path = sqlite_path(config.tracking_uri)
    beside = host_wide(f"registry {config.tracking_uri}") if path is None else path.resolve()
    return file_lock(beside, config.model_name, timeout=timeout, reentrant=True)


@contextlib.contextmanager
def promotion_lock(config: StudyConfig) -> Iterator[None]:
    """One process at a time compares and promotes: of this host, and of the study's server.

    Reentrant: where a worker dies during the comparison, the stages are repaired, too.
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
