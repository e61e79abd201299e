"""The best trials trained again on fresh seeds: who they are, who wins, what a kill leaves."""

from pathlib import Path
from typing import Any

import invariants
import optuna
import pytest
from conftest import copy_databases, run_elsewhere
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import pipeline
from search.config.hyperparameters import REFERENCE
from search.config.settings import StudyConfig
from search.report.progress import Progress
from search.study import ranking, sampling
from search.study.ranking import repeat_attr
from search.task import METRICS
from search.training import train as training
from search.training.train import TrainingDiverged

DISTRIBUTIONS = {
    "hidden_units": CategoricalDistribution((128, 512)),
    "dropout_rate": FloatDistribution(0, 0.5),
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
}
OTHER = {"hidden_units": 128, "dropout_rate": 0.1, "learning_rate": 0.001}
TRIALS, REPEATS = 3, 2


def study_of(
    *values: float | None, reference: int | None = None, repeats: dict[int, list[Any]] | None = None
) -> optuna.Study:
    """A study whose trials have these values, None for a pruned one."""
    study = optuna.create_study(direction="maximize")
    for number, value in enumerate(values):
        kept = (repeats or {}).get(number, [])
        attrs = {
            repeat_attr(index): {
                "seed": index,
                "began": 0,
                "ended": 1,
                "history": [{"epoch": 0, "val_accuracy": again or 0.0}],
                **({"failure": "TrainingDiverged: loss"} if again is None else {}),
            }
            for index, again in enumerate(kept)
        }
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
                value=value,
                params=REFERENCE if number == reference else OTHER,
                distributions=DISTRIBUTIONS,
                user_attrs={"trainable_parameters": 1, **attrs},
            )
        )
    return study


def numbers(trials: list[FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


def chosen(study: optuna.Study, **settings: int) -> list[FrozenTrial]:
    return ranking.candidates(study, StudyConfig(**settings))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, [3, 0]), (2, [3, 1, 0]), (3, [3, 1, 0]), (9, [3, 1, 0, 4])],
)
def test_the_best_complete_trials_and_the_reference(count: int, expected: list[int]) -> None:
    study = study_of(0.7, 0.8, None, 0.9, 0.6, reference=0)
    assert numbers(chosen(study, finalists=count)) == expected


def test_with_a_loss_the_lowest_is_the_best_of_trials_and_of_finalists() -> None:
    study = study_of(0.7, 0.2, 0.5, repeats={1: [0.9, 0.8], 2: [0.3, 0.4], 0: [0.1, None]})
    loss = METRICS["val_loss"]
    trials = study.get_trials(deepcopy=False)
    assert numbers(ranking.ranked(trials, loss)) == [1, 2, 0]
    study.set_user_attr("settings", {"objective": "val_loss"})
    assert [f.number for f in settled(study, finalists=3, repeats=2)] == [2, 1, 0]
    assert ranking.winner(study) == trials[2]


def test_without_a_reference_the_best_alone() -> None:
    assert numbers(chosen(study_of(0.7, 0.9), finalists=1)) == [1]


def test_what_is_missing_goes_round_by_round() -> None:
    study = study_of(0.9, 0.8, repeats={0: [0.7], 1: []})
    config = StudyConfig(finalists=2, repeats=2)
    found = ranking.missing(study.get_trials(deepcopy=False), config)
    assert found == [(1, 0), (0, 1), (1, 1)]


def settled(study: optuna.Study, **settings: int) -> list[ranking.Finalist]:
    config = StudyConfig(**settings)
    ranking.settle(study, chosen(study, **settings), config)
    return ranking.standing(study)


def test_the_best_mean_wins_and_a_failure_comes_last() -> None:
    study = study_of(0.9, 0.8, 0.7, repeats={0: [0.7, 0.6], 1: [0.8, 0.7], 2: [0.99, None]})
    stood = settled(study, finalists=3, repeats=2)
    assert [f.number for f in stood] == [1, 0, 2]
    assert stood[0].mean == pytest.approx(0.75)
    assert stood[0].deviation == pytest.approx(0.0707, abs=1e-4)
    assert (stood[2].mean, stood[2].deviation) == (None, None)
    assert ranking.winner(study) == study.get_trials(deepcopy=False)[1]
    assert "0.7500 ± 0.0707" in stood[0].text(METRICS["val_accuracy"])
    assert "failed" in stood[2].text(METRICS["val_accuracy"])


def test_of_equal_means_the_better_trial_wins() -> None:
    study = study_of(0.7, 0.8, repeats={0: [0.6], 1: [0.6]})
    assert [f.number for f in settled(study, finalists=2, repeats=1)] == [1, 0]


def test_switched_off_the_best_trial_wins_again() -> None:
    study = study_of(0.7, 0.8, repeats={0: [0.9], 1: [0.6]})
    assert settled(study, finalists=2, repeats=1)[0].number == 0
    assert settled(study, finalists=0) == []
    assert ranking.winner(study).number == 1  # type: ignore[union-attr]


# ---- whole runs ----------------------------------------------------------------------------------


def config(clouds: Path, **changed: Any) -> StudyConfig:
    settings = {
        "dataset": str(clouds),
        "epochs": 2,
        "n_trials": TRIALS,
        "hidden_units": "8",
        "workers": 1,
        "pruner": "none",
        "report": "none",
        "baselines": "none",
        "finalists": 2,
        "repeats": REPEATS,
    }
    return StudyConfig(**{**settings, **changed})


class Killed(BaseException):
    """The process ends here, as far as the code above can tell."""


class Repeats(Progress):
    """Counts the repeats; after `stop_at` of them it says stop, or raises."""

    def __init__(self, stop_at: int = -1, error: type[BaseException] | None = None) -> None:
        self.seen: list[tuple[int, int, float | None]] = []
        self._stop_at, self._error = stop_at, error

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        self.seen.append((number, repeat, value))
        if self._error is not None and len(self.seen) == self._stop_at:
            raise self._error

    def stopping(self) -> bool:
        return self._error is None and len(self.seen) == self._stop_at


def curves(found: dict[str, Any]) -> dict[Any, Any]:
    """Every repeat's seed and history, without times."""
    return {
        (trial.user_attrs["place"], name): (
            kept["seed"],
            [{k: v for k, v in entry.items() if k != "time_ms"} for entry in kept["history"]],
        )
        for trial in found["trials"]
        for name, kept in trial.user_attrs.items()
        if name.startswith("finalist_")
    }


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> Path:
    """A study whose trials are finished, stopped before its finalists."""

    class Chosen(Repeats):
        def finalists(self, *_: Any) -> None:
            raise Killed

    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(Killed):
            pipeline.run(config(clouds), Chosen())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, searched: Path, clouds: Path) -> dict[str, Any]:
    """The same, and its finalists in one go."""
    folder = tmp_path_factory.mktemp("whole")
    copy_databases(searched, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        listener = Repeats()
        result = pipeline.run(config(clouds), listener)
    found = invariants.check(folder, TRIALS)
    return {"folder": folder, "result": result, "seen": listener.seen, **found}


@pytest.mark.slow
def test_the_finalists_are_runs_of_their_own_and_the_best_mean_is_registered(
    whole: dict[str, Any],
) -> None:
    result, runs = whole["result"], whole["children"]
    again = [run for run in runs if "optuna.finalist" in run.data.tags]
    assert len(again) == len(whole["seen"]) == 2 * REPEATS
    assert all("optuna.trial_state" not in run.data.tags for run in again)
    ranked = sorted(whole["trials"], key=lambda t: (-t.value, t.number))[:2]
    assert {f.number for f in result.finalists} == {t.number for t in ranked}
    for finalist in result.finalists:
        logged = [
            run.data.metrics["val_accuracy"]
            for run in sorted(again, key=lambda run: run.info.run_name)
            if run.data.tags["optuna.trial_number"] == str(finalist.number)
        ]
        assert logged == finalist.values
    assert result.finalists[0].mean >= result.finalists[1].mean
    assert result.winner.trial == result.finalists[0].number
    assert whole["winner"].info.run_id == result.winner.run_id


@pytest.mark.slow
def test_stopped_among_the_finalists_the_next_run_goes_on_and_ends_the_same(
    whole: dict[str, Any], searched: Path, in_folder: Path, clouds: Path
) -> None:
    copy_databases(searched, in_folder)
    seen = []
    for error in (None, KeyboardInterrupt, Killed, None):  # each after one more repeat
        listener = Repeats(1, error)
        if error is None:
            result = pipeline.run(config(clouds), listener)
            assert (result.winner, result.stopped) == (None, "interrupted")
            assert bool(result.finalists) == (len(seen) + 1 == 2 * REPEATS)
            invariants.check(in_folder, TRIALS, registered=False)
        else:
            with pytest.raises(error):
                pipeline.run(config(clouds), listener)
        assert len(listener.seen) == 1
        seen += listener.seen
    rest = Repeats()
    result = pipeline.run(config(clouds), rest)
    assert rest.seen == []
    assert seen == whole["seen"]
    found = invariants.check(in_folder, TRIALS)
    assert curves(found) == curves(whole)
    assert result.winner is not None
    assert result.winner.trial == whole["result"].winner.trial
    assert result.winner.test_accuracy == whole["result"].winner.test_accuracy

    before = invariants.dump(in_folder)
    pipeline.run(config(clouds), Repeats())
    assert invariants.dump(in_folder) == before


@pytest.mark.slow
def test_in_processes_the_repeats_are_the_same(
    whole: dict[str, Any], searched: Path, in_folder: Path, clouds: Path
) -> None:
    copy_databases(searched, in_folder)
    run_elsewhere(config(clouds, workers=2))
    assert curves(invariants.check(in_folder, TRIALS)) == curves(whole)


@pytest.mark.slow
def test_a_repeat_that_diverges_does_not_win_and_what_the_server_refused_is_written_later(
    searched: Path, in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_databases(searched, in_folder)
    study = optuna.load_study(study_name="mnist-dnn", storage="sqlite:///study.db")
    best = ranking.best(study.get_trials(), METRICS["val_accuracy"])
    assert best is not None
    train, hopeless = training.train, sampling.repeat_seed(0, best.user_attrs["place"], 1)

    def diverge(*arguments: Any, **keywords: Any) -> Any:
        if keywords["seed"] == hopeless:
            raise TrainingDiverged("loss became nan in epoch 0")
        return train(*arguments, **keywords)

    listener, create_run = Repeats(), MlflowClient.create_run

    def refuse(self: MlflowClient, *arguments: Any, **keywords: Any) -> Any:
        if keywords["run_name"].startswith("finalist-") and len(listener.seen) < 2:
            raise MlflowException("the server is down")
        return create_run(self, *arguments, **keywords)

    monkeypatch.setattr("search.training.train.train", diverge)
    monkeypatch.setattr(MlflowClient, "create_run", refuse)
    result = pipeline.run(config(clouds), listener)
    assert sum("no run" in line for line in result.repaired) == 2
    found = invariants.check(in_folder, TRIALS)
    failed = found["trials"][best.number].user_attrs[repeat_attr(1)]
    assert failed["failure"] == "TrainingDiverged: loss became nan in epoch 0"
    assert result.finalists[-1].number == best.number
    assert result.winner is not None
    assert result.winner.trial != best.number


def test_a_lost_run_of_a_finalist_is_written_again(
    whole: dict[str, Any], client: MlflowClient, in_folder: Path, clouds: Path
) -> None:
    copy_databases(whole["folder"], in_folder)
    lost = next(run for run in whole["children"] if "optuna.finalist" in run.data.tags)
    client.delete_run(lost.info.run_id)
    result = pipeline.run(config(clouds))
    assert len(result.repaired) == 1
    assert "repeat" in result.repaired[0]
    assert "no run" in result.repaired[0]
    invariants.check(in_folder, TRIALS)
