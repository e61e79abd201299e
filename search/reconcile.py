"""Make both ledgers agree, after anything: Optuna is the truth, MLflow follows."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import optuna
from mlflow.entities import DatasetInput, Run
from optuna.trial import FrozenTrial, TrialState

from search import storage
from search.config import StudyConfig
from search.tracking import FAILURE, METRICS, NUMBER, ORPHAN, STATE, STATUS, Tracking

LOST = "lost: its process ended without a word (killed, crashed or switched off)"


def reconcile(
    study: optuna.Study,
    tracking: Tracking,
    parent: str,
    config: StudyConfig,
    facts: dict[str, Any],
    dataset: DatasetInput,
    interruption: str | None = None,
) -> list[str]:
    """End what was left running and make every run match its trial; says what it mended.

    interruption: why every trial of this run has ended, where it has.
    Doing it twice changes nothing, and so does being killed in the middle and done again.
    """
    mended = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if interruption is not None or storage.is_lost(trial):
            storage.fail(study, trial, interruption or LOST)
            mended.append(f"trial {trial.number} was left running: now FAIL")

    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    all_runs = tracking.runs_of(parent)
    for other in all_runs:
        if other.info.status == "RUNNING" and not _is_trial(other):
            tracking.client.set_terminated(other.info.run_id, "KILLED")
            mended.append(f"run {other.info.run_name} was left running: ended")
        if _is_trial(other) and _number(other) is None and ORPHAN not in other.data.tags:
            tracking.orphan(other)
            mended.append(f"run {other.info.run_name} does not name its trial: ended")
    runs = _runs_by_trial(all_runs)
    for number, trial in trials.items():
        if not trial.state.is_finished():
            continue
        run = _run_of(trial, runs.get(number, []))
        if run is None:
            run_id = tracking.create_run(parent, f"trial-{number:04d}", number)
            storage.link(study, trial, run_id, config.storage)
            tracking.mend(run_id, trial, facts, dataset)
            mended.append(f"trial {number} had no run: written again")
            continue
        if trial.user_attrs.get("mlflow_run_id") != run.info.run_id:
            storage.link(study, trial, run.info.run_id, config.storage)
            mended.append(f"trial {number} did not name its run: linked")
        wrong = list(_disagreements(trial, run))
        if wrong:
            tracking.mend(run.info.run_id, trial, facts, dataset)
            mended.append(f"run of trial {number} mended: {', '.join(wrong)}")

    for number, candidates in runs.items():
        known = trials.get(number)
        keep = None if known is None else _run_of(known, candidates)
        if known is not None and not known.state.is_finished():
            continue
        for extra in candidates:
            if extra is not keep:
                tracking.orphan(extra)
                mended.append(
                    f"run {extra.info.run_id} ({extra.info.run_name}) has no trial: ended"
                )
    return mended


def _number(run: Run) -> int | None:
    text = run.data.tags.get(NUMBER, "")
    return int(text) if text.isdigit() else None


def _is_trial(run: Run) -> bool:
    return (run.info.run_name or "").startswith("trial-")


def _runs_by_trial(runs: list[Run]) -> dict[int, list[Run]]:
    """The trials' own runs by trial number; other nested runs and known orphans left out."""
    found = defaultdict(list)
    for run in runs:
        number = _number(run)
        if number is not None and _is_trial(run) and ORPHAN not in run.data.tags:
            found[number].append(run)
    return found


def _run_of(trial: FrozenTrial, candidates: list[Run]) -> Run | None:
    """The run that `trial` names; where it names none that exists, the oldest made for it."""
    named = trial.user_attrs.get("mlflow_run_id")
    linked = [run for run in candidates if run.info.run_id == named]
    return linked[0] if linked else (candidates[-1] if candidates else None)


def _disagreements(trial: FrozenTrial, run: Run) -> Iterator[str]:
    """What of `run` is not as its finished trial says."""
    if run.info.status != STATUS[trial.state]:
        yield f"status {run.info.status} -> {STATUS[trial.state]}"
    tags = run.data.tags
    if tags.get(STATE) != trial.state.name:
        yield f"state {tags.get(STATE)} -> {trial.state.name}"
    if trial.state is TrialState.FAIL and tags.get(FAILURE) != trial.user_attrs.get(
        "failure", "unknown"
    ):
        yield "failure"
    for name, value in trial.params.items():
        if run.data.params.get(name) != str(value):
            yield f"param {name}"
    history = trial.user_attrs.get("history", [])
    for name in METRICS.values():
        expected = history[-1][name] if history else None
        if run.data.metrics.get(name) != expected:
            yield f"metric {name}"
