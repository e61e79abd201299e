"""A program in a pseudo-terminal, and what its screen shows."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pyte

ROWS, COLUMNS = 40, 110
LINE = re.compile(
    r"trial +\d+  (COMPLETE|PRUNED  )  val_accuracy (0\.\d{4}|1\.0000)  units +\d+  "
    r"dropout 0\.\d{3}  lr \d\.\d\de-\d\d  \d+ ep +\d+\.\d s  best (0\.\d{4}|1\.0000|--)"
)  # what a run prints of a trial that has ended well


class Terminal:
    """Runs Python on a terminal of its own, which it controls: keys typed here are its keys.

    first: a statement that the process executes before all else.
    """

    def __init__(self, arguments: list[str], folder: Path, first: str = "") -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        given: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        environment = {**os.environ, "TERM": "xterm-256color"}
        given |= {"cwd": folder, "env": environment, "first": first}
        self.process = forks.Python(arguments, **given)
        self.modes = termios.tcgetattr(theirs)
        self._theirs = theirs  # kept open, so that its modes can be read at the end
        self._screen = pyte.HistoryScreen(COLUMNS, ROWS, history=5000)
        self._stream = pyte.ByteStream(self._screen)
        self.seen: list[list[str]] = []

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._mine, keys)

    def until(self, condition: Callable[[list[str]], bool], seconds: float = 120) -> list[str]:
        """Show what comes until `condition` holds of the screen's lines; returns those."""
        deadline = time.monotonic() + seconds
        while not condition(self.lines()):
            assert time.monotonic() < deadline, "\n".join(self.lines())
            assert self._read() or self.process.poll() is None, "\n".join(self.lines())
        return self.lines()

    def end(self, seconds: float = 120) -> list[str]:
        """Wait for the program's end; returns every line it left, those scrolled away included."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self._read():
            self._read()
            assert time.monotonic() < deadline, "\n".join(self.lines())
        gone = [
            "".join(line[column].data for column in range(COLUMNS)).rstrip()
            for line in self._screen.history.top
        ]
        assert termios.tcgetattr(self._theirs) == self.modes  # as it was found
        assert not self._screen.cursor.hidden
        return [*gone, *self.lines()]

    def lines(self) -> list[str]:
        """The screen now, without empty lines at its end."""
        text = "\n".join(line.rstrip() for line in self._screen.display).rstrip()
        return text.split("\n")

    def close(self) -> None:
        """Kill what still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        os.close(self._mine)
        os.close(self._theirs)

    def _read(self) -> bool:
        """Take what the program wrote within a moment; keeps the screen after every piece."""
        ready, _, _ = select.select([self._mine], [], [], 0.05)
        if not ready:
            return False
        try:
            written = os.read(self._mine, 1 << 16)
        except OSError:
            return False
        self._stream.feed(written)
        self.seen.append(self.lines())
        return True
