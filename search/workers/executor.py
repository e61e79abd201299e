"""Run tasks on workers, as many at once as there are, until the budget is met or something stops.

A trial is a task. This process, processes of this machine or a cluster differ only in where the
tasks go, so the number of trials is exact whichever it is.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.errors import Interrupted, RunError
from search.signals import EXIT_INTERRUPTED
from search.study.trials import TrialSummary
from search.workers import tasks
from search.workers.processes import ProcessBackend

if TYPE_CHECKING:
    from search.promotion.comparison import Comparison
    from search.workers.dask import DaskBackend

INTERRUPTED = "interrupted"
Arguments = tuple[int, ...]


class Executor:
    """Workers, here or on the cluster `config.scheduler`. Leave its context to end them.

    stopping: whether no more tasks may start. report: gets a line about the workers.
    renew_lock: is called again and again; raises where another process has taken over the study.
    """

    def __init__(
        self,
        config: StudyConfig,
        parent_run: str,
        dataset: Dataset,
        stopping: Callable[[], bool] = lambda: False,
        report: Callable[[str], None] = lambda _: None,
        renew_lock: Callable[[], None] = lambda: None,
    ) -> None:
        self._parent_run = parent_run
        self._backend = _backend(config, parent_run, dataset, report)
        self._stopping = stopping
        self._renew_lock = renew_lock

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._backend.close(now=kind is not None)

    def retrain(
        self, number: int, on_death: Callable[[], object], meanwhile: Callable[[], object]
    ) -> str:
        """Train the configuration of trial `number` anew on a worker; returns its MLflow run.

        meanwhile: is called here while the worker trains.
        """
        return str(self._call(tasks.retrain, number, on_death=on_death, meanwhile=meanwhile))

    def compare(
        self, challenger: int, champion: int, on_death: Callable[[], object]
    ) -> "Comparison | str":
        """Compare two versions of the model on a worker, as `promotion.compare` does."""
        found: Comparison | str = self._call(tasks.compare, challenger, champion, on_death=on_death)
        return found

    def _call(
        self,
        task: Callable[..., Any],
        *arguments: int,
        on_death: Callable[[], object],
        meanwhile: Callable[[], object] = list,
    ) -> Any:
        results: list[Any] = []

        def missing() -> list[Arguments]:
            on_death()
            return [] if results else [arguments]

        def on_result(_: Arguments, result: Any) -> None:
            results.append(result)

        stopped = self._run(task, [arguments], on_result, missing, self._why_stop, meanwhile)
        if stopped is not None:
            raise Interrupted("interrupted by Ctrl-C", EXIT_INTERRUPTED)
        return results[0]

    def _why_stop(self) -> str | None:
        return INTERRUPTED if self._stopping() else None

    def run_repeats(
        self,
        missing: Callable[[], list[tuple[int, int]]],
        on_repeat: Callable[[int, int, dict[str, Any]], None],
    ) -> bool:
        """Train finalists again until none is `missing` (trial, repeat); False where it stopped.

        on_repeat: gets every result, and keeps it, so that it is not missing any more.
        """

        def on_result(arguments: Arguments, kept: dict[str, Any]) -> None:
            number, repeat = arguments
            on_repeat(number, repeat, kept)

        return self._run(tasks.repeat, missing(), on_result, missing, self._why_stop) is None

    def run_trials(
        self,
        places: Iterable[int],
        on_trial: Callable[[TrialSummary], None],
        on_death: Callable[[], Iterable[int]],
        *,
        timeout: float | None,
        patience: "Patience",
        max_failures: int,
    ) -> str | None:
        """Run a trial for every place; returns why it stopped early, if so.

        A trial that failed is tried again, unless its slot is given up.

        on_trial: gets every trial's outcome, in the order in which they end.
        on_death: is called when a worker has died; says which places are missing now, because a
        trial may have ended whose outcome did not arrive.
        Raises RunError after `max_failures` configurations in a row have failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        failures = 0
        failed: set[int] = set()  # slots, since a trial last ended well

        def why_stop() -> str | None:
            if self._stopping():
                return INTERRUPTED
            if deadline is not None and time.monotonic() >= deadline:
                return f"--timeout: {timeout:g} s are over"
            if patience.exhausted:
                return f"--patience: {patience.limit} trials without a better one"
            return None

        def on_result(_: Arguments, outcome: TrialSummary) -> bool:
            nonlocal failures
            on_trial(outcome)
            if outcome.state != "FAIL":
                failures = 0
                failed.clear()
                patience.see(outcome.value)
                return False
            if not (outcome.given_up and outcome.slot in failed):  # the same configuration
                failures += 1
            failed.add(outcome.slot)
            if failures == max_failures:
                raise RunError(
                    f"{failures} configurations in a row failed, the last with {outcome.failure}; "
                    "mend the cause, or allow more with --max-failures, and run again"
                )
            if outcome.given_up:
                patience.see(None)
            return not outcome.given_up

        def missing() -> list[Arguments]:
            return [(place,) for place in on_death()]

        first = [(place,) for place in places]
        return self._run(tasks.run_trial, first, on_result, missing, why_stop)

    def _run(
        self,
        task: Callable[..., Any],
        first: Iterable[Arguments],
        on_result: Callable[[Arguments, Any], bool | None],
        missing: Callable[[], Iterable[Arguments]],
        why_stop: Callable[[], str | None],
        meanwhile: Callable[[], object] = list,
    ) -> str | None:
        """Run `task` with each of the arguments in `first`; returns why it stopped early, if so.

        on_result: gets arguments and result, and tells whether to run that again.
        missing: after a worker has died, says what is to do now.
        meanwhile: is called each time that tasks were started and before they are waited for.
        Raises RunError where workers die at one task again and again.
        """
        queue = deque(first)
        running: dict[Future[Any], Arguments] = {}
        deaths: Counter[Arguments] = Counter()
        backend = self._backend
        while True:
            self._renew_lock()
            stopped = why_stop()
            died = False
            while queue and not stopped and not died and len(running) < backend.slots():
                arguments = queue.popleft()
                try:
                    running[backend.submit(task, self._parent_run, *arguments)] = arguments
                except backend.deaths:
                    backend.bury()
                    deaths[arguments] += 1
                    died = True
            if not running and not died and (stopped or not queue):
                return stopped if queue else None

            meanwhile()
            done = backend.wait(running)
            while done:
                future = done.pop()
                arguments = running.pop(future)
                try:
                    again = on_result(arguments, future.result(0))
                except backend.not_begun:
                    again = True
                except backend.deaths:
                    if not died:
                        died = True
                        backend.bury()
                        done |= {future for future in running if future.done()}
                    deaths[arguments] += 1
                    continue
                if again:
                    queue.appendleft(arguments)
            if died:
                if any(count >= backend.most_deaths for count in deaths.values()):
                    raise RunError(
                        f"workers died {backend.most_deaths} times at one task {backend.remedy}, "
                        "and run the same command again"
                    )
                at_it = set(running.values())
                queue = deque(left for left in missing() if left not in at_it)


def _backend(
    config: StudyConfig, parent_run: str, dataset: Dataset, say: Callable[[str], None]
) -> "ProcessBackend | DaskBackend":
    """Where the tasks go."""
    if config.scheduler is None:
        return ProcessBackend(config, parent_run, dataset, say)
    from search.workers.dask import DaskBackend

    return DaskBackend(config, parent_run, dataset, say)


class Patience:
    """Counts the finished slots since the best trial; one pruned or given up is not better."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._best = float("-inf")
        self._since = 0

    def see(self, value: float | None) -> None:
        """Take note of a finished slot: its value, or None where it was pruned or given up."""
        if value is not None and value > self._best:
            self._best, self._since = value, 0
        else:
            self._since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the search has waited long enough."""
        return self.limit is not None and self._since >= self.limit
