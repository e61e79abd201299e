"""An open study, and the steps of a run on it."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from search.config.settings import StudyConfig
from search.errors import RunError, one_line
from search.promotion.baselines import LIMIT, Computation
from search.promotion.gate import Found, Winner, promote
from search.promotion.retrain import find_retrained
from search.report import overview, publish
from search.report.progress import Progress, Result
from search.study import ranking, sampling, storage
from search.study.trials import FINISHED, TrialSummary, amend_trial, given_up, missing_slots
from search.tracking.registered_model import aliased_version
from search.tracking.runs import TRACKING_ERRORS
from search.tracking.schema import BASELINE, NOT_MADE, test_metrics
from search.tracking.sync import Stores
from search.workers.executor import INTERRUPTED, Executor, Patience
from search.workers.processes import trains_here

if TYPE_CHECKING:
    from search.report.winner import Chart

T = TypeVar("T")

_WHILE_IMPORTING = 10  # seconds; on a busy machine, workers take longer until they train
_PATIENCE = 20  # seconds that a failing tracking server gets to come back


def retry(step: Callable[[], T], before_again: Callable[[], object] = list) -> T:
    """Repeat `step`, which may be repeated, until the tracking server accepts it."""
    deadline = None
    while True:
        try:
            if deadline is not None:
                before_again()
            return step()
        except TRACKING_ERRORS:
            deadline = deadline or time.monotonic() + _PATIENCE
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


class Session:
    """An open study, and the steps of a run on it."""

    workers: Executor

    def __init__(self, config: StudyConfig, stores: Stores, progress: Progress) -> None:
        self.config = config
        self.study = stores.study
        self.stores = stores
        self.tracking = stores.tracking
        self.parent = stores.parent
        self.progress = progress
        self.objective = storage.objective(self.study)
        self.ran = 0
        self.repaired: list[str] = []
        self.baselines: Computation | None = None  # if they are wanted and not stored yet
        self.stopped: str | None = None  # why the search ended early, if it did
        self.charts: list[Chart] | None = None  # of the report, once they are drawn

    def await_baselines(self, within: float = 2 * LIMIT) -> None:
        """Wait for the baselines `within` so many seconds of their start; store them once there.

        They are lost if the run is stopped before, and computed by the next one.
        """
        if self.baselines is None:
            return
        self.baselines.start()
        found = self.baselines.wait(within, self.progress.stopping)
        if found is None:
            if within > LIMIT and not self.progress.stopping():
                self.baselines.cancel()
                self.baselines = None
                self.progress.warning(f"the baselines took longer than {within:g} s: left out")
            return
        self.baselines = None
        for line in found.failures:
            self.progress.warning(line)
        best = None if found.best is None else asdict(found.best)
        self.study.set_user_attr(storage.BEST_BASELINE, best)
        kept = [asdict(baseline) for baseline in found.baselines]
        self.study.set_user_attr(storage.BASELINES, kept)  # last: the rest is done
        with contextlib.suppress(*TRACKING_ERRORS):  # the next sync writes them
            self.stores.write_baselines()
        self.progress.baselines(found.baselines)

    def missing(self) -> list[int]:
        """The slots that are not finished yet."""
        return missing_slots(self.study, sampling.budget(self.config))

    def _sync_after_death(self) -> list[int]:
        """Workers died: end what they left running; returns the slots that are missing now."""
        self.progress.repaired(retry(self.stores.sync))
        return self.missing()

    def search(self) -> None:
        """Run the missing trials."""
        missing, finished = self.missing(), self._finished()
        patience = Patience(self.config.patience, self.objective)
        for trial in finished:
            patience.see(trial.value if trial.state is TrialState.COMPLETE else None)
        if not missing or patience.exhausted:
            return
        known = ranking.best(finished, self.objective)
        best = None if known is None else known.value

        def on_trial(trial: TrialSummary) -> None:
            nonlocal best
            self.ran += 1
            if trial.final is not None:
                best = self.objective.best([trial.final, *([] if best is None else [best])])
            self.progress.trial(trial, best)

        self.tracking.reopen(self.parent)
        if self.baselines is not None:
            self.baselines.start()
        if trains_here(self.config):
            self.await_baselines()
        self.stopped = self.workers.run_trials(
            missing,
            on_trial,
            self._sync_after_death,
            timeout=self.config.timeout,
            patience=patience,
            max_failures=self.config.max_failures,
            meanwhile=partial(self.await_baselines, _WHILE_IMPORTING),
        )

    def _finished(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=FINISHED)
        trials += given_up(self.study).values()
        return sorted(trials, key=lambda trial: trial.user_attrs.get(storage.SLOT, trial.number))

    def train_finalists(self) -> None:
        """Train the finalists on fresh seeds, as far as that is not done yet."""
        if self.progress.stopping():
            return
        chosen = ranking.candidates(self.study, self.config)
        by_number = {trial.number: trial for trial in chosen}

        def missing() -> list[tuple[int, int]]:
            return ranking.missing(chosen, self.config)

        if missing():
            self.tracking.reopen(self.parent)
            self.progress.finalists(chosen, self.config.repeats)

        def on_repeat(number: int, repeat: int, result: dict[str, Any]) -> None:
            trial, name = by_number[number], ranking.repeat_attr(repeat)
            amend_trial(self.study, trial, name, result, self.config.storage)
            seen = ranking.repeats_of(trial)[repeat]
            with contextlib.suppress(*TRACKING_ERRORS):  # the next sync writes it
                self.stores.write(seen)
            self.progress.repeat(number, repeat, seen.value, len(missing()))

        if self.workers.run_repeats(missing, on_repeat):
            ranking.settle(self.study, chosen, self.config)

    def register_winner(self) -> Winner | None:
        """Retrain, test, register and promote the winner, as far as that is not done yet.

        None where the run was interrupted. Raises RunError where no trial completed.
        """
        self.repaired += retry(self.stores.sync)
        if self.progress.stopping():
            self.stopped = INTERRUPTED
        if self.stopped == INTERRUPTED:
            return None
        return retry(self._register, before_again=self.stores.sync)

    def _register(self) -> Winner:
        best = ranking.winner(self.study)
        if best is None:
            raise RunError(
                f"no trial of study {self.config.study_name} completed, so there is no best one "
                "and nothing was registered; look at the failures, or use --pruner none"
            )
        run = find_retrained(self.tracking, self.tracking.runs_of(self.parent), best.number)
        new = run is None
        if run is None:
            self.tracking.reopen(self.parent)
            self.await_baselines()
            self.progress.retraining(best)
            run_id = self.workers.call(
                "retrain", best.number, on_death=self._sync_after_death, meanwhile=self._draw
            )
            run = self.tracking.client.get_run(run_id)
            if NOT_MADE in run.data.tags:
                self.progress.warning(f"the winner's {run.data.tags[NOT_MADE]}")
        against = run.data.tags.get(BASELINE)
        if against is not None and storage.AGAINST not in best.user_attrs:
            self.stores.amend(best, storage.AGAINST, json.loads(against))
        version, verdict = promote(self.stores, run, self._compare)
        champion = aliased_version(self.tracking.client, self.config.model_name)
        return Winner(
            trial=best.number,
            run_id=run.info.run_id,
            version=version,
            value=best.value or 0.0,
            metrics=test_metrics(run.data.metrics),
            verdict=verdict,
            in_production=None if champion is None else int(champion.version),
            new=new,
        )

    def _compare(self, challenger: int, champion: int) -> Found:
        """Compare two versions of the model on a worker."""
        found: Found = self.workers.call(
            "compare", challenger, champion, on_death=self._sync_after_death
        )
        return found

    def _draw(self) -> None:
        """Draw the report's charts; what fails is repeated when the report is written."""
        if self.config.report != "none" and self.charts is None:
            with contextlib.suppress(Exception):
                self.charts = publish.draw(self.study, self.config)

    def finish(self, winner: Winner | None) -> None:
        """End the parent run; write the notes and the report."""
        status = "KILLED" if winner is None else "FINISHED"
        retry(lambda: self.tracking.close(self.parent, status))
        if winner is None:
            return
        try:  # the winner is registered, so a failure costs only what is shown
            retry(lambda: publish.publish(self.stores, winner, self.charts))
        except Exception as error:
            self.progress.warning(
                f"the report and the notes could not be written ({type(error).__name__}: "
                f"{one_line(error)}); the same command tries it again"
            )

    def result(self, winner: Winner | None, seconds: float) -> Result:
        """What the run leaves."""
        config = self.config
        path = None
        if config.report != "none":
            path = publish.report_path(config.report, config.study_name)
        trials = self.study.get_trials(deepcopy=False)
        states = [trial.state for trial in trials]
        return Result(
            config=config,
            best=ranking.best(trials, self.objective),
            finalists=ranking.standing(self.study),
            reference=ranking.reference(self.study),
            baselines=overview.baselines_of(self.study),
            against_baseline=overview.against_baseline_of(self.study),
            winner=winner,
            parent_run_id=self.parent,
            complete=states.count(TrialState.COMPLETE),
            pruned=states.count(TrialState.PRUNED),
            failed=states.count(TrialState.FAIL),
            given_up=len(given_up(self.study)),
            ran=self.ran,
            seconds=seconds,
            stopped=self.stopped,
            repaired=tuple(self.repaired),
            report=path,
        )
