import gc
import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import numpy as np
import optuna
import psutil
import pytest
from conftest import arrays

from search import (
    InputError,
    RunError,
    StudyConfig,
    doctor,
    overview,
    presentation,
    reproduce,
    run,
    tasks,
)


def config(clouds: Path, **settings: object) -> StudyConfig:
    base = {"dataset": str(clouds), "epochs": 2, "n_trials": 3, "hidden_units": "8,16"}
    return StudyConfig(**{**base, "workers": 1, "report": "none", **settings})  # type: ignore[arg-type]


def test_from_python_a_run_prints_nothing_and_returns_what_the_registry_holds(
    in_folder: Path, clouds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run(config(clouds))
    assert capfd.readouterr() == ("", "")
    found = invariants.check(in_folder, 3)
    assert result.best is not None and result.winner is not None
    assert result.best.value == max(t.value for t in found["trials"] if t.value is not None)
    assert result.winner.test_accuracy == found["winner"].data.metrics["test_accuracy"]
    assert result.winner.version == 1
    assert (result.complete + result.pruned, result.failed, result.ran) == (3, 0, 3)


def test_a_second_run_finds_nothing_to_do(in_folder: Path, clouds: Path) -> None:
    first = run(config(clouds))
    before = invariants.dump(in_folder)
    second = run(config(clouds))
    assert (second.ran, second.mended) == (0, ())
    assert first.winner is not None and second.winner is not None
    assert second.winner.version == first.winner.version
    assert (first.winner.new, second.winner.new) == (True, False)
    assert invariants.dump(in_folder) == before


def test_other_settings_are_refused_with_each_difference(in_folder: Path, clouds: Path) -> None:
    run(config(clouds))
    before = invariants.dump(in_folder)
    with pytest.raises(InputError, match="epochs: 2 -> 3; seed: 0 -> 1"):
        run(config(clouds, epochs=3, seed=1))
    assert invariants.dump(in_folder) == before


def test_a_dataset_under_another_name_goes_on_and_another_one_is_refused(
    in_folder: Path, clouds: Path
) -> None:
    shutil.copy(clouds, "old.npz")
    assert run(config(Path("old.npz"), n_trials=1)).ran == 1
    Path("old.npz").rename("new (2).npz")
    assert run(config(Path("new (2).npz"), n_trials=2)).ran == 1
    before = invariants.dump(in_folder)
    again = run(config(Path("new (2).npz"), n_trials=2))
    assert (again.ran, again.mended) == (0, ())
    np.savez("old.npz", **arrays())
    with pytest.raises(InputError, match=r"dataset: old.npz \(.{12}\) -> old.npz \(.{12}\);"):
        run(config(Path("old.npz"), n_trials=2))
    assert invariants.dump(in_folder) == before


def test_where_nothing_completes_nothing_is_registered(in_folder: Path, tmp_path: Path) -> None:
    huge = np.full((40, 4), 1e30, "float32") * np.arange(1, 41, dtype="float32")[:, None]
    labels = np.arange(40) % 2
    np.savez("huge.npz", x_train=huge, y_train=labels, x_test=huge[:4], y_test=labels[:4])
    with pytest.raises(RunError, match="2 trials in a row failed"):
        run(config(Path("huge.npz"), max_failures=2, learning_rate="10"))
    invariants.check(in_folder, 0, registered=False)


def test_two_studies_share_the_databases(in_folder: Path, clouds: Path) -> None:
    run(config(clouds))
    run(config(clouds, study_name="second", seed=1))
    invariants.check(in_folder, 3)
    assert invariants.check(in_folder, 3, study_name="second")["winner"] is not None


def test_a_grid_ends_when_it_is_exhausted_and_covers_every_point(
    in_folder: Path, clouds: Path
) -> None:
    grid = {"dropout_rate": "0.1,0.2", "learning_rate": "0.01", "sampler": "grid"}
    result = run(config(clouds, n_trials=50, pruner="none", **grid))
    assert result.ran == 4
    found = invariants.check(in_folder, 4)
    points = {(t.params["hidden_units"], t.params["dropout_rate"]) for t in found["trials"]}
    assert points == {(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.2)}


def test_the_longest_names_that_are_allowed_work(in_folder: Path, clouds: Path) -> None:
    given = {
        "study_name": "s" * 200,
        "experiment": "e" * 200,
        "model_name": "m" * 200,
        "storage": f"sqlite:///{'o' * 197}.db",
        "tracking_uri": f"sqlite:///{'f' * 197}.db",
        "report": f"{'r' * 250}.html",
        "dataset": f"{'d' * 251}.npz",
    }
    shutil.copy(clouds, given["dataset"])
    settings = config(clouds, n_trials=1, **given)
    assert run(settings).winner is not None
    assert (in_folder / given["report"]).exists()
    again = run(settings)
    assert (again.ran, again.mended) == (0, ())
    assert doctor.examine(settings, fix=False) == ([], [])


# ---- in the process of who calls it --------------------------------------------------------------


def test_a_run_leaves_no_descriptor_open(in_folder: Path, clouds: Path) -> None:
    run(config(clouds, n_trials=1))  # what it imports keeps some
    process = psutil.Process()
    gc.collect()  # what other tests have left
    before = process.num_fds()
    for number in range(3):
        changed = {"study_name": f"study-{number}", "storage": f"sqlite:///study-{number}.db"}
        settings = config(clouds, tracking_uri=f"sqlite:///mlflow-{number}.db", **changed)
        run(settings)
        run(settings)
        with pytest.raises(InputError, match="other settings"):
            run(replace(settings, seed=1))
        assert [file for file in process.open_files() if str(in_folder) in file.path] == []
        assert process.num_fds() <= before


def test_a_run_leaves_variables_log_levels_and_path_as_they_were(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks.load_trial()  # the import of TensorFlow sets variables of its own
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    names = ("optuna", "mlflow", "alembic", "tensorflow", "distributed")
    before = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)

    def state() -> tuple[Any, ...]:
        levels = [logging.getLogger(name).level for name in names]
        return sorted(os.environ.items()), levels, list(sys.path), optuna.logging.get_verbosity()

    try:
        expected = state()
        run(config(clouds, n_trials=1))
        assert state() == expected
        with pytest.raises(InputError):
            run(config(clouds, n_trials=1, seed=1))
        assert state() == expected
        doctor.examine(config(clouds), fix=False)
        overview.read(config(clouds))
        presentation.report(config(clouds), in_folder / "report.html")
        reproduce.reproduce(config(clouds), 0, None, lambda _: None)
        assert state() == expected
    finally:
        for name, level in zip(names, before, strict=True):
            logging.getLogger(name).setLevel(level)
