"""An open study: locked, in agreement with MLflow, with workers for the missing trials."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.sources import is_own
from search.errors import one_line
from search.promotion.baselines import LIMIT, Computation
from search.promotion.gate import Winner
from search.report import overview, publish
from search.report.progress import Progress, Result
from search.study import ranking, sampling, storage
from search.study.lock import TakenOver, check_promotion_lock, holds_study, study_lock
from search.study.trials import FINISHED, fail_trial, given_up, missing_slots
from search.tracking.runs import TRACKING_ERRORS
from search.tracking.schema import study_metadata
from search.tracking.sync import Stores
from search.workers.executor import Executor

if TYPE_CHECKING:
    from search.report.winner import Chart

T = TypeVar("T")

_PATIENCE = 20  # seconds that a failing tracking server gets to come back


@contextlib.contextmanager
def open_session(
    config: StudyConfig, dataset: Dataset, settings: dict[str, Any], progress: Progress
) -> Iterator["Session"]:
    """Lock and open the study, make both stores agree; an error in the block ends its runs."""
    with contextlib.ExitStack() as stack:
        renew_lock = stack.enter_context(study_lock(config))
        check_promotion_lock(config)  # not after all the training
        study = storage.open_study(config, settings)
        stack.callback(storage.close_study, study)
        if storage.METADATA not in study.user_attrs:
            study.set_user_attr(storage.METADATA, study_metadata(config, dataset))
        stores = Stores(study, config)
        stack.callback(stores.tracking.disconnect)
        stack.enter_context(_ended_on_error(stores))
        session = Session(config, stores, progress)
        session.repaired += stores.sync()
        progress.repaired(session.repaired)
        progress.start(study, dataset, len(session.missing()))
        if dataset.problem is not None:
            progress.warning(f"{dataset.problem}, and another --study-name")
        if storage.BASELINES in study.user_attrs:
            progress.baselines(overview.baselines_of(study))
        elif config.baselines == "auto" and is_own(config.dataset):
            session.baselines = Computation(
                dataset, session.objective, config.seed, config.class_weight
            )
            stack.callback(session.baselines.cancel)
        session.workers = Executor(
            config,
            stores.parent,
            dataset.for_workers(),
            progress.stopping,
            progress.workers,
            renew_lock,
        )
        yield session


@contextlib.contextmanager
def _ended_on_error(stores: Stores) -> Iterator[None]:
    """Where the block is interrupted or fails, end what it left running."""
    try:
        yield
    except TakenOver:
        raise  # its trials and its parent run are another process's now
    except (KeyboardInterrupt, Exception) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = str(error) if interrupted else f"stopped with the run: {one_line(error)}"
        # A database or server may be what failed; the next start repeats both.
        with contextlib.suppress(Exception):
            stores.sync(reason or "interrupted")
        with contextlib.suppress(Exception):
            stores.tracking.close(stores.parent, "KILLED" if interrupted else "FAILED")
        raise


def abandon(config: StudyConfig, reason: str) -> None:
    """End what this process left running; called where its main thread does not respond."""
    if not holds_study(config):
        return
    study = storage.load_study(config)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        fail_trial(study, trial, reason)
    stores = Stores(study, config)
    stores.sync(reason)
    stores.tracking.close(stores.parent, "KILLED")


class Session:
    """A study that is open, and what the steps of a run on it share."""

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

    def sync_after_death(self) -> list[int]:
        """Workers died: end what they left running; returns the slots that are missing now."""
        self.progress.repaired(retry(self.stores.sync))
        return self.missing()

    def finished(self) -> list[FrozenTrial]:
        """The trials that finished a slot or with which one was given up, by slot."""
        trials = self.study.get_trials(deepcopy=False, states=FINISHED)
        trials += given_up(self.study).values()
        return sorted(trials, key=lambda trial: trial.user_attrs.get(storage.SLOT, trial.number))

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
