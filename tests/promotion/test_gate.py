"""The gate: what is better goes to production, what is worse is registered and stays out."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import invariants
import mlflow
import numpy as np
import optuna
import pytest
from conftest import copy_databases, mlflow_at, start
from mlflow.tracking import MlflowClient
from registry import (
    BAD,
    GOOD,
    NAME,
    config,
    in_production,
    register_by_hand,
    results,
    unregister,
    verdict,
    versions,
)

from search import pipeline
from search.data.load import load_dataset
from search.promotion.comparison import Comparison
from search.promotion.gate import Decision, decide
from search.promotion.retrain import find_commit
from search.report.progress import Result
from search.report.text import summary
from search.tracking.registered_model import find_production
from search.workers import executor

# ---- the test and the verdict --------------------------------------------------------------------


def test_a_p_value_too_small_for_a_number_is_never_zero() -> None:
    decided = decide("if-better", 0.9, Comparison(0.9, 0.5, 5_000, 10), 1)
    tags = decided.as_tags(2)
    assert float(tags["gate.mcnemar_p_value"]) > 0
    assert Decision.read(tags, 0.9).p_value == decided.p_value
    stored_before = replace(decided, p_value=0.0)
    for shown in (str(decided), tags["gate.decision"], str(stored_before)):
        assert "exact McNemar p < 1e-300 (significant at 5 %)" in shown
    just_above = replace(decided, p_value=2e-300)
    assert "p = 2e-300 " in str(just_above)


@pytest.mark.parametrize(
    ("challenger", "champion", "promoted"),
    [
        (0.9, 0.8, {"if-better": True, "always": True, "never": False}),
        (0.9, 0.9, {"if-better": False, "always": True, "never": False}),
        (0.8, 0.9, {"if-better": False, "always": True, "never": False}),
        (None, None, {"if-better": False, "always": True, "never": False}),
    ],
)
def test_every_policy_decides(
    challenger: float | None, champion: float | None, promoted: dict[str, bool]
) -> None:
    found: Comparison | str = "it can't be loaded"
    if challenger is not None and champion is not None:
        found = Comparison(challenger, champion, 3, 2)
    for policy, expected in promoted.items():
        decided = decide(policy, challenger or 0.5, found, 7)
        assert decided.promoted == expected
        assert decided.champion == 7
        tags = {**decided.as_tags(8), "promoted": str(expected).lower()}
        assert Decision.read(tags, decided.value) == decided
        loser = None if champion is None else "7" if found.challenger > champion else "8"
        assert tags.get("gate.losing_version") == loser
        assert "\n" not in tags["gate.decision"]


# ---- real registries -----------------------------------------------------------------------------


def test_a_better_challenger_takes_over_and_the_model_loads_by_alias_and_by_stage(
    rivals: Path, held: MlflowClient, clouds: Path
) -> None:
    poor, good = results(rivals)
    first, found = verdict(poor), verdict(good)
    assert (first.promoted, first.champion, str(first)) == (
        *(True, None),
        "promoted: nothing was in production",
    )
    assert (found.promoted, found.champion) == (True, 1)
    assert found.value > (found.champion_value or 1)
    assert poor.winner is not None and good.winner is not None
    assert (poor.winner.version, good.winner.version) == (1, 2)
    assert good.winner.test_accuracy > max(0.9, poor.winner.test_accuracy)
    assert in_production(held) == 2
    found_versions = versions(held)
    assert {n: v.current_stage for n, v in found_versions.items()} == {
        1: "Archived",
        2: "Production",
    }
    assert found_versions[2].run_id == good.winner.run_id
    assert found_versions[2].tags["optuna.study_name"] == "better"
    for study_name, result in (("better", good), ("mnist-dnn", poor)):
        checked = invariants.check(Path.cwd(), 1, study_name=study_name)
        assert result.winner is not None
        assert checked["winner"].info.run_id == result.winner.run_id

    with np.load(clouds) as data:
        x, y = data["x_test"], data["y_test"]
    for name in (f"{NAME}@production", f"{NAME}/Production"):
        model = mlflow.keras.load_model(f"models:/{name}")
        accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
        assert accuracy == pytest.approx(good.winner.test_accuracy, abs=1e-6)

    before = invariants.dump(Path.cwd())
    again = pipeline.run(config(clouds, **BAD))
    assert again.winner == replace(poor.winner, new=False, in_production=2)
    assert "version 1: not in production, where version 2 is." in summary(again)
    assert invariants.dump(Path.cwd()) == before


@dataclass(frozen=True)
class Judged:
    """A folder in which a challenger, a new version, was just compared with the champion."""

    folder: Path
    result: Result
    champion: int
    challenger: int


@contextlib.contextmanager
def at_copy_of(source: Path, target: Path) -> Iterator[MlflowClient]:
    """In `target`, which gets the databases of `source`; the artifacts stay where they are."""
    copy_databases(source, target)
    with mlflow_at(target) as client, contextlib.chdir(target):
        yield client


@pytest.fixture(scope="module")
def worse(rivals: Path, clouds: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """The poor model, registered once more: it meets the good one."""
    folder = tmp_path_factory.mktemp("worse")
    with at_copy_of(rivals, folder) as client:
        unregister(client, 1)
        return Judged(folder, pipeline.run(config(clouds, **BAD)), champion=2, challenger=3)


@pytest.fixture(scope="module")
def equal(rivals: Path, clouds: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """The good model, registered once more: it meets itself."""
    folder = tmp_path_factory.mktemp("equal")
    with at_copy_of(rivals, folder) as client:
        champion = let_it_meet_itself(client)
        result = pipeline.run(config(clouds, **GOOD))
    return Judged(folder, result, champion, challenger=champion + 1)


def let_it_meet_itself(client: MlflowClient) -> int:
    """Register the good model by hand, and unregister its study's version; returns the champion."""
    champion = register_by_hand(client, 2)
    unregister(client, 2)
    return champion


@pytest.mark.slow
def test_a_worse_challenger_is_registered_and_stays_out(
    worse: Judged, client: MlflowClient, clouds: Path
) -> None:
    copy_databases(worse.folder, Path.cwd())
    found = verdict(worse.result)
    assert worse.result.winner is not None
    assert (worse.result.winner.version, found.promoted, found.champion) == (3, False, 2)
    assert found.value == pytest.approx(worse.result.winner.test_accuracy)
    assert found.value < (found.champion_value or 0)
    assert in_production(client) == 2
    tags = versions(client)[3].tags
    assert tags["promoted"] == "false"
    assert float(tags["gate.test_accuracy"]) == found.value
    assert float(tags["gate.champion_test_accuracy"]) == found.champion_value
    assert 0 < float(tags["gate.mcnemar_p_value"]) < 0.05
    assert (tags["gate.champion_version"], tags["gate.losing_version"]) == ("2", "3")
    assert tags["gate.decision"] == str(found)
    assert "significant at 5 %" in str(found)
    invariants.check(Path.cwd(), 1)

    before = invariants.dump(Path.cwd())
    again = pipeline.run(config(clouds, **BAD))
    assert verdict(again) == found
    assert invariants.dump(Path.cwd()) == before

    forced = pipeline.run(config(clouds, **BAD, promote="always"))
    assert verdict(forced).promoted
    assert in_production(client) == 3
    assert sorted(versions(client)) == [2, 3]
    assert versions(client)[3].tags["gate.losing_version"] == "3"


@pytest.mark.slow
def test_an_equal_challenger_stays_out(equal: Judged, client: MlflowClient) -> None:
    copy_databases(equal.folder, Path.cwd())
    found = verdict(equal.result)
    assert (found.promoted, found.p_value) == (False, 1.0)
    assert found.value == found.champion_value
    assert in_production(client) == equal.champion
    assert versions(client)[equal.challenger].tags["gate.losing_version"] == str(equal.challenger)


@pytest.mark.slow
def test_a_rejected_winner_is_judged_again_against_another_champion_or_none(
    worse: Judged, client: MlflowClient, clouds: Path
) -> None:
    copy_databases(worse.folder, Path.cwd())
    other = register_by_hand(client, 2)
    again = verdict(pipeline.run(config(clouds, **BAD)))
    assert (again.promoted, again.champion) == (False, other)
    assert versions(client)[3].tags["gate.champion_version"] == str(other)
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(config(clouds, **BAD))) == again
    assert invariants.dump(Path.cwd()) == before

    client.delete_registered_model_alias(NAME, "production")
    again = verdict(pipeline.run(config(clouds, **BAD)))
    assert str(again) == "promoted: nothing was in production"
    assert in_production(client) == 3
    assert sorted(versions(client)) == [2, 3, other]
    left = {"gate.champion_version", "gate.mcnemar_p_value", "gate.losing_version"}
    assert not left & set(versions(client)[3].tags)


@pytest.mark.slow
def test_never_registers_until_something_else_is_in_production_and_a_later_if_better_decides(
    held: MlflowClient, clouds: Path
) -> None:
    held.delete_registered_model(NAME)
    kept_out = config(clouds, **BAD, promote="never")
    result = pipeline.run(kept_out)
    assert result.winner is not None
    assert result.winner.version == 1
    first = verdict(result)
    assert not first.promoted
    assert versions(held)[1].current_stage == "None"
    assert find_production(kept_out) is None
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(kept_out)) == first
    assert invariants.dump(Path.cwd()) == before

    tags = versions(held)[1].tags
    held.set_registered_model_alias(NAME, "production", "1")  # by hand: no verdict of the gate
    assert verdict(pipeline.run(kept_out)) == first
    assert versions(held)[1].tags == tags
    register_by_hand(held, 1)
    assert verdict(pipeline.run(kept_out)).champion == 2

    held.delete_registered_model_alias(NAME, "production")
    assert verdict(pipeline.run(config(clouds, **BAD))).promoted
    assert in_production(held) == 1


@pytest.mark.slow
def test_a_production_model_of_other_data_is_not_compared_and_by_hand_only_where_it_fits(
    held: MlflowClient, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(clouds) as data:
        wide = {name: np.hstack([data[name]] * 2) for name in ("x_train", "x_test")}
        np.savez("wide.npz", **{**data, **wide})
    digest = load_dataset(str(clouds), 0.1).digest
    other = partial(config, Path("wide.npz"), study_name="wide")
    call = executor.Executor.call

    def load_no_models(
        workers: executor.Executor, method: str, *arguments: Any, **more: Any
    ) -> Any:
        assert method != "compare", "no model has to be loaded for this"
        return call(workers, method, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(executor.Executor, "call", load_no_models)
        found = verdict(pipeline.run(other()))
        assert str(found) == (
            "not promoted: version 2, in production, could not be compared: it was trained on "
            f"other data (clouds.npz, {digest[:12]}); to replace it run again with "
            "--promote always"
        )
        assert in_production(held) == 2
        before = invariants.dump(Path.cwd())
        assert verdict(pipeline.run(other())) == found
        assert invariants.dump(Path.cwd()) == before

    register_by_hand(held, 2)
    shape = verdict(pipeline.run(other()))
    assert not shape.promoted
    assert "takes (None, 4)" in str(shape)
    assert "8 features" in str(shape)
    register_by_hand(held, 2, "of another server")
    assert verdict(pipeline.run(other())).problem == shape.problem

    register_by_hand(held, 2, held.get_model_version(NAME, "2").run_id)
    forced = verdict(pipeline.run(other(promote="always")))
    assert (forced.promoted, forced.problem) == (True, found.problem)
    assert in_production(held) == 3
    assert sorted(versions(held)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "when", "refused"),
    [
        ("set_model_version_tag", "after", False),
        ("set_registered_model_alias", "after", False),
        ("set_model_version_tag", "after", True),
        ("set_registered_model_alias", "before", True),
    ],
)
def test_a_promotion_over_another_that_was_stopped_is_completed(
    rivals: Path,
    equal: Judged,
    client: MlflowClient,
    clouds: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: str,
    refused: bool,
) -> None:
    same = verdict(equal.result).value  # as compared there; the models need not be loaded again
    monkeypatch.setattr("search.pipeline._compare", lambda *_: Comparison(same, same, 0, 0))
    if refused:  # at first; then the user changes the policy
        copy_databases(equal.folder, Path.cwd())
    else:
        copy_databases(rivals, Path.cwd())
        let_it_meet_itself(client)

    class Stopped(BaseException):
        pass

    original = getattr(MlflowClient, step)

    def stop(self: MlflowClient, *arguments: Any) -> None:
        if when == "after":
            original(self, *arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, stop)
        with pytest.raises(Stopped):
            pipeline.run(config(clouds, **GOOD, promote="always"))
    found = verdict(pipeline.run(config(clouds, **GOOD, promote="always")))
    assert (found.promoted, found.champion, found.p_value) == (True, equal.champion, 1.0)
    assert sorted(versions(client)) == [1, equal.champion, equal.challenger]
    assert in_production(client) == equal.challenger
    tags = versions(client)[equal.challenger].tags
    assert tags["gate.losing_version"] == str(equal.challenger)


@pytest.mark.slow
def test_two_studies_that_register_together_leave_the_better_one_in_production(
    held: MlflowClient, clouds: Path
) -> None:
    held.delete_registered_model(NAME)  # both are retrained, and nothing more
    options = ("--dataset", str(clouds), "--n-trials", "1", "--workers", "1", "--hidden-units")
    options += ("16", "--report", "none", "--baselines", "none", "--epochs", "{epochs}")
    options += ("--learning-rate", "{learning_rate}", "--study-name", "{study_name}")
    studies = [{"study_name": "mnist-dnn", **BAD}, GOOD]
    processes = [
        start(Path.cwd(), *(option.format(**study) for option in options)) for study in studies
    ]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert (process.returncode, err) == (0, ""), out
    tags = {number: version.tags for number, version in versions(held).items()}
    assert sorted(tags) == [1, 2]
    better = next(n for n in tags if tags[n]["optuna.study_name"] == "better")
    assert in_production(held) == better
    # Whoever came second was compared with the other one.
    assert tags[1]["gate.decision"] == "promoted: nothing was in production"
    second = "promoted: " if better == 2 else "not promoted: "
    assert tags[2]["gate.decision"].startswith(second)
    assert tags[2]["gate.champion_version"] == "1"
    assert float(tags[2]["gate.mcnemar_p_value"]) < 0.05
    for name in ("mnist-dnn", "better"):
        invariants.check(Path.cwd(), 1, study_name=name)


# ---- lineage -------------------------------------------------------------------------------------


def test_from_a_model_to_its_trial_and_back(held: MlflowClient) -> None:
    version = held.get_model_version_by_alias(NAME, "production")
    of_model = mlflow.models.get_model_info(f"models:/{NAME}@production").metadata
    of_run = held.get_run(version.run_id).data.tags
    storage = optuna.storages.RDBStorage("sqlite:///study.db")
    study = optuna.load_study(study_name=of_model["optuna.study_name"], storage=storage)
    trial = study.trials[int(of_model["optuna.trial_number"])]
    for tags in (of_model, of_run, version.tags):
        assert tags["optuna.study_uid"] == study.user_attrs["study_uid"]
        assert json.loads(tags["lineage.hyperparameters"]) == trial.params
        assert float(tags["lineage.val_accuracy"]) == trial.value
        assert int(tags["lineage.seed"]) == trial.user_attrs["seed"]
        assert len(tags["lineage.settings"]) == 64
        assert study.user_attrs["settings"]["dataset"].endswith(f"({tags['lineage.dataset'][:12]})")
        packages = json.loads(tags["lineage.environment"])
        assert packages == trial.user_attrs["environment"]
        assert packages["keras"].startswith("3.")
        assert tags.get("mlflow.source.git.commit") == find_commit()
    assert trial.user_attrs["model_version"] == f"{NAME}/{version.version}"
    run = held.get_run(trial.user_attrs["mlflow_run_id"])
    assert run.data.tags["optuna.model_version"] == f"{NAME}/{version.version}"
