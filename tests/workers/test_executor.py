"""Trials as tasks: exact budgets whatever dies, and early stops that still leave a model."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import forks
import in_process
import invariants
import numpy as np
import psutil
import pytest
from conftest import ROOT, Process, command, running_owners, start, start_anew, wait_until
from optuna.trial import TrialState

from search import pipeline
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.errors import RunError
from search.study.trials import TrialSummary
from search.task import METRICS
from search.workers import executor as engine
from search.workers import processes as pool
from search.workers.executor import Patience

# ---- patience ------------------------------------------------------------------------------------


def exhausted_after(limit: int | None, values: list[float | None]) -> int | None:
    """How many trials the search waits for, of those that end with `values`."""
    patience = Patience(limit)
    for count, value in enumerate(values, start=1):
        patience.see(value)
        if patience.exhausted:
            return count
    return None


def test_patience_ends_after_so_many_trials_without_a_better_one() -> None:
    assert exhausted_after(2, [0.5, 0.4, 0.6, 0.5, 0.5, 0.9]) == 5


def test_an_equal_or_a_pruned_trial_is_not_better() -> None:
    assert exhausted_after(3, [0.5, 0.5, None, 0.5, 0.6]) == 4
    assert exhausted_after(3, [None, None, None]) == 3


def test_patience_with_a_loss_waits_for_a_lower_one() -> None:
    patience = Patience(2, METRICS["val_loss"])
    waited = []
    for value in (0.5, 0.6, 0.4, 0.4, 0.7, 0.1):
        patience.see(value)
        waited.append(patience.exhausted)
    assert waited == [False, False, False, False, True, False]


def test_without_a_limit_patience_never_ends() -> None:
    assert exhausted_after(None, [0.5] * 1000) is None
    assert not Patience(1).exhausted


# ---- early stops ---------------------------------------------------------------------------------


class Scripted:
    """A process of a pool; the first trial ends, and its process dies before that is told."""

    def __init__(self, submitted: list[int]) -> None:
        self._submitted = submitted

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        *_, place = args
        self._submitted.append(place)
        future: Future[Any] = Future()
        if len(self._submitted) > 1:
            future.set_result(TrialSummary(place, place, "COMPLETE", 0.5, {}, 1, 0.1, None, None))
        else:
            future.set_exception(BrokenProcessPool("a worker died"))
        return future

    def shutdown(self, **_: Any) -> None:
        pass


def test_a_trial_that_ended_as_its_worker_died_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted: list[int] = []
    nothing: Any = None
    dataset: Dataset = nothing
    monkeypatch.setattr(pool.ProcessBackend, "_executor", lambda _: Scripted(submitted))
    told: list[int] = []
    with engine.Executor(StudyConfig(workers=2), "run", dataset) as workers:
        stopped = workers.run_trials(
            int,
            range(4),
            lambda outcome: told.append(outcome.slot),
            lambda: [place for place in (1, 2, 3) if place not in told],  # 0 is finished
            timeout=None,
            patience=Patience(None),
            max_failures=5,
        )
    assert stopped is None
    assert submitted == [0, 1, 2, 3]
    assert sorted(told) == [1, 2, 3]


DYING = """
import sys

folder, tests = sys.argv[1:]
sys.path.insert(0, tests)  # workers look there, too
import crash
from search import StudyConfig
from search.workers import executor

done = []

def missing():
    return [(number,) for number in (0, 1, 2) if number not in done]

executor.tasks.call = crash.die_twice
with executor.Executor(StudyConfig(workers=2), folder, None) as workers:
    workers._run(int, missing(), lambda _, number: done.append(number), missing, lambda: None)
print(*sorted(done))
"""


def test_a_death_is_charged_to_the_task_of_the_process_that_died_and_to_no_other(
    tmp_path: Path,
) -> None:
    process = forks.Python(["-c", DYING, str(tmp_path), str(ROOT / "tests")], cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "0 1 2\n", "")
    starts = [path.name.split("-")[0] for path in tmp_path.glob("*-*")]
    assert sorted(starts) == [*"0", *"111", *"222"]  # the long one went on all the while


def outcomes(
    monkeypatch: pytest.MonkeyPatch, failing: dict[int, int], max_failures: int
) -> list[tuple[int, str]]:
    """Slots and states of the trials of slots 0 to 7, where `failing` of them fail at first."""
    nothing: Any = None
    left = dict(failing)
    failed: set[int] = set()

    def call(_: object, __: str, place: int) -> TrialSummary:
        fails = left.get(place, 0) > 0
        left[place] = left.get(place, 0) - 1
        given_up = fails and place in failed
        failed.update([place] if fails else [])
        state, value = ("FAIL", None) if fails else ("COMPLETE", 0.5)
        return TrialSummary(place, place, state, value, {}, 0, 0.1, None, "why", given_up)

    monkeypatch.setattr(engine.tasks, "call", call)
    seen: list[tuple[int, str]] = []
    with engine.Executor(StudyConfig(workers=1), "run", nothing) as workers:
        workers.run_trials(
            int,
            range(8),
            lambda outcome: seen.append((outcome.slot, outcome.state)),
            list,
            timeout=None,
            patience=Patience(None),
            max_failures=max_failures,
        )
    return seen


def test_a_slot_that_is_given_up_is_not_tried_a_third_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = outcomes(monkeypatch, {1: 9, 3: 1}, max_failures=3)
    assert [place for place, _ in seen] == [0, 1, 1, 2, 3, 3, 4, 5, 6, 7]
    assert [place for place, state in seen if state == "FAIL"] == [1, 1, 3]


def test_the_second_attempt_at_a_slot_is_not_another_configuration_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(outcomes(monkeypatch, {1: 9, 2: 9}, max_failures=3)) == 10
    with pytest.raises(RunError, match=r"^3 configurations in a row failed, the last with why; "):
        outcomes(monkeypatch, {1: 9, 2: 9, 3: 9}, max_failures=3)


def small(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {"epochs": 1, "n_trials": 200, "workers": 1, "hidden_units": "8"}
    return StudyConfig(
        dataset=str(dataset), report="none", baselines="none", **{**settings, **changed}
    )


@pytest.mark.slow
def test_patience_stops_early_and_goes_on_to_the_retraining(in_folder: Path, clouds: Path) -> None:
    config = small(clouds, patience=2)
    result = pipeline.run(config)
    assert result.stopped == "--patience: 2 trials without a better one"
    found = invariants.check(in_folder, result.ran)
    assert found["winner"] is not None
    values = [t.value if t.state is TrialState.COMPLETE else None for t in found["trials"]]
    assert exhausted_after(2, values) == len(values) < 200
    before = invariants.dump(in_folder)
    assert pipeline.run(config).ran == 0
    assert invariants.dump(in_folder) == before


@pytest.mark.slow
def test_a_timeout_stops_early_and_goes_on_to_the_retraining(in_folder: Path, clouds: Path) -> None:
    began = time.monotonic()
    result = pipeline.run(small(clouds, timeout=0.5, pruner="none"))
    assert result.stopped == "--timeout: 0.5 s have passed"
    assert time.monotonic() - began < 60
    assert 1 <= result.ran < 200
    assert invariants.check(in_folder, result.ran)["winner"] is not None


# ---- deaths --------------------------------------------------------------------------------------


def workers(process: Process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.ppid() != process.pid:  # but a child of the process that forks them
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def options(dataset: Path, trials: int, epochs: int = 100) -> tuple[str, ...]:
    return (
        *("--dataset", str(dataset), "--n-trials", str(trials), "--epochs", str(epochs)),
        *("--workers", "2", "--hidden-units", "8", "--pruner", "none"),
        *("--report", "none", "--baselines", "none"),
    )


@pytest.mark.slow
def test_a_killed_worker_costs_its_trial_and_not_the_budget(tmp_path: Path, clouds: Path) -> None:
    (tmp_path / "search.py").write_text("raise ImportError('a namesake')")
    process = start_anew(tmp_path, *options(clouds, 2))
    victim = wait_until(lambda: running_owners(tmp_path), process).pop()
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    found = invariants.check(tmp_path, 2)
    (failed,) = [trial for trial in found["trials"] if trial.state is TrialState.FAIL]
    assert failed.user_attrs["owner"]["pid"] == victim
    assert failed.user_attrs["failure"].startswith("lost: ")
    assert "left RUNNING by a process that is gone" in out


@pytest.mark.slow
def test_workers_die_with_a_killed_main_process_and_the_next_run_completes(
    in_folder: Path, clouds: Path
) -> None:
    process = start(in_folder, *options(clouds, 2))
    wait_until(lambda: running_owners(in_folder), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(workers(process)) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    code, out, err = in_process.command(in_folder, *options(clouds, 2), "--workers", "1")
    assert (code, err) == (0, "")
    assert "left RUNNING by a process that is gone" in out
    failed = [
        trial.user_attrs["failure"]
        for trial in invariants.check(in_folder, 2)["trials"]
        if trial.state is TrialState.FAIL
    ]
    assert failed
    assert all(reason.startswith("lost: ") for reason in failed)


@pytest.mark.slow
def test_three_deaths_in_a_row_end_the_run_in_one_line(tmp_path: Path, clouds: Path) -> None:
    process = start(tmp_path, *options(clouds, 3))
    killed = set()
    deadline = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < deadline
        try:
            for worker in workers(process):
                worker.kill()
                killed.add(worker.pid)
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert err.startswith("error: workers died 3 times at one task")
    assert len(killed) >= 3
    found = invariants.check(tmp_path, 0, registered=False)
    assert found["parent"].info.status == "FAILED"


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_failing_configurations_in_a_row_end_the_run_and_every_one_says_why_in_both_ledgers(
    tmp_path: Path, clouds: Path
) -> None:
    with np.load(clouds) as data:
        huge = {name: data[name] * 1e30 if name[0] == "x" else data[name] for name in data}
    np.savez(tmp_path / "huge.npz", **huge)
    code, out, err = command(
        tmp_path,
        *options(tmp_path / "huge.npz", 20, epochs=2),
        *("--normalize", "none"),
    )
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith(
        "error: 5 configurations in a row failed, the last with TrainingDiverged: "
    )
    assert 5 <= out.count("FAIL") <= 10  # each was tried twice, but for those that ran last
    found = invariants.check(tmp_path, registered=False)
    assert found["parent"].info.status == "FAILED"
    assert {trial.state for trial in found["trials"]} == {TrialState.FAIL}
    assert 5 <= len(found["trials"]) <= 11
    reasons = [run.data.tags["optuna.failure"] for run in found["runs"].values()]
    assert sum(reason.startswith("TrainingDiverged: ") for reason in reasons) >= 5
