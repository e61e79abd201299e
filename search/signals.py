"""Ctrl-C and SIGTERM: the first Ctrl-C finishes the running trials; a second or SIGTERM exits."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from search.errors import Interrupted

EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_GRACE = 5  # seconds for the main thread to exit, which it can't do inside TensorFlow
_ABANDON = 4  # seconds to mark the running trials as failed in its place
_UNNOTICED = 0.5  # seconds after which the main thread can't have noticed that it is to exit
_REASONS = {
    signal.SIGINT: ("interrupted by Ctrl-C", EXIT_INTERRUPTED),
    signal.SIGTERM: ("terminated by SIGTERM", EXIT_TERMINATED),
}


@contextlib.contextmanager
def handled(stop: Callable[[], None], abandon: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`; the second, or SIGTERM, raises Interrupted, once.

    Python runs signal handlers between bytecode instructions, so not during an epoch of an hour,
    and their exception is lost under a bare `except`. Therefore a thread calls `stop`; if the block
    is still running `_GRACE` seconds after the exit was requested, the thread calls `abandon` with
    the reason and ends the process.
    """
    pressed = 0
    raised, left = threading.Event(), threading.Event()

    def on_signal(number: int, _: object) -> None:
        nonlocal pressed
        pressed += number == signal.SIGINT
        if number == signal.SIGINT and pressed == 1:
            return  # `_watch` handles it
        for each in _REASONS:
            signal.signal(each, signal.SIG_IGN)
        raised.set()
        raise Interrupted(*_REASONS[signal.Signals(number)])

    received, written = socket.socketpair()
    written.setblocking(False)
    descriptor = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    watching = (received, stop, abandon, raised, left)
    watcher = threading.Thread(target=_watch, args=watching, daemon=True)
    watcher.start()
    try:
        with _handled_by(on_signal, _REASONS):
            yield
    finally:
        left.set()
        signal.set_wakeup_fd(descriptor)
        written.close()
        watcher.join()
        received.close()


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _watch(
    received: socket.socket,
    stop: Callable[[], None],
    abandon: Callable[[str], None],
    raised: threading.Event,
    left: threading.Event,
) -> None:
    """Follow the signals that have been `received`, each a byte, until the socket is closed.

    raised: whether the main thread was told to exit; left: whether it has left the block.
    """
    interrupts, main = 0, threading.main_thread().ident
    assert main is not None
    while number := received.recv(1):
        interrupts += number[0] == signal.SIGINT
        if number[0] == signal.SIGINT and interrupts == 1:
            stop()
        if number[0] == signal.SIGTERM or interrupts > 1:
            deadline = time.monotonic() + _GRACE
            if not (raised.wait(_UNNOTICED) or left.is_set()):
                signal.pthread_kill(main, number[0])  # Python took two for one, or it began to wait
            if not left.wait(deadline - time.monotonic()):
                _end_process(abandon, *_REASONS[signal.Signals(number[0])])
            return


def _end_process(abandon: Callable[[str], None], reason: str, code: int) -> None:
    def attempt() -> None:
        with contextlib.suppress(Exception):  # the next run marks the rest
            abandon(reason)

    ending = threading.Thread(target=attempt, daemon=True)
    ending.start()
    ending.join(_ABANDON)
    print(f"error: {reason}; run the same command again to go on", file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ctrl-C, SIGTERM or a closed terminal end the block; its clean-up is not interrupted."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def on_signal(number: int, _: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted("ended", 128 + number)

    with _handled_by(on_signal, signals), contextlib.suppress(Interrupted):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM are handled after the block: what starts in it has then started.

    A thread or an executor whose start is interrupted can neither be ended nor waited for.
    """
    if threading.current_thread() is not threading.main_thread():  # it handles all signals
        yield
        return
    arrived: list[int] = []

    def on_signal(number: int, _: object) -> None:
        arrived.append(number)

    try:
        with _handled_by(on_signal, _REASONS):
            yield
    finally:
        for number in arrived:
            handler = signal.getsignal(number)  # that of the one before may have replaced it
            if callable(handler):
                handler(number, None)
            else:
                signal.raise_signal(number)


@contextlib.contextmanager
def no_ctrl_c_for_children() -> Iterator[None]:
    """Processes started in the block never receive Ctrl-C, not even before they can ignore it.

    This one handles it, and SIGTERM, once they have started.
    """
    with deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
