"""Locks of files: the operating system's, so they go with their holder, however that ends."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from filelock import FileLock, Timeout

from search.errors import InputError

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
