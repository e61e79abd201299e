"""Ctrl-C and SIGTERM: the first Ctrl-C asks, the second and SIGTERM end."""

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from search.errors import Interrupted

EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_GRACE = 5  # seconds for the main thread to end, which it can't inside TensorFlow
_MARKING = 4  # seconds to mark what was running in its stead
_TOGETHER = 0.5  # seconds
_WAYS = {
    signal.SIGINT: ("interrupted by Ctrl-C", EXIT_INTERRUPTED),
    signal.SIGTERM: ("terminated by SIGTERM", EXIT_TERMINATED),
}


@contextlib.contextmanager
def handled(stop: Callable[[], None], abandon: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`; the second, or SIGTERM, raises Interrupted, once.

    Python runs signal handlers between two of its own instructions, so not during an epoch of an
    hour; and what one raises is lost where it happens to run under a bare `except`. So a thread
    calls `stop`, and where the block has not been left `_GRACE` seconds after the end was asked
    for, it calls `abandon` with the reason and ends the process.
    """
    pressed = 0
    raised, left = threading.Event(), threading.Event()

    def on_signal(number: int, _: object) -> None:
        nonlocal pressed
        pressed += number == signal.SIGINT
        if number == signal.SIGINT and pressed == 1:
            return  # `watch` sees to it
        for each in _WAYS:
            signal.signal(each, signal.SIG_IGN)
        raised.set()
        raise Interrupted(*_WAYS[signal.Signals(number)])

    def attempt(reason: str) -> None:
        with contextlib.suppress(Exception):  # the next start marks what is left
            abandon(reason)

    def watch(received: socket.socket) -> None:
        interrupts = 0
        while number := received.recv(1):  # empty at the end
            interrupts += number[0] == signal.SIGINT
            if number[0] == signal.SIGINT and interrupts == 1:
                stop()
            if number[0] == signal.SIGTERM or interrupts > 1:
                if interrupts > 1 and not raised.wait(_TOGETHER):
                    _thread.interrupt_main(signal.SIGINT)  # Python took the two for one
                if not left.wait(_GRACE):
                    reason, code = _WAYS[signal.Signals(number[0])]
                    ending = threading.Thread(target=attempt, args=(reason,), daemon=True)
                    ending.start()
                    ending.join(_MARKING)
                    print(f"error: {reason}; run the same command again to go on", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(code)
                return

    received, written = socket.socketpair()
    written.setblocking(False)
    descriptor = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, on_signal) for number in _WAYS}
    watcher = threading.Thread(target=watch, args=(received,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        written.close()
        watcher.join()
        received.close()


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ctrl-C, SIGTERM or a closed terminal leave the block; its clean-up is not interrupted."""
    ways = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def on_signal(number: int, _: object) -> None:
        for each in ways:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted("ended", 128 + number)

    before = {number: signal.signal(number, on_signal) for number in ways}
    try:
        with contextlib.suppress(Interrupted):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def no_ctrl_c_for_children() -> Iterator[None]:
    """Processes started in the block never get Ctrl-C, not even before they can say so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
