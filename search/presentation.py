"""Put what a study found where people look: the descriptions in both UIs, and the report."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from search import evaluation, overview, ranking, registry, storage, tracking
from search.config import InputError, StudyConfig
from search.imports import undisturbed
from search.reconcile import Ledgers, existing
from search.tracking import Tracking

if TYPE_CHECKING:
    from search.pipeline import Winner
    from search.report import Tested


def check(path: Path) -> None:
    """Raise InputError where the report can't be written to `path`."""
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"the report must be a file in a folder that can be written to, but got {str(path)!r}; "
            "give another file"
        )


def present(ledgers: Ledgers, winner: "Winner") -> None:
    """Describe the study in both ledgers and write its report, where that is not yet done."""
    study, config, mirror = ledgers.study, ledgers.config, ledgers.tracking
    found = overview.of(study, config, importances=False)
    won = (
        f"Its winner, trial {winner.trial}, trained anew, is version {winner.version} of "
        f"{config.model_name}: test accuracy {winner.test_accuracy:.4f} (run {winner.run_id}); "
        f"{winner.verdict}."
    )
    described = overview.markdown(
        found, [won, f"Trials and their curves: study {study.study_name} in {found.storage}."]
    )
    new = not mirror.is_described(ledgers.parent, described)
    path = Path(config.report)
    if config.report != "none" and (new or not path.exists()):
        _write(path, study, config, mirror)
    if not new:
        return
    if config.report != "none":
        mirror.client.log_artifact(ledgers.parent, str(path))
    note = f"Runs, models and curves: MLflow run {ledgers.parent} in {found.tracking_uri}."
    storage.note(study, overview.markdown(found, [won, note]))
    mirror.describe(ledgers.parent, described)  # last: it says that the rest is done


@undisturbed()
def report(config: StudyConfig, path: Path) -> None:
    """Write the report of the study that `config` names into `path`.

    Raises InputError where there is none, RunError where it can't be read or written.
    """
    check(path)
    try:
        study, config = existing(config)
        mirror = Tracking(config)
        _write(path, study, config, mirror.open() if mirror.exists() else None)
    except (*storage.ERRORS, *tracking.ERRORS) as error:
        raise storage.failure(error) from error


def _write(path: Path, study: optuna.Study, config: StudyConfig, mirror: Tracking | None) -> None:
    from search import report  # slow: Plotly

    report.write(path, study, config, None if mirror is None else _tested(study, mirror))


def _tested(study: optuna.Study, mirror: Tracking) -> "Tested | None":
    """The retrained best trial, if it is there."""
    from search.report import Tested

    best = ranking.winner(study)
    parent = study.user_attrs.get("mlflow_run_id")
    if best is None or parent is None:
        return None
    run = registry.find_retrained(mirror, mirror.runs_of(parent), best.number)
    if run is None:
        return None
    data, mistakes = registry.test_pictures(mirror, run)
    return Tested(
        run_id=run.info.run_id,
        trial=best.number,
        test_accuracy=run.data.metrics["test_accuracy"],
        evaluation=None if data is None else evaluation.load(data),
        mistakes=mistakes,
    )
