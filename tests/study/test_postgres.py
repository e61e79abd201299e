"""A study on PostgreSQL: made once, run by one process, its trials seen from all hosts."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import invariants
import optuna
import psycopg
import pytest
import sqlalchemy
from conftest import ROOT, wait_until
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from servers import BINARIES, Postgres, ask
from test_sqlite import SETTINGS, killed_after, python

from search import RunError, StudyConfig, pipeline
from search.report.progress import Progress
from search.study import postgres as server
from search.study import storage
from search.study.lock import find_holder, holds_study, promotion_lock, study_lock
from search.study.outline import OutlineStorage
from search.study.postgres import GRACE, ServerLock, retry_if_cut
from search.study.trials import (
    SlotTaken,
    SlottedStudy,
    TrialSummary,
    is_lost,
    owner_of_this_process,
    read_trial,
    trials_in_slot,
)

pytestmark = pytest.mark.skipif(not BINARIES, reason="no PostgreSQL is installed")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    postgres = Postgres()
    yield postgres
    postgres.remove()


@pytest.fixture
def url(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """A fresh database."""
    return postgres.create(f"d{abs(hash(request.node.name)) % 10**9}")


# ---- the first start -----------------------------------------------------------------------------

CREATE = """
import sys
from search.study import storage
print("ready", flush=True)
input()
storage.close(storage.open_storage(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_first_start_in_parallel_makes_one_database(url: str) -> None:
    processes = [python(CREATE, ROOT, url) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ends
    assert ask(url, "SELECT count(*) FROM version_info") == [(1,)]
    assert ask(url, "SELECT count(*) FROM alembic_version") == [(1,)]


KILL = """
import os, sys
from optuna.storages._rdb import storage as rdb
from search.study import storage
manager, after = rdb._VersionManager, sys.argv[2]
def stop(*arguments):
    print("there", flush=True)
    input()
setattr(manager, after, stop)
storage.open_storage(sys.argv[1])
"""


@pytest.mark.parametrize("point", ["_init_version_info_model", "_init_alembic"])
def test_a_first_start_that_is_killed_is_finished_by_the_next(url: str, point: str) -> None:
    process = python(KILL, ROOT, url, point)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.communicate()
    study = storage.open_study(StudyConfig(storage=url), SETTINGS)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert ask(url, "SELECT count(*) FROM alembic_version") == [(1,)]


# ---- the sole runner -----------------------------------------------------------------------------

HOLD = """
import signal, sys
from search.config.settings import StudyConfig
from search.study.lock import study_lock

with study_lock(StudyConfig(storage="URL")):
    print("held", flush=True)
    signal.pause()
"""


def test_the_server_knows_who_runs_a_study_until_that_is_gone(url: str, tmp_path: Path) -> None:
    config = StudyConfig(storage=url)
    assert find_holder(config) is None
    with killed_after(HOLD.replace("URL", url), tmp_path, "held") as holder:
        assert find_holder(config) == f"{socket.gethostname()[:40]}, pid {holder.pid}"
        with pytest.raises(RunError, match=f"is being run by .*, pid {holder.pid}; wait for it"):
            study_lock(config).__enter__()
        with study_lock(StudyConfig(storage=url, study_name="another")):
            assert not holds_study(config)
        holder.kill()
        holder.wait()
        with study_lock(config):
            assert holds_study(config)
    assert find_holder(config) is None


def test_a_restarted_server_forgets_its_locks_and_gives_them_again(
    url: str, postgres: Postgres
) -> None:
    config = StudyConfig(storage=url)
    with study_lock(config) as renew:
        renew()
        postgres.stop()
        postgres.start()
        assert find_holder(config) is None
        renew()
        assert holds_study(config)
        ask(url, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        faster = ServerLock(url, f"study {config.study_name}", "elsewhere, pid 1")
        assert faster.acquire(wait=False)
        with pytest.raises(RunError, match="is being run by elsewhere, pid 1; wait for it"):
            renew()
        faster.release()


# ---- heartbeats ----------------------------------------------------------------------------------


def slotted(url: str, **owner: Any) -> SlottedStudy:
    config = StudyConfig(storage=url)
    storage.open_study(config, SETTINGS)
    backend = OutlineStorage(storage.open_storage(url))
    study = SlottedStudy(study_name=config.study_name, storage=backend)
    study.attrs = {"place": 0, "owner": {**owner_of_this_process(), **owner}}
    return study


def test_a_trial_is_lost_when_it_has_no_heartbeat_for_a_minute(url: str) -> None:
    study = slotted(url, host="elsewhere")

    def state() -> bool:
        (trial,) = study.get_trials(deepcopy=False)
        return is_lost(study, trial)

    def age(seconds: int) -> None:
        back = f"now() AT TIME ZONE 'UTC' - interval '{seconds} s'"
        ask(url, f"UPDATE trial_heartbeats SET heartbeat = {back}")

    study.ask()  # in the same transaction with its first heartbeat
    assert not state()
    age(GRACE - 20)
    assert not state()
    age(GRACE + 1)
    assert state()
    study._storage.record_heartbeat(study.trials[0]._trial_id)
    assert not state()
    ask(url, "DELETE FROM trial_heartbeats")
    assert state()


def test_who_promotes_may_repair_stages_meanwhile(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = StudyConfig(storage=url)
    with promotion_lock(config), promotion_lock(config):
        other = ServerLock(url, f"model {config.model_name} of {config.tracking_uri}")
        assert not other.acquire(wait=False)
    assert other.acquire(wait=False)
    other.release()


def test_every_connection_is_in_one_time_zone_whatever_the_servers_is(url: str) -> None:
    ask(url, f"ALTER DATABASE {url.rsplit('/', 1)[1]} SET timezone TO 'Pacific/Auckland'")
    assert ask(url, "SHOW timezone") == [("Pacific/Auckland",)]
    opened = storage.open_storage(url)
    with contextlib.ExitStack() as stack:  # those that opening it left, and a new one
        connections = [stack.enter_context(opened.engine.connect()) for _ in range(4)]
        zones = {c.execute(sqlalchemy.text("SHOW timezone")).scalar() for c in connections}
    storage.close(opened)
    assert zones == {"UTC"}


@pytest.mark.slow
def test_a_running_trial_sends_heartbeats_also_after_the_server_was_away(
    url: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEARTBEAT", 1)
    study = slotted(url)
    last = "SELECT heartbeat FROM trial_heartbeats"

    def wait_for_another() -> None:
        before = ask(url, last)
        wait_until(lambda: ask(url, last) != before)

    def objective(trial: optuna.Trial) -> float:
        wait_for_another()
        postgres.stop()
        postgres.start()
        wait_for_another()
        return 1.0

    study.optimize(objective, n_trials=1)
    assert study.trials[0].state is TrialState.COMPLETE


def test_optuna_itself_fails_no_trial_without_a_reason(url: str) -> None:
    study = slotted(url, host="elsewhere")
    study.ask()
    ask(url, "UPDATE trial_heartbeats SET heartbeat = now() - interval '1 day'")
    study.attrs = {"place": 1, "owner": owner_of_this_process()}
    study.optimize(lambda _: 1.0, n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE"]


@pytest.mark.slow
def test_a_worker_reads_of_a_server_what_it_reads_of_a_file(url: str) -> None:
    study = slotted(url)
    every = optuna.load_study(study_name=study.study_name, storage=storage.open_storage(url))
    for slot, value in enumerate((0.5, float("inf"), None)):
        study.attrs = {**study.attrs, "place": slot}
        trial = study.ask()
        trial.suggest_categorical("units", [8, 16])
        trial.suggest_float("rate", 1e-4, 1e-2, log=True)
        trial.report(float("nan"), 0)
        trial.set_user_attr("history", [])
        if value is not None:
            study.tell(trial, value)
    for whole, outline in zip(every.trials, study.trials, strict=True):
        for name in ("number", "state", "values", "params", "distributions"):
            assert getattr(outline, name) == getattr(whole, name), name
        slot = whole.number
        assert [trial.number for trial in trials_in_slot(study, slot)] == [slot]
        assert "history" in read_trial(study, slot).user_attrs.keys() - outline.user_attrs
    storage.close_study(every)


# ---- a slot is run once --------------------------------------------------------------------------


def test_of_two_trials_started_in_one_slot_the_first_goes_on(url: str) -> None:
    first, second = slotted(url), slotted(url, host="elsewhere")
    first.ask()
    with pytest.raises(SlotTaken):
        second.ask()
    mine, theirs = first.trials
    assert (mine.state, theirs.state) == (TrialState.RUNNING, TrialState.FAIL)
    failure = read_trial(first, theirs.number).user_attrs["failure"]
    assert failure == "trial 0 was started in the same slot a moment earlier"
    first.tell(0, 1.0)
    with pytest.raises(SlotTaken):
        first.ask()
    second.attrs = {**second.attrs, "place": 1}
    assert second.ask().number == 3


def test_a_trial_whose_start_a_cut_connection_hid_is_ended(url: str) -> None:
    study = slotted(url)
    study.ask()  # what a connection hides that is cut after the commit
    study.ask()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING"]
    assert read_trial(study, 0).user_attrs["failure"].startswith("a cut connection hid its start")


def test_an_end_that_was_written_unheard_is_no_error(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = slotted(url)
    study.ask()
    original, calls = optuna.storages.RDBStorage.set_trial_state_values, 0

    def cut(*arguments: Any, **keywords: Any) -> bool:
        nonlocal calls
        calls += 1
        done = original(*arguments, **keywords)
        if calls == 1:
            cause = sqlalchemy.exc.OperationalError(
                "", {}, Exception(), connection_invalidated=True
            )
            raise StorageInternalError("cut") from cause
        return done

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", cut)
    study.tell(0, 0.5)
    assert (calls, study.trials[0].value) == (2, 0.5)


# ---- cut connections -----------------------------------------------------------------------------


def test_a_silent_address_is_tried_more_than_once_while_a_server_may_restart() -> None:
    for driver in ("psycopg", "psycopg2"):
        arguments = server.connect_arguments(f"postgresql+{driver}://study@host/study")
        assert 3 * arguments["connect_timeout"] < 30
    assert server.connect_arguments("sqlite:///study.db") == {}


def test_a_connection_that_is_cut_while_connecting_is_opened_again(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    tries: list[int] = []

    def cut_the_first(connection: Any, _: Any) -> None:
        tries.append(connection.info.backend_pid)
        if len(tries) == 1:
            ask(url, f"SELECT pg_terminate_backend({tries[0]})")
        connection.execute("SELECT 1")

    sqlalchemy.event.listen(engine, "connect", cut_the_first)

    @retry_if_cut
    def look() -> Any:
        with engine.connect() as connection:
            return connection.execute(sqlalchemy.text("SELECT 1")).scalar()

    assert look() == 1
    assert len(tries) == 2
    engine.dispose()


@pytest.mark.slow
def test_connections_that_are_cut_in_the_middle_of_statements_lose_nothing(
    url: str, in_folder: Path, clouds: Path
) -> None:
    over = threading.Event()
    cuts = 0
    name = url.rsplit("/", 1)[1]

    written = "SELECT " + " + ".join(
        f"(SELECT count(*) FROM {table})"
        for table in ("trials", "trial_user_attributes", "trial_intermediate_values")
    )

    others = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        f"WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )

    def cut() -> None:
        nonlocal cuts
        seen = 0
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
            # However slow the machine, something is written between two cuts.
            while not over.wait(0.02):
                (rows,) = connection.execute(written).fetchone() or (0,)
                if rows != seen:
                    seen = rows
                    (cut,) = connection.execute(others).fetchone() or (0,)
                    cuts += cut

    cutting = threading.Thread(target=cut)

    class Starting(Progress):
        def trial(self, outcome: TrialSummary, best: float | None) -> None:
            if outcome.number == 0:
                cutting.start()

    config = StudyConfig(
        dataset=str(clouds),
        n_trials=3,
        epochs=12,
        hidden_units="8",
        report="none",
        baselines="none",
        workers=1,
        storage=url,
    )
    try:
        pipeline.run(config, Starting())
    finally:
        over.set()
        cutting.join()
    assert cuts > 30
    found = invariants.check(in_folder, 3, url=url)
    assert pipeline.run(config).repaired == ()
    finished = {TrialState.COMPLETE, TrialState.PRUNED}
    unheard = [trial for trial in found["trials"] if trial.state not in finished]
    assert all("a cut connection hid" in trial.user_attrs["failure"] for trial in unheard)
