"""One process runs a study at a time, and the others know which."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from search.config import RunError, StudyConfig
from search.database import ServerLock
from search.lock import Timeout, file_lock, host_wide, lock_file
from search.urls import is_postgresql, sqlite_path


class TakenOver(RunError):
    """Another process runs the study."""


def is_this_process(config: StudyConfig) -> bool:
    """Whether this process holds the study."""
    return find(config) == _signature()


def find(config: StudyConfig) -> str | None:
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
def sole_runner(config: StudyConfig) -> Iterator[Callable[[], None]]:
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
