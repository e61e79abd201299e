"""Every value of every hyperparameter trains, is saved and loaded, is retrained, reproduces."""

import warnings
from pathlib import Path
from typing import Any

import invariants
import keras
import mlflow
import numpy as np
import pytest
from conftest import ROOT
from mlflow.tracking import MlflowClient
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.trial import FrozenTrial, create_trial

from search import pipeline
from search.config.hyperparameters import HYPERPARAMETERS, complete, describe, short
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.load import load_for_study
from search.data.preparation import scaled
from search.promotion import retrain
from search.report import overview
from search.study import sampling
from search.training.network import network_to_register
from search.workers import reproduce
from search.workers.reproduce import train_again

CORE = {"hidden_units": 16, "dropout_rate": 0.1, "learning_rate": 0.01}
ALWAYS = {"label_smoothing": 0.1}  # the same in all trials of the study
VALUES: dict[str, dict[str, Any]] = {  # of each trial, several at once
    "five layers": {
        "hidden_layers": 5,
        "activation": "leaky_relu",
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "schedule": "cosine",
        "augmentation": "shift",
    },
    "batch_normalization": {
        "batch_normalization": True,
        "hidden_layers": 2,
        "activation": "elu",
        "optimizer": "sgd",
        "weight_decay": 0.1,
        "early_stopping": 1,
        "batch_size": 16,
        "augmentation": "elastic",
    },
    "nadam": {
        "optimizer": "nadam",
        "learning_rate": 0.03,
        "activation": "gelu",
        "batch_size": 1024,  # more than there are examples: a step an epoch
        "schedule": "plateau",
    },
    "cnn of 3 blocks, with the weight decay of adam, much at once": {
        "architecture": "cnn",
        "filters": 4,
        "conv_blocks": 3,
        "batch_normalization": True,
        "activation": "silu",
        "weight_decay": 0.01,
        "learning_rate": 0.03,
        "batch_size": 16,  # the moving averages of the normalization need some steps
        "schedule": "one_cycle",
        "early_stopping": 2,
        "augmentation": "affine",
        "augmentation_strength": 0.5,
    },
}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 real digits, every second row and column of them."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    with np.load(ROOT / "search" / "data" / "datasets" / "mnist.npz") as mnist:
        np.savez(
            path,
            x_train=mnist["x_train"][:600, ::2, ::2],
            y_train=mnist["y_train"][:600],
            x_test=mnist["x_test"][:100, ::2, ::2],
            y_test=mnist["y_test"][:100],
        )
    return path


def config(dataset: Path, **changed: Any) -> StudyConfig:
    small = {"n_trials": 1, "epochs": 3, "workers": 1, "batch_size": 64}
    without = {"report": "none", "baselines": "none"}
    return StudyConfig(**{"dataset": str(dataset), **small, **without, **CORE, **changed})


def quietly(_: str) -> None:
    """Ignore what `reproduce` prints."""


def test_each_value_is_in_a_test() -> None:
    tried = {name for changed in (ALWAYS, *VALUES.values()) for name in changed}
    assert tried | set(CORE) == set(HYPERPARAMETERS)
    for name, known in HYPERPARAMETERS.items():
        for word, value in known.domain.words.items():
            if value != known.default:
                assert any(changed.get(name) == value for changed in VALUES.values()), word


@pytest.fixture
def of_all(small: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study in which each trial has the next of VALUES, and else the defaults."""
    usual = {name: known.default for name, known in HYPERPARAMETERS.items()} | {"batch_size": 64}
    trials = [{**usual, **CORE, **changed} for changed in VALUES.values()]
    space = {name: list(dict.fromkeys(trial[name] for trial in trials)) for name in usual}

    def sampler(_: StudyConfig, slot: int) -> BaseSampler:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            return PartialFixedSampler(trials[slot], RandomSampler(0))

    monkeypatch.setattr(sampling, "sampler", sampler)
    return config(small, n_trials=len(trials), pruner="none", **{**space, **ALWAYS})


@pytest.mark.slow
def test_every_value_trains_is_saved_loaded_retrained_and_reproduces(
    client: MlflowClient, in_folder: Path, of_all: StudyConfig, no_pictures: None
) -> None:
    result = pipeline.run(of_all)
    found = invariants.check(in_folder, len(VALUES))
    for trial, changed in zip(found["trials"], VALUES.values(), strict=True):
        check_names(trial, found["runs"][trial.number].data.params, changed)
    assert overview.read(of_all).fixed == ALWAYS
    before = invariants.dump(in_folder)
    pipeline.run(of_all)
    assert invariants.dump(in_folder) == before

    assert result.winner is not None
    origin = client.get_run(result.winner.run_id).data.tags["lineage.hyperparameters"]
    legacy = client.download_artifacts(result.winner.run_id, "mnist_model.h5", str(in_folder))
    dataset = load_for_study(of_all, None)
    loaded = mlflow.keras.load_model("models:/MNIST_DNN_Model@production")
    for model in (loaded, keras.saving.load_model(legacy)):
        assert accuracy(model, dataset) == pytest.approx(result.winner.test_accuracy, abs=1e-6)
    for trial, changed in zip(found["trials"], VALUES.values(), strict=True):
        kept = retrain.lineage(found["study"], trial, dataset)["lineage.hyperparameters"]
        assert all(f'"{name}": ' in kept for name in {**changed, **CORE, **ALWAYS})
        assert (kept == origin) == (trial.number == result.winner.trial)
        check_model(of_all, dataset, trial)
        again = reproduce.reproduce(of_all, trial.number, None, quietly)
        assert again.differences == []


def check_names(trial: FrozenTrial, params: dict[str, str], changed: dict[str, Any]) -> None:
    """Assert that both stores show what a trial used, and nothing else."""
    convolutional, distorted = "architecture" in changed, "augmentation" in changed
    for names in (trial.params, params):
        assert ("filters" in names) == ("conv_blocks" in names) == convolutional
        assert ("augmentation_strength" in names) == distorted
    for name, value in changed.items():
        assert (trial.params[name], params[name]) == (value, str(value))
    for name, value in ALWAYS.items():
        assert params[name] == str(value)
        assert name not in trial.params
    assert set(CORE) < set(trial.params)
    assert ("learning_rate" in trial.user_attrs["history"][0]) == (
        changed.get("schedule") == "plateau"
    )


def accuracy(model: Any, dataset: Dataset) -> float:
    return float((answers(model, dataset).argmax(axis=1) == dataset.y_test).mean())


def answers(model: Any, dataset: Dataset) -> Any:
    return model(scaled(dataset.test_inputs()), training=False).numpy()


def check_model(settings: StudyConfig, dataset: Dataset, trial: FrozenTrial) -> None:
    """Assert that a trial is retrained, and its model loaded as it was saved, in both formats."""
    hyperparameters = complete(trial.params, ALWAYS)
    network, curves = retrain._train(settings, dataset, trial, hyperparameters)
    assert len(curves) == trial.user_attrs.get("best_epoch", 2) + 1
    model = network_to_register(network, dataset)
    expected = answers(model, dataset)
    for name in ("model.keras", "model.h5"):
        file = Path(f"{trial.number}-{name}")
        model.save(file)
        again = keras.saving.load_model(file)
        np.testing.assert_allclose(answers(again, dataset), expected, rtol=1e-5, atol=1e-6)
    assert accuracy(model, dataset) > 0.15, hyperparameters  # a tenth by chance


# ---- early stopping and plateaus ---------------------------------------------------------------


@pytest.mark.slow
def test_trials_and_finalists_that_stop_early_count_by_their_best_epochs_and_are_retrained_as_long(
    in_folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrain, "save_evaluation", lambda *_: None)
    changed = {"early_stopping": 2, "learning_rate": 0.03, "finalists": 1, "repeats": 2}
    settings = config(small, epochs=40, n_trials=2, **changed)
    result = pipeline.run(settings)
    found = invariants.check(in_folder, 2)
    assert result.winner is not None
    for trial in found["trials"]:
        curve = [entry["val_accuracy"] for entry in trial.user_attrs["history"]]
        assert trial.value == max(curve)
        best = curve.index(max(curve))
        assert len(curve) == best + 3 < 40
        assert trial.user_attrs["best_epoch"] == best
        run = found["runs"][trial.number].data
        assert run.tags["optuna.best_epoch"] == str(best)
        assert set(trial.params) == set(CORE)
        assert (run.params["early_stopping"], run.params["optimizer"]) == ("2", "adam")
        assert not {"schedule", "weight_decay", "hidden_layers"} & set(run.params)
    assert overview.read(settings).fixed == {"batch_size": 64, "early_stopping": 2}
    winner = found["trials"][result.winner.trial]
    repeats = [winner.user_attrs[f"finalist_{index}"] for index in range(2)]
    best_of = [max(entry["val_accuracy"] for entry in repeat["history"]) for repeat in repeats]
    assert result.finalists[0].values == best_of
    assert [repeat["value"] for repeat in repeats] == best_of
    retrained = found["client"].get_metric_history(result.winner.run_id, "train_loss")
    assert len(retrained) == winner.user_attrs["best_epoch"] + 1
    again = reproduce.reproduce(settings, winner.number, None, quietly)
    assert again.differences == []
    assert again.value == winner.value


@pytest.mark.slow
def test_the_retraining_lowers_its_rate_where_the_trials_plateaus_did(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    class Watch(keras.callbacks.LearningRateScheduler):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            super().on_epoch_end(epoch, logs)
            seen.append(float(self.model.optimizer.learning_rate))

    monkeypatch.setattr(keras.callbacks, "LearningRateScheduler", Watch)
    settings = config(small, epochs=25, schedule="plateau", learning_rate=0.05)
    dataset, history = load_for_study(settings, None), []
    hyperparameters = complete(CORE, {"batch_size": 64, "schedule": "plateau"})
    hyperparameters["learning_rate"] = 0.05
    trial = create_trial(value=0.5, user_attrs={"seed": 1, "history": history})
    trial.params = hyperparameters
    train_again(settings, dataset, trial, {"params": {}}, 1, history)
    rates = [entry["learning_rate"] for entry in history]
    assert rates[0] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 / 3
    retrain._train(settings, dataset, trial, hyperparameters)
    assert seen == rates


# ---- as text -----------------------------------------------------------------------------------


def test_a_line_of_the_terminal_leaves_out_the_defaults() -> None:
    params = {
        "hidden_units": 64,
        "dropout_rate": 0.25,
        "learning_rate": 0.002,
        "hidden_layers": 1,
        "optimizer": "sgd",
        "batch_normalization": True,
        "weight_decay": 0.0001,
        "augmentation": "none",
        "kernel": 3,
    }
    assert describe(params) == (
        "units   64  dropout 0.250  lr 2.00e-03  sgd  batch norm  decay 0.0001  kernel 3"
    )
    own = {"filters": 32, "activation": "relu", "learning_rate": 0.002, "optimizer": "adam"}
    assert describe(own) == "filters 32  relu  lr 2.00e-03"
    assert [short(value) for value in (None, True, False, "a", 0.123456)] == [
        "",
        "on",
        "off",
        "a",
        "0.1235",
    ]
