"""One run, from top to bottom: check, open, search, retrain, register, report."""

import contextlib
import json
import time
from functools import partial
from typing import Any

from optuna.trial import TrialState

from search.config.settings import StudyConfig
from search.errors import RunError, one_line
from search.imports import undisturbed
from search.preflight import check_main_module, preflight
from search.promotion.gate import Found, Winner, promote
from search.promotion.retrain import find_retrained
from search.report import publish
from search.report.progress import Progress, Result
from search.session import Session, open_session, retry
from search.study import ranking, storage
from search.study.trials import TrialSummary, amend_trial
from search.tracking.registered_model import aliased_version
from search.tracking.runs import TRACKING_ERRORS
from search.tracking.schema import BASELINE, NOT_MADE, test_metrics
from search.workers.executor import INTERRUPTED, Patience
from search.workers.processes import trains_here
from search.workers.reproduce import repeat
from search.workers.trial import run_trial
from search.workers.worker import Worker

_WHILE_IMPORTING = 10  # seconds; on a busy machine, workers take longer until they train


def run(config: StudyConfig, progress: Progress | None = None) -> Result:
    """Run the study until `config.n_trials` of its slots are finished, and register the best trial.

    Repeating it after the end changes nothing. With one worker TensorFlow runs in this process,
    where it keeps the one thread that it started with. Raises InputError where something given
    cannot be used, RunError where the run has to stop.
    """
    check_main_module()
    try:
        with undisturbed():
            return _run(config, progress or Progress())
    except (*storage.ERRORS, *TRACKING_ERRORS) as error:
        raise storage.failure(error) from error


def _run(config: StudyConfig, progress: Progress) -> Result:
    started = time.monotonic()
    config, dataset, settings = preflight(config)  # creates nothing
    with open_session(config, dataset, settings, progress) as session:
        with session.workers:
            search(session)
            train_finalists(session)
            winner = register_winner(session)  # None if interrupted
        finish(session, winner)
        return session.result(winner, time.monotonic() - started)


def search(session: Session) -> None:
    """Run the missing trials."""
    missing, finished = session.missing(), session.finished()
    patience = Patience(session.config.patience, session.objective)
    for trial in finished:
        patience.see(trial.value if trial.state is TrialState.COMPLETE else None)
    if not missing or patience.exhausted:
        return
    known = ranking.best(finished, session.objective)
    best = None if known is None else known.value

    def on_trial(trial: TrialSummary) -> None:
        nonlocal best
        session.ran += 1
        if trial.final is not None:
            best = session.objective.best([trial.final, *([] if best is None else [best])])
        session.progress.trial(trial, best)

    session.tracking.reopen(session.parent)
    if session.baselines is not None:
        session.baselines.start()
    if trains_here(session.config):
        session.await_baselines()
    session.stopped = session.workers.run_trials(
        run_trial,
        missing,
        on_trial,
        session.sync_after_death,
        timeout=session.config.timeout,
        patience=patience,
        max_failures=session.config.max_failures,
        meanwhile=partial(session.await_baselines, _WHILE_IMPORTING),
    )


def train_finalists(session: Session) -> None:
    """Train the finalists on fresh seeds, as far as that is not done yet."""
    if session.progress.stopping():
        return
    chosen = ranking.candidates(session.study, session.config)
    by_number = {trial.number: trial for trial in chosen}

    def missing() -> list[tuple[int, int]]:
        return ranking.missing(chosen, session.config)

    if missing():
        session.tracking.reopen(session.parent)
        session.progress.finalists(chosen, session.config.repeats)

    def on_repeat(number: int, repeat: int, result: dict[str, Any]) -> None:
        trial, name = by_number[number], ranking.repeat_attr(repeat)
        amend_trial(session.study, trial, name, result, session.config.storage)
        seen = ranking.repeats_of(trial)[repeat]
        with contextlib.suppress(*TRACKING_ERRORS):  # the next sync writes it
            session.stores.write(seen)
        session.progress.repeat(number, repeat, seen.value, len(missing()))

    if session.workers.run_repeats(repeat, missing, on_repeat):
        ranking.settle(session.study, chosen, session.config)


def register_winner(session: Session) -> Winner | None:
    """Retrain, test, register and promote the winner, as far as that is not done yet.

    None where the run was interrupted. Raises RunError where no trial completed.
    """
    session.repaired += retry(session.stores.sync)
    if session.progress.stopping():
        session.stopped = INTERRUPTED
    if session.stopped == INTERRUPTED:
        return None
    return retry(partial(_register, session), before_again=session.stores.sync)


def _register(session: Session) -> Winner:
    best = ranking.winner(session.study)
    if best is None:
        raise RunError(
            f"no trial of study {session.config.study_name} completed, so there is no best one "
            "and nothing was registered; look at the failures, or use --pruner none"
        )
    run = find_retrained(session.tracking, session.tracking.runs_of(session.parent), best.number)
    new = run is None
    if run is None:
        session.tracking.reopen(session.parent)
        session.await_baselines()
        session.progress.retraining(best)
        run_id = session.workers.call(
            Worker.retrain,
            best.number,
            on_death=session.sync_after_death,
            meanwhile=partial(_draw, session),
        )
        run = session.tracking.client.get_run(run_id)
        if NOT_MADE in run.data.tags:
            session.progress.warning(f"the winner's {run.data.tags[NOT_MADE]}")
    against = run.data.tags.get(BASELINE)
    if against is not None and storage.AGAINST not in best.user_attrs:
        session.stores.amend(best, storage.AGAINST, json.loads(against))
    version, verdict = promote(session.stores, run, partial(_compare, session))
    champion = aliased_version(session.tracking.client, session.config.model_name)
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


def _compare(session: Session, challenger: int, champion: int) -> Found:
    """Compare two versions of the model on a worker."""
    found: Found = session.workers.call(
        Worker.compare, challenger, champion, on_death=session.sync_after_death
    )
    return found


def _draw(session: Session) -> None:
    """Draw the report's charts; what fails is repeated when the report is written."""
    if session.config.report != "none" and session.charts is None:
        with contextlib.suppress(Exception):
            session.charts = publish.draw(session.study, session.config)


def finish(session: Session, winner: Winner | None) -> None:
    """End the parent run; write the notes and the report."""
    status = "KILLED" if winner is None else "FINISHED"
    retry(lambda: session.tracking.close(session.parent, status))
    if winner is None:
        return
    try:  # the winner is registered, so a failure costs only what is shown
        retry(lambda: publish.publish(session.stores, winner, session.charts))
    except Exception as error:
        session.progress.warning(
            f"the report and the notes could not be written ({type(error).__name__}: "
            f"{one_line(error)}); the same command tries it again"
        )
