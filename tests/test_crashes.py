"""Whatever is killed, locked, full or gone: the next start repairs it, and nothing is lost."""

import contextlib
import ctypes
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import crash
import forks
import invariants
import optuna
import pytest
from conftest import ROOT, command, start, start_anew, wait_until
from optuna.trial import TrialState
from optuna_dashboard import get_note
from servers import MlflowServer, Proxy

from search import RunError, StudyConfig, pipeline, session
from search.report.progress import Progress, Result
from search.study import sqlite
from search.study.trials import TrialSummary
from search.tracking.sync import doctor

TRIALS, EPOCHS = 8, 3
pytestmark = pytest.mark.slow
OPTIONS = (
    *("--n-trials", str(TRIALS), "--epochs", str(EPOCHS), "--hidden-units", "8"),
    *("--report", "none"),  # takes longer than the search
)


def settings(dataset: Path, **changed: Any) -> StudyConfig:
    """What OPTIONS say, to run in this process, which has TensorFlow already."""
    given: dict[str, Any] = {
        "n_trials": TRIALS,
        "epochs": EPOCHS,
        "hidden_units": "8",
        "report": "none",
    }
    return StudyConfig(dataset=str(dataset), workers=1, **{**given, **changed})


def results(found: dict[str, Any]) -> dict[int, Any]:
    """What every slot tried and how it ended."""
    return {
        trial.user_attrs["place"]: (trial.state, trial.params, trial.values)
        for trial in found["trials"]
        if trial.state.name != "FAIL"
    }


def check(folder: Path, config: StudyConfig, **expected: Any) -> dict[str, Any]:
    """Both stores agree, and running the study once more changes nothing."""
    found = invariants.check(folder, config.n_trials, **expected)
    before = invariants.dump(folder)
    assert found["parent"].info.status == "FINISHED"
    assert doctor(config, fix=False) == ([], [])
    again = pipeline.run(config)
    assert (again.ran, again.repaired) == (0, ())
    assert invariants.dump(folder) == before
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> dict[int, Any]:
    """What every slot of the study tries, and how it goes, if nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.run(settings(clouds))
    return results(invariants.check(folder, TRIALS))


# ---- kills at named points -----------------------------------------------------------------------


def die(folder: Path, dataset: Path, points: Iterable[str], *more: str) -> None:
    """Start the command once for each point, where it dies; each start repairs the last one."""
    options = ["--dataset", str(dataset), "--workers", "1", *OPTIONS, *more]
    for point in points:
        process = forks.Python([crash.__file__, point, *options], cwd=folder)
        out, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, point + out + err


def test_a_kill_at_any_point_of_the_search_is_repaired_by_the_next_start(
    in_folder: Path, clouds: Path, undisturbed: dict[int, Any]
) -> None:
    die(in_folder, clouds, crash.OF_SEARCH)
    result = pipeline.run(settings(clouds))
    found = check(in_folder, settings(clouds))
    assert results(found) == undisturbed
    assert len(result.baselines) == 2
    lost = [trial for trial in found["trials"] if trial.state.name == "FAIL"]
    assert len(lost) == len(crash.LOSES_A_TRIAL)
    assert all(trial.user_attrs["failure"].startswith("lost: ") for trial in lost)


def test_a_kill_at_any_point_on_the_winners_way_is_repaired_by_the_next_start(
    in_folder: Path, clouds: Path, undisturbed: dict[int, Any]
) -> None:
    config = settings(clouds, finalists=2, repeats=2, report="report.html")
    more = ("--finalists", "2", "--repeats", "2", "--report", config.report)
    die(in_folder, clouds, crash.OF_WINNER, *more)
    result = pipeline.run(config)
    found = check(in_folder, config)
    assert results(found) == undisturbed
    assert len(result.finalists) in (2, 3)
    repeats = [run for run in found["children"] if "optuna.finalist" in run.data.tags]
    assert len(repeats) == 2 * len(result.finalists)

    assert (result.ran, result.repaired) == (0, ())
    assert result.winner is not None
    assert result.winner.version == 1
    assert result.against_baseline is not None
    assert len(found["client"].search_model_versions("name = 'MNIST_DNN_Model'")) == 1

    (in_folder / "report.html").unlink()
    pipeline.run(config)
    assert (in_folder / "report.html").exists()
    parent = found["parent"]
    assert [entry.path for entry in found["client"].list_artifacts(parent.info.run_id)] == [
        "report.html"
    ]
    assert parent.data.tags["mlflow.note.content"].startswith("Study mnist-dnn searched")
    assert parent.info.run_id in get_note(found["study"])


def test_a_kill_at_a_random_moment_is_repaired(in_folder: Path, clouds: Path) -> None:
    options = ("--dataset", str(clouds), "--workers", "2", *OPTIONS)
    for seed in (1, 2):
        process = start(in_folder, *options)
        try:
            process.wait(timeout=random.Random(seed).uniform(0, 5))
        except subprocess.TimeoutExpired:
            process.kill()  # the main process alone: its workers have to notice
        process.communicate()
    pipeline.run(settings(clouds))
    invariants.check(in_folder, TRIALS)


# ---- many starts at once -------------------------------------------------------------------------


def test_of_many_first_starts_one_runs_the_study_and_the_others_say_so(
    tmp_path: Path, clouds: Path
) -> None:
    options = ("--dataset", str(clouds), "--workers", "1", *OPTIONS)
    processes = [start(tmp_path, *options) for _ in range(16)]
    ended = [(process.communicate(timeout=300), process.returncode) for process in processes]
    codes = [code for _, code in ended]
    assert codes.count(0) >= 1
    pids = {process.pid for process in processes}
    for (_, err), code in ended:
        if code:
            assert code == 1
            said = re.fullmatch(
                r"error: study mnist-dnn is being run by \S+, pid (\d+); wait for it, or give "
                r"another --study-name\n",
                err,
            )
            assert said is not None, err
            assert int(said[1]) in pids
    invariants.check(tmp_path, TRIALS)


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "code"), [((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM,), 143)]
)
def test_an_epoch_that_takes_long_is_ended_within_ten_seconds(
    in_folder: Path, numbers: tuple[int, ...], code: int
) -> None:
    long = ("--hidden-units", "16384", "--workers", "1", "--n-trials", "2")  # a minute an epoch
    process = start(in_folder, *long)
    try:
        wait_until(lambda: statuses(in_folder, "RUNNING") >= 2)  # the parent's and a trial's run
        for number in numbers:
            os.kill(process.pid, number)
            wait_until(lambda: not pending(process.pid))  # two at once would be one
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
    finally:
        process.kill()
    assert process.returncode == code
    assert err.endswith("; run the same command again to go on\n")
    (trial,) = optuna.load_study(study_name="mnist-dnn", storage="sqlite:///study.db").trials
    assert trial.state is TrialState.FAIL
    assert "Ctrl-C" in trial.user_attrs["failure"] or "SIGTERM" in trial.user_attrs["failure"]
    # On a busy machine, those seconds may not suffice to end the runs; nothing else is wrong.
    repaired, left = doctor(StudyConfig(), fix=True)
    assert all("RUNNING" in line for line in repaired), repaired
    assert left == []
    invariants.check(in_folder, registered=False)


def pending(pid: int) -> bool:
    """Whether a signal to the process has not arrived yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(int(line.split()[1], 16) for line in lines if line[:6] in ("SigPnd", "ShdPnd"))


def statuses(folder: Path, status: str) -> int:
    """How many runs have it."""
    path = folder / "mlflow.db"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as database:
        query = "SELECT count(*) FROM runs WHERE status = ?"
        return int(database.execute(query, (status,)).fetchone()[0])


# ---- databases and disks -------------------------------------------------------------------------


class During(Progress):
    """Does something when so many trials have ended."""

    def __init__(self, deeds: dict[int, Callable[[], object]]) -> None:
        self._deeds = deeds
        self.outcomes: list[TrialSummary] = []

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        self.outcomes.append(outcome)
        self._deeds.get(len(self.outcomes), lambda: None)()


def test_databases_locked_for_half_as_long_as_is_waited_lose_nothing(
    in_folder: Path, clouds: Path, undisturbed: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT", 10_000)  # ms, instead of a minute
    locked = threading.Event()

    def lock() -> None:
        with (
            closing(sqlite3.connect(in_folder / "study.db", timeout=60)) as study,
            closing(sqlite3.connect(in_folder / "mlflow.db", timeout=60)) as mlflow,
        ):
            study.execute("BEGIN EXCLUSIVE")
            mlflow.execute("BEGIN EXCLUSIVE")
            locked.set()
            time.sleep(5)  # the fault itself

    locker = threading.Thread(target=lock)

    def begin() -> None:
        locker.start()
        locked.wait()

    during = During({2: begin})
    pipeline.run(settings(clouds), during)
    locker.join()
    assert max(outcome.seconds for outcome in during.outcomes) > 4
    assert results(check(in_folder, settings(clouds))) == undisturbed


def limited(folder: Path, kilobytes: int, *options: str) -> tuple[int, str, str]:
    """The command where no file can grow beyond so much, as on a full disk."""
    size = kilobytes * 1024
    process = forks.Python(
        [str(ROOT / "study.py"), *options],
        cwd=folder,
        first=f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({size}, {size}))",
    )
    out, err = process.communicate(timeout=300)
    return process.wait(), out, err


def test_a_disk_that_is_full_is_told_in_one_line_and_the_same_command_works_later(
    in_folder: Path, clouds: Path
) -> None:
    trials = 20  # fill the write-ahead log
    options = ("--dataset", str(clouds), *OPTIONS, "--baselines", "none", "--n-trials", str(trials))
    code, _, err = limited(in_folder, 40, *options, "--workers", "1")  # less than one database
    assert (code, len(err.splitlines())) == (1, 1), err
    assert not (in_folder / "mlflow.db").exists()

    pipeline.run(settings(clouds, n_trials=2, baselines="none"))
    for workers in ("1", "2"):
        size = max((in_folder / name).stat().st_size for name in ("study.db", "mlflow.db"))
        code, out, err = limited(in_folder, size // 1024, *options, "--workers", workers)
        assert (code, len(err.splitlines())) == (1, 1), err
        assert err.startswith("error: the study's records could not be written")
        assert "Traceback" not in out

    pipeline.run(settings(clouds, n_trials=trials, baselines="none"))
    invariants.check(in_folder, trials)


def without_superpowers() -> None:
    """In a child of root: permissions hold for it too."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_folder_that_is_read_only_is_refused_in_one_line(tmp_path: Path, clouds: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, str(ROOT / "study.py"), "--workers", "1", "--dataset", str(clouds)],
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=without_superpowers,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "must be writable, but the folder" in done.stderr
    assert list(folder.iterdir()) == []


# ---- a real tracking server ----------------------------------------------------------------------


@pytest.fixture
def server(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the machine may be busy
    server = MlflowServer(in_folder)
    yield server
    server.stop()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    proxy = Proxy(server.uri)
    yield proxy
    proxy.stop()


def run_with(
    folder: Path, clouds: Path, uri: str, deeds: dict[int, Callable[[], object]]
) -> tuple[Result, During, dict[str, Any]]:
    """A whole study on a server that misbehaves on the way; both stores agree at its end."""
    config = settings(clouds, tracking_uri=uri)
    during = During(deeds)
    result = pipeline.run(config, during)
    assert [outcome.failure for outcome in during.outcomes] == [None] * TRIALS
    assert max(outcome.seconds for outcome in during.outcomes) < 30
    found = check(folder, config)
    everything = found["client"].search_runs([found["parent"].info.experiment_id])
    assert len(everything) == TRIALS + 2  # the parent and the retraining: no run twice
    return result, during, found


def test_a_server_that_is_gone_for_a_while_or_answers_500_loses_nothing(
    in_folder: Path,
    clouds: Path,
    server: MlflowServer,
    proxy: Proxy,
    undisturbed: dict[int, Any],
) -> None:
    def answer(status: int | None) -> Callable[[], None]:
        return lambda: setattr(proxy, "status", status)

    result, _, found = run_with(
        in_folder,
        clouds,
        proxy.uri,
        {1: server.stop, 3: server.start, 4: answer(500), 6: answer(None)},
    )
    assert {"trial 1: no run", "trial 4: no run"} <= set(result.repaired)
    assert results(found) == undisturbed


def test_a_server_that_hangs_costs_little_and_loses_nothing(
    in_folder: Path,
    clouds: Path,
    server: MlflowServer,
    undisturbed: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def freeze() -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        server.freeze()

    def thaw() -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        server.thaw()

    _, during, found = run_with(in_folder, clouds, server.uri, {2: freeze, 6: thaw})
    assert results(found) == undisturbed
    while_frozen = during.outcomes[:6]  # on a busy machine a thawed server is slow for a while
    slow = [outcome.number for outcome in while_frozen if outcome.seconds > 5]
    assert slow == [2]  # the next ones leave it alone


def test_what_a_slow_server_did_after_all_is_not_done_twice(
    in_folder: Path,
    clouds: Path,
    proxy: Proxy,
    undisturbed: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow() -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        proxy.delay = 4

    def quick() -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        proxy.delay = 0

    _, _, found = run_with(in_folder, clouds, proxy.uri, {2: slow, 3: quick})
    assert results(found) == undisturbed


def test_a_server_gone_to_the_end_leaves_a_study_that_the_next_start_completes(
    in_folder: Path, clouds: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_PATIENCE", 1)
    config = settings(clouds, tracking_uri=server.uri)
    with pytest.raises(RunError, match="run the same command again"):
        pipeline.run(config, During({3: server.stop}))
    server.start()
    result = pipeline.run(config)
    assert result.ran == 0
    check(in_folder, config)


# ---- passwords -----------------------------------------------------------------------------------

CANARY = "kanarienvogel-7391"


def test_a_password_in_a_url_is_nowhere_to_be_found(
    in_folder: Path, clouds: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(server.uri)
    address = proxy.uri.removeprefix("http://")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{CANARY}@{address}")
    said, seen = "", ""
    try:
        for kind, code in (("works", 0), ("fails midway", 1), ("fails", 2)):
            proxy.status = 500 if kind == "fails" else None
            name = ("--study-name", kind.replace(" ", "-"), "--report", "report.html")
            workers = ("--workers", "2" if kind == "works" else "1")
            few = ("--n-trials", "3", "--epochs", "1", "--hidden-units", "4")
            begin = start_anew if kind == "works" else start  # whose name is not study.py
            process = begin(in_folder, "--dataset", str(clouds), *workers, *few, *name)
            before = statuses(in_folder, "FINISHED")
            ended = False
            while not ended:
                if kind == "fails midway" and statuses(in_folder, "FINISHED") > before:
                    proxy.status = 500
                for command_line in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):  # it has ended
                        seen += command_line.read_bytes().decode(errors="replace")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said += "".join(process.communicate(timeout=0.2))
                    ended = True
            assert process.returncode == code, said
            if kind == "works":
                for verb in (["show", "--json"], ["doctor"]):
                    answer = command(in_folder, *verb, "--study-name", kind)
                    assert answer[0] == 0, answer
                    said += answer[1] + answer[2]
    finally:
        proxy.stop()
    assert "must be a running MLflow server" in said
    assert "study.py" in seen
    assert CANARY not in seen
    assert CANARY not in said
    for file in in_folder.rglob("*"):
        assert CANARY not in str(file)
        if file.is_file():
            assert CANARY.encode() not in file.read_bytes(), file
