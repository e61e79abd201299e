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
from search.task import DEFAULT_OBJECTIVE, Metric
from search.workers import tasks
from search.workers.processes import ProcessBackend
from search.workers.tasks import Died, Done, NotStarted, Task

if TYPE_CHECKING:
    from search.workers.dask import DaskBackend

INTERRUPTED = "interrupted"
Arguments = tuple[int, ...]


class Executor:
    """Runs tasks on the workers of this machine, or of the cluster `config.scheduler`.

    stopping: whether no more tasks may start. report: gets a line about the workers. renew_lock: is
    called between tasks; raises where another process has taken over the study. Leave the context
    to end the workers.
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

    def call(
        self,
        task: Task,
        *arguments: int,
        on_death: Callable[[], object],
        meanwhile: Callable[[], object] = list,
    ) -> Any:
        """What `task` returns, called with one of the workers and `arguments`.

        on_death: is called when a worker has died, before the call is repeated. meanwhile: is
        called in this process while the worker is busy. Raises Interrupted to stop the run.
        """
        results: list[Any] = []

        def missing() -> list[Arguments]:
            on_death()
            return [] if results else [arguments]

        def on_result(_: Arguments, result: Any) -> None:
            results.append(result)

        if self._run(task, [arguments], on_result, missing, self._why_stop, meanwhile) is not None:
            raise Interrupted("interrupted by Ctrl-C", EXIT_INTERRUPTED)
        return results[0]

    def run_repeats(
        self,
        repeat: Task,
        missing: Callable[[], list[tuple[int, int]]],
        on_repeat: Callable[[int, int, dict[str, Any]], None],
    ) -> bool:
        """Call `repeat` with a worker and every `missing` (trial, repeat); False where it stopped.

        on_repeat: gets each result and stores it, so that it is no longer missing.
        """

        def on_result(arguments: Arguments, result: dict[str, Any]) -> None:
            number, repeat = arguments
            on_repeat(number, repeat, result)

        return self._run(repeat, missing(), on_result, missing, self._why_stop) is None

    def run_trials(
        self,
        run_trial: Task,
        slots: Iterable[int],
        on_trial: Callable[[TrialSummary], None],
        on_death: Callable[[], Iterable[int]],
        *,
        timeout: float | None,
        patience: "Patience",
        max_failures: int,
        meanwhile: Callable[[], object] = list,
    ) -> str | None:
        """Call `run_trial` with a worker and every slot; returns why it stopped early, if it did.

        A trial that failed is repeated once, unless its slot is given up.

        on_trial: gets every trial's summary, in the order in which they end.
        on_death: is called when a worker has died; returns the slots that are missing now, because
        a trial may have ended whose summary did not arrive.
        meanwhile: is called in this process after trials were started, before they are waited for.
        Raises RunError after `max_failures` configurations in a row have failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        failures = 0
        failed: set[int] = set()  # slots, since the last trial that ended well

        def why_stop() -> str | None:
            if deadline is not None and time.monotonic() >= deadline:
                return f"--timeout: {timeout:g} s have passed"
            if patience.exhausted:
                return f"--patience: {patience.limit} trials without a better one"
            return None

        def on_result(_: Arguments, trial: TrialSummary) -> bool:
            nonlocal failures
            on_trial(trial)
            if trial.state != "FAIL":
                failures = 0
                failed.clear()
                patience.see(trial.final)
                return False
            if not (trial.given_up and trial.slot in failed):  # the same configuration
                failures += 1
            failed.add(trial.slot)
            if failures == max_failures:
                raise RunError(
                    f"{failures} configurations in a row failed, the last with {trial.failure}; "
                    "fix the cause, or allow more with --max-failures, and run again"
                )
            if trial.given_up:
                patience.see(None)
            return not trial.given_up

        def missing() -> list[Arguments]:
            return [(slot,) for slot in on_death()]

        first = [(slot,) for slot in slots]
        stop = lambda: self._why_stop() or why_stop()  # noqa: E731
        return self._run(run_trial, first, on_result, missing, stop, meanwhile)

    def _why_stop(self) -> str | None:
        return INTERRUPTED if self._stopping() else None

    def _run(
        self,
        task: Task,
        first: Iterable[Arguments],
        on_result: Callable[[Arguments, Any], bool | None],
        missing: Callable[[], Iterable[Arguments]],
        why_stop: Callable[[], str | None],
        meanwhile: Callable[[], object] = list,
    ) -> str | None:
        """Run `task` with each of the arguments in `first`; returns why it stopped early, if so.

        on_result: gets arguments and result, and returns whether to run that again.
        missing: is called after a worker has died; returns what is left to run.
        meanwhile: is called after tasks were started and before they are waited for.
        Raises RunError where workers die repeatedly at one task.
        """
        backend, queue = self._backend, deque(first)
        running: dict[Future[Any], Arguments] = {}
        deaths: Counter[Arguments] = Counter()
        while True:
            self._renew_lock()
            stopped = why_stop()
            while queue and not stopped and len(running) < backend.slots():
                arguments = queue.popleft()
                future = backend.submit(tasks.call, task, self._parent_run, *arguments)
                running[future] = arguments
            if not running and (stopped or not queue):
                return stopped if queue else None

            meanwhile()
            died = False
            for future, end in backend.wait(running):
                arguments = running.pop(future)
                match end:
                    case Done(result):
                        if on_result(arguments, result):
                            queue.appendleft(arguments)
                    case NotStarted():
                        queue.appendleft(arguments)
                    case Died():
                        died = True
                        deaths[arguments] += 1
            if died:
                if max(deaths.values()) >= backend.most_deaths:
                    raise RunError(
                        f"workers died {backend.most_deaths} times at one task {backend.remedy}, "
                        "and run the same command again"
                    )
                busy = set(running.values())
                queue = deque(left for left in missing() if left not in busy)


def _backend(
    config: StudyConfig, parent_run: str, dataset: Dataset, report: Callable[[str], None]
) -> "ProcessBackend | DaskBackend":
    """Where the tasks run."""
    if config.scheduler is None:
        return ProcessBackend(config, parent_run, dataset, report)
    from search.workers.dask import DaskBackend

    return DaskBackend(config, parent_run, dataset, report)


class Patience:
    """Counts the slots finished since the best trial; a pruned or given-up one is not better."""

    def __init__(self, limit: int | None, objective: Metric = DEFAULT_OBJECTIVE) -> None:
        self.limit = limit
        self._sign = objective.sign
        self._best = float("-inf")
        self._since = 0

    def see(self, value: float | None) -> None:
        """Take note of a finished slot: its value, or None where it was pruned or given up."""
        if value is not None and self._sign * value > self._best:
            self._best, self._since = self._sign * value, 0
        else:
            self._since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the search has waited long enough."""
        return self.limit is not None and self._since >= self.limit
