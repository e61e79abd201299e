"""Trials as tasks: exact budgets whatever dies, and early stops that still leave a model."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import crash
import invariants
import numpy as np
import psutil
import pytest
from conftest import ROOT, Process, command, running_owners, start, start_anew, wait_for
from optuna.trial import TrialState

from search import pipeline
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.task import METRICS
from search.errors import RunError
from search.study.trials import TrialSummary
from search.training import environment
from search.workers import executor as engine
from search.workers import processes as pool
from search.workers.executor import Patience
from search.workers.processes import InProcess

# ---- the small parts -----------------------------------------------------------------------------


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


def test_in_process_a_task_runs_at_once_and_its_error_is_in_the_future() -> None:
    with InProcess() as executor:
        done: list[int] = []
        future: Future[None] = executor.submit(done.append, 1)
        assert (done, future.done()) == ([1], True)
        assert executor.submit(divmod, 7, 2).result() == (3, 1)
        failed = executor.submit(divmod, 7, 0)
        with pytest.raises(ZeroDivisionError):
            failed.result()


def test_in_process_an_interruption_is_raised_at_once() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with InProcess() as executor, pytest.raises(KeyboardInterrupt):
        executor.submit(interrupt)


def test_there_are_as_many_workers_as_asked_or_one_a_core() -> None:
    assert pool.worker_count(7) == pool.worker_count(7, gpu=True) == 7
    assert pool.worker_count(None) == pool.cpu_count()
    assert pool.worker_count(None, gpu=True) == 1


def cgroups(root: Path, lines: str, **files: str) -> int:
    """The CPUs of a process in the cgroups `lines`, where there are such files; of 64 CPUs.

    files: by folder, with __ for a slash: cpu.max, or quota and period of the first version.
    """
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        folder = root / "sys/fs/cgroup" / name.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        if "cpu" in name:
            for file, number in zip(("quota", "period"), text.split(), strict=True):
                (folder / f"cpu.cfs_{file}_us").write_text(f"{number}\n")
        else:
            (folder / "cpu.max").write_text(f"{text}\n")
    return pool.cpu_count(root)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/", {}, 64),
        ("0::/", {".": "max 100000"}, 64),
        ("0::/", {".": "150000 100000"}, 2),
        ("0::/", {".": "20000 100000"}, 1),
        ("0::/", {".": "9900000 100000"}, 64),
        ("0::/a/b", {"a": "300000 100000", "a__b": "max 100000"}, 3),
        ("0::/a/b", {"a": "300000 100000", "a__b": "500000 100000"}, 3),
        ("0::/a/b", {"other": "100000 100000"}, 64),
        ("0::/../pod", {".": "400000 100000"}, 4),
        ("3:cpu,cpuacct:/\n2:memory:/", {"cpu,cpuacct": "250000 100000"}, 3),
        ("3:cpu,cpuacct:/", {"cpu": "-1 100000"}, 64),
        ("3:cpuacct,cpu:/docker/x", {"cpu": "200000 100000"}, 2),
        ("3:cpu:/a", {"cpu": "800000 100000", "cpu__a": "700000 100000"}, 7),
        ("5:cpuset:/a\n0::/", {"cpuset__a": "100000 100000"}, 64),
    ],
)
def test_a_containers_quota_limits_the_workers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    files: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 64, raising=False)
    assert cgroups(tmp_path, lines, **files) == expected


def test_where_nothing_is_known_of_cgroups_all_cores_count(tmp_path: Path) -> None:
    affinity = getattr(os, "process_cpu_count", lambda: len(os.sched_getaffinity(0)))
    assert pool.cpu_count(tmp_path) == affinity()


def told(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, device: str | None, gpu: str | None
) -> list[str]:
    """What is said of the workers where TensorFlow answers `gpu`."""
    said: list[str] = []
    nothing: Any = None
    monkeypatch.setattr(environment, "gpu_device", lambda: device)
    monkeypatch.setattr(pool.ProcessBackend, "_ask_for_gpu", lambda *_: gpu)
    monkeypatch.setattr(pool, "cpu_count", lambda: 3)
    found = pool.ProcessBackend(StudyConfig(workers=workers), "run", nothing, said.append)
    assert said == []
    assert str(found.slots()) == said[0].split()[0]
    found.slots()
    return said


def test_what_tensorflow_found_and_how_many_workers_run_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvidia = "/dev/nvidia0"
    assert told(monkeypatch, None, None, None) == ["3 workers, 1 thread each, CPU"]
    assert told(monkeypatch, 1, None, None) == ["1 worker, 1 thread, CPU"]
    assert told(monkeypatch, None, nvidia, "NVIDIA H100") == ["1 worker on GPU NVIDIA H100"]
    assert told(monkeypatch, 2, nvidia, "NVIDIA H100") == ["2 workers on GPU NVIDIA H100"]
    assert told(monkeypatch, None, nvidia, None) == [
        "3 workers, 1 thread each, CPU; /dev/nvidia0 is there, but TensorFlow finds no GPU that it "
        "can use"
    ]


def test_where_there_is_no_device_tensorflow_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    monkeypatch.setattr(environment, "gpu_device", lambda: None)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", None)  # none can be started
    assert pool.ProcessBackend(StudyConfig(workers=4), "run", nothing, print).slots() == 4


def test_tensorflow_is_asked_for_a_gpu_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing: Any = None
    monkeypatch.setattr(pool, "_start_method", lambda: multiprocessing.get_context("spawn"))
    monkeypatch.setattr(pool.tasks, "gpu", os.getpid)
    found: Any = pool.ProcessBackend(StudyConfig(), "run", nothing, print)._ask_for_gpu(
        "/dev/nvidia0"
    )
    assert found != os.getpid()
    assert not psutil.pid_exists(found)
    monkeypatch.setattr(pool.tasks, "gpu", os.abort)
    with pytest.raises(RunError, match=r"^TensorFlow died while it looked for a GPU"):
        pool.ProcessBackend(StudyConfig(), "run", nothing, print)._ask_for_gpu("/dev/nvidia0")


def test_tensorflow_is_imported_ahead_where_trials_are_missing(
    monkeypatch: pytest.MonkeyPatch, in_folder: Path, clouds: Path
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(pool, "_start_method", lambda: started.append(True))
    monkeypatch.setattr(environment, "gpu_device", lambda: None)

    def starts(**changed: Any) -> bool:
        started.clear()
        pool.start_importing(small(clouds, **{"n_trials": 2, "workers": 2, **changed}))
        return started == ([True] if sys.platform == "linux" else [])

    assert starts()
    assert not starts(workers=1)
    pipeline.run(small(clouds, n_trials=2))
    assert not starts()
    assert starts(n_trials=3)
    assert starts(study_name="another")
    assert starts(storage=f"sqlite:///{'a' * 300}.db")
    (in_folder / "study.db").write_text("no database")
    assert starts()


# ---- processes -----------------------------------------------------------------------------------

UNGUARDED = """
import multiprocessing, os
from search import StudyConfig
from search.workers import processes

print("imported", flush=True)
for method in ("spawn", "forkserver"):
    processes._start_method = lambda: multiprocessing.get_context(method)
    workers = processes.ProcessBackend(StudyConfig(workers=2), "run", None, lambda line: None)
    print(workers.submit(os.getpid).result() != os.getpid())
    workers.close(now=False)
"""
FROM_STDIN = """
from search import StudyConfig, run

result = run(StudyConfig(dataset="clouds.npz", epochs=1, n_trials=2, workers=2, report="none"))
print(result.complete + result.pruned, "finished")
"""
IMPORTED = """
import multiprocessing
from search import StudyConfig, run

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
else:
    run(StudyConfig(dataset="clouds.npz", workers=1))
"""


def python(folder: Path, script: str, *, by_stdin: bool) -> "subprocess.CompletedProcess[str]":
    """Run `script`, a file or what comes from stdin."""
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-" if by_stdin else "script.py"],
        input=script if by_stdin else "",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_workers_do_not_import_a_script_that_lacks_its_guard(tmp_path: Path) -> None:
    done = python(tmp_path, UNGUARDED, by_stdin=False)
    assert (done.stdout, done.stderr) == ("imported\nTrue\nTrue\n", "")


@pytest.mark.slow
def test_a_script_from_stdin_without_a_guard_runs_a_study(tmp_path: Path, clouds: Path) -> None:
    shutil.copy(clouds, tmp_path)
    done = python(tmp_path, FROM_STDIN, by_stdin=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 finished\n", "")


@pytest.mark.slow
def test_a_run_in_a_child_that_only_imports_the_script_is_refused(
    tmp_path: Path, clouds: Path
) -> None:
    shutil.copy(clouds, tmp_path)
    done = python(tmp_path, IMPORTED, by_stdin=False)
    assert done.stderr.splitlines()[-1].startswith(
        "search.errors.InputError: run() must not be called when the main module is imported"
    )
    assert not (tmp_path / "study.db").exists()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[pool.ProcessBackend]:
    """Two processes that have nothing prepared."""
    nothing: Any = None
    monkeypatch.setattr(pool, "_start_method", lambda: multiprocessing.get_context("spawn"))
    both = pool.ProcessBackend(StudyConfig(workers=2), "run", nothing, lambda _: None)
    yield both
    both.close(now=True)


def test_where_a_process_dies_the_other_one_goes_on(processes: pool.ProcessBackend) -> None:
    dying = processes.submit(os._exit, 3)
    other = processes.submit(os.getpid).result()
    with pytest.raises(BrokenProcessPool):
        dying.result()
    assert processes.submit(os.getpid).result() == other


@pytest.mark.parametrize("now", [True, False])
def test_processes_leave_no_descriptor_behind(processes: pool.ProcessBackend, now: bool) -> None:
    processes.submit(os.getpid).result()  # what the first one opens for all stays
    processes.close(now=now)
    before = psutil.Process().num_fds()
    processes.submit(os.getpid).result()
    processes.close(now=now)
    assert psutil.Process().num_fds() == before


# ---- early stops ---------------------------------------------------------------------------------


class Scripted:
    """A process of a pool; the first trial ends, and its process dies before that is told."""

    def __init__(self, submitted: list[int]) -> None:
        self._submitted = submitted

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        _, place = args
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


def test_a_death_is_charged_to_the_task_of_the_process_that_died_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: Any = None
    done: list[int] = []

    def missing() -> list[tuple[int, ...]]:
        return [(number,) for number in (0, 1, 2) if number not in done]

    monkeypatch.setattr(pool, "_start_method", lambda: multiprocessing.get_context("spawn"))
    with engine.Executor(StudyConfig(workers=2), str(tmp_path), nothing) as workers:
        workers._run(
            crash.die_twice, missing(), lambda _, number: done.append(number), missing, lambda: None
        )
    assert sorted(done) == [0, 1, 2]
    starts = [path.name.split("-")[0] for path in tmp_path.glob("*-*")]
    assert sorted(starts) == [*"0", *"111", *"222"]  # the long one went on all the while


def outcomes(
    monkeypatch: pytest.MonkeyPatch, failing: dict[int, int], max_failures: int
) -> list[tuple[int, str]]:
    """Slots and states of the trials of slots 0 to 7, where `failing` of them fail at first."""
    nothing: Any = None
    left = dict(failing)
    failed: set[int] = set()

    def call(_: str, __: str, place: int) -> TrialSummary:
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
    return StudyConfig(dataset=str(dataset), report="none", **{**settings, **changed})


def test_patience_stops_early_and_goes_on_to_the_retraining(in_folder: Path, clouds: Path) -> None:
    config = small(clouds, patience=4)
    result = pipeline.run(config)
    assert result.stopped == "--patience: 4 trials without a better one"
    found = invariants.check(in_folder, result.ran)
    assert found["winner"] is not None
    values = [t.value if t.state is TrialState.COMPLETE else None for t in found["trials"]]
    assert exhausted_after(4, values) == len(values) < 200
    before = invariants.dump(in_folder)
    assert pipeline.run(config).ran == 0
    assert invariants.dump(in_folder) == before


@pytest.mark.slow
def test_a_timeout_stops_early_and_goes_on_to_the_retraining(in_folder: Path, clouds: Path) -> None:
    began = time.monotonic()
    result = pipeline.run(small(clouds, timeout=1.5, pruner="none"))
    assert result.stopped == "--timeout: 1.5 s have passed"
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


def options(dataset: Path, trials: int, epochs: int = 25) -> tuple[str, ...]:
    return (
        *("--dataset", str(dataset), "--n-trials", str(trials), "--epochs", str(epochs)),
        *("--workers", "2", "--hidden-units", "8,16", "--pruner", "none", "--report", "none"),
    )


@pytest.mark.slow
def test_a_killed_worker_costs_its_trial_and_not_the_budget(tmp_path: Path, clouds: Path) -> None:
    (tmp_path / "search.py").write_text("raise ImportError('a namesake')")
    process = start_anew(tmp_path, *options(clouds, 4))
    victim = wait_for(lambda: running_owners(tmp_path), process).pop()
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    found = invariants.check(tmp_path, 4)
    (failed,) = [trial for trial in found["trials"] if trial.state is TrialState.FAIL]
    assert failed.user_attrs["owner"]["pid"] == victim
    assert failed.user_attrs["failure"].startswith("lost: ")
    assert "left RUNNING by a process that is gone" in out


@pytest.mark.slow
def test_workers_die_with_a_killed_main_process_and_the_next_run_completes(
    tmp_path: Path, clouds: Path
) -> None:
    process = start(tmp_path, *options(clouds, 3))
    wait_for(lambda: running_owners(tmp_path), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(workers(process)) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    code, out, err = command(tmp_path, *options(clouds, 3))
    assert (code, err) == (0, "")
    assert "left RUNNING by a process that is gone" in out
    failed = [
        trial.user_attrs["failure"]
        for trial in invariants.check(tmp_path, 3)["trials"]
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
        tmp_path, *options(tmp_path / "huge.npz", 20, epochs=2), "--normalize", "none"
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
