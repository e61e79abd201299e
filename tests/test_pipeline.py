import gc
import io
import json
import logging
import os
import shutil
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
from search.promotion.evaluation import load_evaluation
from search.report import overview, publish
from search.report.terminal import Lines
from search.tracking.sync import doctor
from search.workers import reproduce, tasks


def config(clouds: Path, **settings: object) -> StudyConfig:
    base = {"dataset": str(clouds), "epochs": 2, "n_trials": 3, "hidden_units": "8,16"}
    base |= {"workers": 1, "report": "none", "baselines": "none"}
    return StudyConfig(**{**base, **settings})  # type: ignore[arg-type]


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


@pytest.mark.slow
def test_a_second_run_finds_nothing_to_do(in_folder: Path, clouds: Path) -> None:
    first = run(config(clouds))
    before = invariants.dump(in_folder)
    second = run(config(clouds))
    assert (second.ran, second.repaired) == (0, ())
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


@pytest.mark.slow
def test_a_dataset_under_another_name_goes_on_and_another_one_is_refused(
    in_folder: Path, clouds: Path
) -> None:
    shutil.copy(clouds, "old.npz")
    assert run(config(Path("old.npz"), n_trials=1)).ran == 1
    Path("old.npz").rename("new (2).npz")
    assert run(config(Path("new (2).npz"), n_trials=2)).ran == 1
    before = invariants.dump(in_folder)
    again = run(config(Path("new (2).npz"), n_trials=2))
    assert (again.ran, again.repaired) == (0, ())
    np.savez("old.npz", **arrays())
    with pytest.raises(InputError, match=r"dataset: old.npz \(.{12}\) -> old.npz \(.{12}\);"):
        run(config(Path("old.npz"), n_trials=2))
    assert invariants.dump(in_folder) == before


def test_where_nothing_completes_nothing_is_registered(in_folder: Path, tmp_path: Path) -> None:
    huge = np.full((40, 4), 1e30, "float32") * np.arange(1, 41, dtype="float32")[:, None]
    labels = np.arange(40) % 2
    np.savez("huge.npz", x_train=huge, y_train=labels, x_test=huge[:4], y_test=labels[:4])
    with pytest.raises(RunError, match="2 configurations in a row failed"):
        run(config(Path("huge.npz"), max_failures=2, learning_rate="10", normalize="none"))
    invariants.check(in_folder, 1, registered=False)  # the first one, tried twice


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every trial of 16 units raise `error`; returns the units of all that were built."""
    tasks.load_trial()  # TensorFlow, in silence
    from search.training.network import build_network

    tried: list[int] = []
    build = build_network

    def fails(what: Any, *arguments: Any) -> Any:
        tried.append(what["hidden_units"])
        if tried[-1] == 16:
            raise error
        return build(what, *arguments)

    monkeypatch.setattr("search.training.network.build_network", fails)
    return tried


GRID = {"sampler": "grid", "dropout_rate": "0.1", "learning_rate": "0.01", "pruner": "none"}


@pytest.mark.slow
def test_a_grid_with_an_impossible_point_ends_and_registers_the_best_of_the_others(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(MemoryError("too large"), monkeypatch)
    settings = config(clouds, hidden_units="8,16,24", n_trials=50, **GRID)
    result = run(settings)
    assert tried == [8, 16, 16, 24, result.best.params["hidden_units"]]  # type: ignore[union-attr]
    assert (result.complete, result.failed, result.given_up, result.ran) == (2, 2, 1, 4)
    found = invariants.check(in_folder, 3)
    failed = [t for t in found["trials"] if t.state.name == "FAIL"]
    assert [t.user_attrs["failure"] for t in failed] == ["MemoryError: too large"] * 2
    before = invariants.dump(in_folder)
    again = run(settings)
    assert (again.ran, again.winner.version) == (0, 1)  # type: ignore[union-attr]
    assert invariants.dump(in_folder) == before


def test_a_slot_is_given_up_by_two_failures_of_its_own_in_one_run_or_two(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(ValueError("impossible"), monkeypatch)
    settings = config(clouds, hidden_units="16,8", **GRID)
    with pytest.raises(RunError, match="1 configurations in a row failed"):
        run(replace(settings, max_failures=1))
    invariants.check(in_folder, 0, registered=False)
    result = run(settings)
    assert tried == [16, 16, 8, 8]  # the last one is the retraining
    assert (result.complete, result.given_up, result.ran) == (1, 1, 2)
    invariants.check(in_folder, 2)


def test_a_trial_whose_records_could_not_be_written_says_nothing_of_its_configuration(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(OSError("no space left on device"), monkeypatch)
    settings = config(clouds, hidden_units="16,8", **GRID)
    with pytest.raises(RunError, match="5 configurations in a row failed"):
        run(settings)
    assert tried == [16] * 5
    invariants.check(in_folder, 0, registered=False)


@pytest.mark.slow
def test_two_studies_share_the_databases(in_folder: Path, clouds: Path) -> None:
    run(config(clouds))
    run(config(clouds, study_name="second", seed=1))
    invariants.check(in_folder, 3)
    assert invariants.check(in_folder, 3, study_name="second")["winner"] is not None


@pytest.mark.slow
def test_a_grid_ends_when_it_is_exhausted_and_covers_every_point(
    in_folder: Path, clouds: Path
) -> None:
    grid = {"dropout_rate": "0.1,0.2", "learning_rate": "0.01", "sampler": "grid"}
    result = run(config(clouds, n_trials=50, pruner="none", **grid))
    assert result.ran == 4
    found = invariants.check(in_folder, 4)
    points = {(t.params["hidden_units"], t.params["dropout_rate"]) for t in found["trials"]}
    assert points == {(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.2)}


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


@pytest.mark.slow
def test_sorted_data_on_any_scale_are_learnt_with_defaults(sorted_clouds: Path) -> None:
    out = io.StringIO()
    chosen = config(sorted_clouds, epochs=None, learning_rate="0.01", pruner="none")
    result = run(chosen, Lines(Console(file=out)))
    first, second = out.getvalue().splitlines()[:2]
    assert "(stratified split); 4 features, normalized, 3 classes" in first
    assert "3 trials of 20 epochs to run" in second
    assert result.winner is not None
    assert result.winner.test_accuracy > 0.95
    with np.load(sorted_clouds) as cloud:
        x, y = cloud["x_test"], cloud["y_test"]
    (file,) = Path().rglob("model.keras")
    registered = keras.saving.load_model(file)
    accuracy = (registered.predict(x, verbose=0).argmax(axis=1) == y).mean()
    assert accuracy == pytest.approx(result.winner.test_accuracy, abs=1e-6)
    params = invariants.check(Path.cwd(), 3)["runs"][0].data.params
    assert (params["split"], params["normalize"], params["epochs"]) == ("stratified", "auto", "20")


def test_a_split_without_a_class_is_refused_and_nothing_is_created(sorted_clouds: Path) -> None:
    with pytest.raises(InputError, match=r"has none of class 2; give --split stratified$"):
        run(config(sorted_clouds, split="last", validation_split=0.4))
    assert {path.name for path in Path().iterdir()} == {"sorted.npz"}


@pytest.mark.slow
def test_a_study_keeps_its_split_its_scale_its_epochs_and_its_batches(sorted_clouds: Path) -> None:
    first = run(config(sorted_clouds, epochs=3, n_trials=2, pruner="none", batch_size=16))
    again = run(config(sorted_clouds, epochs=None, n_trials=3, pruner="none", batch_size="auto"))
    assert (first.ran, again.ran) == (2, 1)
    found = invariants.check(Path.cwd(), 3)
    trials, runs = found["trials"], found["runs"]
    assert {run.data.params["batch_size"] for run in runs.values()} == {"16"}
    assert {len(trial.user_attrs["history"]) for trial in trials} == {3}
    with pytest.raises(InputError, match="split: stratified -> last; normalize: auto -> none"):
        run(config(sorted_clouds, split="last", normalize="none", epochs=3, batch_size="auto"))


def test_a_study_from_before_there_was_a_choice_goes_on_as_it_was(
    sorted_clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # as it was then
        patch.setattr("search.data.load.is_own", lambda _: False)
        patch.setattr(Dataset, "problem", None)
        run(config(sorted_clouds, epochs=2, n_trials=2))
    out = io.StringIO()
    again = run(config(sorted_clouds, epochs=None), Lines(Console(file=out)))
    assert again.ran == 1
    assert "(last split); 4 features, 3 classes" in out.getvalue()
    assert "warning: --dataset sorted.npz: the validation part" in out.getvalue()
    assert invariants.check(Path.cwd(), 3)["winner"] is not None


# ---- what is only shown ----------------------------------------------------------------------


@pytest.mark.slow
def test_more_than_two_hundred_classes_are_shown_by_their_most_frequent_confusions(
    client: MlflowClient, in_folder: Path
) -> None:
    classes = 250
    x = np.random.default_rng(0).normal(size=(classes * 3, 4)).astype("float32")
    y = np.arange(classes * 3) % classes
    np.savez("many.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    many = config(Path("many.npz"), n_trials=1, epochs=1, hidden_units="8", report="report.html")
    winner = run(many).winner
    assert winner is not None
    assert winner.in_production == winner.version == 1
    artifacts = {entry.path for entry in client.list_artifacts(winner.run_id)}
    assert "confusions.png" in artifacts
    assert "confusion_matrix.png" not in artifacts
    kept = client.download_artifacts(winner.run_id, "evaluation.json", str(in_folder))
    assert set(json.loads(Path(kept).read_text())) == {"right", "total", "confusions", "mistakes"}
    report = Path("report.html").read_text()
    first = load_evaluation(Path(kept).read_text()).confusions[0]
    assert "Most frequent confusions of the winner" in report
    assert "Confusion matrix of the winner" not in report
    assert f'"{first.label} called {first.predicted}"' in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "step", "line"),
    [
        (
            "search.promotion.evaluation",
            "evaluate_predictions",
            "the winner's evaluation.json could not be written",
        ),
        (
            "search.promotion.pictures",
            "_draw_matrix",
            "the winner's confusion_matrix.png could not be written",
        ),
        ("search.report.html", "build_html", "the report and the notes could not be written"),
        ("search.study.storage", "write_note", "the report and the notes could not be written"),
    ],
)
def test_what_is_only_shown_never_costs_the_registration(
    client: MlflowClient,
    in_folder: Path,
    clouds: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    step: str,
    line: str,
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 75 GiB")

    wanted = config(clouds, n_trials=1, report="report.html")
    text = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{step}", fail)
        result = run(wanted, Lines(Console(file=text, width=60)))
    assert result.winner is not None
    assert result.winner.verdict.promoted
    assert result.winner.in_production == result.winner.version == 1
    invariants.check(in_folder, 1)
    (told,) = [told for told in text.getvalue().splitlines() if "75 GiB" in told]
    assert told.startswith(f"warning: {line} (MemoryError: Unable to allocate 75 GiB)")

    run(wanted)
    assert Path("report.html").exists()
    found = invariants.check(in_folder, 1)
    assert "mlflow.note.content" in found["parent"].data.tags
    assert [int(v.version) for v in client.search_model_versions()] == [1]


@pytest.mark.slow
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
    assert (again.ran, again.repaired) == (0, ())
    assert doctor(settings, fix=False) == ([], [])


# ---- in the process of who calls it --------------------------------------------------------------


@pytest.mark.slow
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
        gc.collect()  # what TensorFlow and SQLAlchemy leave in cycles
        assert process.num_fds() <= before


@pytest.mark.slow
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
        doctor(config(clouds), fix=False)
        overview.read(config(clouds))
        publish.write_report(config(clouds), "report.html")
        reproduce.reproduce(config(clouds), 0, None, lambda _: None)
        assert state() == expected
    finally:
        for name, level in zip(names, before, strict=True):
            logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("known", [None, "sqlite:///elsewhere.db"])
def test_a_run_leaves_no_address_behind(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch, known: str | None
) -> None:
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", known)

    def addresses() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.endswith("_URI")}

    before, default = addresses(), mlflow.get_tracking_uri()
    run(config(clouds))
    assert addresses() == before
    assert mlflow.get_tracking_uri() == (known or default)
    mlflow.set_tracking_uri("sqlite:///another.db")
    assert mlflow.get_registry_uri() == "sqlite:///another.db"
