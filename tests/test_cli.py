"""The command line: precedence of settings, exit codes, Ctrl-C and SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import invariants
import pytest
from conftest import ROOT, running_owners, start, wait_for
from optuna.trial import TrialState

from search import cli, signals
from search.config import files
from search.config.hyperparameters import HYPERPARAMETERS, REFERENCE
from search.config.parameter import is_fixed
from search.config.settings import StudyConfig

FILE = 'n-trials = 11\nstorage = "sqlite:///file.db"\nseed = 3\nhidden-units = [8, 16]\n'


@pytest.fixture
def file(in_folder: Path) -> str:
    (in_folder / "study.toml").write_text(FILE)
    return "study.toml"


# ---- settings ------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_environment_the_file_and_the_default(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, str | None] = {"storage": "sqlite:///given.db"}
    assert files.build_config({}).storage == "sqlite:///study.db"
    assert files.build_config({"config": file}).storage == "sqlite:///file.db"
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///environment.db")
    assert files.build_config({"config": file}).storage == "sqlite:///environment.db"
    assert files.build_config({"config": file, **given}).storage == "sqlite:///given.db"


def test_an_empty_environment_variable_is_ignored(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "")
    assert files.build_config({"config": file}).storage == "sqlite:///file.db"


def test_the_file_gives_what_the_command_line_does_not(file: str) -> None:
    config = files.build_config({"config": file, "n_trials": "7", "workers": "auto"})
    assert (config.n_trials, config.seed, config.workers) == (7, 3, None)
    assert str(config.space.parameters["hidden_units"]) == "8,16"


def test_a_preset_is_overruled_by_the_file_and_both_by_the_command_line(file: str) -> None:
    config = files.build_config({"preset": "cnn"})
    assert (config.study_name, config.n_trials, config.hidden_units) == ("mnist-cnn", 10, "128,256")
    config = files.build_config({"preset": "cnn", "config": file, "n_trials": "3"})
    assert (config.study_name, config.n_trials, config.hidden_units) == ("mnist-cnn", 3, "8,16")
    assert config.space.fixed()["architecture"] == "cnn"


@pytest.mark.parametrize("name", files.presets())
def test_every_preset_is_valid_and_has_a_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = files.build_config({"preset": name})
    assert config.study_name == ("mnist-dnn" if name == "default" else f"mnist-{name}")
    assert cli.main(["presets"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name]
    assert len(line.split()) > 5


def test_the_default_preset_is_what_the_command_does_without_one() -> None:
    assert files.build_config({"preset": "default"}) == StudyConfig()


def test_the_grid_preset_is_the_classic_table() -> None:
    space = files.build_config({"preset": "grid"}).space
    grid = [space.grid_point(index) for index in range(space.grid_size())]
    assert {(p["hidden_units"], p["dropout_rate"]) for p in grid} == {
        (units, dropout) for units in (128, 256, 512, 1024) for dropout in (0.1, 0.2, 0.3, 0.5)
    }
    assert len(grid) == 16
    assert {p["learning_rate"] for p in grid} == {0.001}
    assert grid[0] == REFERENCE


def test_the_wide_preset_searches_everything_of_a_dense_network() -> None:
    config = files.build_config({"preset": "wide"})
    opened = {name for name, known in config.space.searched().items() if not is_fixed(known)}
    of_a_cnn = {"architecture", "conv_blocks", "filters"}
    assert set(HYPERPARAMETERS) - opened - of_a_cnn == {"early_stopping"}
    assert config.space.reference() is not None


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


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.handled(lambda: None, lambda reason: None):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- signals, sent to the real command -----------------------------------------------------------


def search(folder: Path, dataset: Path, epochs: int) -> forks.Python:
    options = ("--n-trials", "60", "--workers", "2", "--hidden-units", "8", "--pruner", "none")
    return start(
        folder, "--dataset", str(dataset), "--epochs", str(epochs), "--report", "none", *options
    )


def read_until(process: forks.Python, beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"no line began with {beginning!r}: {process.communicate()}")


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
    process = search(tmp_path, clouds, epochs=300)
    wait_for(lambda: len(running_owners(tmp_path)) == 2, process)
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "stopping when")
    os.killpg(process.pid, signal.SIGINT)
    ended(process, 130, "interrupted by Ctrl-C", tmp_path)


def test_sigterm_ends_at_once(tmp_path: Path, clouds: Path) -> None:
    process = search(tmp_path, clouds, epochs=300)
    wait_for(lambda: len(running_owners(tmp_path)) == 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    ended(process, 143, "terminated by SIGTERM", tmp_path)


def test_the_command_is_this_one() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "study.py"), "--n-trials", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --n-trials must be a whole number")
