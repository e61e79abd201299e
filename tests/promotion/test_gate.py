"""The gate: what is better goes to production, what is worse is registered and stays out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import invariants
import mlflow
import numpy as np
import optuna
import pytest
from conftest import start
from mlflow.tracking import MlflowClient
from registry import BAD, GOOD, NAME, config, in_production, verdict, versions

from search import pipeline
from search.data.load import load_dataset
from search.promotion.comparison import Comparison
from search.promotion.gate import Decision, decide
from search.promotion.retrain import find_commit
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


@pytest.mark.slow
def test_a_worse_challenger_is_registered_and_stays_out(held: MlflowClient, clouds: Path) -> None:
    result = pipeline.run(config(clouds, **BAD))
    found = verdict(result)
    assert result.winner is not None
    assert (result.winner.version, found.promoted, found.champion) == (2, False, 1)
    assert found.value == pytest.approx(result.winner.test_accuracy)
    assert found.value < (found.champion_value or 0)
    assert in_production(held) == 1
    tags = versions(held)[2].tags
    assert tags["promoted"] == "false"
    assert float(tags["gate.test_accuracy"]) == found.value
    assert float(tags["gate.champion_test_accuracy"]) == found.champion_value
    assert 0 < float(tags["gate.mcnemar_p_value"]) < 0.05
    assert (tags["gate.champion_version"], tags["gate.losing_version"]) == ("1", "2")
    assert tags["gate.decision"] == str(found)
    assert "significant at 5 %" in str(found)
    invariants.check(Path.cwd(), 1)

    before = invariants.dump(Path.cwd())
    again = pipeline.run(config(clouds, **BAD))
    assert verdict(again) == found
    assert invariants.dump(Path.cwd()) == before

    forced = pipeline.run(config(clouds, **BAD, promote="always"))
    assert verdict(forced).promoted
    assert in_production(held) == 2
    assert sorted(versions(held)) == [1, 2]
    assert versions(held)[2].tags["gate.losing_version"] == "2"


@pytest.mark.slow
def test_an_equal_challenger_stays_out(held: MlflowClient, clouds: Path) -> None:
    found = verdict(pipeline.run(config(clouds, **GOOD)))
    assert (found.promoted, found.p_value) == (False, 1.0)
    assert found.value == found.champion_value
    assert in_production(held) == 1
    assert versions(held)[2].tags["gate.losing_version"] == "2"


def test_a_better_challenger_takes_over(client: MlflowClient, clouds: Path) -> None:
    first = verdict(pipeline.run(config(clouds, **BAD)))
    assert (first.promoted, first.champion, str(first)) == (
        *(True, None),
        "promoted: nothing was in production",
    )
    found = verdict(pipeline.run(config(clouds, **GOOD, study_name="better")))
    assert (found.promoted, found.champion) == (True, 1)
    assert found.value > (found.champion_value or 1)
    assert in_production(client) == 2
    assert {n: v.current_stage for n, v in versions(client).items()} == {
        1: "Archived",
        2: "Production",
    }


@pytest.mark.slow
def test_never_registers_and_a_later_if_better_decides(client: MlflowClient, clouds: Path) -> None:
    result = pipeline.run(config(clouds, promote="never"))
    assert result.winner is not None
    assert result.winner.version == 1
    assert not verdict(result).promoted
    assert versions(client)[1].current_stage == "None"
    assert find_production(config(clouds)) is None
    assert verdict(pipeline.run(config(clouds))).promoted
    assert in_production(client) == 1


def save_changed(clouds: Path, path: str, **changed: Any) -> Path:
    """The clouds with some arrays replaced, as another file."""
    with np.load(clouds) as data:
        np.savez(path, **{**data, **changed})
    return Path(path)


def register_by_hand(client: MlflowClient, run_id: str | None = None) -> None:
    """Put version 1's model into production once more, as a version without our tags."""
    source = client.get_model_version(NAME, "1").source
    version = client.create_model_version(NAME, source, run_id)
    client.set_registered_model_alias(NAME, "production", version.version)


@pytest.mark.slow
def test_a_production_model_that_was_trained_on_other_data_is_not_compared(
    held: MlflowClient, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(clouds) as arrays:
        labels = {name: (arrays[name] + 1) % 3 for name in ("y_train", "y_test")}
    other = save_changed(clouds, "other.npz", **labels)
    digest = load_dataset(str(clouds), 0.1).digest

    call = executor.Executor.call

    def load_no_models(
        workers: executor.Executor, method: str, *arguments: Any, **more: Any
    ) -> Any:
        assert method != "compare", "no model has to be loaded for this"
        return call(workers, method, *arguments, **more)

    monkeypatch.setattr(executor.Executor, "call", load_no_models)
    found = verdict(pipeline.run(config(other, **GOOD)))
    assert str(found) == (
        "not promoted: version 1, in production, could not be compared: it was trained on other "
        f"data (clouds.npz, {digest[:12]}); to replace it run again with --promote always"
    )
    assert in_production(held) == 1
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(config(other, **GOOD))) == found
    assert invariants.dump(Path.cwd()) == before

    forced = verdict(pipeline.run(config(other, **GOOD, promote="always")))
    assert (forced.promoted, forced.problem) == (True, found.problem)
    assert in_production(held) == 2
    assert sorted(versions(held)) == [1, 2]


@pytest.mark.slow
def test_a_version_registered_by_hand_is_compared_where_nothing_tells_its_data(
    held: MlflowClient, clouds: Path
) -> None:
    wide = {}
    with np.load(clouds) as data:
        for name in ("x_train", "x_test"):
            wide[name] = np.hstack([data[name]] * 2)
    other = save_changed(clouds, "wide.npz", **wide)
    run_id = held.get_model_version(NAME, "1").run_id
    register_by_hand(held)
    shape = verdict(pipeline.run(config(other)))
    assert not shape.promoted
    assert "takes (None, 4)" in str(shape)
    assert "8 features" in str(shape)
    register_by_hand(held, "of another server")
    assert verdict(pipeline.run(config(other))).problem == shape.problem
    register_by_hand(held, run_id)
    assert "it was trained on other data" in str(verdict(pipeline.run(config(other))))


@pytest.mark.slow
def test_a_rejected_winner_is_judged_again_when_nothing_is_in_production_any_more(
    held: MlflowClient, clouds: Path
) -> None:
    assert verdict(pipeline.run(config(clouds, **BAD))).champion == 1
    held.delete_registered_model_alias(NAME, "production")
    again = verdict(pipeline.run(config(clouds, **BAD)))
    assert str(again) == "promoted: nothing was in production"
    assert in_production(held) == 2
    assert sorted(versions(held)) == [1, 2]
    left = {"gate.champion_version", "gate.mcnemar_p_value", "gate.losing_version"}
    assert not left & set(versions(held)[2].tags)


@pytest.mark.slow
def test_a_rejected_winner_is_judged_again_against_another_champion(
    held: MlflowClient, clouds: Path
) -> None:
    assert verdict(pipeline.run(config(clouds, **BAD))).champion == 1
    register_by_hand(held)
    again = verdict(pipeline.run(config(clouds, **BAD)))
    assert (again.promoted, again.champion) == (False, 3)
    assert versions(held)[2].tags["gate.champion_version"] == "3"
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(config(clouds, **BAD))) == again
    assert invariants.dump(Path.cwd()) == before


@pytest.mark.slow
def test_the_verdict_never_stands_until_something_else_is_in_production(
    client: MlflowClient, clouds: Path
) -> None:
    kept_out = config(clouds, promote="never")
    first = verdict(pipeline.run(kept_out))
    before = invariants.dump(Path.cwd())
    assert verdict(pipeline.run(kept_out)) == first
    assert invariants.dump(Path.cwd()) == before
    tags = versions(client)[1].tags
    client.set_registered_model_alias(NAME, "production", "1")  # by hand: no verdict of the gate
    assert verdict(pipeline.run(kept_out)) == first
    assert versions(client)[1].tags == tags
    register_by_hand(client)
    assert verdict(pipeline.run(kept_out)).champion == 2


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
    held: MlflowClient,
    clouds: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    when: str,
    refused: bool,
) -> None:
    if refused:  # at first; then the user changes the policy
        assert not verdict(pipeline.run(config(clouds, **GOOD, promote="never"))).promoted

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
    assert (found.promoted, found.champion, found.p_value) == (True, 1, 1.0)
    assert sorted(versions(held)) == [1, 2]
    assert in_production(held) == 2
    assert versions(held)[2].tags["gate.losing_version"] == "2"


@pytest.mark.slow
def test_a_winner_of_yesterday_is_not_said_to_be_in_production(
    client: MlflowClient, clouds: Path
) -> None:
    pipeline.run(config(clouds, **BAD))
    pipeline.run(config(clouds, **GOOD, study_name="better"))
    again = pipeline.run(config(clouds, **BAD))
    assert again.winner is not None
    assert (again.winner.version, again.winner.in_production) == (1, 2)
    assert "version 1: not in production, where version 2 is." in summary(again)


@pytest.mark.slow
def test_two_studies_that_end_together_leave_one_in_production(
    client: MlflowClient, clouds: Path
) -> None:
    options = ("--dataset", str(clouds), "--n-trials", "1", "--epochs", "2", "--workers", "1")
    options += ("--hidden-units", "8", "--report", "none", "--baselines", "none", "--study-name")
    processes = [start(Path.cwd(), *options, name) for name in ("one", "other")]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert (process.returncode, err) == (0, ""), out
    assert in_production(client) == 1
    tags = {number: version.tags for number, version in versions(client).items()}
    assert sorted(tags) == [1, 2]
    # Both were the same training, so whoever came second was equal, and stayed out.
    assert tags[1]["gate.decision"] == "promoted: nothing was in production"
    assert tags[2]["gate.decision"].startswith("not promoted: ")
    assert tags[2]["gate.champion_version"] == "1"
    assert tags[2]["gate.mcnemar_p_value"] == "1.0"
    for name in ("one", "other"):
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
