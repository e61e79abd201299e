"""The command line: exit codes, Ctrl-C and SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import invariants
import pytest
from conftest import ROOT, command, running_owners, start, start_anew, wait_until
from optuna.trial import TrialState

from search import cli
from search.config.options import flag
from search.config.settings import options

FILE = 'n-trials = 11\nstorage = "sqlite:///file.db"\nseed = 3\nhidden-units = [8, 16]\n'


@pytest.fixture
def file(in_folder: Path) -> str:
    (in_folder / "study.toml").write_text(FILE)
    return "study.toml"


@pytest.mark.slow
def test_mlflow_says_nothing_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "")
    monkeypatch.delenv("GIT_PYTHON_REFRESH")
    assert cli.main(["presets"]) == 0
    code = "import mlflow.utils.git_utils as utils; print(utils.get_git_commit('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


# ---- exit codes ----------------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line on standard error that `arguments` end with."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--n-trials", "0"), "--n-trials must be a whole number from 1 to 1000000, but got 0"),
        (("--n-trails", "5"), "--n-trails"),
        (("--n-trials",), "--n-trials"),
        (("serch",), "serch"),
        (("--config", "missing.toml"), "missing.toml"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(
    in_folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in error_of(capsys, 2, *arguments)
    assert list(in_folder.iterdir()) == []


def test_the_file_of_config_is_read(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.npz" in error_of(capsys, 2, "--config", file, "--dataset", "none.npz")
    Path(file).write_text("n-trials = 0\n")
    assert "--n-trials" in error_of(capsys, 2, "--config", file)
    assert "--n-trials" not in error_of(
        capsys, 2, "--config", file, "--n-trials", "1", "--dataset", "none.npz"
    )


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_exit_code_0(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert cli.main([word]) == 0
    assert "--n-trials" in capsys.readouterr().out


def test_help_names_every_option(tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "--help", by=start_anew)
    assert (code, err) == (0, "")
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", out))
    assert {flag(name) for name in options()} | {"--config", "--help"} <= shown
    assert list(tmp_path.iterdir()) == []


# ---- signals, sent to the real command -----------------------------------------------------------


def search(folder: Path, dataset: Path, epochs: int) -> forks.Python:
    options = ("--n-trials", "60", "--workers", "2", "--hidden-units", "8", "--pruner", "none")
    return start(
        folder,
        *("--dataset", str(dataset), "--epochs", str(epochs), *options),
        *("--report", "none", "--baselines", "none"),
    )


def read_until(process: forks.Python, beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"no line began with {beginning!r}: {process.communicate()}")


@pytest.mark.slow
def test_ctrl_c_waits_for_the_running_trials_and_prints_the_summary(
    tmp_path: Path, clouds: Path
) -> None:
    process = search(tmp_path, clouds, epochs=3)
    read_until(process, "trial ")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "stopping when the running trials have finished" in out
    assert "finished trials: " in out
    assert out.endswith("Run the same command again to go on.\n")
    found = invariants.check(tmp_path, registered=False)
    assert found["parent"].info.status == "KILLED"
    assert 1 <= len(found["trials"]) < 60
    assert TrialState.FAIL not in {trial.state for trial in found["trials"]}


def ended(process: forks.Python, code: int, reason: str, folder: Path) -> None:
    """Assert that `process` ends within 10 s, in one line, and leaves nothing running."""
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == code
    assert err == f"error: {reason}; run the same command again to go on\n"
    found = invariants.check(folder, registered=False)
    assert found["parent"].info.status == "KILLED"
    assert [trial.state for trial in found["trials"]] == [TrialState.FAIL] * 2
    assert {trial.user_attrs["failure"] for trial in found["trials"]} == {reason}


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(tmp_path: Path, clouds: Path) -> None:
    process = search(tmp_path, clouds, epochs=100_000)
    wait_until(lambda: len(running_owners(tmp_path)) == 2, process)
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "stopping when")
    os.killpg(process.pid, signal.SIGINT)
    ended(process, 130, "interrupted by Ctrl-C", tmp_path)


@pytest.mark.slow
def test_sigterm_ends_at_once(tmp_path: Path, clouds: Path) -> None:
    process = search(tmp_path, clouds, epochs=100_000)
    wait_until(lambda: len(running_owners(tmp_path)) == 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    ended(process, 143, "terminated by SIGTERM", tmp_path)


def test_the_command_is_this_one() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "study.py"), "--n-trials", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --n-trials must be a whole number")
