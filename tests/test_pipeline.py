import gc
import io
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import keras
import mlflow
import numpy as np
import optuna
import psutil
import pytest
from conftest import arrays
from mlflow.tracking import MlflowClient
from rich.console import Console

from search import InputError, RunError, StudyConfig, run
from search.data.dataset import Dataset
from search.preflight import preflight
from search.promotion.evaluation import load_evaluation
from search.report import overview, publish
from search.report.progress import Progress, Result
from search.report.terminal import Lines
from search.tracking.sync import doctor
from search.workers import reproduce, tasks


def config(clouds: Path, **settings: object) -> StudyConfig:
    base = {"dataset": str(clouds), "epochs": 2, "n_trials": 3, "hidden_units": "8"}
    base |= {"workers": 1, "report": "none", "baselines": "none"}
    return StudyConfig(**{**base, **settings})  # type: ignore[arg-type]


def addresses() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.endswith("_URI")}


@pytest.mark.slow
def test_from_python_a_run_prints_nothing_and_returns_what_the_registry_holds_once(
    in_folder: Path,
    clouds: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    before, default = addresses(), mlflow.get_tracking_uri()
    first = run(config(clouds))
    assert capfd.readouterr() == ("", "")
    assert addresses() == before
    assert mlflow.get_tracking_uri() == default
    found = invariants.check(in_folder, 3)
    assert first.best is not None and first.winner is not None
    assert first.best.value == max(t.value for t in found["trials"] if t.value is not None)
    assert first.winner.test_accuracy == found["winner"].data.metrics["test_accuracy"]
    assert (first.winner.version, first.winner.new) == (1, True)
    assert (first.complete + first.pruned, first.failed, first.ran) == (3, 0, 3)

    kept = invariants.dump(in_folder)
    second = run(config(clouds))  # finds nothing to do
    assert (second.ran, second.repaired) == (0, ())
    assert second.winner is not None
    assert (second.winner.version, second.winner.new) == (1, False)
    assert invariants.dump(in_folder) == kept
    with pytest.raises(InputError, match="epochs: 2 -> 3; seed: 0 -> 1"):
        run(config(clouds, epochs=3, seed=1))
    assert invariants.dump(in_folder) == kept
    mlflow.set_tracking_uri("sqlite:///another.db")
    assert mlflow.get_registry_uri() == "sqlite:///another.db"


@pytest.mark.slow
def test_where_nothing_completes_nothing_is_registered(in_folder: Path, tmp_path: Path) -> None:
    huge = np.full((40, 4), 1e30, "float32") * np.arange(1, 41, dtype="float32")[:, None]
    labels = np.arange(40) % 2
    np.savez("huge.npz", x_train=huge, y_train=labels, x_test=huge[:4], y_test=labels[:4])
    with pytest.raises(RunError, match="2 configurations in a row failed"):
        run(config(Path("huge.npz"), max_failures=2, learning_rate="10", normalize="none"))
    invariants.check(in_folder, 1, registered=False)  # the first one, tried twice


GRID = {"sampler": "grid", "dropout_rate": "0.1,0.2", "learning_rate": "0.01", "pruner": "none"}
Point = tuple[int, float]  # units and dropout


def failing(points: list[Point], error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Let every trial of these points raise `error`; returns the points of all that were built."""
    tasks.load_trial()  # TensorFlow, in silence
    from search.training.network import build_network

    tried: list[Point] = []
    build = build_network

    def fails(what: Any, *arguments: Any) -> Any:
        tried.append((what["hidden_units"], what["dropout_rate"]))
        if tried[-1] in points:
            raise error
        return build(what, *arguments)

    monkeypatch.setattr("search.training.network.build_network", fails)
    return tried


@pytest.mark.slow
def test_a_grid_ends_when_every_point_was_tried_and_registers_the_best_of_the_possible_ones(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing([(16, 0.1)], MemoryError("too large"), monkeypatch)
    settings = config(clouds, hidden_units="8,16", n_trials=50, **GRID)
    result = run(settings)
    assert result.best is not None and result.winner is not None
    best = result.best.params["hidden_units"], result.best.params["dropout_rate"]
    assert tried == [(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.1), (16, 0.2), best]
    assert (result.complete, result.failed, result.given_up, result.ran) == (3, 2, 1, 5)
    found = invariants.check(in_folder, 4)
    points = {(t.params["hidden_units"], t.params["dropout_rate"]) for t in found["trials"]}
    assert points == {(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.2)}
    failed = [t for t in found["trials"] if t.state.name == "FAIL"]
    assert [t.user_attrs["failure"] for t in failed] == ["MemoryError: too large"] * 2
    before = invariants.dump(in_folder)
    again = run(settings)
    assert again.winner is not None
    assert (again.ran, again.winner.version) == (0, 1)
    assert invariants.dump(in_folder) == before


ROW = {**GRID, "dropout_rate": "0.1", "hidden_units": "16,8"}
IMPOSSIBLE, POSSIBLE = (16, 0.1), (8, 0.1)


@pytest.mark.slow
def test_a_slot_is_given_up_by_two_failures_of_its_own_in_one_run_or_two(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing([IMPOSSIBLE], ValueError("impossible"), monkeypatch)
    settings = config(clouds, **ROW)
    with pytest.raises(RunError, match="1 configurations in a row failed"):
        run(replace(settings, max_failures=1))
    invariants.check(in_folder, 0, registered=False)
    result = run(settings)
    assert tried == [IMPOSSIBLE, IMPOSSIBLE, POSSIBLE, POSSIBLE]  # the last one: the retraining
    assert (result.complete, result.given_up, result.ran) == (1, 1, 2)
    invariants.check(in_folder, 2)


def test_a_trial_whose_records_could_not_be_written_says_nothing_of_its_configuration(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing([IMPOSSIBLE], OSError("no space left on device"), monkeypatch)
    with pytest.raises(RunError, match="5 configurations in a row failed"):
        run(config(clouds, **ROW))
    assert tried == [IMPOSSIBLE] * 5
    invariants.check(in_folder, 0, registered=False)


# ---- whatever data a user brings -----------------------------------------------------------------


@pytest.fixture
def sorted_clouds(in_folder: Path, clouds: Path) -> Path:
    """The clouds sorted by class, on scales far from one another."""
    with np.load(clouds) as cloud:
        order = np.argsort(cloud["y_train"], kind="stable")
        scales = np.array([1e-3, 1, 1e3, 1e5], np.float32)
        np.savez(
            "sorted.npz",
            x_train=(cloud["x_train"] + 9)[order] * scales,
            y_train=cloud["y_train"][order],
            x_test=(cloud["x_test"] + 9) * scales,
            y_test=cloud["y_test"],
        )
    return Path("sorted.npz")


def test_sorted_data_on_any_scale_are_split_scaled_and_trained_long_enough(
    sorted_clouds: Path,
) -> None:
    chosen, _, settings = preflight(config(sorted_clouds, epochs=None))
    assert chosen.trial_epochs == settings["epochs"] == 20
    assert (settings["split"], settings["normalize"]) == ("stratified", "auto")


@pytest.mark.slow
def test_a_study_learns_and_goes_on_as_it_began_also_under_another_file_name(
    sorted_clouds: Path,
) -> None:
    out, fixed = io.StringIO(), {"learning_rate": "0.01", "pruner": "none"}
    chosen = config(sorted_clouds, n_trials=1, epochs=6, batch_size=16, **fixed)
    result = run(chosen, Lines(Console(file=out)))
    first, second = out.getvalue().splitlines()[:2]
    assert "(stratified split); 4 features, normalized, 3 classes" in first
    assert "1 trials of 6 epochs to run" in second
    assert (result.ran, result.winner is not None) == (1, True)
    assert result.winner.test_accuracy > 0.95  # type: ignore[union-attr]
    with np.load(sorted_clouds) as cloud:
        x, y = cloud["x_test"], cloud["y_test"]
    (file,) = Path().rglob("model.keras")
    registered = keras.saving.load_model(file)
    accuracy = (registered.predict(x, verbose=0).argmax(axis=1) == y).mean()
    assert accuracy == pytest.approx(result.winner.test_accuracy, abs=1e-6)  # type: ignore[union-attr]

    renamed = sorted_clouds.rename("new (2).npz")
    unsaid = config(renamed, n_trials=2, epochs=None, batch_size="auto", **fixed)
    assert run(unsaid).ran == 1
    found = invariants.check(Path.cwd(), 2)
    params = [run.data.params for run in found["runs"].values()]
    kept = {(p["split"], p["normalize"], p["epochs"], p["batch_size"]) for p in params}
    assert kept == {("stratified", "auto", "6", "16")}
    assert {len(trial.user_attrs["history"]) for trial in found["trials"]} == {6}
    before = invariants.dump(Path.cwd())
    again = run(unsaid)
    assert (again.ran, again.repaired) == (0, ())
    with pytest.raises(InputError, match="split: stratified -> last; normalize: auto -> none"):
        run(replace(unsaid, split="last", normalize="none"))
    np.savez("sorted.npz", **arrays())
    dataset = r"dataset: sorted.npz \(.{12}\) -> sorted.npz \(.{12}\);"
    with pytest.raises(InputError, match=dataset):
        run(config(Path("sorted.npz")))
    assert invariants.dump(Path.cwd()) == before


def test_a_split_without_a_class_is_refused_and_nothing_is_created(sorted_clouds: Path) -> None:
    with pytest.raises(InputError, match=r"has none of class 2; give --split stratified$"):
        run(config(sorted_clouds, split="last", validation_split=0.4))
    assert {path.name for path in Path().iterdir()} == {"sorted.npz"}


class OneTrial(Progress):
    """Stops the run after its first trial."""

    def trial(self, *_: Any) -> None:
        self.stop()


@pytest.mark.slow
def test_a_study_from_before_there_was_a_choice_goes_on_as_it_was(
    sorted_clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # as it was then
        patch.setattr("search.data.load.is_own", lambda _: False)
        patch.setattr(Dataset, "problem", None)
        assert run(config(sorted_clouds, epochs=2, n_trials=2), OneTrial()).ran == 1
    out = io.StringIO()
    again = run(config(sorted_clouds, epochs=None, n_trials=2), Lines(Console(file=out)))
    assert again.ran == 1
    assert "(last split); 4 features, 3 classes" in out.getvalue()
    assert "warning: --dataset sorted.npz: the validation part" in out.getvalue()
    assert invariants.check(Path.cwd(), 2)["winner"] is not None


# ---- what is only shown ----------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_only_shown_never_costs_the_registration(
    client: MlflowClient, in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 75 GiB")

    wanted = config(clouds, n_trials=1, report="report.html")
    shown = "the report and the notes could not be written"
    both = ["search.promotion.evaluation.evaluate_predictions", "search.report.html.build_html"]
    for steps, lines in (
        (both, ["the winner's evaluation.json could not be written", shown]),
        (["search.study.storage.write_note"], [shown]),
    ):
        text = io.StringIO()
        with monkeypatch.context() as patch:
            for step in steps:
                patch.setattr(step, fail)
            result = run(wanted, Lines(Console(file=text, width=60)))
        assert result.winner is not None
        assert result.winner.verdict.promoted
        assert result.winner.in_production == result.winner.version == 1
        invariants.check(in_folder, 1)
        told = [line for line in text.getvalue().splitlines() if "75 GiB" in line]
        for found, line in zip(told, lines, strict=True):
            assert found.startswith(f"warning: {line} (MemoryError: Unable to allocate 75 GiB)")

    run(wanted)
    assert Path("report.html").exists()
    found = invariants.check(in_folder, 1)
    assert "mlflow.note.content" in found["parent"].data.tags
    assert [int(v.version) for v in client.search_model_versions()] == [1]


# ---- in the process of who calls it --------------------------------------------------------------


LONGEST = {
    "study_name": "s" * 200,
    "experiment": "e" * 200,
    "model_name": "m" * 200,
    "storage": f"sqlite:///{'o' * 197}.db",
    "tracking_uri": f"sqlite:///{'f' * 197}.db",
    "report": f"{'r' * 250}.html",
    "dataset": f"{'d' * 251}.npz",
}


@pytest.fixture
def at_their_limits(in_folder: Path) -> StudyConfig:
    """A study of names as long as they may be and of more classes than a picture can show."""
    classes = 250
    x = np.random.default_rng(0).normal(size=(classes * 3, 4)).astype("float32")
    y = np.arange(classes * 3) % classes
    np.savez(LONGEST["dataset"], x_train=x, y_train=y, x_test=x, y_test=y)
    return config(in_folder, n_trials=1, epochs=1, **LONGEST)


def check_most_frequent_confusions(result: Result) -> None:
    """Assert that they stand for the matrix, among the winner's artifacts and in the report."""
    assert result.winner is not None
    assert result.winner.in_production == result.winner.version == 1
    client = MlflowClient(LONGEST["tracking_uri"])
    artifacts = {entry.path for entry in client.list_artifacts(result.winner.run_id)}
    assert "confusions.png" in artifacts
    assert "confusion_matrix.png" not in artifacts
    kept = client.download_artifacts(result.winner.run_id, "evaluation.json", str(Path.cwd()))
    assert set(json.loads(Path(kept).read_text())) == {"right", "total", "confusions", "mistakes"}
    first = load_evaluation(Path(kept).read_text()).confusions[0]
    report = Path(LONGEST["report"]).read_text()
    assert "Most frequent confusions of the winner" in report
    assert "Confusion matrix of the winner" not in report
    assert f'"{first.label} called {first.predicted}"' in report


@pytest.mark.slow
def test_runs_leave_all_as_it_was_and_no_descriptor_open_also_at_their_limits(
    in_folder: Path,
    clouds: Path,
    at_their_limits: StudyConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks.load_trial()  # the import of TensorFlow sets variables of its own
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    elsewhere = "sqlite:///elsewhere.db"
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", elsewhere)
    names = ("optuna", "mlflow", "alembic", "tensorflow", "distributed")
    before = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)

    def state() -> tuple[Any, ...]:
        levels = [logging.getLogger(name).level for name in names]
        found = sorted(os.environ.items()), mlflow.get_tracking_uri()
        return *found, levels, list(sys.path), optuna.logging.get_verbosity()

    try:
        expected = state()
        run(config(clouds, n_trials=1))  # what it imports keeps some descriptors
        assert state() == expected
        with pytest.raises(InputError):
            run(config(clouds, n_trials=1, seed=1))
        assert state() == expected

        process = psutil.Process()
        gc.collect()  # what other tests have left
        open_before = process.num_fds()
        result = run(at_their_limits)
        assert (in_folder / LONGEST["report"]).exists()
        again = run(at_their_limits)
        assert (again.ran, again.repaired) == (0, ())
        with pytest.raises(InputError, match="other settings"):
            run(replace(at_their_limits, seed=1))
        assert [file for file in process.open_files() if str(in_folder) in file.path] == []
        gc.collect()  # what TensorFlow and SQLAlchemy leave in cycles
        assert process.num_fds() <= open_before
        assert state() == expected

        assert doctor(at_their_limits, fix=False) == ([], [])
        doctor(config(clouds), fix=True)
        overview.read(config(clouds))
        publish.write_report(config(clouds), "report.html")
        reproduce.reproduce(config(clouds), 0, None, lambda _: None)
        assert [file for file in process.open_files() if str(in_folder) in file.path] == []
        assert state() == expected
        assert mlflow.get_tracking_uri() == elsewhere
        mlflow.set_tracking_uri("sqlite:///another.db")
        assert mlflow.get_registry_uri() == "sqlite:///another.db"
    finally:
        for name, level in zip(names, before, strict=True):
            logging.getLogger(name).setLevel(level)
    check_most_frequent_confusions(result)
