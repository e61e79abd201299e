"""The lines of a run."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import optuna
import pytest
from conftest import TRIALS, start
from optuna.trial import create_trial
from rich.console import Console
from terminal import LINE

from search.config.parameter import Value
from search.report.terminal import Lines
from search.study.trials import TrialSummary

TRIED: dict[str, Value] = {"hidden_units": 1024, "dropout_rate": 0.25, "learning_rate": 0.0005}


def lines() -> tuple[Lines, io.StringIO]:
    text = io.StringIO()
    return Lines(Console(file=text, width=60)), text


OUTCOME = TrialSummary(
    number=7,
    slot=7,
    state="COMPLETE",
    value=0.97654,
    hyperparameters=TRIED,
    epochs=5,
    seconds=12.34,
    run_id=None,
    failure=None,
)


def test_a_trial_is_one_line_however_narrow_the_terminal() -> None:
    to, text = lines()
    to.trial(OUTCOME, 0.98)
    assert text.getvalue() == (
        "trial    7  COMPLETE  val_accuracy 0.9765  units 1024  dropout 0.250  lr 5.00e-04  "
        "5 ep  12.3 s  best 0.9800\n"
    )


def test_a_failed_trial_says_why_and_markup_in_it_is_only_text() -> None:
    to, text = lines()
    failure = "ValueError: [red]bad[/blue]"
    failed = replace(OUTCOME, state="FAIL", value=None, epochs=0, failure=failure)
    to.trial(replace(failed, hyperparameters={}), None)
    assert text.getvalue() == (
        f"trial    7  FAIL      val_accuracy     --    0 ep  12.3 s  best --  ({failure})\n"
    )


def test_stopping_is_told_once_asked_for() -> None:
    to, text = lines()
    assert not to.stopping()
    to.stop()
    assert to.stopping()
    assert text.getvalue().startswith("stopping when the running trials have finished; Ctrl-C ")


@pytest.mark.parametrize(
    ("done", "missing", "expected"),
    [
        (0, 5, "s: 5 trials of 7 epochs to run"),
        (2, 3, "s: 3 more trials of 7 epochs to run"),
        (2, 0, "nothing to search"),
    ],
)
def test_the_start_says_what_will_be_done(done: int, missing: int, expected: str) -> None:
    study = optuna.create_study(study_name="s")
    study.set_user_attr("settings", {"epochs": 7})
    for _ in range(done):
        study.add_trial(create_trial(value=0.5))
    to, text = lines()
    to.start(study, "the dataset", missing)  # type: ignore[arg-type]
    first, second = text.getvalue().splitlines()
    assert first == "the dataset"
    assert second.endswith(expected)


def test_every_repair_is_a_line() -> None:
    to, text = lines()
    to.repaired(["run [1] repaired", "trial 2 had no run"])
    to.repaired([])
    assert text.getvalue() == "repaired: run [1] repaired\nrepaired: trial 2 had no run\n"


@pytest.mark.slow
def test_without_a_terminal_there_is_a_line_a_trial(finished: dict[str, Any]) -> None:
    lines = finished["out"].splitlines()
    assert sum(LINE.fullmatch(line) is not None for line in lines) == TRIALS
    assert "\x1b" not in finished["out"]


@pytest.mark.slow
def test_a_run_that_nobody_reads_is_interrupted(in_folder: Path, clouds: Path) -> None:
    options = ("--dataset", str(clouds), "--n-trials", "500", "--epochs", "3", "--workers", "1")
    process = start(in_folder, *options, "--report", "none", "--baselines", "none")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("trial "):
        pass
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == (
        "error: nobody reads the output; run the same command again to go on\n"
    )
    process.stderr.close()
    invariants.check(in_folder, registered=False)
