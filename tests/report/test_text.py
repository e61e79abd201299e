"""The findings as text: the summary of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import command
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from search.config.hyperparameters import REFERENCE
from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.errors import InputError
from search.promotion.baselines import Baseline
from search.promotion.gate import Decision, Winner
from search.report import overview
from search.report import text as display
from search.report.progress import Result
from search.study import storage
from search.study.ranking import Finalist
from search.study.sampling import distributions
from search.task import METRICS

TRIED: dict[str, Value] = {"hidden_units": 1024, "dropout_rate": 0.25, "learning_rate": 0.0005}


def trial(number: int, tried: dict[str, Value], value: float) -> FrozenTrial:
    made = create_trial(
        state=TrialState.COMPLETE,
        params=tried,
        distributions=dict(distributions(StudyConfig().space)),
        value=value,
    )
    made.number = number
    return made


RESULT = Result(
    config=StudyConfig(objective="val_accuracy"),
    best=trial(17, TRIED, 0.98125),
    reference=trial(0, REFERENCE, 0.9785),
    finalists=[],
    winner=Winner(
        trial=17,
        run_id="r",
        version=3,
        value=0.98125,
        metrics={"test_accuracy": 0.9812, "test_loss": 0.06125, "test_f1": 0.975},
        verdict=Decision(True, "if-better", 0.9812, 2, 0.9801, 0.0425),
        in_production=3,
        new=True,
    ),
    parent_run_id="p",
    complete=30,
    pruned=20,
    failed=1,
    given_up=0,
    ran=51,
    seconds=125.4,
    stopped=None,
    repaired=(),
    report=Path("report.html"),
)


def test_the_summary_of_a_whole_run(in_folder: Path) -> None:
    assert display.summary(RESULT).splitlines() == [
        "",
        "50 finished trials: 30 complete, 20 pruned; 1 failed. 51 run now, in 0:02:05.",
        "",
        "best: trial 17         val_accuracy 0.9812  units 1024  dropout 0.250  lr 5.00e-04",
        "reference: trial 0     val_accuracy 0.9785  units  512  dropout 0.200  lr 1.00e-03",
        "The search gained +0.0027 val_accuracy over the reference. It is the best of 30 noisy "
        "results, so part of that is luck.",
        "",
        "winner: trial 17, val_accuracy 0.9812, used for the selection, so optimistically biased",
        "Retrained on training and validation data: test accuracy 0.9812, test macro F1 0.9750, "
        "test loss 0.0612 (the test examples are used only here and by the gate).",
        "Registered as MNIST_DNN_Model version 3: alias production, stage Production.",
        "Gate: promoted: test accuracy 0.9812 against 0.9801 of version 2, exact McNemar p = 0.043 "
        "(significant at 5 %).",
        "",
        "See also:",
        "  report.html",
        "  mlflow ui",
        "  optuna-dashboard sqlite:///study.db",
    ]


def summary(**changed: Any) -> str:
    return display.summary(replace(RESULT, **changed))


def test_the_summary_counts_the_slots_that_were_given_up() -> None:
    text = summary(pruned=18, failed=5, given_up=2)
    assert text.splitlines()[1] == (
        "50 finished trials: 30 complete, 18 pruned, 2 given up (failed twice); 5 failed. "
        "51 run now, in 0:02:05."
    )


def test_a_rerun_says_that_the_model_was_registered_before() -> None:
    assert RESULT.winner is not None
    text = summary(winner=replace(RESULT.winner, new=False), ran=0)
    assert "Already registered as MNIST_DNN_Model version 3:" in text
    assert "\nRegistered" not in text


def test_finalists_are_listed_and_chose_the_winner() -> None:
    stood = [
        Finalist(17, [0.98, 0.982], 0.981, 0.0014142),
        Finalist(0, [0.98], 0.98, None),
        Finalist(3, [None, 0.99], None, None),
    ]
    lines = summary(finalists=stood).splitlines()
    first = lines.index("finalists, mean of 2 fresh seeds, winner first:")
    assert lines[first + 1 : first + 4] == [
        "  trial 17, mean val_accuracy 0.9810 ± 0.0014",
        "  trial 0, mean val_accuracy 0.9800",
        "  trial 3, failed on a fresh seed",
    ]
    assert "winner: trial 17, mean val_accuracy 0.9810 ± 0.0014, used for the selection" in lines


def test_a_winner_that_is_kept_out_is_said_to_be() -> None:
    assert RESULT.winner is not None
    kept_out = Decision(False, "if-better", 0.9701, 2, 0.9801, 0.2)
    text = summary(winner=replace(RESULT.winner, verdict=kept_out, in_production=2))
    assert "version 3: not in production, where version 2 is.\n" in text
    assert "Gate: not promoted: test accuracy 0.9701 against 0.9801 of version 2" in text
    assert "(not significant at 5 %)" in text


def test_an_early_stop_says_why() -> None:
    assert "Stopped early: --timeout: 60 s have passed.\n" in summary(
        stopped="--timeout: 60 s have passed"
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
        objective="val_accuracy",
        storage="postgresql://me:hunter2@db/x",
        tracking_uri="sqlite:///my runs.db",
    )
    text = summary(config=config)
    assert "  mlflow ui --backend-store-uri 'sqlite:///my runs.db'\n" in text
    assert "hunter2" not in text
    assert "me:***@db/x" in text
    served = summary(
        config=StudyConfig(objective="val_accuracy", tracking_uri="http://me:hunter2@host:5000")
    )
    assert "already served at http://me:***@host:5000" in served
    assert "report.html  (also an artifact of MLflow run " in served


def test_the_addresses_to_look_further_are_those_of_the_readers_browser() -> None:
    config = StudyConfig(
        objective="val_accuracy",
        storage="postgresql://study@db/study",
        tracking_uri="http://mlflow:5000",
        mlflow_page="http://localhost:5000/",
        optuna_page="http://localhost:8080",
    )
    text = summary(config=config)
    run = RESULT.parent_run_id
    assert text.endswith(
        "See also:\n"
        f"  report.html  (also an artifact of MLflow run {run})\n"
        f"  http://localhost:5000/#/runs/{run}\n"
        "  http://localhost:8080"
    )


@pytest.mark.parametrize("page", ["localhost:5000", "http://", "http://me:hunter2@host"])
def test_an_address_that_no_browser_opens_is_refused(page: str) -> None:
    with pytest.raises(InputError, match=r"^--mlflow-page must be an address"):
        StudyConfig(mlflow_page=page)


@pytest.mark.slow
def test_quiet_leaves_the_summary(tmp_path: Path, clouds: Path) -> None:
    options = ("--dataset", str(clouds), "--n-trials", "3", "--epochs", "3", "--workers", "1")
    code, out, err = command(tmp_path, *options, "--report", "none", "--quiet")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("3 finished trials: ")
    assert "\ntrial " not in out


def test_show_says_it_in_words(finished: dict[str, Any]) -> None:
    code, out, err = command(finished["folder"], "show")
    assert (code, err) == (0, "")
    best = finished["study"].best_trial
    assert f"The best is trial {best.number} with val_accuracy {best.value:.4f}" in out
    assert "Importance for val_accuracy after epoch " in out
    assert "In production: MNIST_DNN_Model version 1, trial " in out
    for run_id in [finished["runs"][0].info.run_id, finished["runs"][best.number].info.run_id]:
        assert run_id in out


def test_a_study_without_a_finished_trial_is_shown(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = StudyConfig()
    study = storage.open_study(config, config.settings("mnist (0123456789ab)"))
    study.set_user_attr("facts", {})
    study.add_trial(
        create_trial(state=TrialState.FAIL, user_attrs={"failure": "ValueError: too [bold]much"})
    )
    found = overview.read(config)
    assert (found.best, found.reference, found.importances, found.production) == (None,) * 4
    display.show(Console(width=60), found)
    out = capsys.readouterr().out
    assert "No trial has completed yet." in out
    assert "  trial 0: ValueError: too [bold]much\n" in out
    assert "Nothing is in production." in out


@pytest.mark.parametrize(
    ("metric", "value", "baseline_value", "significant", "expected"),
    [
        ("test_accuracy", 0.98, 0.95, True, "significantly better"),
        ("test_accuracy", 0.9, 0.95, True, "significantly worse"),
        ("test_accuracy", 0.9, 0.95, False, "not significantly better"),
        ("test_rmse", 50.0, 60.0, True, "significantly better"),
        ("test_rmse", 60.0, 50.0, True, "significantly worse"),
    ],
)
def test_whether_the_network_beats_the_best_baseline_is_said(
    metric: str, value: float, baseline_value: float, significant: bool, expected: str
) -> None:
    found = {
        "baseline": "a simple model",
        "metric": metric,
        "value": value,
        "baseline_value": baseline_value,
        "test": "paired bootstrap",
        "p_value": 0.0123,
        "significant": significant,
    }
    shown = "RMSE {:g} against {:g}"
    if metric == "test_accuracy":
        shown = "accuracy {:.4f} against {:.4f}"
    assert display.against_baseline(found) == (
        f"The network is {expected} than a simple model on the test examples: "
        f"{shown.format(value, baseline_value)}, paired bootstrap p = 0.012."
    )


def test_baselines_are_shown_by_the_objective() -> None:
    metrics = {"val_accuracy": 0.9, "val_f1": 0.8}
    baselines = [
        Baseline("simple", metrics, 100, True),
        Baseline("slow", {**metrics, "val_f1": 0.75}, 100, False),
    ]
    config = StudyConfig(objective="val_f1")
    lines = display.summary(replace(RESULT, config=config, baselines=baselines)).splitlines()
    assert "simple                 val_f1 0.8000" in lines
    assert "slow                   val_f1 0.7500  not converged" in lines
    listed = display.listed(baselines, METRICS["val_f1"])
    assert listed == "simple 0.8000, slow 0.7500 (not converged)"
    assert display.listed(baselines, METRICS["val_loss"]).startswith("simple 0.9000, ")
