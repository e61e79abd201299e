"""The one path of a run, top to bottom."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from search import (
    address,
    data,
    engine,
    facts,
    presentation,
    production,
    promotion,
    ranking,
    recipe,
    registry,
    runner,
    sampling,
    storage,
    tracking,
)
from search.config import InputError, RunError, StudyConfig, one_line
from search.contract import NOT_MADE, repeat_attr, repeats_of
from search.imports import undisturbed
from search.listener import Listener
from search.outcome import Outcome
from search.production import aliased
from search.ranking import Finalist
from search.reconcile import Ledgers

if TYPE_CHECKING:
    from search.report import Chart

T = TypeVar("T")


@dataclass(frozen=True)
class Winner:
    """The trial that won, trained anew, and its version of the registered model.

    val_accuracy: of the trial. verdict: whether it went to production. in_production: the version
    that is there now, which may be a later study's. new: whether it was trained anew in this run.
    """

    trial: int
    run_id: str
    version: int
    val_accuracy: float
    test_loss: float
    test_accuracy: float
    verdict: promotion.Verdict
    in_production: int | None
    new: bool


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    best: the COMPLETE trial with the highest val_accuracy, `best.value`; None only where the run
    was interrupted before one completed.
    finalists: the trials that were trained again on fresh seeds, the best mean first; the first one
    is the winner. Empty with `--finalists 0`: the best trial is the winner.
    reference: the study's trial of the reference configuration, None where it was not tried.
    winner: the best configuration trained anew on training and validation data, its accuracy on
    the test images and its version of the registered model; None where the run was interrupted.
    complete, pruned, failed: trials of the study in all; `ran` of them in this run. given_up: slots
    whose configuration failed by itself twice; they count as finished.
    stopped: why the search ended before its budget, if it did.
    mended: what the reconciliation had to mend.
    """

    config: StudyConfig
    best: FrozenTrial | None
    finalists: list[Finalist]
    reference: FrozenTrial | None
    winner: Winner | None
    parent_run_id: str
    complete: int
    pruned: int
    failed: int
    given_up: int
    ran: int
    seconds: float
    stopped: str | None
    mended: tuple[str, ...]


def run(config: StudyConfig, listener: Listener | None = None) -> Result:
    """Run the study until `config.n_trials` of its slots are finished, and register the best.

    Doing it again after the end changes nothing. With one worker TensorFlow runs in this process,
    where it keeps the one thread that it started with. Raises InputError where something given
    cannot be used, RunError where the run has to stop.
    """
    _check_main_module()
    try:
        with undisturbed():
            return _run(config, listener or Listener())
    except (*storage.ERRORS, *tracking.ERRORS) as error:
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


def _run(config: StudyConfig, listener: Listener) -> Result:
    began = time.monotonic()
    storage.check(config)
    stored = storage.stored_settings(config)
    dataset = data.of_study(config, stored)
    config = config.with_epochs(data.epochs(config, dataset, stored))
    data.check(dataset, recipe.needs_images(config.space))
    if dataset.problem is not None and stored is None:
        raise InputError(dataset.problem)
    settings = config.settings(
        _short(dataset), split=dataset.split, normalized=dataset.normalization is not None
    )
    address.check(config.tracking_uri)
    production.check_experiment(config)
    if config.scheduler is not None:
        _check_scheduler(config.scheduler)
    if config.report != "none":
        presentation.check(config, config.report)
    storage.check_same(config, settings)
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(runner.sole_runner(config))
        promotion.check_lock(config)  # not after all the training
        study = storage.open_study(config, settings)
        stack.callback(storage.close_study, study)
        if "facts" not in study.user_attrs:
            study.set_user_attr("facts", facts.facts_of(config, dataset))
        ledgers = Ledgers(study, config)
        ledger, parent = ledgers.tracking, ledgers.parent
        stack.callback(ledger.disconnect)
        try:
            mended = ledgers.reconcile()
            listener.mended(mended)
            missing = storage.missing_places(study, sampling.budget(config))
            listener.start(study, dataset, len(missing))
            if dataset.problem is not None:
                listener.warning(f"{dataset.problem}, and another --study-name")
            with engine.Engine(config, parent, dataset, listener, keep) as workers:
                job = _Job(config, study, ledgers, listener, workers)
                stopped = job.search(missing)
                if not listener.stopping():
                    job.train_finalists()
                mended += _patiently(ledgers.reconcile)
                if listener.stopping():
                    stopped = engine.INTERRUPTED
                winner = None if stopped == engine.INTERRUPTED else job.register_winner()
        except KeyboardInterrupt as interruption:
            with contextlib.suppress(Exception):  # the next start does it
                ledgers.reconcile(str(interruption) or "interrupted")
                ledger.close(parent, "KILLED")
            raise
        except runner.TakenOver:
            raise  # its trials and its parent run are another process's now
        except Exception as error:
            with contextlib.suppress(Exception):  # a database or server may be what failed
                ledgers.reconcile(f"stopped with the run: {one_line(error)}")
            with contextlib.suppress(Exception):
                ledger.close(parent, "FAILED")
            raise
        _patiently(lambda: ledger.close(parent, "KILLED" if winner is None else "FINISHED"))
        if winner is not None:
            _present(ledgers, winner, job.charts, listener)
        return job.result(winner, stopped, tuple(mended), time.monotonic() - began)


def _present(
    ledgers: Ledgers, winner: Winner, charts: "list[Chart] | None", listener: Listener
) -> None:
    """Write notes and report; the winner is registered, so a failure only costs what is shown."""
    try:
        _patiently(lambda: presentation.present(ledgers, winner, charts))
    except Exception as error:
        listener.warning(
            f"the report and the notes could not be written ({type(error).__name__}: "
            f"{one_line(error)}); the same command tries it again"
        )


def _check_scheduler(address: str) -> None:
    try:
        from search import cluster
    except ImportError as error:
        raise InputError(
            f"--scheduler needs Dask's distributed, which is not installed ({error}); "
            "pip install -e '.[cluster]'"
        ) from None
    cluster.check(address)


_PATIENCE = 20  # seconds that a tracking server which fails gets to come back


def _patiently(step: Callable[[], T], before_again: Callable[[], object] = list) -> T:
    """Do `step`, which can be done again, until the tracking server takes it."""
    deadline = None
    while True:
        try:
            if deadline is not None:
                before_again()
            return step()
        except tracking.ERRORS:
            deadline = deadline or time.monotonic() + _PATIENCE
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def abandon(config: StudyConfig, reason: str) -> None:
    """End what this process left running, from outside its main thread, which does not answer."""
    if not runner.is_this_process(config):
        return
    study = storage.load_study(config)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.fail(study, trial, reason)
    ledgers = Ledgers(study, config)
    ledgers.reconcile(reason)
    ledgers.tracking.close(ledgers.parent, "KILLED")


def _short(dataset: data.Dataset) -> str:
    return f"{dataset.name.rsplit('/', 1)[-1]} ({dataset.digest[:12]})"


class _Job:
    """The steps of a run that share an open study."""

    def __init__(
        self,
        config: StudyConfig,
        study: optuna.Study,
        ledgers: Ledgers,
        listener: Listener,
        workers: engine.Engine,
    ) -> None:
        self.config = config
        self.study = study
        self.ledgers = ledgers
        self.ledger = ledgers.tracking
        self.parent = ledgers.parent
        self.listener = listener
        self.workers = workers
        self.ran = 0
        self.charts: list[Chart] | None = None  # of the report, once they are drawn

    def search(self, missing: list[int]) -> str | None:
        """Run the missing trials; returns why the search stopped early, if it did."""
        patience = engine.Patience(self.config.patience)
        finished = self._finished()
        for trial in finished:
            patience.see(trial.value if trial.state is TrialState.COMPLETE else None)
        if not missing or patience.exhausted:
            return None
        known = ranking.best(finished)
        best = None if known is None else known.value

        def on_trial(outcome: Outcome) -> None:
            nonlocal best
            self.ran += 1
            if outcome.value is not None:
                best = outcome.value if best is None else max(best, outcome.value)
            self.listener.trial(outcome, best)

        self.ledger.reopen(self.parent)
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
            self.ledger.reopen(self.parent)
            self.listener.finalists(chosen, self.config.repeats)

        def on_repeat(number: int, repeat: int, kept: dict[str, Any]) -> None:
            trial, name = by_number[number], repeat_attr(repeat)
            storage.amend(self.study, trial, name, kept, self.config.storage)
            seen = repeats_of(trial)[repeat]
            with contextlib.suppress(*tracking.ERRORS):  # reconcile writes it later
                self.ledgers.write(seen)
            self.listener.repeat(number, repeat, seen.value, len(missing()))

        if self.workers.run_repeats(missing, on_repeat):
            ranking.settle(self.study, chosen, self.config)

    def register_winner(self) -> Winner:
        """Retrain, test, register and promote the winner, as far as that is not yet done."""
        return _patiently(self._register, before_again=self.ledgers.reconcile)

    def _register(self) -> Winner:
        best = self.winner()
        runs = self.ledger.runs_of(self.parent)
        run = registry.find_retrained(self.ledger, runs, best.number)
        new = run is None
        if run is None:
            self.ledger.reopen(self.parent)
            self.listener.retraining(best)
            run_id = self.workers.retrain(best.number, self._after_death, self._draw)
            run = self.ledger.client.get_run(run_id)
            if NOT_MADE in run.data.tags:
                self.listener.warning(f"the winner's {run.data.tags[NOT_MADE]}")

        def compare(challenger: int, champion: int) -> promotion.Comparison | str:
            return self.workers.compare(challenger, champion, self._after_death)

        version, verdict = promotion.promote(self.ledgers, run, compare)
        champion = aliased(self.ledger.client, self.config.model_name)
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
                self.charts = presentation.draw(self.study, self.config)

    def _after_death(self) -> list[int]:
        """Workers died: end what they left running; returns the places that are missing now."""
        self.listener.mended(_patiently(self.ledgers.reconcile))
        return storage.missing_places(self.study, sampling.budget(self.config))

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
        self, winner: Winner | None, stopped: str | None, mended: tuple[str, ...], seconds: float
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
            given_up=len(storage.given_up(self.study)),
            ran=self.ran,
            seconds=seconds,
            stopped=stopped,
            mended=mended,
        )

    def _finished(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=storage.FINISHED)
        trials += storage.given_up(self.study).values()
        return sorted(trials, key=lambda trial: trial.user_attrs.get("place", trial.number))
