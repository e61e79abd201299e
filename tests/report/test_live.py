"""What the user reads."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import optuna
import pytest
from conftest import ROOT, TRIALS, command, start
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from terminal import Terminal

from search.config.hyperparameters import REFERENCE
from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.promotion.gate import Decision, Winner
from search.report import text as display
from search.report.live import Panel
from search.report.progress import Result
from search.report.terminal import Lines
from search.study.ranking import Finalist
from search.study.sampling import distributions
from search.study.trials import TrialSummary

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
    config=StudyConfig(),
    best=trial(17, TRIED, 0.98125),
    reference=trial(0, REFERENCE, 0.9785),
    finalists=[],
    winner=Winner(
        trial=17,
        run_id="r",
        version=3,
        val_accuracy=0.98125,
        test_loss=0.06125,
        test_accuracy=0.9812,
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
        "winner: trial 17, val_accuracy 0.9812, by which it was chosen, so it flatters",
        "Trained anew on all training data: test accuracy 0.9812, test loss 0.0612 (the test "
        "images were used this once, and by the gate).",
        "Registered as MNIST_DNN_Model version 3: alias production, stage Production.",
        "Gate: promoted: test accuracy 0.9812 against 0.9801 of version 2, exact McNemar p = 0.043 "
        "(more than chance).",
        "",
        "Look further:",
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
    first = lines.index("finalists, the mean of 2 fresh seeds; the first is the winner:")
    assert lines[first + 1 : first + 4] == [
        "  trial 17, mean val_accuracy 0.9810 ± 0.0014",
        "  trial 0, mean val_accuracy 0.9800",
        "  trial 3, failed on a fresh seed",
    ]
    assert "winner: trial 17, mean val_accuracy 0.9810 ± 0.0014, by which it was chosen" in lines


def test_a_winner_that_is_kept_out_is_said_to_be() -> None:
    assert RESULT.winner is not None
    kept_out = Decision(False, "if-better", 0.9701, 2, 0.9801, 0.2)
    text = summary(winner=replace(RESULT.winner, verdict=kept_out, in_production=2))
    assert "version 3: not in production, where version 2 is.\n" in text
    assert "Gate: not promoted: test accuracy 0.9701 against 0.9801 of version 2" in text
    assert "(may be chance)" in text


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


def lines() -> tuple[Lines, io.StringIO]:
    text = io.StringIO()
    return Lines(Console(file=text, width=60)), text


OUTCOME = TrialSummary(
    number=7,
    slot=7,
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
        (0, 5, "s: 5 trials of 7 epochs to run"),
        (2, 3, "s: 3 trials of 7 epochs to go on with"),
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


def test_every_mend_is_a_line() -> None:
    to, text = lines()
    to.repaired(["run [1] repaired", "trial 2 had no run"])
    to.repaired([])
    assert text.getvalue() == "repaired: run [1] repaired\nrepaired: trial 2 had no run\n"


# ---- the panel, in a pseudo-terminal -------------------------------------------------------------

LINE = re.compile(
    r"trial +\d+  (COMPLETE|PRUNED  )  val_accuracy (0\.\d{4}|1\.0000)  units +\d+  "
    r"dropout 0\.\d{3}  lr \d\.\d\de-\d\d  \d+ ep +\d+\.\d s  best (0\.\d{4}|1\.0000|--)"
)

WORKER = re.compile(r"worker \d+  trial \d+  epoch [123]/3")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def begin(*arguments: str, shell: str | None = None) -> Terminal:
        started.append(Terminal(list(arguments), tmp_path, shell))
        return started[0]

    yield begin
    for each in started:
        each.close()


def options(dataset: Path, trials: int, workers: str = "2") -> list[str]:
    return [
        *(str(ROOT / "study.py"), "--dataset", str(dataset), "--n-trials", str(trials)),
        *("--epochs", "3", "--workers", workers, "--report", "none"),
    ]


@pytest.mark.slow
def test_the_panel_shows_how_the_search_stands_and_leaves_whole_lines(
    terminal: Callable[..., Terminal], digits: Path
) -> None:
    trials = 10
    running = terminal(*options(digits, trials))
    running.until(lambda lines: "study mnist-dnn: loading the libraries" in lines[0])
    running.until(lambda lines: any(f"0 of {trials} trials" in line for line in lines))
    shown = running.until(
        lambda lines: (
            any(line.startswith("reference  0.") for line in lines)
            and len([line for line in lines if WORKER.match(line)]) == 2
        )
    )
    progress = next(line for line in shown if f" of {trials} trials" in line)
    assert re.search(r"\d of 10 trials  0:\d\d:\d\d passed  0:\d\d:\d\d to go", progress)
    assert any(re.fullmatch(r"\d complete  \d pruned  0 failed", line) for line in shown)
    assert any(re.match(r"best +0\.\d{4}  trial \d+  units", line) for line in shown)
    lines = running.end()
    assert running.process.returncode == 0
    assert sum(LINE.fullmatch(line) is not None for line in lines) == trials
    assert not any("passed" in line or line.startswith("worker ") for line in lines)
    assert any(line.startswith("Registered as MNIST_DNN_Model version 1") for line in lines)


def test_the_panel_shows_eight_trials_of_a_cluster_and_counts_the_rest() -> None:
    below = Panel(Console(file=io.StringIO()))
    below._running = [trial(number, TRIED, 0.5) for number in range(70, 0, -1)]
    lines = list(below._below())
    assert [line.split("  ")[1].strip() for line in lines[:-1]] == [
        f"trial {n}" for n in range(1, 9)
    ]
    assert lines[-1] == "and 62 more"


def test_a_refusal_on_a_terminal_is_one_line(terminal: Callable[..., Terminal]) -> None:
    refused = terminal(str(ROOT / "study.py"), "--dataset", "none.npz")
    (line,) = refused.end()
    assert line.startswith("error: --dataset none.npz: must be a readable .npz file, but has ")


@pytest.mark.slow
def test_ctrl_c_tears_no_line(terminal: Callable[..., Terminal], clouds: Path) -> None:
    running = terminal(*options(clouds, 500))
    running.until(lambda lines: any(LINE.fullmatch(line) for line in lines))
    running.type(b"\x03")
    lines = running.end()
    assert running.process.returncode == 130
    said = "stopping when the running trials have finished; Ctrl-C again ends them now"
    assert lines.count(said) == 1
    assert lines[-1] == "Run the same command again to go on."
    trials = [line for line in lines if line.startswith("trial ")]
    assert trials
    assert [line for line in trials if not LINE.fullmatch(line)] == []
    assert not any("^C" in line for screen in running.seen for line in screen)


@pytest.mark.slow
def test_sigterm_gives_the_terminal_back(terminal: Callable[..., Terminal], clouds: Path) -> None:
    running = terminal(*options(clouds, 500, "1"))
    running.until(lambda lines: any(LINE.fullmatch(line) for line in lines))
    os.kill(running.process.pid, signal.SIGTERM)
    lines = running.end()
    assert running.process.returncode == 143
    assert lines[-1] == "error: terminated by SIGTERM; run the same command again to go on"
    assert not any("passed" in line for line in lines)


WARNING = """
import os, sys, time, warnings
import optuna
from rich.console import Console
from search.report.live import choose_progress
from search.study.trials import TrialSummary

study = optuna.create_study(direction="maximize")
study.set_user_attr("settings", {"epochs": 3})
shown = choose_progress(Console(), quiet=False)
shown.start(study, "a dataset", 20)
for number in range(20):
    shown.trial(TrialSummary(number, number, "PRUNED", None, 0.5, None, 1, 0.1, None), None)
    warnings.warn(f"warning {number} of Python")
    os.write(2, b"warning %d of native code\\n" % number)
    print("warning", number, "of a worker", file=sys.stderr)
    time.sleep(0.02)  # more than one refresh of the panel in all
shown.close()
print("the end")
"""


def test_a_warning_tears_no_line(terminal: Callable[..., Terminal]) -> None:
    running = terminal("-c", WARNING)
    lines = running.end()
    assert running.process.returncode == 0
    assert lines[-1] == "the end"
    for number in range(20):
        assert sum(line.endswith(f"warning {number} of Python") for line in lines) == 1
        assert lines.count(f"warning {number} of native code") == 1
        assert lines.count(f"warning {number} of a worker") == 1
        assert sum(line.startswith(f"trial {number:4d}  PRUNED ") for line in lines) == 1
    assert not any("passed" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        '"$@" < /dev/null',
        '"$@" <&-',
        'set -m; "$@" & wait $!',  # in the background, where a terminal's modes are not ours
    ],
)
def test_a_terminal_that_is_not_all_ours_does_no_harm(
    terminal: Callable[..., Terminal], shell: str
) -> None:
    running = terminal("-c", WARNING, shell=shell)
    lines = running.end()
    assert running.process.returncode == 0
    assert "the end" in lines[-2:]  # a shell says that its job is done


def test_a_pipe_that_is_called_a_terminal_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = subprocess.run(
        [sys.executable, "-c", WARNING], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the end\n")
    assert "passed" not in done.stdout


@pytest.mark.slow
def test_a_run_that_nobody_reads_is_interrupted(in_folder: Path, clouds: Path) -> None:
    process = start(in_folder, *options(clouds, 500, "1")[1:])
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


@pytest.mark.slow
def test_without_a_terminal_there_is_a_line_a_trial(finished: dict[str, Any]) -> None:
    lines = finished["out"].splitlines()
    assert sum(LINE.fullmatch(line) is not None for line in lines) == TRIALS
    assert "\x1b" not in finished["out"]


def test_quiet_leaves_the_summary(tmp_path: Path, clouds: Path) -> None:
    code, out, err = command(tmp_path, *options(clouds, 3, "1")[1:], "--quiet")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("3 finished trials: ")
    assert "\ntrial " not in out
