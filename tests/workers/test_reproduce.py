"""A trial trained again is the same to the last digit, or what differs is named."""

import shutil
from pathlib import Path
from typing import Any

import invariants
import pytest
from conftest import copy_databases, run_elsewhere
from in_process import command

from search import pipeline
from search.config.settings import StudyConfig
from search.errors import InputError
from search.report.progress import Progress
from search.study import storage
from search.study.trials import TrialSummary, amend_trial
from search.training import environment
from search.workers.reproduce import Reproduction, reproduce

TRIALS = 4


def config(clouds: Path, **changed: Any) -> StudyConfig:
    settings = {
        "epochs": 3,
        "n_trials": TRIALS,
        "hidden_units": "8",
        "report": "none",
        "baselines": "none",
    }
    return StudyConfig(dataset=str(clouds), **{**settings, **changed})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> Path:
    """A study that one process began and two others, in another run, went on with."""

    class Stopped(Progress):
        def trial(self, outcome: TrialSummary, best: float | None) -> None:
            if outcome.number == 1:
                self.stop()

    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert pipeline.run(config(clouds, workers=1), Stopped()).ran == 2
        run_elsewhere(config(clouds, workers=2))
    return folder


@pytest.fixture
def here(study: Path, in_folder: Path) -> Path:
    """A copy of the study's database in the working directory."""
    copy_databases(study, in_folder)
    return in_folder


def again(number: int | None, moved: str | None = None) -> Reproduction:
    return reproduce(StudyConfig(), number, moved, lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(TRIALS))
def test_every_trial_of_a_fresh_and_a_resumed_run_is_the_same(here: Path, number: int) -> None:
    before = invariants.dump(here)
    found = again(number)
    trial = storage.load_study(StudyConfig()).trials[number]
    assert (found.trial, found.differences, found.changed) == (number, [], [])
    assert found.values == [entry["val_accuracy"] for entry in trial.user_attrs["history"]]
    assert invariants.dump(here) == before


@pytest.mark.slow
def test_without_a_number_it_is_the_winner(study: Path, here: Path) -> None:
    winner = invariants.check(study, TRIALS)["winner"]
    assert str(again(None).trial) == winner.data.tags["optuna.trial_number"]


def amend(name: str, change: Any) -> None:
    study = storage.load_study(StudyConfig())
    trial = study.get_trials(deepcopy=False)[1]
    amend_trial(study, trial, name, change(trial.user_attrs[name]), StudyConfig().storage)


def test_what_differs_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amend("history", lambda h: [*h[:-1], {**h[-1], "val_accuracy": 0.125}])
    now = {**environment.here(), "keras": "9.9"}
    monkeypatch.setattr(environment, "here", lambda: now)
    found = again(1)
    (difference,) = found.differences
    assert difference.startswith("epoch 2: val_accuracy ")
    assert difference.endswith(", expected 0.125")
    assert found.changed is not None
    assert len(found.changed) == 1
    assert found.changed[0].endswith(" -> 9.9")


@pytest.mark.slow
def test_the_command_says_so(here: Path) -> None:
    code, out, err = command(here, "reproduce", "--trial", "1")
    assert (code, err) == (0, "")
    assert "the same to the last digit: val_accuracy 0." in out
    amend("seed", lambda seed: seed + 1)
    code, out, err = command(here, "reproduce", "--trial", "1")
    assert (code, err) == (1, "")
    assert "not the same: epoch 0: train_loss " in out
    assert "the recorded packages and hardware are unchanged" in out


@pytest.mark.slow
def test_a_trial_that_is_not_there_is_refused(here: Path) -> None:
    with pytest.raises(
        InputError, match=f"--trial must be a trial of the study, 0 to {TRIALS - 1}"
    ):
        again(TRIALS)


@pytest.mark.slow
def test_a_trial_without_an_epoch_is_refused(here: Path) -> None:
    amend("history", lambda _: [])
    with pytest.raises(InputError, match="must have ended after at least one epoch"):
        again(1)


@pytest.mark.slow
def test_other_data_are_refused_and_moved_ones_are_taken(
    here: Path, clouds: Path, digits: Path
) -> None:
    with pytest.raises(InputError, match="must be the data of the study"):
        again(0, str(digits))
    shutil.copy(clouds, here / "moved.npz")
    assert again(0, str(here / "moved.npz")).differences == []


@pytest.mark.slow
@pytest.mark.parametrize("text", ["-1", "x", "1.5", ""])
def test_what_is_no_number_is_one_line(here: Path, text: str) -> None:
    from search import cli

    assert cli.main(["reproduce", f"--trial={text}"]) == 2
