"""The next run repairs whatever is damaged in a finished study; the one after finds nothing wrong.

One small study is made once; every test gets a copy of its databases and damages it through
SQLite, MLflow or Optuna. The artifacts stay where the first study wrote them.
"""

import json
import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import invariants
import optuna
import psutil
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from search import cli, pipeline
from search.config.settings import StudyConfig
from search.errors import RunError
from search.report.progress import Result
from search.study import storage as storage_module
from search.study import trials as storage
from search.study.lock import study_lock
from search.tracking.runs import Tracking
from search.tracking.sync import doctor

TRIALS = 6


@dataclass
class Damaged:
    """A copy of the finished study, for a test to damage."""

    folder: Path
    config: StudyConfig

    @property
    def client(self) -> MlflowClient:
        uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        return MlflowClient(uri, registry_uri=uri)

    def sql(self, name: str, statement: str, *values: Any) -> list[Any]:
        """Execute `statement` on the database `name`; it must change or find something."""
        with closing(sqlite3.connect(self.folder / name)) as database:
            cursor = database.execute(statement, values)
            rows = cursor.fetchall()
            database.commit()
            assert cursor.rowcount > 0 or rows
            return rows

    def parent(self) -> str:
        query = "SELECT value_json FROM study_user_attributes WHERE key = 'mlflow_run_id'"
        return str(json.loads(self.sql("study.db", query)[0][0]))

    def run_of(self, number: int) -> str:
        query = (
            "SELECT value_json FROM trial_user_attributes JOIN trials USING (trial_id) "
            "WHERE key = 'mlflow_run_id' AND number = ?"
        )
        return str(json.loads(self.sql("study.db", query, number)[0][0]))

    def new_run(self, name: str, number: int) -> str:
        """A nested run that nobody ended."""
        tags = {"mlflow.parentRunId": self.parent(), "optuna.trial_number": str(number)}
        experiment = self.client.get_run(self.parent()).info.experiment_id
        return str(self.client.create_run(experiment, run_name=name, tags=tags).info.run_id)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> Damaged:
    folder = tmp_path_factory.mktemp("template")
    config = StudyConfig(
        dataset=str(clouds),
        epochs=2,
        n_trials=TRIALS,
        workers=1,
        hidden_units="8,16",
        report="none",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        pipeline.run(config)
    invariants.check(folder, TRIALS)
    return Damaged(folder, config)


@pytest.fixture
def study(template: Damaged, in_folder: Path) -> Damaged:
    for name in ("study.db", "mlflow.db"):
        with (
            closing(sqlite3.connect(template.folder / name)) as source,
            closing(sqlite3.connect(in_folder / name)) as copy,
        ):
            source.backup(copy)
    return Damaged(in_folder, template.config)


def repair(study: Damaged) -> Result:
    """Run the study: afterwards all must hold, and running it once more must change nothing."""
    result = pipeline.run(study.config)
    invariants.check(study.folder, TRIALS)
    before = invariants.dump(study.folder)
    again = pipeline.run(study.config)
    assert (again.repaired, again.ran) == ((), 0)
    assert again.winner is not None
    assert not again.winner.new
    assert invariants.dump(study.folder) == before
    return result


def test_an_undamaged_study_is_left_alone(study: Damaged) -> None:
    before = invariants.dump(study.folder)
    assert repair(study).repaired == ()
    assert invariants.dump(study.folder) == before


# ---- damages to MLflow that cost no trial --------------------------------------------------------


def left_running(study: Damaged) -> None:
    study.client.update_run(study.run_of(1), status="RUNNING")


def wrong_status(study: Damaged) -> None:
    study.client.set_terminated(study.run_of(1), "FAILED")


def run_deleted(study: Damaged) -> None:
    study.client.delete_run(study.run_of(1))


def metrics_removed(study: Damaged) -> None:
    for table in ("metrics", "latest_metrics"):
        study.sql("mlflow.db", f"DELETE FROM {table} WHERE run_uuid = ?", study.run_of(1))


def param_removed(study: Damaged) -> None:
    query = "DELETE FROM params WHERE run_uuid = ? AND key = 'hidden_units'"
    study.sql("mlflow.db", query, study.run_of(1))


def state_tag_removed(study: Damaged) -> None:
    study.client.delete_tag(study.run_of(1), "optuna.trial_state")


def number_tag_removed(study: Damaged) -> None:
    study.client.delete_tag(study.run_of(1), "optuna.trial_number")


def extra_run_of_a_trial(study: Damaged) -> None:
    study.new_run("trial-0001", 1)


def run_of_no_trial(study: Damaged) -> None:
    study.new_run("trial-0077", 77)


def orphan_left_running(study: Damaged) -> None:
    study.client.set_tag(study.new_run("trial-0077", 77), "optuna.orphan", "true")


def link_removed(study: Damaged) -> None:
    query = (
        "DELETE FROM trial_user_attributes WHERE key = 'mlflow_run_id' AND trial_id = "
        "(SELECT trial_id FROM trials WHERE number = 1)"
    )
    study.sql("study.db", query)


def retraining_left_running(study: Damaged) -> None:
    study.new_run("retrain-trial-0001", 1)


def parent_left_running(study: Damaged) -> None:
    study.client.update_run(study.parent(), status="RUNNING")


def point_changed(study: Damaged) -> None:
    """In the middle of a curve: its end is as it was."""
    query = "UPDATE metrics SET value = 0.123 WHERE run_uuid = ? AND key = 'val_loss' AND step = 0"
    study.sql("mlflow.db", query, study.run_of(1))


def point_added(study: Damaged) -> None:
    study.client.log_metric(study.run_of(1), "val_accuracy", 0.123, step=9)


def param_changed(study: Damaged) -> None:
    query = "UPDATE params SET value = '7' WHERE run_uuid = ? AND key = 'hidden_units'"
    study.sql("mlflow.db", query, study.run_of(1))


def hung_elsewhere(study: Damaged) -> None:
    study.client.set_tag(study.run_of(1), "mlflow.parentRunId", study.run_of(2))


def parent_deleted(study: Damaged) -> None:
    study.client.delete_run(study.parent())


def second_production(study: Damaged) -> None:
    first = study.client.get_model_version("MNIST_DNN_Model", "1")
    second = study.client.create_model_version(
        "MNIST_DNN_Model", first.source, run_id=study.run_of(1)
    )
    study.client.transition_model_version_stage("MNIST_DNN_Model", second.version, "Production")


def no_production(study: Damaged) -> None:
    study.client.transition_model_version_stage("MNIST_DNN_Model", "1", "Archived")


DAMAGES = [
    left_running,
    wrong_status,
    run_deleted,
    metrics_removed,
    param_removed,
    param_changed,
    state_tag_removed,
    number_tag_removed,
    extra_run_of_a_trial,
    run_of_no_trial,
    orphan_left_running,
    link_removed,
    hung_elsewhere,
    point_added,
    second_production,
    no_production,
    retraining_left_running,
    parent_left_running,
    parent_deleted,
]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mirror_is_repaired_without_a_new_trial_or_version(
    study: Damaged, damage: Callable[[Damaged], None]
) -> None:
    damage(study)
    with pytest.raises((AssertionError, KeyError)):
        invariants.check(study.folder, TRIALS)
    result = repair(study)
    assert result.ran == 0
    assert result.winner is not None
    assert (result.winner.version, result.winner.new) == (1, False)
    assert result.repaired or damage in (parent_left_running, parent_deleted)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*DAMAGES, point_changed])
def test_the_doctor_says_what_disagrees_and_repairs_it_only_when_told_to(
    study: Damaged, damage: Callable[[Damaged], None]
) -> None:
    damage(study)
    before = invariants.dump(study.folder)
    repaired, left = doctor(study.config, fix=False)
    assert repaired == []
    assert left
    assert invariants.dump(study.folder) == before

    repaired, left = doctor(study.config, fix=True)
    assert left == []
    assert repaired or damage is parent_deleted
    invariants.check(study.folder, TRIALS)
    before = invariants.dump(study.folder)
    assert doctor(study.config, fix=True) == ([], [])
    assert doctor(study.config, fix=False) == ([], [])
    assert invariants.dump(study.folder) == before


def test_the_doctor_on_the_command_line(study: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "study mnist-dnn: both stores agree\n"
    left_running(study)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "trial 1: its run differs: status is RUNNING, expected FINISHED\n" in out
    assert "1 disagreement; repair with python study.py doctor --fix\n" in out
    assert cli.main(["doctor", "--fix"]) == 0
    out = capsys.readouterr().out
    assert "repaired: trial 1: its run differs: status is RUNNING, expected FINISHED\n" in out
    assert out.endswith("both stores agree\n")
    assert cli.main(["doctor", "--study-name", "other"]) == 2
    assert "has none named other" in capsys.readouterr().err
    assert cli.main(["--study-name", "other", "doctor"]) == 2
    assert "--study-name must come after the verb" in capsys.readouterr().err


def test_a_failure_that_an_earlier_version_stored_raw_is_repaired_shown_and_reported(
    study: Damaged, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = "ValueError: \x1b[31mrot\x00 \ud800 größer 模型\nnext"
    shown = r"ValueError: \x1b[31mrot\x00 \ud800 größer 模型\nnext"
    own = storage_module.load_study(study.config)
    attributes = {**own.trials[-1].user_attrs, "failure": raw}
    for name in ("mlflow_run_id", "history"):
        attributes.pop(name, None)
    own.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes))
    assert cli.main(["doctor", "--fix"]) == 0
    run = study.client.get_run(study.run_of(TRIALS))
    assert run.data.tags["optuna.failure"] == shown
    study.client.set_tag(run.info.run_id, "optuna.failure", "\x1b[31mrot")
    assert cli.main(["doctor", "--fix"]) == 0
    assert cli.main(["doctor"]) == 0
    assert cli.main(["show"]) == 0
    assert cli.main(["report", "--output", "new.html"]) == 0
    out = capsys.readouterr().out
    assert f"trial {TRIALS}: {shown}\n" in out
    assert not {"\x1b", "\x00", "\ud800"} & set(out)
    assert shown in (study.folder / "new.html").read_text(encoding="utf-8")


def test_the_doctor_creates_nothing(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--fix"]) == 2
    assert "has none named mnist-dnn" in capsys.readouterr().err
    assert list(in_folder.iterdir()) == []


def test_the_doctor_waits_for_the_end_of_a_run(study: Damaged) -> None:
    with (
        study_lock(study.config),
        pytest.raises(RunError, match="is being run by"),
    ):
        doctor(study.config, fix=True)


@pytest.mark.slow
def test_a_parent_run_that_is_gone_for_good_is_created_again_and_takes_its_runs(
    study: Damaged,
) -> None:
    gone = study.parent()
    for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
        query = f"DELETE FROM {table} WHERE run_uuid = ?"
        with closing(sqlite3.connect(study.folder / "mlflow.db")) as database:
            database.execute(query, (gone,))
            database.commit()
    before = [study.run_of(number) for number in range(TRIALS)]
    result = repair(study)
    assert result.ran == 0
    assert result.parent_run_id != gone
    assert len(result.repaired) == TRIALS + 1  # and the parent run's metrics of the baselines
    assert [study.run_of(number) for number in range(TRIALS)] == before


@pytest.mark.slow
def test_a_lost_mlflow_database_is_rebuilt_and_the_model_registered_again(study: Damaged) -> None:
    (study.folder / "mlflow.db").unlink()
    result = repair(study)
    assert result.ran == 0
    assert len(result.repaired) == TRIALS + 1  # and the parent run's metrics of the baselines
    assert result.winner is not None
    assert (result.winner.version, result.winner.new) == (1, True)
    assert (study.folder / "mlruns").is_dir()


# ---- lost trials ---------------------------------------------------------------------------------


def leave_running(study: Damaged, number: int, pid: int) -> None:
    """Trial `number` as it is when its process, `pid`, dies before the end is written."""
    own = "trial_id = (SELECT trial_id FROM trials WHERE number = ?)"
    query = f"SELECT value_json FROM trial_user_attributes WHERE key = 'owner' AND {own}"
    owner = {**json.loads(study.sql("study.db", query, number)[0][0]), "pid": pid}
    study.sql(
        "study.db",
        f"UPDATE trial_user_attributes SET value_json = ? WHERE key = 'owner' AND {own}",
        json.dumps(owner),
        number,
    )
    study.sql("study.db", f"DELETE FROM trial_values WHERE {own}", number)
    study.sql(
        "study.db",
        f"UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE {own}",
        number,
    )
    study.client.update_run(study.run_of(number), status="RUNNING")
    study.client.set_tag(study.run_of(number), "optuna.trial_state", "RUNNING")


@pytest.mark.slow
def test_a_trial_left_running_by_a_dead_process_fails_and_is_replaced(study: Damaged) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    old = invariants.check(study.folder, TRIALS)["trials"]
    leave_running(study, 2, process.pid)
    result = repair(study)
    assert (result.ran, result.failed) == (1, 1)
    trials = invariants.check(study.folder, TRIALS)["trials"]
    assert trials[2].user_attrs["failure"].startswith("lost: ")
    assert (trials[6].params, trials[6].value) == (old[2].params, old[2].value)
    assert trials[6].user_attrs["place"] == 2


@pytest.mark.slow
def test_a_trial_left_running_on_another_host_is_lost_because_this_one_runs_the_study(
    study: Damaged,
) -> None:
    leave_running(study, 2, os.getppid())
    query = (
        "UPDATE trial_user_attributes SET value_json = json_set(value_json, '$.host', 'elsewhere') "
        "WHERE key = 'owner'"
    )
    study.sql("study.db", query)
    assert (repair(study).ran, len(invariants.check(study.folder, TRIALS)["trials"])) == (1, 7)


def test_a_trial_that_somebody_enqueued_is_left_alone(study: Damaged) -> None:
    with_waiting = optuna.load_study(study_name="mnist-dnn", storage="sqlite:///study.db")
    with_waiting.enqueue_trial({"hidden_units": 8})
    assert pipeline.run(study.config).repaired == ()
    assert doctor(study.config, fix=True) == ([], [])
    assert with_waiting.get_trials()[-1].state.name == "WAITING"


@pytest.mark.slow
def test_a_server_that_fails_while_repairing_leaves_no_run_twice(
    study: Damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_repaired = Tracking.repair
    failures = iter([True])

    def failing(*arguments: Any) -> None:
        if next(failures, False):
            raise MlflowException("the server is down")
        leave_repaired(*arguments)

    monkeypatch.setattr(Tracking, "repair", failing)
    left_running(study)
    with pytest.raises(RunError, match="the server is down"):
        pipeline.run(study.config)
    assert repair(study).ran == 0
    assert len(study.client.search_runs(["1"])) == TRIALS + 2


@pytest.mark.slow
def test_a_trial_of_a_living_process_is_waited_for(
    study: Damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = subprocess.Popen(["sleep", "300"])
    leave_running(study, 2, living.pid)
    started = str(psutil.Process(living.pid).create_time())
    query = (
        "UPDATE trial_user_attributes SET value_json = json_set(json_remove(value_json, "
        "'$.ticks'), '$.started', json(?)) WHERE key = 'owner'"
    )
    study.sql("study.db", query, started)  # as an earlier version marked it
    looked: list[bool] = []
    is_lost = storage.is_lost

    def look(*arguments: Any) -> bool:
        looked.append(is_lost(*arguments))
        if len(looked) == 5:
            living.kill()
            living.wait()
        return looked[-1]

    for module in ("tracking.sync", "study.trials"):
        monkeypatch.setattr(f"search.{module}.is_lost", look)
    result = pipeline.run(study.config)
    assert looked[:5] == [False] * 5
    assert looked[5]
    assert (result.ran, result.failed) == (1, 1)
    invariants.check(study.folder, TRIALS)
