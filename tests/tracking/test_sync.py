"""The next run repairs whatever is damaged in a finished study; the one after finds nothing wrong.

One small study is made once; every test gets a copy of its databases and damages it through
SQLite, MLflow or Optuna. The artifacts stay where the first study wrote them.
"""

import json
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import invariants
import optuna
import psutil
import pytest
from conftest import copy_databases
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

TRIALS = 4
pytestmark = pytest.mark.usefixtures("no_pictures")


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
        hidden_units="8",
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
    copy_databases(template.folder, in_folder)
    return Damaged(in_folder, template.config)


@pytest.mark.slow
def test_an_undamaged_study_is_left_alone(study: Damaged) -> None:
    before = invariants.dump(study.folder)
    assert pipeline.run(study.config).repaired == ()
    assert invariants.dump(study.folder) == before


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


# ---- damages to MLflow that cost no trial --------------------------------------------------------


def left_running(study: Damaged, number: int) -> None:
    study.client.update_run(study.run_of(number), status="RUNNING")


def wrong_status(study: Damaged, number: int) -> None:
    study.client.set_terminated(study.run_of(number), "FAILED")


def run_deleted(study: Damaged, number: int) -> None:
    study.client.delete_run(study.run_of(number))


def metrics_removed(study: Damaged, number: int) -> None:
    for table in ("metrics", "latest_metrics"):
        study.sql("mlflow.db", f"DELETE FROM {table} WHERE run_uuid = ?", study.run_of(number))


def param_removed(study: Damaged, number: int) -> None:
    query = "DELETE FROM params WHERE run_uuid = ? AND key = 'hidden_units'"
    study.sql("mlflow.db", query, study.run_of(number))


def state_tag_removed(study: Damaged, number: int) -> None:
    study.client.delete_tag(study.run_of(number), "optuna.trial_state")


def number_tag_removed(study: Damaged, number: int) -> None:
    study.client.delete_tag(study.run_of(number), "optuna.trial_number")


def extra_run_of_a_trial(study: Damaged, number: int) -> None:
    study.new_run(f"trial-{number:04d}", number)


def link_removed(study: Damaged, number: int) -> None:
    query = (
        "DELETE FROM trial_user_attributes WHERE key = 'mlflow_run_id' AND trial_id = "
        "(SELECT trial_id FROM trials WHERE number = ?)"
    )
    study.sql("study.db", query, number)


def retraining_left_running(study: Damaged, number: int) -> None:
    study.new_run(f"retrain-trial-{number:04d}", number)


def point_changed(study: Damaged, number: int) -> None:
    """In the middle of a curve: its end is as it was."""
    query = "UPDATE metrics SET value = 0.123 WHERE run_uuid = ? AND key = 'val_loss' AND step = 0"
    study.sql("mlflow.db", query, study.run_of(number))


def point_added(study: Damaged, number: int) -> None:
    study.client.log_metric(study.run_of(number), "val_accuracy", 0.123, step=9)


def param_changed(study: Damaged, number: int) -> None:
    query = "UPDATE params SET value = '7' WHERE run_uuid = ? AND key = 'hidden_units'"
    study.sql("mlflow.db", query, study.run_of(number))


def hung_elsewhere(study: Damaged, number: int) -> None:
    other = study.run_of(1 if number == 0 else 0)
    study.client.set_tag(study.run_of(number), "mlflow.parentRunId", other)


def run_of_no_trial(study: Damaged, _: int) -> None:
    study.new_run("trial-0077", 77)


def orphan_left_running(study: Damaged, _: int) -> None:
    study.client.set_tag(study.new_run("trial-0077", 77), "optuna.orphan", "true")


def parent_left_running(study: Damaged, _: int) -> None:
    study.client.update_run(study.parent(), status="RUNNING")


def parent_deleted(study: Damaged, _: int) -> None:
    study.client.delete_run(study.parent())


def second_production(study: Damaged, number: int) -> None:
    first = study.client.get_model_version("MNIST_DNN_Model", "1")
    second = study.client.create_model_version(
        "MNIST_DNN_Model", first.source, run_id=study.run_of(number)
    )
    study.client.transition_model_version_stage("MNIST_DNN_Model", second.version, "Production")


def no_production(study: Damaged, _: int) -> None:
    study.client.transition_model_version_stage("MNIST_DNN_Model", "1", "Archived")


Damage = Callable[[Damaged, int], None]
DIFFERS = "trial {0}: its run differs: "
SAID: dict[Damage, str] = {
    left_running: DIFFERS + "status is RUNNING, expected FINISHED",
    wrong_status: DIFFERS + "status is FAILED, expected FINISHED",
    run_deleted: "trial {0}: no run",
    metrics_removed: DIFFERS + "train_loss is None, expected ",
    param_removed: DIFFERS + "hidden_units is None, expected ",
    param_changed: DIFFERS + "hidden_units is 7, expected ",
    state_tag_removed: DIFFERS + "optuna.trial_state is None, expected COMPLETE",
    number_tag_removed: DIFFERS + "optuna.trial_number is None, expected {0}",
    extra_run_of_a_trial: "run trial-000{0} (",
    link_removed: "trial {0}: not linked to its run",
    hung_elsewhere: "trial {0}: its run is nested under another parent run",
    point_added: DIFFERS + "val_accuracy is 0.123, expected ",
    retraining_left_running: "run retrain-trial-000{0} (",
    run_of_no_trial: "run trial-0077 (",
    orphan_left_running: "run trial-0077 (",
    second_production: "version 2 of MNIST_DNN_Model: stage is Production, expected Archived",
    no_production: "version 1 of MNIST_DNN_Model: stage is Archived, expected Production",
    parent_left_running: "the parent run: left RUNNING",
    parent_deleted: "the study has no parent run in MLflow",
    point_changed: DIFFERS + "the curve of val_loss differs",
}
TOGETHER: list[dict[Damage, int]] = [  # which damages, each of which trial
    {left_running: 0, wrong_status: 1, run_deleted: 2, metrics_removed: 3, no_production: 0},
    {param_removed: 0, param_changed: 1, state_tag_removed: 2, number_tag_removed: 3}
    | {orphan_left_running: 0},
    {extra_run_of_a_trial: 0, link_removed: 1, hung_elsewhere: 2, point_added: 3},
    {retraining_left_running: 1, run_of_no_trial: 0, second_production: 2, parent_left_running: 0},
    {parent_deleted: 0},
]


@pytest.mark.slow
def test_every_damage_is_one(study: Damaged, template: Damaged) -> None:
    assert {damage for damages in TOGETHER for damage in damages} == SAID.keys() - {point_changed}
    for damage in SAID:
        copy_databases(template.folder, study.folder)
        damage(study, 1)
        with pytest.raises((AssertionError, KeyError)):
            invariants.check(study.folder, TRIALS)


def said(damages: dict[Damage, int], lines: Iterable[str]) -> dict[Damage, bool]:
    """Of which damages a line tells."""
    return {
        damage: any(line.startswith(SAID[damage].format(number)) for line in lines)
        for damage, number in damages.items()
    }


@pytest.mark.slow
def test_a_damaged_mirror_is_repaired_without_a_new_trial_or_version(study: Damaged) -> None:
    for damages in TOGETHER:
        for damage, number in damages.items():
            damage(study, number)
        result = pipeline.run(study.config)
        invariants.check(study.folder, TRIALS)
        assert result.ran == 0
        assert result.winner is not None
        assert (result.winner.version, result.winner.new) == (1, False)
        untold = {damage for damage, told in said(damages, result.repaired).items() if not told}
        assert untold <= {parent_left_running, parent_deleted}
        expected = tuple(SAID[damage].format(number) for damage, number in damages.items())
        assert all(line.startswith(expected) for line in result.repaired)  # nothing of before
    assert repair(study).repaired == ()


@pytest.mark.slow
def test_the_doctor_says_what_disagrees_and_repairs_it_only_when_told_to(study: Damaged) -> None:
    for damages in [*TOGETHER, {point_changed: 1}]:
        for damage, number in damages.items():
            damage(study, number)
        before = invariants.dump(study.folder)
        repaired, left = doctor(study.config, fix=False)
        assert repaired == []
        assert all(said(damages, left).values()), left
        assert len(left) == len(damages)
        assert invariants.dump(study.folder) == before

        repaired, left = doctor(study.config, fix=True)
        assert left == []
        assert all(said(damages, repaired).values()) or damages == {parent_deleted: 0}
        invariants.check(study.folder, TRIALS)
    before = invariants.dump(study.folder)
    assert doctor(study.config, fix=True) == ([], [])
    assert doctor(study.config, fix=False) == ([], [])
    opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert str(study.folder / "study.db") not in opened
    assert invariants.dump(study.folder) == before


def test_the_doctor_on_the_command_line(study: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "study mnist-dnn: both stores agree\n"
    left_running(study, 1)
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


@pytest.mark.slow
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


def leave_running(study: Damaged, number: int, pid: int, **owner: str) -> None:
    """Trial `number` as it is when its process, `pid`, dies before the end is written.

    owner: what else is noted of that process.
    """
    own = "trial_id = (SELECT trial_id FROM trials WHERE number = ?)"
    query = f"SELECT value_json FROM trial_user_attributes WHERE key = 'owner' AND {own}"
    noted = json.loads(study.sql("study.db", query, number)[0][0])
    study.sql(
        "study.db",
        f"UPDATE trial_user_attributes SET value_json = ? WHERE key = 'owner' AND {own}",
        json.dumps({**noted, "pid": pid, **owner}),
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
def test_trials_left_running_by_a_dead_process_or_on_another_host_fail_and_are_replaced(
    study: Damaged,
) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    old = invariants.check(study.folder, TRIALS)["trials"]
    leave_running(study, 1, process.pid)
    leave_running(study, 2, os.getppid(), host="elsewhere")  # this one runs the study
    result = repair(study)
    assert (result.ran, result.failed) == (2, 2)
    trials = invariants.check(study.folder, TRIALS)["trials"]
    assert len(trials) == TRIALS + 2
    for lost, again in ((1, TRIALS), (2, TRIALS + 1)):
        assert trials[lost].user_attrs["failure"].startswith("lost: ")
        assert (trials[again].params, trials[again].value) == (old[lost].params, old[lost].value)
        assert trials[again].user_attrs["place"] == lost


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
    left_running(study, 1)
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
