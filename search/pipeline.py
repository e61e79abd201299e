"""The one path of a run, top to bottom."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
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
from search.study.storage import METADATA, SLOT
from search.study.trials import (
    FINISHED,
    TrialSummary,
    amend_trial,
    fail_trial,
    given_up,
    missing_slots,
)
from search.tracking.address import check_experiment, check_tracking
from search.tracking.registered_model import aliased_version
from search.tracking.runs import TRACKING_ERRORS
from search.tracking.schema import NOT_MADE, study_metadata
from search.tracking.sync import Stores
from search.workers import executor

if TYPE_CHECKING:
    from search.report.html import Chart

T = TypeVar("T")


def run(config: StudyConfig, listener: Progress | None = None) -> Result:
    """Run the study until `config.n_trials` of its slots are finished, and register the best.

    Doing it again after the end changes nothing. With one worker TensorFlow runs in this process,
    where it keeps the one thread that it started with. Raises InputError where something given
    cannot be used, RunError where the run has to stop.
    """
    _check_main_module()
    try:
        with undisturbed():
            return _run(config, listener or Progress())
    except (*storage.ERRORS, *TRACKING_ERRORS) as error:
        raise storage.failure(error) from error


def _check_main_module() -> None:
    """Raise InputError in a child process that is only importing the main module.

    Workers do not import it, but other children of a script may, to find what they are to do.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing does
        raise InputError(
            "run() must not be called when the main module is imported, as a child process of "
            "multiprocessing does; put the call under: if __name__ == '__main__':"
        )


def _run(config: StudyConfig, listener: Progress) -> Result:
    began = time.monotonic()
    storage.check(config)
    stored = storage.stored_settings(config)
    dataset = load_for_study(config, stored)
    config = config.with_epochs(choose_epochs(config, dataset, stored))
    check_images(dataset, needs_images(config.space))
    if dataset.problem is not None and stored is None:
        raise InputError(dataset.problem)
    settings = config.settings(
        _short(dataset), split=dataset.split, normalized=dataset.normalization is not None
    )
    check_tracking(config.tracking_uri)
    check_experiment(config)
    if config.scheduler is not None:
        _check_scheduler(config.scheduler)
    if config.report != "none":
        publish.check_report(config, config.report)
    storage.check_same(config, settings)
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(study_lock(config))
        check_promotion_lock(config)  # not after all the training
        study = storage.open_study(config, settings)
        stack.callback(storage.close_study, study)
        if METADATA not in study.user_attrs:
            study.set_user_attr(METADATA, study_metadata(config, dataset))
        stores = Stores(study, config)
        tracking, parent = stores.tracking, stores.parent
        stack.callback(tracking.disconnect)
        try:
            repaired = stores.sync()
            listener.repaired(repaired)
            missing = missing_slots(study, sampling.budget(config))
            listener.start(study, dataset, len(missing))
            if dataset.problem is not None:
                listener.warning(f"{dataset.problem}, and another --study-name")
            with executor.Executor(
                config, parent, dataset, listener.stopping, listener.workers, keep
            ) as workers:
                job = _Job(config, study, stores, listener, workers)
                stopped = job.search(missing)
                if not listener.stopping():
                    job.train_finalists()
                repaired += _patiently(stores.sync)
                if listener.stopping():
                    stopped = executor.INTERRUPTED
                winner = None if stopped == executor.INTERRUPTED else job.register_winner()
        except KeyboardInterrupt as interruption:
            with contextlib.suppress(Exception):  # the next start does it
                stores.sync(str(interruption) or "interrupted")
                tracking.close(parent, "KILLED")
            raise
        except TakenOver:
            raise  # its trials and its parent run are another process's now
        except Exception as error:
            with contextlib.suppress(Exception):  # a database or server may be what failed
                stores.sync(f"stopped with the run: {one_line(error)}")
            with contextlib.suppress(Exception):
                tracking.close(parent, "FAILED")
            raise
        _patiently(lambda: tracking.close(parent, "KILLED" if winner is None else "FINISHED"))
        if winner is not None:
            _present(stores, winner, job.charts, listener)
        return job.result(winner, stopped, tuple(repaired), time.monotonic() - began)


def _present(
    stores: Stores, winner: Winner, charts: "list[Chart] | None", listener: Progress
) -> None:
    """Write notes and report; the winner is registered, so a failure only costs what is shown."""
    try:
        _patiently(lambda: publish.publish(stores, winner, charts))
    except Exception as error:
        listener.warning(
            f"the report and the notes could not be written ({type(error).__name__}: "
            f"{one_line(error)}); the same command tries it again"
        )


def _check_scheduler(address: str) -> None:
    try:
        from search.workers.dask import check_scheduler
    except ImportError as error:
        raise InputError(
            f"--scheduler needs Dask's distributed, which is not installed ({error}); "
            "pip install -e '.[cluster]'"
        ) from None
    check_scheduler(address)


_PATIENCE = 20  # seconds that a tracking server which fails gets to come back


def _patiently(step: Callable[[], T], before_again: Callable[[], object] = list) -> T:
    """Do `step`, which can be done again, until the tracking server takes it."""
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


def abandon(config: StudyConfig, reason: str) -> None:
    """End what this process left running, from outside its main thread, which does not answer."""
    if not holds_study(config):
        return
    study = storage.load_study(config)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        fail_trial(study, trial, reason)
    stores = Stores(study, config)
    stores.sync(reason)
    stores.tracking.close(stores.parent, "KILLED")


def _short(dataset: Dataset) -> str:
    return f"{dataset.name.rsplit('/', 1)[-1]} ({dataset.digest[:12]})"


class _Job:
    """The steps of a run that share an open study."""

    def __init__(
        self,
        config: StudyConfig,
        study: optuna.Study,
        stores: Stores,
        listener: Progress,
        workers: executor.Executor,
    ) -> None:
        self.config = config
        self.study = study
        self.stores = stores
        self.tracking = stores.tracking
        self.parent = stores.parent
        self.listener = listener
        self.workers = workers
        self.ran = 0
        self.charts: list[Chart] | None = None  # of the report, once they are drawn

    def search(self, missing: list[int]) -> str | None:
        """Run the missing trials; returns why the search stopped early, if it did."""
        patience = executor.Patience(self.config.patience)
        finished = self._finished()
        for trial in finished:
            patience.see(trial.value if trial.state is TrialState.COMPLETE else None)
        if not missing or patience.exhausted:
            return None
        known = ranking.best(finished)
        best = None if known is None else known.value

        def on_trial(outcome: TrialSummary) -> None:
            nonlocal best
            self.ran += 1
            if outcome.value is not None:
                best = outcome.value if best is None else max(best, outcome.value)
            self.listener.trial(outcome, best)

        self.tracking.reopen(self.parent)
        return self.workers.run_trials(
            missing,
            on_trial,
            self._after_death,
            timeout=self.config.timeout,
            patience=patience,
            max_failures=self.config.max_failures,
        )

    def train_finalists(self) -> None:
        """Train the finalists again, as far as that is not yet done and nothing says stop."""
        chosen = ranking.candidates(self.study, self.config)
        by_number = {trial.number: trial for trial in chosen}

        def missing() -> list[tuple[int, int]]:
            return ranking.missing(chosen, self.config)

        if missing():
            self.tracking.reopen(self.parent)
            self.listener.finalists(chosen, self.config.repeats)

        def on_repeat(number: int, repeat: int, kept: dict[str, Any]) -> None:
            trial, name = by_number[number], ranking.repeat_attr(repeat)
            amend_trial(self.study, trial, name, kept, self.config.storage)
            seen = ranking.repeats_of(trial)[repeat]
            with contextlib.suppress(*TRACKING_ERRORS):  # `sync` writes it later
                self.stores.write(seen)
            self.listener.repeat(number, repeat, seen.value, len(missing()))

        if self.workers.run_repeats(missing, on_repeat):
            ranking.settle(self.study, chosen, self.config)

    def register_winner(self) -> Winner:
        """Retrain, test, register and promote the winner, as far as that is not yet done."""
        return _patiently(self._register, before_again=self.stores.sync)

    def _register(self) -> Winner:
        best = self.winner()
        runs = self.tracking.runs_of(self.parent)
        run = find_retrained(self.tracking, runs, best.number)
        new = run is None
        if run is None:
            self.tracking.reopen(self.parent)
            self.listener.retraining(best)
            run_id = self.workers.retrain(best.number, self._after_death, self._draw)
            run = self.tracking.client.get_run(run_id)
            if NOT_MADE in run.data.tags:
                self.listener.warning(f"the winner's {run.data.tags[NOT_MADE]}")

        def compare(challenger: int, champion: int) -> Comparison | str:
            return self.workers.compare(challenger, champion, self._after_death)

        version, verdict = promote(self.stores, run, compare)
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

    def _draw(self) -> None:
        """Draw the report's charts; what fails is tried again when the report is written."""
        if self.config.report != "none" and self.charts is None:
            with contextlib.suppress(Exception):
                self.charts = publish.draw(self.study, self.config)

    def _after_death(self) -> list[int]:
        """Workers died: end what they left running; returns the places that are missing now."""
        self.listener.repaired(_patiently(self.stores.sync))
        return missing_slots(self.study, sampling.budget(self.config))

    def winner(self) -> FrozenTrial:
        """The best finalist, or else the best trial. Raises RunError where there is none."""
        best = ranking.winner(self.study)
        if best is None:
            raise RunError(
                f"no trial of study {self.config.study_name} completed, so there is no best one "
                "and nothing was registered; look at the failures, or use --pruner none"
            )
        return best

    def result(
        self, winner: Winner | None, stopped: str | None, repaired: tuple[str, ...], seconds: float
    ) -> Result:
        """What the run leaves."""
        trials = self.study.get_trials(deepcopy=False)
        states = [trial.state for trial in trials]
        return Result(
            config=self.config,
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
            stopped=stopped,
            repaired=repaired,
            report=None
            if self.config.report == "none"
            else publish.report_path(self.config.report, self.config.study_name),
        )

    def _finished(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=FINISHED)
        trials += given_up(self.study).values()
        return sorted(trials, key=lambda trial: trial.user_attrs.get(SLOT, trial.number))
