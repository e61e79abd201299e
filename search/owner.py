"""Which process a trial belongs to, and whether that is still there."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def mark() -> dict[str, Any]:
    """This process's mark on a trial: host, pid and start, which no later process shares."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pids": _pids(),
        "pid": process.pid,
        "started": round(process.create_time(), 2),
        "ticks": _ticks(process.pid),
    }


def _pids() -> str | None:
    """Whose pids this process's is one of: containers may share a host's name and not its pids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _ticks(pid: int) -> str | None:
    """When a process started, since which start of the system; None where that isn't known.

    Setting the clock moves every process's start as a time, and with it those of living ones.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return f"{int(after_name[19])} {boot}"  # the 22nd field: proc(5)


def is_here(mark: Mapping[str, Any]) -> bool:
    """Whether `mark` was made on this host, among the processes that this one can see."""
    return (mark["host"], mark.get("pids")) == (socket.gethostname(), _pids())


def is_gone(mark: Mapping[str, Any]) -> bool:
    """Whether the process of this host that made `mark` has ended."""
    try:
        process = psutil.Process(mark["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        if mark.get("ticks") is not None:
            return bool(_ticks(mark["pid"]) != mark["ticks"])
        return bool(abs(process.create_time() - mark["started"]) > 1)
    except psutil.NoSuchProcess:
        return True
