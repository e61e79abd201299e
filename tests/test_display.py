"""What the user reads."""

import io
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from search import display
from search.config import StudyConfig
from search.outcome import Outcome
from search.pipeline import Result
from search.registry import Winner
from search.sampling import distributions
from search.space import REFERENCE, Hyperparameters

TRIED = Hyperparameters(1024, 0.25, 0.0005)


def trial(number: int, tried: Hyperparameters, value: float) -> FrozenTrial:
    made = create_trial(
        state=TrialState.COMPLETE,
        params=tried.as_dict(),
        distributions=dict(distributions(StudyConfig().space)),
        value=value,
    )
    made.number = number
    return made


RESULT = Result(
    config=StudyConfig(),
    best=trial(17, TRIED, 0.98125),
    reference=trial(0, REFERENCE, 0.9785),
    winner=Winner(
        trial=17, run_id="r", version=3, test_loss=0.06125, test_accuracy=0.9812, new=True
    ),
    parent_run_id="p",
    complete=30,
    pruned=20,
    failed=1,
    ran=51,
    seconds=125.4,
    stopped=None,
    mended=(),
)


def test_the_summary_of_a_whole_run() -> None:
    assert display.summary(RESULT).splitlines() == [
        "",
        "50 finished trials: 30 complete, 20 pruned; 1 failed. 51 run now, in 0:02:05.",
        "",
        "best: trial 17         val_accuracy 0.9812  units 1024  dropout 0.250  lr 5.00e-04",
        "reference: trial 0     val_accuracy 0.9785  units  512  dropout 0.200  lr 1.00e-03",
        "The search gained +0.0027 val_accuracy over the reference. It is the best of 30 noisy "
        "results, so part of that is luck.",
        "",
        "Trained anew on all training data: test accuracy 0.9812, test loss 0.0612 (the test "
        "images were used this once).",
        "Registered as MNIST_DNN_Model version 3: alias production, stage Production.",
        "",
        "Look further:",
        "  mlflow ui",
        "  optuna-dashboard sqlite:///study.db",
    ]


def summary(**changed: Any) -> str:
    return display.summary(replace(RESULT, **changed))


def test_a_rerun_says_that_the_model_was_registered_before() -> None:
    assert RESULT.winner is not None
    text = summary(winner=replace(RESULT.winner, new=False), ran=0)
    assert "Already registered as MNIST_DNN_Model version 3:" in text
    assert "\nRegistered" not in text


def test_an_early_stop_says_why() -> None:
    assert "Stopped early: --timeout: 60 s are over.\n" in summary(
        stopped="--timeout: 60 s are over"
    )
    assert "Stopped" not in display.summary(RESULT)


def test_a_search_that_found_nothing_better_says_so() -> None:
    text = summary(best=RESULT.reference)
    assert "The search found nothing better than the reference configuration.\n" in text
    assert "gained" not in text


def test_without_a_reference_nothing_is_compared() -> None:
    text = summary(reference=None)
    assert "reference" not in text
    assert "gained" not in text


@pytest.mark.parametrize("best", [RESULT.best, None])
def test_an_interrupted_run_says_how_to_go_on(best: FrozenTrial | None) -> None:
    text = summary(winner=None, best=best)
    assert text.endswith("\n\nRun the same command again to go on.")
    assert "egistered" not in text
    assert ("best: trial 17" in text) == (best is not None)


def test_the_commands_to_look_further_name_the_databases_quoted_and_without_passwords() -> None:
    config = StudyConfig(
        storage="postgresql://me:hunter2@db/x", tracking_uri="sqlite:///my runs.db"
    )
    text = summary(config=config)
    assert "  mlflow ui --backend-store-uri 'sqlite:///my runs.db'\n" in text
    assert "hunter2" not in text
    assert "me:***@db/x" in text
    served = summary(config=StudyConfig(tracking_uri="http://me:hunter2@host:5000"))
    assert "already served at http://me:***@host:5000" in served


# ---- the lines of a run --------------------------------------------------------------------------


def lines() -> tuple[display.Lines, io.StringIO]:
    text = io.StringIO()
    return display.Lines(Console(file=text, width=60)), text


OUTCOME = Outcome(
    number=7,
    place=7,
    state="COMPLETE",
    value=0.97654,
    last=0.97654,
    hyperparameters=TRIED,
    epochs=5,
    seconds=12.34,
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
    failed = replace(OUTCOME, state="FAIL", value=None, last=None, epochs=0, failure=failure)
    to.trial(replace(failed, hyperparameters=None), None)
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
        (0, 5, "s: 5 trials to run"),
        (2, 3, "s: 3 trials to go on with"),
        (2, 0, "nothing to search"),
    ],
)
def test_the_start_says_what_will_be_done(done: int, missing: int, expected: str) -> None:
    study = optuna.create_study(study_name="s")
    for _ in range(done):
        study.add_trial(create_trial(value=0.5))
    to, text = lines()
    to.start(study, "the dataset", missing)  # type: ignore[arg-type]
    first, second = text.getvalue().splitlines()
    assert first == "the dataset"
    assert second.endswith(expected)


def test_every_mend_is_a_line() -> None:
    to, text = lines()
    to.mended(["run [1] mended", "trial 2 had no run"])
    to.mended([])
    assert text.getvalue() == "mended: run [1] mended\nmended: trial 2 had no run\n"
