"""What `show` says, of real databases."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import ROOT, TRIALS
from in_process import command
from optuna.trial import TrialState, create_trial
from servers import MlflowServer

from search import StudyConfig
from search.report import overview
from search.study import sampling, storage


def test_show_is_what_the_databases_hold(finished: dict[str, Any]) -> None:
    code, out, err = command(finished["folder"], "show", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    states = [trial.state for trial in finished["trials"]]
    assert shown["complete"] == states.count(TrialState.COMPLETE)
    assert shown["pruned"] == states.count(TrialState.PRUNED)
    assert (shown["schema"], shown["study"], shown["failures"]) == (2, "mnist-dnn", [])
    assert (shown["running"], shown["unfinished"]) == (None, 0)
    assert shown["parent_run_id"] == finished["parent"].info.run_id

    best = finished["study"].best_trial
    assert shown["best"]["number"] == shown["top"][0]["number"] == best.number
    assert shown["best"]["value"] == best.value
    assert shown["best"]["hyperparameters"] == best.params
    assert shown["best"]["run_id"] == finished["runs"][best.number].info.run_id
    complete = [t.value for t in finished["trials"] if t.state is TrialState.COMPLETE]
    assert [row["value"] for row in shown["top"]] == sorted(complete, reverse=True)[:10]
    assert shown["reference"]["number"] == 0
    saved = sum(3 - len(trial.intermediate_values) for trial in finished["trials"])
    assert shown["saved"]["epochs"] == saved
    assert shown["importances"]["trials"] == TRIALS
    assert sum(shown["importances"]["shares"].values()) == pytest.approx(1)
    winner = finished["winner"]
    assert shown["production"] == {
        "model": "MNIST_DNN_Model",
        "version": 1,
        "run_id": winner.info.run_id,
        "study": "mnist-dnn",
        "trial": best.number,
        "metrics": {k: v for k, v in winner.data.metrics.items() if k.startswith("test_")},
    }
    assert (shown["objective"], shown["direction"]) == ("val_accuracy", "maximize")
    history = finished["trials"][best.number].user_attrs["history"]
    assert shown["best"]["metrics"].items() <= history[-1].items()
    assert {"train_loss", "val_loss", "val_f1", "val_auc"} < shown["best"]["metrics"].keys()


@pytest.mark.slow
def test_the_schema_in_the_docs_is_the_one_printed(finished: dict[str, Any]) -> None:
    shown = json.loads(command(finished["folder"], "show", "--json")[1])
    page = (ROOT / "docs" / "results.md").read_text()
    listed = page.split("### The JSON of `show --json`")[1].split("\n## ")[0]
    for key in (*shown, *shown["best"], *shown["production"], *shown["importances"]):
        assert f"`{key}`" in listed


@pytest.mark.slow
def test_show_takes_less_than_two_seconds_and_loads_no_tensorflow(
    finished: dict[str, Any],
) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['study.py', 'show']\n"
        f"try: runpy.run_path({str(ROOT / 'study.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )

    def seconds() -> float:
        """Of processor: other tests run beside this one."""
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=finished["folder"], capture_output=True, text=True
        )
        after = os.times()
        assert done.returncode == 0, done.stderr
        assert "Study mnist-dnn" in done.stdout
        assert not {"tensorflow", "keras", "mlflow"} & set(done.stdout.splitlines()[-1].split())
        return sum(after[2:4]) - sum(before[2:4])

    assert any(seconds() < 2.0 for _ in range(3))


def test_show_changes_nothing(finished: dict[str, Any]) -> None:
    def content() -> list[list[str]]:
        found = []
        for name in ("study.db", "mlflow.db"):
            with closing(sqlite3.connect(finished["folder"] / name)) as database:
                found.append(list(database.iterdump()))
        return found

    before = content(), sorted(path.name for path in finished["folder"].iterdir())
    assert command(finished["folder"], "show")[0] == 0
    assert (content(), sorted(path.name for path in finished["folder"].iterdir())) == before


def test_the_password_of_a_server_is_shown_nowhere(finished: dict[str, Any]) -> None:
    server = MlflowServer(finished["folder"])
    secret = "hunter2 'of' \"mine\""
    uri = server.uri.replace("//", f"//someone:{secret}@")
    try:
        for verb in (("show", "--json"), ("show",)):
            code, out, err = command(finished["folder"], *verb, "--tracking-uri", uri)
            assert (code, err) == (0, "")
            assert "hunter2" not in out
            assert "mine" not in out
            assert verb == ("show",) or json.loads(out)["tracking_uri"].startswith(
                "http://someone:***@127"
            )
    finally:
        server.stop()


def test_a_server_that_is_gone_is_one_line_without_its_password(finished: dict[str, Any]) -> None:
    began = time.monotonic()
    gone = ("--tracking-uri", "http://someone:hunter2@127.0.0.1:9")
    for verb in ("show", "report", "ui"):
        code, out, err = command(finished["folder"], verb, *gone)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert "must be a running MLflow server" in err
        assert "hunter2" not in err
    assert time.monotonic() - began < 60


def test_a_reader_that_stops_reading_gets_no_traceback(finished: dict[str, Any]) -> None:
    for verb in ("show", "show --json"):
        shell = f"{sys.executable} {ROOT / 'study.py'} {verb} | true"
        done = subprocess.run(
            ["bash", "-c", shell], cwd=finished["folder"], capture_output=True, text=True
        )
        assert done.stderr == ""


def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "show")
    assert (code, out) == (2, "")
    assert err.startswith("error: --study-name must be a study of this tool")
    assert list(tmp_path.iterdir()) == []


def test_trials_are_compared_after_the_last_epoch_that_all_of_them_have() -> None:
    study = optuna.create_study(direction="maximize")
    distributions = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for number, values in enumerate([(0.1, 0.2, 0.3), (0.4, 0.5), (0.6, 0.7, 0.8)]):
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if len(values) == 3 else TrialState.PRUNED,
                value=values[-1] if len(values) == 3 else None,
                params={"x": number / 10},
                distributions=distributions,
                intermediate_values=dict(enumerate(values)),
            )
        )
    epoch, copy = overview.comparable(study)
    assert epoch == 2
    assert [(trial.params["x"], trial.value) for trial in copy.trials] == [
        (0.0, 0.2),
        (0.1, 0.5),
        (0.2, 0.7),
    ]


def test_importances_need_trials_and_something_that_varies() -> None:
    import optuna

    study = optuna.create_study(direction="maximize")
    config = StudyConfig(hidden_units="8", dropout_rate="0.1", learning_rate="0.001:0.01")
    for number in range(12):
        assert (overview.importances_of(study) is not None) == (number >= 10)
        study.add_trial(
            create_trial(
                value=number / 20,
                params={
                    "hidden_units": 8,
                    "dropout_rate": 0.1,
                    "learning_rate": 0.002 + number / 2000,
                },
                distributions=dict(sampling.distributions(config.space)),
                intermediate_values={0: number / 20},
            )
        )
    found = overview.importances_of(study)
    assert found is not None
    assert found.shares == {"learning_rate": 1.0}


@pytest.mark.parametrize("best", [0.5, 0.75])
def test_trials_of_one_value_have_no_importances_in_any_view(
    in_folder: Path, capsys: pytest.CaptureFixture[str], best: float
) -> None:
    from rich.console import Console

    from search.report.html import build_html, draw_charts
    from search.report.text import show

    config = StudyConfig()
    study = storage.open_study(config, config.settings("mnist (0123456789ab)"))
    study.set_user_attr("facts", {})
    for number in range(12):
        value = 0.5 if number else best
        study.add_trial(
            create_trial(
                value=value,
                params={
                    "hidden_units": 128 * 2 ** (number % 4),
                    "dropout_rate": number / 40,
                    "learning_rate": 0.001 + number / 10_000,
                },
                distributions=dict(sampling.distributions(config.space)),
                intermediate_values={0: value},
                user_attrs={"history": [{"epoch": 0, "val_accuracy": value}]},
            )
        )
    found = overview.read(config)
    assert found.importances is None
    assert found.as_json()["importances"] is None
    show(Console(), found)
    assert "Importance" not in capsys.readouterr().out
    page = build_html(study, found, draw_charts(study, found), None)
    assert "All hyperparameters together" in page
    assert "the most important is" not in page
