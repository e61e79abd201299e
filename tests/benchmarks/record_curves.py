"""Record real learning curves on MNIST: python tests/benchmarks/record_curves.py

Random configurations of the default space, and the reference on many seeds, each trained for five
epochs on 54,000 digits. A row holds val and test accuracy after every epoch and the seconds of
processor time, which other work on the machine disturbs least. Rows already in the table are kept,
so the recording can be interrupted, and `--part 0/2` and `--part 1/2` can run side by side.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import keras
import optuna
import tensorflow as tf

from search.config.hyperparameters import REFERENCE, complete
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.load import load_dataset
from search.training.network import build_network
from search.training.train import train, use_one_thread_each

TABLE = Path(__file__).with_name("curves.csv")
EPOCHS = 5
FIELDS = [
    "name",
    "hidden_units",
    "dropout_rate",
    "learning_rate",
    *(f"val_{epoch}" for epoch in range(1, EPOCHS + 1)),
    *(f"test_{epoch}" for epoch in range(1, EPOCHS + 1)),
    "seconds",
]


def configurations(count: int, repeats: int) -> dict[str, Any]:
    """The configurations by name; the name ends in the training's seed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=20261122))
    space = StudyConfig().space
    found = {f"reference-{seed}": complete(REFERENCE) for seed in range(repeats)}
    found.update({f"random-{i}": space.suggest(study.ask()) for i in range(count)})
    return found


def record(name: str, tried: dict[str, Any], dataset: Dataset) -> dict[str, object]:
    """Train one configuration and return its row."""
    seed = int(name.rsplit("-", 1)[1])
    network = build_network(tried, dataset.sample_shape, dataset.task, seed)
    test: list[float] = []
    batches = tf.data.Dataset.from_tensor_slices((dataset.x_test, dataset.y_test)).batch(2000)

    class TestToo(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            test.append(self.model.evaluate(batches, verbose=0, return_dict=True)["accuracy"])

    began = time.process_time()
    history = train(
        network,
        dataset.train,
        tried,
        validation=dataset.validation,
        epochs=EPOCHS,
        seed=seed,
        callbacks=[TestToo()],
    )
    row: dict[str, object] = {"name": name, **{key: tried[key] for key in REFERENCE}}
    row.update({f"val_{i + 1}": f"{v:.6f}" for i, v in enumerate(history["val_accuracy"])})
    row.update({f"test_{i + 1}": f"{v:.6f}" for i, v in enumerate(test)})
    row["seconds"] = f"{time.process_time() - began:.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=220)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))

    use_one_thread_each(1)
    dataset = load_dataset("mnist", 0.1)
    wanted = configurations(arguments.configurations, arguments.repeats)
    done = set()
    if arguments.table.exists():
        with arguments.table.open() as file:
            done = {row["name"] for row in csv.DictReader(file)}
    for index, (name, hyperparameters) in enumerate(wanted.items()):
        if index % parts != part or name in done:
            continue
        row = record(name, hyperparameters, dataset)
        with arguments.table.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
