"""The same study on a Dask cluster, PostgreSQL and an MLflow server; nothing is lost there."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import invariants
import pytest
from conftest import start, wait_until
from optuna.trial import TrialState
from servers import BINARIES, Dask, MlflowServer, Postgres, Process, TcpProxy, ask

from search import RunError, StudyConfig, pipeline
from search.report.progress import Progress
from search.study import storage
from search.study.trials import LOST, TrialSummary
from search.tracking.sync import doctor
from search.workers.scheduler import connect

TRIALS, EPOCHS = 6, 3
pytestmark = [
    pytest.mark.skipif(not BINARIES, reason="no PostgreSQL is installed"),
    pytest.mark.slow,
]


@dataclass
class Site:
    """A database, a tracking server, a scheduler and two workers, one of them of two threads."""

    postgres: Postgres
    mlflow: MlflowServer
    dask: Dask
    workers: dict[int, Process]  # by threads
    studies: int = 0

    def settings(self, dataset: Path, **changed: Any) -> StudyConfig:
        """A new study here; what its places try and how it goes depends on nothing else."""
        self.studies += 1
        given = {
            "n_trials": TRIALS,
            "epochs": EPOCHS,
            "hidden_units": "8",
            "sampler": "random",
            "pruner": "none",
            "report": "none",
            "study_name": f"study-{self.studies}",
            "model_name": f"model-{self.studies}",
            "scheduler": self.dask.address,
            "storage": self.postgres.url,
            "tracking_uri": self.mlflow.uri,
        }
        return StudyConfig(dataset=str(dataset), **{**given, **changed})

    def ask(self, query: str, **values: Any) -> list[Any]:
        """What the study's database answers."""
        return ask(self.postgres.url, query, **values)

    def at_full_strength(self) -> None:
        """Start the workers that are missing, wait for them, and let them train."""
        self.dask.hold.unlink(missing_ok=True)
        for threads in (1, 2):
            if threads not in self.workers or self.workers[threads].poll() is not None:
                self.workers[threads] = self.dask.start_worker(threads)
        self.wait_for_threads(1, 2)

    def wait_for_threads(self, *threads: int) -> None:
        """Wait until the scheduler has workers of so many threads each, and no others."""
        client = connect(self.dask.address)
        wait_until(lambda: sorted(client.nthreads().values()) == sorted(threads))
        client.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with contextlib.ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        storage.close(storage.open_storage(postgres.url))
        mlflow = MlflowServer(folder, postgres.create("mlflow"))
        stack.callback(mlflow.stop)
        dask = Dask(folder)
        stack.callback(dask.stop)
        yield Site(postgres, mlflow, dask, {})


@pytest.fixture
def whole(site: Site, in_folder: Path) -> Site:
    site.at_full_strength()
    return site


class Hearing(Progress):
    """Keeps what it is told, and does something once after so many trials."""

    def __init__(self, after: int = 0, act: Callable[[], Any] | None = None) -> None:
        self.lines: list[str] = []
        self.outcomes: list[TrialSummary] = []
        self._after, self._act = after, act

    def workers(self, line: str) -> None:
        self.lines.append(line)

    def repaired(self, lines: list[str]) -> None:
        self.lines.extend(lines)

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        self.outcomes.append(outcome)
        if len(self.outcomes) == self._after and self._act is not None:
            self._act()


def results(found: dict[str, Any]) -> dict[int, Any]:
    """What every place tried and how it went, to the last digit of every epoch."""
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    return {
        trial.user_attrs["place"]: (
            trial.params,
            [[entry[name] for name in names] for entry in trial.user_attrs["history"]],
        )
        for trial in found["trials"]
        if trial.state.is_finished() and trial.state is not TrialState.FAIL
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> dict[int, Any]:
    """What every place of the study tries, and how it goes, in one process with its own files."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        here: Any = _Here()
        pipeline.run(Site(here, here, here, {}).settings(clouds, workers=1))
    return results(invariants.check(folder, TRIALS, study_name="study-1", model_name="model-1"))


class _Here:
    url, uri, address = "sqlite:///study.db", "sqlite:///mlflow.db", None


def check(site: Site, folder: Path, config: StudyConfig) -> dict[str, Any]:
    """Both stores agree, and running the study once more changes nothing."""
    again = pipeline.run(config)
    assert (again.ran, again.repaired) == (0, ())
    assert doctor(config, fix=False) == ([], [])
    return invariants.check(
        folder,
        config.n_trials,
        study_name=config.study_name,
        model_name=config.model_name,
        url=site.postgres.url,
        tracking_uri=site.mlflow.uri,
    )


def lost(found: dict[str, Any]) -> list[Any]:
    """The trials whose worker died."""
    failed = [trial for trial in found["trials"] if trial.state is TrialState.FAIL]
    assert {trial.user_attrs["failure"] for trial in failed} <= {LOST}
    return failed


def running(site: Site, config: StudyConfig) -> list[Any]:
    """Trial id, host and pid of every trial that has reported an epoch and not ended."""
    return site.ask(
        "SELECT t.trial_id, a.value_json::json->>'host', (a.value_json::json->>'pid')::int "
        "FROM trials t JOIN studies s USING (study_id) "
        "JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = 'owner' "
        "WHERE s.study_name = :name AND t.state = 'RUNNING' AND EXISTS "
        "(SELECT 1 FROM trial_intermediate_values v WHERE v.trial_id = t.trial_id)",
        name=config.study_name,
    )


@contextlib.contextmanager
def meanwhile(act: Callable[[], Any]) -> Iterator[None]:
    """Do `act` in another thread, and raise here what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not errors, errors


# ---- a whole study -------------------------------------------------------------------------------


def test_a_study_on_a_cluster_is_the_study_of_one_process_to_the_last_digit(
    whole: Site, in_folder: Path, clouds: Path, alone: dict[int, Any]
) -> None:
    config = whole.settings(clouds)
    refused: list[str] = []

    def run_too() -> None:
        with pytest.raises(RunError) as caught:
            pipeline.run(config)
        refused.append(str(caught.value))

    hearing = Hearing(1, run_too)
    result = pipeline.run(config, hearing)
    assert (result.complete, result.failed, result.ran) == (TRIALS, 0, TRIALS)
    assert len(result.baselines) == 2
    assert result.against_baseline is not None
    assert hearing.lines == [f"{whole.dask.address}: 2 workers, 3 trials at once"]
    found = check(whole, in_folder, config)
    assert results(found) == alone
    owners = [trial.user_attrs["owner"] for trial in found["trials"]]
    assert {owner["pid"] for owner in owners} == {worker.pid for worker in whole.workers.values()}
    assert len({(owner["pid"], owner["thread"]) for owner in owners}) == 3
    assert os.listdir(in_folder) == []  # neither store and no model is kept here
    assert len(refused) == 1  # on whatever host it is tried
    assert f"is being run by {os.uname().nodename[:40]}, pid {os.getpid()}; wait" in refused[0]


# ---- workers -------------------------------------------------------------------------------------


def test_a_killed_worker_costs_its_trials_one_cut_off_leaves_and_one_that_joins_gets_some(
    whole: Site, in_folder: Path, clouds: Path, alone: dict[int, Any]
) -> None:
    proxy = TcpProxy(whole.dask.address)
    remote = whole.dask.start_worker(1, scheduler=proxy.address)
    config = whole.settings(clouds)
    joining: list[Process] = []
    hearing = Hearing()

    def cut_kill_and_add() -> None:
        wait_until(lambda: any(pid == remote.pid for *_, pid in running(whole, config)))
        proxy.stop()
        victim = whole.workers[2]
        wait_until(lambda: any(pid == victim.pid for *_, pid in running(whole, config)))
        victim.kill()
        victim.wait()
        joining.append(whole.dask.start_worker(1))
        wait_until(lambda: "2 workers, 2 trials at once" in hearing.lines[-1])
        whole.dask.hold.unlink()

    whole.dask.hold.touch()
    try:
        whole.wait_for_threads(1, 1, 2)
        with meanwhile(cut_kill_and_add):
            result = pipeline.run(config, hearing)
    finally:
        proxy.stop()
        remote.wait(timeout=60)  # it leaves by itself
    joining[0].kill()
    found = check(whole, in_folder, config)
    assert results(found) == alone
    gone = [trial.user_attrs["owner"]["pid"] for trial in lost(found)]
    assert len(gone) == result.failed
    assert set(gone) <= {remote.pid, whole.workers[2].pid}
    assert gone.count(remote.pid) <= 1
    assert 1 <= gone.count(whole.workers[2].pid) <= 2
    counts = [line.split(": ")[1] for line in hearing.lines if line.endswith(" at once")]
    assert counts[0] == "3 workers, 4 trials at once"
    assert counts[-1] == "2 workers, 2 trials at once"
    assert any("left RUNNING by a process that is gone" in line for line in hearing.lines)


ELSEWHERE = """
import ctypes, socket
ctypes.CDLL(None).unshare(0x04000000)  # CLONE_NEWUTS: a host name of its own
socket.sethostname("elsewhere")
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0,
    reason="this system lets nobody give a process another host's name",
)
def test_a_trial_of_a_worker_on_another_host_is_lost_when_it_gives_no_sign_of_life(
    whole: Site, in_folder: Path, clouds: Path, alone: dict[int, Any]
) -> None:
    elsewhere = whole.dask.start_worker(first=ELSEWHERE)
    config = whole.settings(clouds)
    silent: list[Any] = []

    def kill() -> None:
        def there() -> list[Any]:
            return [row for row in running(whole, config) if row[1] == "elsewhere"]

        (trial, *_), *_ = wait_until(there)
        os.killpg(elsewhere.pid, signal.SIGKILL)
        elsewhere.wait()
        whole.dask.hold.unlink()
        done = "SELECT count(*) FROM trials JOIN studies USING (study_id) WHERE study_name = :name "
        others = done + "AND state = 'COMPLETE'"
        wait_until(lambda: whole.ask(others, name=config.study_name)[0][0] == TRIALS - 1)
        assert whole.ask("SELECT state FROM trials WHERE trial_id = :id", id=trial) == [
            ("RUNNING",)
        ]
        whole.ask(
            "UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '2 minutes' "
            "WHERE trial_id = :id",
            id=trial,
        )
        silent.append(trial)

    whole.dask.hold.touch()
    whole.wait_for_threads(1, 1, 2)
    with meanwhile(kill):
        pipeline.run(config)
    found = check(whole, in_folder, config)
    assert results(found) == alone
    assert [trial._trial_id for trial in lost(found)] == silent


def without(package: str, installed: str = "") -> str:
    """What lets a process know `package` only by the name `installed`."""
    return (
        "import importlib.metadata as found\n"
        "version = found.version\n"
        "def without(name):\n"
        f"    if name == {package!r}:\n"
        "        raise found.PackageNotFoundError(name)\n"
        f"    return version({package!r} if name == {installed!r} else name)\n"
        "without.__module__, without.__qualname__ = 'importlib.metadata', 'version'\n"
        "found.version = without\n"
    )


def with_path(folder: Path) -> str:
    """What lets a process find packages in `folder` before all others."""
    return f"import sys; sys.path.insert(0, {str(folder)!r})"


def test_workers_with_other_packages_are_refused_and_slow_ones_are_named(
    whole: Site, clouds: Path, tmp_path: Path
) -> None:
    versions = {"keras": "3.14.0", "search": "0.0.9"}
    for name, version in versions.items():
        info = tmp_path / f"other-{name}" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    other = Dask(tmp_path)
    try:
        for name in versions:
            other.start_worker(first=with_path(tmp_path / f"other-{name}"))
        other.start_worker(first=without("search"))
        client = connect(other.address)
        client.wait_for_workers(3, timeout=60)
        config = whole.settings(clouds, n_trials=2, epochs=1, scheduler=other.address)
        hearing = Hearing()
        with pytest.raises(RunError, match=f"^no worker of {other.address} can be used: tcp://"):
            pipeline.run(config, hearing)
        refused = [line.split(" is refused: ")[1] for line in hearing.lines if "refused" in line]
        has = "and this process has"
        assert sorted(line.split(";")[0].rsplit(" ", 1)[0] for line in refused) == [
            f"it has keras 3.14.0, {has} keras",
            f"it has no search, {has} search",
            f"it has search 0.0.9, {has} search",
        ]
        remedy = "; install the same there, and start it again"
        assert all(line.endswith(remedy) for line in refused)

        # the same TensorFlow, in a package of another name
        trims = "import os; os.environ['MALLOC_TRIM_THRESHOLD_'] = '65536'\n"
        build = without("tensorflow", installed="tensorflow-cpu")
        fit = other.start_worker(first=trims + build)
        client.wait_for_workers(4, timeout=60)
        client.close()
        hearing = Hearing()
        assert pipeline.run(config, hearing).complete == 2
        assert len([line for line in hearing.lines if "refused" in line]) == 3
        (slow,) = [line for line in hearing.lines if "MALLOC" in line]
        assert "1 of " in slow
        assert "1.5 times as slowly as with MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_" in slow
        owners = whole.ask(
            "SELECT value_json::json->>'pid' FROM trial_user_attributes "
            "JOIN trials USING (trial_id) JOIN studies USING (study_id) "
            "WHERE key = 'owner' AND study_name = :name",
            name=config.study_name,
        )
        assert {int(row[0]) for row in owners} == {fit.pid}
    finally:
        other.stop()


# ---- servers -------------------------------------------------------------------------------------


def test_a_database_and_a_tracking_server_restarted_lose_nothing(
    whole: Site, in_folder: Path, clouds: Path, alone: dict[int, Any]
) -> None:
    config = whole.settings(clouds)

    def restart() -> None:
        wait_until(lambda: len(running(whole, config)) == 3)
        whole.postgres.stop()
        whole.mlflow.stop()
        whole.dask.hold.unlink()
        whole.postgres.start()
        whole.mlflow.start()

    whole.dask.hold.touch()
    with meanwhile(restart):
        result = pipeline.run(config)
    assert (result.complete, result.failed) == (TRIALS, 0)
    assert results(check(whole, in_folder, config)) == alone


def test_a_scheduler_that_is_started_again_loses_nothing(
    whole: Site, in_folder: Path, clouds: Path, alone: dict[int, Any]
) -> None:
    config = whole.settings(clouds)

    def restart() -> None:
        wait_until(lambda: running(whole, config))
        whole.dask.scheduler.kill()
        whole.dask.scheduler.wait()
        whole.dask.hold.unlink()
        whole.dask.start_scheduler()
        for worker in whole.workers.values():
            worker.wait(timeout=60)  # they end themselves, and what runs a cluster starts others
        whole.at_full_strength()

    whole.dask.hold.touch()
    with meanwhile(restart):
        result = pipeline.run(config)
    assert result.complete == TRIALS
    found = check(whole, in_folder, config)
    assert results(found) == alone
    assert len(lost(found)) == result.failed <= 3


# ---- the main process ----------------------------------------------------------------------------


def options(config: StudyConfig) -> list[str]:
    """The command line of `config`."""
    names = ("n_trials", "epochs", "hidden_units", "sampler", "pruner", "report", "dataset")
    places = ("study_name", "model_name", "scheduler", "storage", "tracking_uri")
    return [
        word
        for name in (*names, *places)
        for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]


def test_what_runs_when_the_main_process_is_killed_is_finished_and_not_run_again(
    whole: Site, in_folder: Path, clouds: Path, alone: dict[int, Any]
) -> None:
    config = whole.settings(clouds)
    whole.dask.hold.touch()
    process = start(in_folder, *options(config))
    began = wait_until(lambda: len(found := running(whole, config)) == 3 and found, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    whole.dask.hold.unlink()
    result = pipeline.run(config)
    found = check(whole, in_folder, config)
    assert results(found) == alone
    assert result.failed == 0
    finished = {trial._trial_id for trial in found["trials"]}
    assert {trial for trial, *_ in began} <= finished
    assert len(finished) == TRIALS


def test_what_runs_at_the_second_ctrl_c_is_ended_and_stops_by_itself(
    whole: Site, in_folder: Path, clouds: Path
) -> None:
    config = whole.settings(clouds, epochs=100_000, n_trials=3)
    process = start(in_folder, *options(config))
    wait_until(lambda: len(running(whole, config)) == 3, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("stopping when"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted by Ctrl-C; run the same command again to go on\n"
    quick = whole.settings(clouds, n_trials=3, epochs=1)
    assert pipeline.run(quick).complete == 3  # so the workers are free again
    found = invariants.check(
        in_folder,
        0,
        study_name=config.study_name,
        model_name=config.model_name,
        registered=False,
        url=whole.postgres.url,
        tracking_uri=whole.mlflow.uri,
    )
    reasons = {trial.user_attrs["failure"] for trial in found["trials"]}
    assert reasons == {"interrupted by Ctrl-C"}
