"""A study that an earlier version stored is shown, repaired, resumed and reproduced.

studies/DATE.zip holds both databases, the artifacts and the data of a run of that day's version,
which SIGKILL ended in trial 10 of 14, after an earlier run had registered the best of 8. Its
`resumed.json` is what that version itself went on with: trials 11 to 14.
"""

import json
import os
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest
from in_process import command

from search.data.load import load_dataset
from search.data.preparation import scaled
from search.training import environment

ARCHIVES = sorted((Path(__file__).parent / "studies").glob("*.zip"))
MADE_IN = "/where/it/was/made"  # stands for the folder in the archive
NAMES = ("--study-name", "flowers", "--model-name", "Flowers")
SAME = (
    *(*NAMES, "--dataset", "flowers.npz", "--hidden-units", "4,8", "--hidden-layers", "1:2"),
    *("--optimizer", "adam,sgd", "--epochs", "6", "--workers", "1", "--report", "none"),
    *("--seed", "3", "--finalists", "1", "--repeats", "2"),
)


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def stored(request: pytest.FixtureRequest, in_folder: Path) -> Path:
    """A folder with the stored study, whose artifacts are where the databases say."""
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(in_folder)
    for name in ("study.db", "mlflow.db"):
        with closing(sqlite3.connect(in_folder / name)) as database, database:
            tables = "SELECT name FROM sqlite_master WHERE type = 'table'"
            for (table,) in database.execute(tables).fetchall():
                for _, column, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                    database.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                        f'WHERE "{column}" LIKE ?',
                        (MADE_IN, str(in_folder), f"%{MADE_IN}%"),
                    )
    return in_folder


def on_the_same_processor(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the last digits must be those of then."""
    return bool(trial.user_attrs["environment"] == environment.here())


def contents(folder: Path) -> list[str]:
    """Both databases as SQL."""
    lines: list[str] = []
    for name in ("study.db", "mlflow.db"):
        with closing(sqlite3.connect(folder / name)) as database:
            lines += database.iterdump()
    return lines


def trials() -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="flowers", storage="sqlite:///study.db").trials


def test_a_stored_study_is_shown(stored: Path) -> None:
    before = contents(stored)
    code, out, err = command(stored, "show", *NAMES, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["complete"], found["pruned"], found["unfinished"]) == (7, 3, 1)
    assert found["best"]["number"] == 0
    assert found["registered"] == "Flowers/1"
    assert (found["baselines"], found["against_baseline"]) == ([], None)
    assert found["finalists"][0]["mean"] == pytest.approx(0.5278, abs=1e-4)
    assert found["production"]["metrics"]["test_accuracy"] == pytest.approx(0.45)
    assert contents(stored) == before


@pytest.mark.slow
def test_a_stored_study_is_repaired(stored: Path) -> None:
    code, out, _ = command(stored, "doctor", *NAMES)
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("trial 10: ")
    assert lines[1].startswith("the parent run: ")
    assert len(lines) == 3
    assert command(stored, "doctor", "--fix", *NAMES)[0] == 0
    assert command(stored, "doctor", *NAMES)[0] == 0


@pytest.mark.slow
def test_a_stored_study_is_resumed_as_the_version_that_stored_it_did(stored: Path) -> None:
    code, out, err = command(stored, *SAME, "--n-trials", "14")
    assert (code, err) == (0, ""), out
    expected = json.loads((stored / "resumed.json").read_text())
    found = trials()
    assert len(found) == 15
    assert found[10].state.name == "FAIL"
    for number, then in expected.items():
        trial = found[int(number)]
        history: list[dict[str, Any]] = trial.user_attrs["history"]
        # Later versions have added metrics.
        now = [{k: v for k, v in entry.items() if k in then["history"][0]} for entry in history]
        if on_the_same_processor(found[0]):
            assert trial.params == then["params"]
            assert (trial.state.name, now) == (then["state"], then["history"])
        assert list(trial.params) == list(then["params"])
        assert now[0].keys() == then["history"][0].keys()
    assert "Already registered as Flowers version 1" in out
    assert command(stored, "doctor", *NAMES)[0] == 0


@pytest.mark.slow
def test_a_trial_of_a_stored_study_is_reproduced(stored: Path) -> None:
    code, out, err = command(stored, "reproduce", "--study-name", "flowers", "--trial", "3")
    assert err == ""
    if on_the_same_processor(trials()[3]):
        assert code == 0, out
        assert "the same to the last digit" in out
    else:
        assert "changed since then: " in out


@pytest.mark.slow
def test_the_model_of_a_stored_study_is_loaded(stored: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{stored}/mlflow.db")
    try:
        model = mlflow.keras.load_model("models:/Flowers@production")
    finally:
        mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    data = load_dataset("flowers.npz", 0.1)
    predicted = np.asarray(model(scaled(data.x_test))).argmax(axis=1)
    assert (predicted == data.y_test).mean() == pytest.approx(0.45, abs=0.02)
