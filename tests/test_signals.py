import signal
import subprocess
import sys

import pytest

from search import signals

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


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.handled(lambda: None, lambda reason: None):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
