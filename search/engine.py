"""Run the missing trials, one task each, until the budget is met or something says stop."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from search.config import RunError, StudyConfig

if TYPE_CHECKING:
    from search.trial import Outcome, Worker

MAX_FAILURES = 5  # trials failing in a row before the search gives up


def start_worker(config: StudyConfig, parent_run: str) -> "Worker":
    """Everything heavy a trial needs, TensorFlow included, loaded without its banner."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silent_stderr():
        from search.trial import Worker
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # retracing advice
    return Worker(config, parent_run)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """TensorFlow's native code announces CPU features and missing GPUs before any log level."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def run_trials(
    worker: "Worker",
    places: Iterable[int],
    on_trial: Callable[["Outcome"], None],
    *,
    timeout: float | None,
    patience: "Patience",
) -> str | None:
    """Run a trial for every place, a failed one again; returns why it stopped early, if it did.

    Raises RunError after MAX_FAILURES failures in a row.
    """
    queue = deque(places)
    deadline = None if timeout is None else time.monotonic() + timeout
    failures = 0
    while queue:
        if deadline is not None and time.monotonic() >= deadline:
            return f"--timeout: {timeout:g} s are over"
        if patience.exhausted:
            return f"--patience: {patience.limit} trials without a better one"
        place = queue.popleft()
        outcome = worker.run_trial(place)
        on_trial(outcome)
        if outcome.state == "FAIL":
            queue.appendleft(place)
            failures += 1
            if failures == MAX_FAILURES:
                raise RunError(
                    f"{failures} trials in a row failed, the last with {outcome.failure}; "
                    "mend the cause and run the same command again"
                )
        else:
            failures = 0
            patience.see(outcome.value)
    return None


class Patience:
    """Counts the finished trials since the best one; a pruned one is not better."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._best = float("-inf")
        self._since = 0

    def see(self, value: float | None) -> None:
        """Take note of a finished trial: its value, or None where it was pruned."""
        if value is not None and value > self._best:
            self._best, self._since = value, 0
        else:
            self._since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the search has waited long enough."""
        return self.limit is not None and self._since >= self.limit
