"""The plain script: what one writes from Optuna's, Keras' and MLflow's documentation.

    python tests/benchmarks/plain.py --n-trials 12 --hidden-units 512 --no-pruning

The same search as study.py's default: TPE, MedianPruner, five epochs of `model.fit`, each trial a
nested MLflow run, the best trial trained anew, logged, registered and promoted.
"""

import argparse
from pathlib import Path

import keras
import mlflow
import numpy as np
import optuna
from optuna_integration import KerasPruningCallback

MNIST = Path(__file__).parents[2] / "search" / "data" / "datasets" / "mnist.npz"


def create_model(units: int, dropout: float, learning_rate: float) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


class LogEpoch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        mlflow.log_metrics(logs or {}, step=epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-trials", type=int, default=50)
    parser.add_argument("--hidden-units", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--no-pruning", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    with np.load(MNIST) as data:
        x_train = data["x_train"].reshape(-1, 784).astype("float32") / 255
        x_test = data["x_test"].reshape(-1, 784).astype("float32") / 255
        y_train, y_test = data["y_train"], data["y_test"]

    keras.utils.set_random_seed(arguments.seed)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment("MNIST_Classification")

    def objective(trial: optuna.Trial) -> float:
        params = {
            "units": trial.suggest_categorical("units", arguments.hidden_units),
            "dropout": trial.suggest_float("dropout", 0.0, 0.5),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        }
        with mlflow.start_run(run_name=f"trial-{trial.number}", nested=True):
            mlflow.log_params(params)
            model = create_model(**params)
            history = model.fit(
                x_train,
                y_train,
                batch_size=128,
                epochs=5,
                validation_split=0.1,
                verbose=0,
                callbacks=[LogEpoch(), KerasPruningCallback(trial, "val_accuracy")],
            )
            return history.history["val_accuracy"][-1]

    with mlflow.start_run(run_name="study"):
        study = optuna.create_study(
            study_name="plain",
            storage="sqlite:///study.db",
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=arguments.seed),
            pruner=(
                optuna.pruners.NopPruner()
                if arguments.no_pruning
                else optuna.pruners.MedianPruner()
            ),
        )
        study.optimize(objective, n_trials=arguments.n_trials)

        with mlflow.start_run(run_name="best", nested=True):
            model = create_model(**study.best_params)
            model.fit(x_train, y_train, batch_size=128, epochs=5, verbose=0, callbacks=[LogEpoch()])
            _, accuracy = model.evaluate(x_test, y_test, verbose=0)
            mlflow.log_metric("test_accuracy", accuracy)
            mlflow.keras.log_model(
                model,
                name="model",
                signature=mlflow.models.infer_signature(x_test[:2], model.predict(x_test[:2])),
                registered_model_name="MNIST_DNN_Model",
            )
    client = mlflow.MlflowClient()
    (version,) = client.search_model_versions("name = 'MNIST_DNN_Model'")
    client.set_registered_model_alias("MNIST_DNN_Model", "production", version.version)
    print(f"test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
