"""A study by another objective than accuracy: in its direction, in both stores, to the end."""

import json
from pathlib import Path

import invariants
import pytest
from conftest import command

OPTIONS = ("--dataset", "clouds.npz", "--epochs", "2", "--hidden-units", "8,16", "--workers", "1")


@pytest.fixture
def folder(in_folder: Path, clouds: Path) -> Path:
    (in_folder / "clouds.npz").write_bytes(clouds.read_bytes())
    return in_folder


@pytest.mark.slow
def test_a_study_goes_by_the_loss(folder: Path) -> None:
    options = (*OPTIONS, "--objective", "val_loss", "--early-stopping", "1", "--n-trials", "4")
    code, out, err = command(folder, *options, "--finalists", "1", "--repeats", "2")
    assert (code, err) == (0, "")
    found = invariants.check(folder, 4)
    losses = [trial.value for trial in found["trials"] if trial.value is not None]
    assert found["study"].best_value == min(losses)
    assert f"best {min(losses):.4f}\n" in out
    assert "val_accuracy" not in out
    shown = json.loads(command(folder, "show", "--json")[1])
    assert (shown["objective"], shown["direction"]) == ("val_loss", "minimize")
    assert [row["value"] for row in shown["top"]] == sorted(losses)
    assert command(folder, "doctor")[0] == 0
    assert "the same to the last digit: val_loss " in command(folder, "reproduce")[1]
    assert "val_loss" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_stored_study_keeps_its_objective(folder: Path) -> None:
    assert command(folder, *OPTIONS, "--objective", "val_auc", "--n-trials", "1")[0] == 0
    code, out, err = command(folder, *OPTIONS, "--n-trials", "2")
    assert (code, err) == (0, "")
    assert "val_auc" in out
    code, _, err = command(folder, *OPTIONS, "--objective", "val_f1", "--n-trials", "3")
    assert code == 2
    assert "objective: val_auc -> val_f1; give another --study-name" in err


def test_an_objective_of_another_task_is_refused(folder: Path) -> None:
    code, out, err = command(folder, *OPTIONS, "--objective", "val_rmse")
    assert (code, out) == (2, "")
    assert err.startswith("error: --objective must be a metric of the task, for classification ")
    assert [path.name for path in folder.iterdir()] == ["clouds.npz"]
