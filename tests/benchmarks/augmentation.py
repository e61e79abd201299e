"""What augmentation costs: python tests/benchmarks/augmentation.py

One process of one thread trains the reference on 54,000 digits, an epoch of each augmentation in
turns. The cost is the median epoch's time by that of the plain epoch of the same round. Beside it,
one batch through Keras' own layers that do the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from search.config.hyperparameters import AUGMENTATIONS, REFERENCE, complete
from search.data.dataset import Dataset
from search.data.load import load_dataset
from search.data.preparation import scaled
from search.training import augmentation
from search.training.network import build_network
from search.training.train import train, use_one_thread_each

KINDS = ("none", *AUGMENTATIONS)
BATCH = 128
KERAS = {
    "shift": [keras.layers.RandomTranslation(0.1, 0.1)],
    "affine": [
        keras.layers.RandomTranslation(0.1, 0.1),
        keras.layers.RandomRotation(15 / 360),
        keras.layers.RandomZoom(0.15, 0.15),
    ],
    "elastic": [keras.layers.RandomElasticTransform()],
}


def epoch(kind: str, dataset: Dataset) -> float:
    """Seconds of the second of two epochs: the first one carries the tracing."""
    tried = complete({**REFERENCE, "augmentation": kind, "augmentation_strength": 1.0})
    network = build_network(tried, dataset.sample_shape, dataset.task, seed=0)
    began: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: began.append(time.perf_counter()),
        on_train_end=lambda *_: began.append(time.perf_counter()),
    )
    train(network, dataset.train, tried, epochs=2, seed=0, shape=(28, 28), callbacks=[clock])
    return began[2] - began[1]


def batch(distort: Callable[[Any, Any], Any], images: Any) -> float:
    """Milliseconds of one batch, of 50 in a graph."""

    @tf.function
    def many(seed: Any) -> Any:
        def step(i: Any, total: Any) -> Any:
            return i + 1, total + tf.reduce_sum(distort(images, tf.stack([seed, i])))

        return tf.while_loop(lambda i, _: i < 50, step, (0, 0.0), parallel_iterations=1)[1]

    many(tf.constant(0))
    began = time.perf_counter()
    many(tf.constant(1))
    return (time.perf_counter() - began) * 1000 / 50


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    use_one_thread_each(1)
    dataset = load_dataset("mnist", 0.1)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            seconds[kind].append(epoch(kind, dataset))
    print("| augmentation | epoch s | by the plain epoch | lowest to highest |\n|---|---|---|---|")
    for kind in KINDS:
        ratios = [a / b for a, b in zip(seconds[kind], seconds["none"], strict=True)]
        print(
            f"| {kind} | {statistics.median(seconds[kind]):.2f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    images = tf.constant(scaled(dataset.x_all[:BATCH]).reshape(BATCH, 28, 28, 1))
    print("\n| a batch of 128 | here ms | Keras' layers ms |\n|---|---|---|")
    for kind in AUGMENTATIONS:
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            ours.append(batch(lambda x, s, k=kind: augmentation.augment(k, x, 1.0, s), images))
            theirs.append(batch(lambda x, _, k=kind: _keras(k, x), images))
        print(f"| {kind} | {statistics.median(ours):.2f} | {statistics.median(theirs):.2f} |")


def _keras(kind: str, images: Any) -> Any:
    for layer in KERAS[kind]:
        images = layer(images, training=True)
    return images


if __name__ == "__main__":
    main()
