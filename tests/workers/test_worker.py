"""A worker: whose source it trains, and what it says of a trial."""

from pathlib import Path

import invariants
import pytest
from test_trial import Outcomes, config

from search import StudyConfig, run
from search.data.load import load_dataset
from search.errors import InputError
from search.workers.worker import Worker

DENSE = """
import keras

SPACE = {"units": "4,8"}


def build(hyperparameters, shape, classes):
    hidden = keras.layers.Dense(hyperparameters["units"], activation="relu")
    return keras.Sequential([keras.Input(shape), hidden, keras.layers.Dense(classes, "softmax")])
"""


@pytest.mark.slow
def test_a_worker_with_another_source_trains_nothing(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    (in_folder / "theirs.py").write_text(DENSE)
    model = "theirs:build"
    config = StudyConfig(
        dataset=str(clouds),
        model=model,
        n_trials=1,
        epochs=1,
        workers=1,
        report="none",
        baselines="none",
    )
    result = run(config, Outcomes(0))
    (in_folder / "theirs.py").write_text(DENSE.replace("units", "width"))
    dataset = load_dataset(config.dataset, config.validation_split)
    with pytest.raises(InputError, match=f"{model} must be the model of the study"):
        Worker(config, result.parent_run_id, dataset)


@pytest.mark.slow
def test_an_outcome_says_what_the_stores_say(in_folder: Path, clouds: Path) -> None:
    outcomes = Outcomes(3)
    run(config(clouds), outcomes)
    trials = invariants.check(in_folder, 3, registered=False)["trials"]
    for outcome, trial in zip(outcomes.seen, trials, strict=True):
        assert (outcome.number, outcome.slot) == (trial.number, trial.user_attrs["place"])
        assert outcome.value == outcome.final == trial.value
        assert outcome.hyperparameters
        assert outcome.hyperparameters == trial.params
        assert (outcome.epochs, outcome.failure) == (2, None)
