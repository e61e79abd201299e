"""One run, from top to bottom: check, open, search, retrain, register, report."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from search.config.hyperparameters import needs_images
from search.config.settings import StudyConfig
from search.data.dataset import Dataset, check_images, choose_epochs, load_for_study
from search.errors import InputError, RunError, one_line
from search.imports import undisturbed
from search.promotion.comparison import Comparison
from search.promotion.gate import Winner, promote
from search.promotion.retrain import find_retrained
from search.report import publish
from search.report.progress import Progress, Result
from search.study import ranking, sampling, storage
from search.study.lock import TakenOver, check_promotion_lock, holds_study, study_lock
from search.study.trials import (
    FINISHED,
    TrialSummary,
    amend_trial,
    fail_trial,
    given_up,
    missing_slots,
    repeat_attr,
    repeats_of,
)
from search.tracking.address import check_experiment, check_tracking
from search.tracking.registered_model import aliased_version
from search.tracking.runs import TRACKING_ERRORS
from search.tracking.schema import NOT_MADE, study_metadata
from search.tracking.sync import Stores
from search.workers.executor import INTERRUPTED, Executor, Patience

if TYPE_CHECKING:
    from search.report.html import Chart

T = TypeVar("T")

_PATIENCE = 20  # seconds that a failing tracking server gets to come back


def run(config: StudyConfig, progress: Progress | None = None) -> Result:
    """Run the study until `config.n_trials` of its slots are finished, and register the best trial.

    Repeating it after the end changes nothing. With one worker TensorFlow runs in this process,
    where it keeps the one thread that it started with. Raises InputError where something given
    cannot be used, RunError where the run has to stop.
    """
    _check_main_module()
    try:
        with undisturbed():
            return _run(config, progress or Progress())
    except (*storage.ERRORS, *TRACKING_ERRORS) as error:
        raise storage.failure(error) from error


def _run(config: StudyConfig, progress: Progress) -> Result:
    started = time.monotonic()
    config, dataset, settings = _preflight(config)  # creates nothing
    with _open_session(config, dataset, settings, progress) as session:
        with session.workers:
            session.search()
            session.train_finalists()
            winner = session.register_winner()  # None if interrupted
        session.finish(winner)
        return session.result(winner, time.monotonic() - started)


# ---- before anything is created --------------------------------------------------------------


def _check_main_module() -> None:
    """Raise InputError in a child process that is only importing the main module.

    Workers do not import it, but other children of a script may, to find their target function.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing does
        raise InputError(
            "run() must not be called when the main module is imported, as a child process of "
            "multiprocessing does; put the call under: if __name__ == '__main__':"
        )


def _preflight(config: StudyConfig) -> tuple[StudyConfig, Dataset, dict[str, Any]]:
    """The configuration with its epochs, the dataset and the study's settings, all checked."""
    storage.check(config)
    stored = storage.stored_settings(config)
    dataset = load_for_study(config, stored)
    config = config.with_epochs(choose_epochs(config, dataset, stored))
    check_images(dataset, needs_images(config.space))
    if dataset.problem is not None and stored is None:
        raise InputError(dataset.problem)
    name = f"{dataset.name.rsplit('/', 1)[-1]} ({dataset.digest[:12]})"
    normalized = dataset.normalization is not None
    settings = config.settings(name, split=dataset.split, normalized=normalized)
    check_tracking(config.tracking_uri)
    check_experiment(config)
    if config.scheduler is not None:
        _check_scheduler(config.scheduler)
    if config.report != "none":
        publish.check_report(config, config.report)
    storage.check_same(config, settings)
    return config, dataset, settings


def _check_scheduler(address: str) -> None:
    try:
        from search.workers.dask import check_scheduler
    except ImportError as error:
        raise InputError(
            f"--scheduler needs Dask's distributed, which is not installed ({error}); "
            "pip install -e '.[cluster]'"
        ) from None
    check_scheduler(address)


# ---- the open study --------------------------------------------------------------------------


@contextlib.contextmanager
def _open_session(
    config: StudyConfig, dataset: Dataset, settings: dict[str, Any], progress: Progress
) -> "Iterator[_Session]":
    """Lock and open the study, make both stores agree; an error in the block ends its runs."""
    with contextlib.ExitStack() as stack:
        renew_lock = stack.enter_context(study_lock(config))
        check_promotion_lock(config)  # not after all the training
        study = storage.open_study(config, settings)
        stack.callback(storage.close_study, study)
        if "facts" not in study.user_attrs:
            study.set_user_attr("facts", study_metadata(config, dataset))
        stores = Stores(study, config)
        stack.callback(stores.tracking.disconnect)
        stack.enter_context(_ended_on_error(stores))
        session = _Session(config, stores, progress)
        session.sync()
        progress.start(study, dataset, len(session.missing()))
        if dataset.problem is not None:
            progress.warning(f"{dataset.problem}, and another --study-name")
        session.workers = Executor(
            config, stores.parent, dataset, progress.stopping, progress.workers, renew_lock
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
            stores.reconcile(reason or "interrupted")
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
    stores.reconcile(reason)
    stores.tracking.close(stores.parent, "KILLED")


def _retry(step: Callable[[], T], before_again: Callable[[], object] = list) -> T:
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


class _Session:
    """An open study, and the steps of a run on it."""

    workers: Executor

    def __init__(self, config: StudyConfig, stores: Stores, progress: Progress) -> None:
        self.config = config
        self.study = stores.study
        self.stores = stores
        self.tracking = stores.tracking
        self.parent = stores.parent
        self.progress = progress
        self.ran = 0
        self.mended: list[str] = []
        self.stopped: str | None = None  # why the search ended early, if it did
        self.charts: list[Chart] | None = None  # of the report, once they are drawn

    def sync(self) -> None:
        """Make both stores agree, and report what had to be repaired."""
        repaired = _retry(self.stores.reconcile)
        self.mended += repaired
        self.progress.mended(repaired)

    def missing(self) -> list[int]:
        """The slots that are not finished yet."""
        return missing_slots(self.study, sampling.budget(self.config))

    def _sync_after_death(self) -> list[int]:
        """Workers died: end what they left running; returns the slots that are missing now."""
        self.progress.mended(_retry(self.stores.reconcile))
        return self.missing()

    def search(self) -> None:
        """Run the missing trials."""
        missing, finished = self.missing(), self._finished()
        patience = Patience(self.config.patience)
        for trial in finished:
            patience.see(trial.value if trial.state is TrialState.COMPLETE else None)
        if not missing or patience.exhausted:
            return
        known = ranking.best(finished)
        best = None if known is None else known.value

        def on_trial(trial: TrialSummary) -> None:
            nonlocal best
            self.ran += 1
            if trial.value is not None:
                best = trial.value if best is None else max(best, trial.value)
            self.progress.trial(trial, best)

        self.tracking.reopen(self.parent)
        self.stopped = self.workers.run_trials(
            missing,
            on_trial,
            self._sync_after_death,
            timeout=self.config.timeout,
            patience=patience,
            max_failures=self.config.max_failures,
        )

    def _finished(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=FINISHED)
        trials += given_up(self.study).values()
        return sorted(trials, key=lambda trial: trial.user_attrs.get("place", trial.number))

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
            trial, name = by_number[number], repeat_attr(repeat)
            amend_trial(self.study, trial, name, result, self.config.storage)
            seen = repeats_of(trial)[repeat]
            with contextlib.suppress(*TRACKING_ERRORS):  # the next sync writes it
                self.stores.write(seen)
            self.progress.repeat(number, repeat, seen.value, len(missing()))

        if self.workers.run_repeats(missing, on_repeat):
            ranking.settle(self.study, chosen, self.config)

    def register_winner(self) -> Winner | None:
        """Retrain, test, register and promote the winner, as far as that is not done yet.

        None where the run was interrupted. Raises RunError where no trial completed.
        """
        self.mended += _retry(self.stores.reconcile)
        if self.progress.stopping():
            self.stopped = INTERRUPTED
        if self.stopped == INTERRUPTED:
            return None
        return _retry(self._register, before_again=self.stores.reconcile)

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
            self.progress.retraining(best)
            run_id = self.workers.call(
                "retrain", best.number, on_death=self._sync_after_death, meanwhile=self._draw
            )
            run = self.tracking.client.get_run(run_id)
            if NOT_MADE in run.data.tags:
                self.progress.warning(f"the winner's {run.data.tags[NOT_MADE]}")
        version, verdict = promote(self.stores, run, self._compare)
        champion = aliased_version(self.tracking.client, self.config.model_name)
        return Winner(
            trial=best.number,
            run_id=run.info.run_id,
            version=version,
            val_accuracy=best.value or 0.0,
            test_loss=run.data.metrics["test_loss"],
            test_accuracy=run.data.metrics["test_accuracy"],
            verdict=verdict,
            in_production=None if champion is None else int(champion.version),
            new=new,
        )

    def _compare(self, challenger: int, champion: int) -> Comparison | str:
        """Compare two versions of the model on a worker."""
        found: Comparison | str = self.workers.call(
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
        _retry(lambda: self.tracking.close(self.parent, status))
        if winner is None:
            return
        try:  # the winner is registered, so a failure costs only what is shown
            _retry(lambda: publish.publish(self.stores, winner, self.charts))
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
            best=ranking.best(trials),
            finalists=ranking.standing(self.study),
            reference=ranking.reference(self.study),
            winner=winner,
            parent_run_id=self.parent,
            complete=states.count(TrialState.COMPLETE),
            pruned=states.count(TrialState.PRUNED),
            failed=states.count(TrialState.FAIL),
            given_up=len(given_up(self.study)),
            ran=self.ran,
            seconds=seconds,
            stopped=self.stopped,
            mended=tuple(self.mended),
            report=path,
        )
