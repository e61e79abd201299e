import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import invariants
import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.storages import RDBStorage
from sqlalchemy.engine import Engine

from search import StudyConfig, run
from search.errors import Interrupted, RunError
from search.report.progress import Progress
from search.study.storage import BY_ITSELF
from search.study.trials import TrialSummary, history_of
from search.task import KINDS
from search.tracking.runs import Tracking
from search.workers.tasks import load_trial

pytestmark = pytest.mark.usefixtures("no_pictures")


class Outcomes(Progress):
    """Remembers how trials ended; after `most` of them the run stops, without a retraining."""

    def __init__(self, most: int | None = None) -> None:
        self.seen: list[TrialSummary] = []
        self.most = most

    def start(self, *_: object) -> None:
        self.stop_at_most()

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        self.seen.append(outcome)
        self.stop_at_most()

    def stop_at_most(self) -> None:
        if len(self.seen) == self.most:
            self.stop()


def config(clouds: Path) -> StudyConfig:
    return StudyConfig(
        dataset=str(clouds),
        epochs=2,
        n_trials=3,
        hidden_units="8",
        workers=1,
        pruner="none",
        report="none",
        baselines="none",
    )


@pytest.mark.slow
def test_a_trial_outlives_a_failing_tracking_server_and_its_run_is_written_later(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In trial 1 the first of the calls fails, in trial 2 the second, and so on."""
    calls = ("create_run", "log_batch", "log_inputs", "set_terminated")
    trials = len(calls) + 2
    outcomes, failed = Outcomes(trials), set()

    def failing_in(trial: int, working: Any) -> Any:
        def call(client: MlflowClient, *arguments: object, **keywords: object) -> object:
            if len(outcomes.seen) == trial:
                failed.add(trial)
                raise MlflowException("the server is down")
            return working(client, *arguments, **keywords)

        return call

    load_trial()
    monkeypatch.setattr("search.workers.trial._REST", 0)  # the next trial asks the server again
    for trial, name in enumerate(calls, start=1):
        monkeypatch.setattr(MlflowClient, name, failing_in(trial, getattr(MlflowClient, name)))
    result = run(replace(config(clouds), n_trials=trials), outcomes)
    assert [outcome.state for outcome in outcomes.seen] == ["COMPLETE"] * trials
    repaired = {line.split(":")[0] for line in result.repaired}
    assert failed == set(range(1, trials - 1))
    assert repaired == {f"trial {number}" for number in failed}
    invariants.check(in_folder, trials, registered=False)


@pytest.mark.parametrize(("together", "written"), [(math.inf, [1, 4]), (0, [1, 1, 1, 1, 1])])
def test_epochs_that_end_soon_after_each_other_are_written_to_the_run_together(
    in_folder: Path,
    clouds: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: float,
    written: list[int],
) -> None:
    calls: list[int] = []

    def count(tracking: Tracking, run_id: str, entries: list[Any]) -> None:
        calls.append(len(entries))
        write(tracking, run_id, entries)

    write = Tracking.log_epochs
    monkeypatch.setattr(Tracking, "log_epochs", count)
    monkeypatch.setattr("search.workers.trial._TOGETHER", together)
    run(replace(config(clouds), epochs=5, n_trials=1), Outcomes(1))
    assert calls == written
    invariants.check(in_folder, 1, registered=False)


class Traffic:
    """What comes from and goes to all SQLite databases of this process."""

    def __init__(self) -> None:
        self.rows = self.characters = 0

    def connected(self, connection: sqlite3.Connection, _: object) -> None:
        connection.row_factory = self.read

    def read(self, _: sqlite3.Cursor, row: tuple[object, ...]) -> tuple[object, ...]:
        self.rows += 1
        self.characters += len(repr(row))
        return row

    def executed(self, *arguments: Any) -> None:
        self.characters += len(repr(arguments[3]))


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    counted = Traffic()
    listeners = (("connect", counted.connected), ("before_cursor_execute", counted.executed))
    for name, listener in listeners:
        sqlalchemy.event.listen(Engine, name, listener)
    yield counted
    for name, listener in listeners:
        sqlalchemy.event.remove(Engine, name, listener)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["percentile", "halving", "hyperband"])
def test_what_an_epoch_writes_and_reads_does_not_grow_with_the_epochs_before(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic, pruner: str
) -> None:
    epochs, trials, block = 62, 6, 20  # blocks of 20 epochs, as those of 100 in a real study
    rows: list[int] = []
    characters: list[int] = []

    def train(*_: Any, callbacks: Sequence[Any], **__: Any) -> None:
        longest = len(outcomes.seen) == trials - 1  # the one that the pruner judges
        model = SimpleNamespace(stop_training=False)
        for callback in callbacks:
            callback.set_model(model)
        for epoch in range(epochs if longest else 2):
            model.stop_training = not longest
            traffic.rows = traffic.characters = 0
            logs = dict.fromkeys(["loss", "accuracy", *KINDS["classification"].metrics], 0.5)
            for callback in callbacks:
                callback.on_epoch_end(epoch, logs)
            if longest:
                rows.append(traffic.rows)
                characters.append(traffic.characters)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    load_trial()
    outcomes = Outcomes()
    monkeypatch.setattr("search.training.train.train", train)
    monkeypatch.setattr("search.study.trials.HISTORY_BLOCK", block)
    monkeypatch.setattr("search.workers.trial._TOGETHER", 0)
    monkeypatch.setattr("search.workers.trial._PATIENCE", float("inf"))  # a busy machine is slow
    monkeypatch.setattr("search.workers.worker.retrain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config(clouds), epochs=epochs, n_trials=trials, pruner=pruner), outcomes)
    assert len(rows) == epochs
    assert median(rows[40:60]) == median(rows[20:40])
    assert sum(characters[40:60]) < 1.02 * sum(characters[20:40])
    study = invariants.check(in_folder, trials, registered=False)
    assert len(history_of(study["trials"][-1])) == epochs
    assert len(study["trials"][-1].user_attrs["history"]) == block


def test_a_failure_is_kept_and_shown_without_control_characters(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("\x1b[31mrot\x00 \ud800 größer 模型\nnext")

    monkeypatch.setattr("search.training.train.train", fail)
    outcomes = Outcomes()
    with pytest.raises(RunError) as stopped:
        run(replace(config(clouds), max_failures=1), outcomes)
    shown = r"ValueError: \x1b[31mrot\x00 \ud800 größer 模型 next"
    assert shown in str(stopped.value)
    assert outcomes.seen[0].failure == shown
    found = invariants.check(in_folder, 0, registered=False)
    assert found["trials"][0].user_attrs["failure"] == shown


def test_an_interruption_that_a_library_replaced_by_its_own_error_is_one_nevertheless(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        try:
            raise Interrupted("terminated by SIGTERM", 143)
        except:  # noqa: E722 - as in TensorFlow
            raise TypeError("no such type")  # noqa: B904

    monkeypatch.setattr("search.training.train.train", interrupt)
    with pytest.raises(Interrupted, match="terminated by SIGTERM"):
        run(config(clouds))
    found = invariants.check(in_folder, 0, registered=False)
    (trial,) = found["trials"]
    assert trial.user_attrs["failure"] == "terminated by SIGTERM"
    assert BY_ITSELF not in trial.user_attrs


@pytest.mark.slow
def test_an_interruption_while_a_trial_is_being_ended_ends_the_run_as_interrupted(
    in_folder: Path, clouds: Path
) -> None:
    end = RDBStorage.set_trial_state_values

    def interrupt(storage: RDBStorage, *arguments: Any, **keywords: Any) -> bool:
        assert end(storage, *arguments, **keywords)
        raise Interrupted("terminated by SIGTERM", 143)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RDBStorage, "set_trial_state_values", interrupt)
        with pytest.raises(Interrupted) as stopped:
            run(replace(config(clouds), n_trials=2))
    assert stopped.value.exit_code == 143
    assert run(replace(config(clouds), n_trials=2)).ran == 1
    invariants.check(in_folder, 2)
