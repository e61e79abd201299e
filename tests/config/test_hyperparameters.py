"""Every value of every hyperparameter trains, is saved and loaded, is retrained, reproduces."""

from pathlib import Path
from typing import Any

import invariants
import keras
import mlflow
import numpy as np
import pytest
from conftest import ROOT
from mlflow.tracking import MlflowClient

from search import pipeline
from search.config.hyperparameters import HYPERPARAMETERS, describe, short
from search.config.settings import StudyConfig
from search.report import overview
from search.workers import reproduce

VALUES: dict[str, dict[str, Any]] = {  # several at once, since each is a study of its own
    "five layers": {
        "hidden_layers": 5,
        "activation": "leaky_relu",
        "optimizer": "nadam",
        "schedule": "cosine",
        "augmentation": "shift",
    },
    "batch_normalization": {
        "batch_normalization": True,
        "hidden_layers": 2,
        "activation": "elu",
        "optimizer": "sgd",
        "weight_decay": 0.1,
        "batch_size": 16,
    },
    "adamw": {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "activation": "gelu",
        "schedule": "plateau",
        "label_smoothing": 0.2,
        "augmentation": "elastic",
    },
    "weight_decay of adam": {
        "weight_decay": 0.1,
        "activation": "silu",
        "early_stopping": 1,
        "batch_size": 1024,  # more than there are examples
    },
    "cnn of 3 blocks": {"architecture": "cnn", "filters": 2, "conv_blocks": 3},
    "much at once": {
        "architecture": "cnn",
        "filters": 4,
        "batch_normalization": True,
        "activation": "silu",
        "optimizer": "nadam",
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
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
    core = {"hidden_units": 16, "dropout_rate": 0.1, "learning_rate": 0.01}
    small = {"n_trials": 1, "epochs": 3, "workers": 1, "batch_size": 64}
    without = {"report": "none", "baselines": "none"}
    return StudyConfig(**{"dataset": str(dataset), **small, **without, **core, **changed})


def quietly(_: str) -> None:
    """Ignore what `reproduce` prints."""


def test_each_value_is_in_a_test() -> None:
    tried = {name for changed in VALUES.values() for name in changed}
    assert tried | {"hidden_units", "dropout_rate", "learning_rate"} == set(HYPERPARAMETERS)
    for name, known in HYPERPARAMETERS.items():
        for word, value in known.domain.words.items():
            if value != known.default:
                assert any(changed.get(name) == value for changed in VALUES.values()), word


@pytest.mark.slow
@pytest.mark.parametrize("changed", VALUES.values(), ids=VALUES)
def test_a_value_trains_is_saved_loaded_retrained_and_reproduces(
    client: MlflowClient, in_folder: Path, small: Path, changed: dict[str, Any]
) -> None:
    settings = config(small, **changed)
    result = pipeline.run(settings)
    found = invariants.check(in_folder, 1)
    (trial,) = found["trials"]
    assert set(trial.params) == {"hidden_units", "dropout_rate", "learning_rate"}
    params = found["runs"][0].data.params
    for name, value in changed.items():
        assert params[name] == str(value)
        assert f'"{name}": ' in found["winner"].data.tags["lineage.hyperparameters"] or (
            value == HYPERPARAMETERS[name].default
        )

    assert result.winner is not None
    model = mlflow.keras.load_model("models:/MNIST_DNN_Model@production")
    legacy = client.download_artifacts(result.winner.run_id, "mnist_model.h5", str(in_folder))
    with np.load(small) as arrays:
        x = arrays["x_test"].reshape(100, -1).astype("float32") / 255
        for loaded in (model, keras.saving.load_model(legacy)):
            hits = loaded(x, training=False).numpy().argmax(axis=1) == arrays["y_test"]
            assert hits.mean() == pytest.approx(result.winner.test_accuracy, abs=1e-6)
    assert result.winner.test_accuracy > 0.15  # a tenth by chance
    unusual = {n: v for n, v in changed.items() if v != HYPERPARAMETERS[n].default}
    assert overview.read(settings).fixed == {"batch_size": 64, **unusual}

    again = reproduce.reproduce(settings, None, None, quietly)
    assert again.differences == []
    before = invariants.dump(in_folder)
    pipeline.run(settings)
    assert invariants.dump(in_folder) == before


# ---- early stopping and plateaus ---------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_that_stops_early_counts_by_its_best_epoch_and_is_retrained_as_long(
    in_folder: Path, small: Path
) -> None:
    settings = config(small, epochs=40, early_stopping=2, learning_rate=0.03, n_trials=2)
    result = pipeline.run(settings)
    found = invariants.check(in_folder, 2)
    assert result.winner is not None
    for trial in found["trials"]:
        curve = [entry["val_accuracy"] for entry in trial.user_attrs["history"]]
        assert trial.value == max(curve)
        best = curve.index(max(curve))
        assert len(curve) == best + 3 < 40
        assert trial.user_attrs["best_epoch"] == best
        assert found["runs"][trial.number].data.tags["optuna.best_epoch"] == str(best)
    winner = found["trials"][result.winner.trial]
    retrained = found["client"].get_metric_history(result.winner.run_id, "train_loss")
    assert len(retrained) == winner.user_attrs["best_epoch"] + 1
    again = reproduce.reproduce(settings, winner.number, None, quietly)
    assert again.differences == []
    assert again.value == winner.value


@pytest.mark.slow
def test_finalists_that_stop_early_count_by_their_best_epochs(in_folder: Path, small: Path) -> None:
    settings = config(small, epochs=30, early_stopping=1, finalists=1, repeats=2, n_trials=1)
    result = pipeline.run(settings)
    found = invariants.check(in_folder, 1)
    repeats = [found["trials"][0].user_attrs[f"finalist_{index}"] for index in range(2)]
    best = [max(entry["val_accuracy"] for entry in repeat["history"]) for repeat in repeats]
    assert result.finalists[0].values == best
    assert [repeat["value"] for repeat in repeats] == best


@pytest.mark.slow
def test_the_retraining_lowers_its_rate_where_the_trials_plateaus_did(
    in_folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    class Watch(keras.callbacks.LearningRateScheduler):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            super().on_epoch_end(epoch, logs)
            seen.append(float(self.model.optimizer.learning_rate))

    monkeypatch.setattr(keras.callbacks, "LearningRateScheduler", Watch)
    settings = config(small, epochs=25, schedule="plateau", learning_rate=0.05)
    pipeline.run(settings)
    (trial,) = invariants.check(in_folder, 1)["trials"]
    rates = [entry["learning_rate"] for entry in trial.user_attrs["history"]]
    assert rates[0] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 / 3
    assert seen == rates


# ---- in both stores, only what was used -------------------------------------------------------


@pytest.mark.slow
def test_both_stores_show_what_a_trial_used_and_nothing_else(in_folder: Path, small: Path) -> None:
    pipeline.run(
        config(
            small,
            n_trials=6,
            epochs=1,
            pruner="none",
            sampler="random",
            architecture="dense,cnn",
            filters="2,4",
            augmentation="none,shift",
            optimizer="sgd",
        )
    )
    found = invariants.check(in_folder, 6)
    kinds = set()
    for trial in found["trials"]:
        convolutional = trial.params["architecture"] == "cnn"
        distorted = trial.params["augmentation"] == "shift"
        kinds.add((convolutional, distorted))
        params = found["runs"][trial.number].data.params
        for names in (trial.params, params):
            assert ("filters" in names) == ("conv_blocks" in names) == convolutional
            assert ("augmentation_strength" in names) == distorted
        assert params["optimizer"] == "sgd"
        assert "optimizer" not in trial.params  # the same for all
        assert not {"schedule", "weight_decay", "hidden_layers", "early_stopping"} & set(params)
    assert len(kinds) > 2


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
