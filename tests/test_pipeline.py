from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import pytest

from search import InputError, RunError, StudyConfig, run
from search.tasks import load_trial


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


def test_where_nothing_completes_nothing_is_registered(in_folder: Path, tmp_path: Path) -> None:
    import numpy as np

    huge = np.full((40, 4), 1e30, "float32") * np.arange(1, 41, dtype="float32")[:, None]
    labels = np.arange(40) % 2
    np.savez("huge.npz", x_train=huge, y_train=labels, x_test=huge[:4], y_test=labels[:4])
    with pytest.raises(RunError, match="2 configurations in a row failed"):
        run(config(Path("huge.npz"), max_failures=2, learning_rate="10"))
    invariants.check(in_folder, 1, registered=False)  # the first one, tried twice


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every trial of 16 units raise `error`; returns the units of all that were built."""
    load_trial()  # TensorFlow, in silence
    from search import model

    tried: list[int] = []
    build = model.build

    def fails(what: Any, *arguments: Any) -> Any:
        tried.append(what["hidden_units"])
        if tried[-1] == 16:
            raise error
        return build(what, *arguments)

    monkeypatch.setattr(model, "build", fails)
    return tried


GRID = {"sampler": "grid", "dropout_rate": "0.1", "learning_rate": "0.01", "pruner": "none"}


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
