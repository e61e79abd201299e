"""Publish the findings of a study: the descriptions in both user interfaces, and the report."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from search.config.settings import StudyConfig, defaults
from search.config.urls import sqlite_path
from search.errors import InputError, RunError
from search.imports import undisturbed
from search.promotion.evaluation import load_evaluation
from search.promotion.retrain import find_retrained, test_pictures
from search.report import overview
from search.report.text import markdown, tested_by
from search.study import ranking, storage
from search.study.storage import RUN_ID, UID
from search.tracking.runs import TRACKING_ERRORS, Tracking
from search.tracking.schema import test_metrics
from search.tracking.sync import Stores, existing

if TYPE_CHECKING:
    from search.promotion.gate import Winner
    from search.report.winner import Chart, Tested

_MARK = re.compile(r'<meta name="search-study" content="([^"]*)" data-uid="([^"]*)">')
_TITLE = re.compile(r"<title>([^<]*)(): hyperparameter search</title>")  # before there was a mark


def report_path(given: str, study: str) -> Path:
    """The file of the report of the study named `study`, if the option's value is `given`.

    It is `given`, unless that is the default and holds another study's report.
    """
    path, own = Path(given), Path(f"report-{study}.html")
    if given != defaults()["report"]:
        return path
    taken = (_study_of(path) or (study,))[0] != study
    return own if taken or (_study_of(own) or ("",))[0] == study else path


def _study_of(path: Path) -> tuple[str, str] | None:
    """Name and uid (empty if it has none) of the study in a report; None if it is no report."""
    try:
        with path.open("rb") as file:
            head = file.read(2_000).decode(errors="replace")
    except OSError:
        return None
    mark = _MARK.search(head) or _TITLE.search(head)
    return (mark[1], mark[2]) if mark and head.startswith("<!doctype html>") else None


def check_report(config: StudyConfig, given: str) -> None:
    """Raise InputError if the report can't be written to `given`, or would overwrite a file."""
    path = report_path(given, config.study_name)

    def refused(rule: str, remedy: str) -> InputError:
        return InputError(f"the report must be {rule}; {remedy}")

    if len(os.fsencode(path.name)) > 255:  # the limit of Linux file systems
        rule = f"a file whose name has at most 255 bytes, but got {path.name!r}"
        raise refused(rule, "give a shorter one")
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        rule = f"a file in a folder that can be written to, but got {str(path)!r}"
        raise refused(rule, "give another file")
    other = "give another file, for example report-2.html"
    databases = [sqlite_path(url) for url in (config.storage, config.tracking_uri)]
    if path.resolve() in [
        Path(f"{file.resolve()}{end}")
        for file in databases
        if file is not None
        for end in ("", "-wal", "-shm", "-journal")
    ]:
        raise refused(f"a file of its own, but {str(path)!r} is a database's", other)
    if path.exists() and _study_of(path) is None:
        rule = f"a new file or replace a report, but {str(path)!r} is something else"
        raise refused(rule, f"move it away or {other}")


def draw(study: optuna.Study, config: StudyConfig) -> "list[Chart]":
    """The report's charts of the search; loads Plotly."""
    from search.report.html import draw_charts

    return draw_charts(study, overview.of(study, config))


def publish(stores: Stores, winner: "Winner", charts: "list[Chart] | None" = None) -> None:
    """Describe the study in both stores and write its report, unless that is already done.

    charts: the result of `draw` since the last trial ended, if it was called.
    """
    study, config, tracking = stores.study, stores.config, stores.tracking
    found = overview.of(study, config, importances=False)
    won = (
        f"Its winner, trial {winner.trial}, retrained, is version {winner.version} of "
        f"{config.model_name}: {tested_by(winner.metrics, found.metric)} (run {winner.run_id}); "
        f"{winner.verdict}."
    )
    described = markdown(
        found,
        [
            won,
            f"Trials and their curves: study {study.study_name} in "
            f"{config.optuna_page or found.storage}.",
        ],
    )
    new = not tracking.is_described(stores.parent, described)
    path = report_path(config.report, study.study_name)
    if config.report != "none" and (new or not _is_of(path, study)):
        try:
            check_report(config, config.report)
        except InputError as error:  # at the start of the run, the file could be written
            raise RunError(f"{error}, and run the same command again") from None
        _write(path, study, config, tracking, found, charts)
    if not new:
        return
    if config.report != "none":
        tracking.client.log_artifact(stores.parent, str(path))
    page = config.mlflow_page or found.tracking_uri
    note = f"Runs, models and curves: MLflow run {stores.parent} in {page}."
    storage.write_note(study, markdown(found, [won, note]))
    tracking.describe(stores.parent, described)  # last: the rest is done


def _is_of(path: Path, study: optuna.Study) -> bool:
    """Whether `path` is a report of this study, not of another one of the same name."""
    return _study_of(path) in [(study.study_name, study.user_attrs[UID]), (study.study_name, "")]


@undisturbed()
def write_report(config: StudyConfig, given: str) -> Path:
    """Write the report of the study that `config` names; returns its path (`report_path`).

    Raises InputError if there is no such study, RunError if it can't be read or written.
    """
    check_report(config, given)
    path = report_path(given, config.study_name)
    try:
        with existing(config) as (study, config, tracking):
            found = overview.of(study, config, importances=False)
            _write(path, study, config, tracking.open() if tracking.exists() else None, found)
    except (*storage.ERRORS, *TRACKING_ERRORS) as error:
        raise storage.failure(error) from error
    return path


def _write(
    path: Path,
    study: optuna.Study,
    config: StudyConfig,
    tracking: Tracking | None,
    found: overview.Overview,
    charts: "list[Chart] | None" = None,
) -> None:
    from search.report.html import write_html  # slow: Plotly

    charts = draw(study, config) if charts is None else charts
    write_html(path, study, found, charts, None if tracking is None else _tested(study, tracking))


def _tested(study: optuna.Study, tracking: Tracking) -> "Tested | None":
    """The retrained winner, None if there is none yet."""
    from search.report.winner import Tested

    best = ranking.winner(study)
    parent = study.user_attrs.get(RUN_ID)
    if best is None or parent is None:
        return None
    run = find_retrained(tracking, tracking.runs_of(parent), best.number)
    if run is None:
        return None
    data, mistakes = test_pictures(tracking, run)
    return Tested(
        run_id=run.info.run_id,
        trial=best.number,
        metrics=test_metrics(run.data.metrics),
        evaluation=None if data is None else load_evaluation(data),
        mistakes=mistakes,
    )
