"""The live panel, in a pseudo-terminal."""

import io
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
from conftest import ROOT
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from servers import HOLD
from terminal import LINE, Terminal

from search.report.live import Panel

WORKER = re.compile(r"worker \d+  trial \d+  epoch [123]/3")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def begin(*arguments: str, first: str = "") -> Terminal:
        started.append(Terminal(list(arguments), tmp_path, first))
        return started[0]

    yield begin
    for each in started:
        each.close()


def options(dataset: Path, trials: int, workers: str = "2") -> list[str]:
    return [
        *(str(ROOT / "study.py"), "--dataset", str(dataset), "--n-trials", str(trials)),
        *("--epochs", "3", "--workers", workers, "--report", "none", "--baselines", "none"),
        *("--hidden-units", "512"),  # one graph
    ]


@pytest.mark.slow
def test_the_panel_shows_how_the_search_stands_and_leaves_whole_lines(
    terminal: Callable[..., Terminal], digits: Path, tmp_path: Path
) -> None:
    trials, hold = 6, tmp_path / "hold"
    hold.touch()
    first = HOLD.format(file=str(hold), number=2)
    running = terminal(*options(digits, trials), first=first)
    running.until(lambda lines: "study mnist-dnn: loading the libraries" in lines[0])
    running.until(lambda lines: any(f"0 of {trials} trials" in line for line in lines))
    shown = running.until(
        lambda lines: (
            any(line.startswith("reference  0.") for line in lines)
            and len([line for line in lines if WORKER.match(line)]) == 2
        )
    )
    progress = next(line for line in shown if f" of {trials} trials" in line)
    assert re.search(r"\d of 6 trials  0:\d\d:\d\d passed  0:\d\d:\d\d to go", progress)
    assert any(re.fullmatch(r"\d complete  \d pruned  0 failed", line) for line in shown)
    assert any(re.match(r"best +0\.\d{4}  trial \d+  units", line) for line in shown)
    hold.unlink()
    lines = running.end()
    assert running.process.returncode == 0
    assert sum(LINE.fullmatch(line) is not None for line in lines) == trials
    assert not any("passed" in line or line.startswith("worker ") for line in lines)
    assert any(line.startswith("Registered as MNIST_DNN_Model version 1") for line in lines)


def running(number: int) -> FrozenTrial:
    made = create_trial(state=TrialState.RUNNING)
    made.number = number
    return made


def test_the_panel_shows_eight_trials_of_a_cluster_and_counts_the_rest() -> None:
    below = Panel(Console(file=io.StringIO()))
    below._running = [running(number) for number in range(70, 0, -1)]
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
    shown.trial(TrialSummary(number, number, "PRUNED", 0.5, {}, 1, 0.1, None, None), None)
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


BEFORE = {  # what a shell does with: < /dev/null, <&-, and with & where it controls jobs
    "no input": "import os; os.dup2(os.open(os.devnull, os.O_RDONLY), 0)",
    "closed input": "import os, sys; os.close(0); sys.stdin = None",
    "in the background": """
import os
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.setpgid(0, 0)  # a terminal's modes are not ours there: to set them stops a process
""",
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_a_terminal_that_is_not_all_ours_does_no_harm(
    terminal: Callable[..., Terminal], before: str
) -> None:
    running = terminal("-c", f"{before}\n{WARNING}")
    lines = running.end()
    assert running.process.returncode == 0
    assert lines[-1] == "the end"


def test_a_pipe_that_is_called_a_terminal_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    process = forks.Python(["-c", WARNING], cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.endswith("the end\n")
    assert "passed" not in out
