import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from search import signals
from search.errors import Interrupted

LOST = """
import contextlib, time
from search.signals import handled

with handled(stop=lambda: None, abandon=lambda reason: print("abandoned:", reason, flush=True)):
    with contextlib.suppress(BaseException):  # as a bare except in a library would
        print("ready", flush=True)
        time.sleep(60)
    time.sleep(60)
"""


@pytest.mark.slow
def test_an_end_that_a_library_swallowed_is_an_end_nevertheless() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOST], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
    assert out == "abandoned: terminated by SIGTERM\n"
    assert err == "error: terminated by SIGTERM; run the same command again to go on\n"
    assert process.returncode == 143


def test_two_ctrl_c_that_python_took_for_one_wake_a_main_thread_that_waits() -> None:
    stopped = threading.Event()
    with pytest.raises(Interrupted), signals.handled(stopped.set, lambda reason: None):
        signal.raise_signal(signal.SIGINT)
        assert stopped.wait(10)
        noticed = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(noticed, warn_on_full_buffer=False)
        os.write(noticed, bytes([signal.SIGINT]))
        began = time.monotonic()
        try:
            threading.Event().wait(4)
        finally:
            assert time.monotonic() - began < 3


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.handled(lambda: None, lambda reason: None):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_deferred_signal_is_handled_after_the_block_whatever_the_handler_is() -> None:
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), signals.deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("block")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a command in the background
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["block"]

    stopped = threading.Event()
    with (
        pytest.raises(Interrupted, match="terminated by SIGTERM"),
        signals.handled(stopped.set, lambda reason: None),
    ):
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("the first Ctrl-C")
        assert stopped.wait(10)
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # ignored from here on
            done.append("SIGTERM")
    assert done == ["block", "the first Ctrl-C", "SIGTERM"]


def test_nothing_is_deferred_in_another_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run() -> None:
        with signals.deferred():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
