"""The command, killed at a named point.

A point is a call of ours, of Optuna or of MLflow. Before or after it, the process sends itself
SIGKILL, as an empty battery would.
"""

import functools
import inspect
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """The `nth` call of `name` on `owner` whose arguments hold `word`."""

    owner: str
    name: str
    nth: int = 1
    word: str = ""
    before: bool = False


CLIENT, TRACKING = "mlflow.tracking:MlflowClient", "search.tracking.runs:Tracking"
# In the order in which a study comes by.
OF_SEARCH = {
    "study database half created": Point("pathlib:Path", "rename", before=True),
    "study created": Point("optuna", "create_study"),
    "study identified": Point("optuna:Study", "set_user_attr", word="study_uid"),
    "tracking database half created": Point("pathlib:Path", "rename", before=True),
    "tracking database created": Point("pathlib:Path", "rename"),
    "experiment created": Point(CLIENT, "create_experiment"),
    "parent run created": Point(CLIENT, "create_run"),
    "baselines half stored": Point("optuna:Study", "set_user_attr", word="best_baseline"),
    "baselines stored, not in MLflow": Point(
        "search.tracking.sync:Stores", "write_baselines", before=True
    ),
    "baselines in MLflow": Point(TRACKING, "log_values"),
    # the second trial after a start
    "trial created": Point("search.study.trials:SlottedStudy", "ask", nth=2),
    "run created": Point(TRACKING, "create_run", nth=2),
    "params logged": Point(TRACKING, "log_start", nth=2),
    "mid-report, epoch not in MLflow": Point(TRACKING, "log_epochs", nth=5, before=True),
    "mid-report, epoch in MLflow": Point(TRACKING, "log_epochs", nth=5),
    # the repair of that one
    "mid-sync, trial failed": Point("search.study.trials", "fail_trial"),
    "mid-sync, run not repaired": Point(TRACKING, "repair", before=True),
    "mid-sync, run repaired": Point(TRACKING, "repair"),
    "trial told, run open": Point(TRACKING, "finish", nth=2, before=True),
    "run ended, not tagged": Point(CLIENT, "set_terminated", nth=2),
}
LOSES_A_TRIAL = (
    *("trial created", "run created", "params logged"),
    *("mid-report, epoch not in MLflow", "mid-report, epoch in MLflow"),
)
OF_WINNER = {
    "repeat trained, not stored": Point(
        "search.study.trials", "amend_trial", word="finalist_", before=True
    ),
    "repeat stored, no run": Point("search.tracking.sync:Stores", "write", before=True),
    "repeat's run open": Point(TRACKING, "create_run", word="finalist-"),
    "repeat's run linked, empty": Point(
        "search.study.trials", "amend_trial", word="finalist_", nth=2
    ),
    "finalists compared": Point("search.study.ranking", "settle"),
    "retrained, not logged": Point(TRACKING, "active", before=True),
    "model logged": Point("mlflow.models:Model", "log"),
    "model tagged": Point(CLIENT, "set_tag", word="model_uri"),
    "winner compared with the baselines, not stored": Point(
        "search.study.trials", "amend_trial", word="against_baseline", before=True
    ),
    "registered model created": Point(CLIENT, "create_registered_model"),
    "version created": Point(CLIENT, "create_model_version"),
    "version linked": Point("search.promotion.gate", "link_trial"),
    "verdict half kept": Point(CLIENT, "set_model_version_tag", nth=2),
    "alias set": Point(CLIENT, "set_registered_model_alias"),
    "stage set": Point(CLIENT, "transition_model_version_stage"),
    "report written": Point("search.report.html", "write_html"),
    "report logged": Point(CLIENT, "log_artifact", word="report.html"),
    "note written": Point("search.study.storage", "write_note"),
}
POINTS = OF_SEARCH | OF_WINNER


def die_twice(_: object, folder: str, number: int) -> int:
    """Leaves a file for every start; task 0 goes on until task 2 has ended. For `tasks.call`."""
    marks = Path(folder)
    (marks / f"{number}-{os.getpid()}").touch()
    while number == 0 and not (marks / "end").exists():
        time.sleep(0.02)
    if number and len(list(marks.glob(f"{number}-*"))) < 3:
        os._exit(1)
    if number == 2:
        (marks / "end").touch()
    return number


def arm(point: Point) -> None:
    """Let the process die at `point`."""
    owner = pkgutil.resolve_name(point.owner)
    original: Callable[..., Any] = getattr(owner, point.name)
    calls = 0

    @functools.wraps(original)
    def deadly(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += point.word in f"{arguments} {keywords}"
        due = calls == point.nth and point.word in f"{arguments} {keywords}"
        if due and point.before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    if not inspect.ismodule(owner):
        setattr(owner, point.name, staticmethod(deadly) if inspect.ismethod(original) else deadly)
        return
    for module in list(sys.modules.values()):  # all that have imported it by its name
        if getattr(module, "__dict__", {}).get(point.name) is original:
            setattr(module, point.name, deadly)


def run(point: str, options: list[str]) -> int:
    """The command, in this process, which is to die at `point`."""
    import search.pipeline  # noqa: F401 - and by it all that may name what is armed
    from search.cli import main
    from search.workers import trial

    trial._TOGETHER = 0  # so that an epoch of milliseconds is written as one of a second is
    arm(POINTS[point])
    return main(options)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
