"""Workers as processes of this machine: how many, what they import, and how they end."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import forks
import psutil
import pytest
from conftest import ROOT
from optuna.trial import TrialState, create_trial

from search import signals
from search.config.settings import StudyConfig
from search.errors import Interrupted, RunError
from search.study import storage
from search.training import environment
from search.workers import processes as pool


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


def small(dataset: Path, **changed: Any) -> StudyConfig:
    settings = {"epochs": 1, "n_trials": 200, "workers": 1, "hidden_units": "8"}
    return StudyConfig(
        dataset=str(dataset), report="none", baselines="none", **{**settings, **changed}
    )


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
    config = small(clouds, n_trials=2)
    study = storage.open_study(config, config.settings("clouds.npz"))
    for state, value in ((TrialState.COMPLETE, 0.5), (TrialState.PRUNED, None)):
        assert starts()
        study.add_trial(create_trial(state=state, value=value))
    study.add_trial(create_trial(state=TrialState.FAIL))
    storage.close_study(study)
    assert not starts()
    assert starts(n_trials=3)
    assert starts(study_name="another")
    assert starts(storage=f"sqlite:///{'a' * 300}.db")
    (in_folder / "study.db").write_text("no database")
    assert starts()


# ---- what they import ----------------------------------------------------------------------------

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

result = run(StudyConfig(dataset="clouds.npz", epochs=1, n_trials=2, workers=2, baselines="none"))
print(result.complete + result.pruned, "finished")
"""
IMPORTED = """
import multiprocessing
from search import StudyConfig, run

if __name__ == "__main__":
    process = multiprocessing.get_context("forkserver").Process(target=print)
    process.start()
    process.join()
else:
    run(StudyConfig(dataset="clouds.npz", workers=1))
"""


def test_workers_do_not_import_a_script_that_lacks_its_guard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.stdout, done.stderr) == ("imported\nTrue\nTrue\n", "")


@pytest.mark.slow
def test_a_script_from_stdin_without_a_guard_runs_a_study(tmp_path: Path, clouds: Path) -> None:
    shutil.copy(clouds, tmp_path)
    process = forks.Python(["-"], cwd=tmp_path, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(FROM_STDIN)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out, err) == (0, "2 finished\n", "")


def test_a_run_in_a_child_that_only_imports_the_script_is_refused(
    tmp_path: Path, clouds: Path
) -> None:
    shutil.copy(clouds, tmp_path)
    script = tmp_path / "script.py"
    script.write_text(IMPORTED)
    _, err = forks.Python([str(script)], cwd=tmp_path).communicate(timeout=200)
    assert err.splitlines()[-1].startswith(
        "search.errors.InputError: run() must not be called when the main module is imported"
    )
    assert not (tmp_path / "study.db").exists()


# ---- how they end --------------------------------------------------------------------------------


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


def test_a_process_whose_start_is_interrupted_is_ended_with_the_others(
    processes: pool.ProcessBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = pool._submit

    def interrupted(*arguments: Any) -> None:
        submit(*arguments)
        raise Interrupted("interrupted by Ctrl-C", 130)

    monkeypatch.setattr(pool, "_submit", interrupted)
    with pytest.raises(Interrupted):
        processes.submit(time.sleep, 600)
    (worker,) = multiprocessing.active_children()
    processes.close(now=True)
    assert not worker.is_alive()


def test_a_signal_that_arrives_as_a_process_starts_is_handled_afterwards(
    processes: pool.ProcessBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        signal.raise_signal(signal.SIGTERM)
        start(thread)

    with signals.handled(lambda: None, lambda reason: None):
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(Interrupted, match="terminated by SIGTERM"):
            processes.submit(time.sleep, 600)
        monkeypatch.undo()
        (worker,) = multiprocessing.active_children()
        processes.close(now=True)
    assert not worker.is_alive()


STARTED_TOO_LATE = """
import _multiprocessing, os
from multiprocessing import resource_tracker
from search.workers import processes

context = processes._start_method()
lock = context.Lock()
_multiprocessing.sem_unlink(lock._semlock.name)  # as a command that ends does
resource_tracker.unregister(lock._semlock.name, "semaphore")
process = context.Process(target=print, args=(lock,))
process.start()
process.join()
print(process.exitcode, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nothing is forked")
def test_a_process_that_starts_as_the_command_ends_says_nothing(tmp_path: Path) -> None:
    process = forks.Python(["-c", STARTED_TOO_LATE], cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("1\n", "")


@pytest.mark.parametrize("now", [True, False])
def test_processes_leave_no_descriptor_behind(processes: pool.ProcessBackend, now: bool) -> None:
    processes.submit(os.getpid).result()  # what the first one opens for all stays
    processes.close(now=now)
    before = psutil.Process().num_fds()
    processes.submit(os.getpid).result()
    processes.close(now=now)
    assert psutil.Process().num_fds() == before
