"""Time the training loop against its floor: python tests/benchmarks/floor.py

The floor is the two matrix products of the hidden layer, forward and weight gradient, for all steps
of an epoch, by NumPy's BLAS. Loop and floor take turns, both on one thread in each of as many
processes as there are cores (as the workers of a study do), and then in a single process. Prints
seconds an epoch, medians, and floor / loop: the share of the loop's time that is matrix products.
"""

import argparse
import multiprocessing
import os
import time
from statistics import median
from typing import Any

import numpy as np

UNITS, BATCH, FEATURES = 512, 128, 784


def floor_epoch(examples: int) -> float:
    """Seconds of the matrix products alone for one epoch on `examples` examples."""
    random = np.random.default_rng(0)
    x = random.random((BATCH, FEATURES), dtype=np.float32)
    weights = random.random((FEATURES, UNITS), dtype=np.float32)
    gradient = random.random((BATCH, UNITS), dtype=np.float32)
    forward, backward = np.empty((BATCH, UNITS), "f4"), np.empty((FEATURES, UNITS), "f4")
    began = time.perf_counter()
    for _ in range(-(-examples // BATCH)):
        np.matmul(x, weights, out=forward)
        np.matmul(x.T, gradient, out=backward)
    return time.perf_counter() - began


def measure(barrier: Any, rounds: int, results: Any) -> None:
    """Take turns: the floor in all processes at once, then an epoch of the loop in all."""
    import keras

    from search.config.hyperparameters import REFERENCE, complete
    from search.data.load import load_dataset
    from search.training.network import build_network
    from search.training.train import train, use_one_thread_each

    use_one_thread_each(1)
    dataset = load_dataset("mnist", 0.1)
    network = build_network(complete(REFERENCE), dataset.sample_shape, dataset.task, seed=0)
    floors: list[float] = []
    loops: list[float] = []

    class Turns(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            barrier.wait()
            floors.append(floor_epoch(dataset.train_size))
            barrier.wait()
            self.began = time.perf_counter()

        def on_test_begin(self, logs: Any = None) -> None:
            loops.append(time.perf_counter() - self.began)

    train(
        network,
        dataset.train,
        complete({"batch_size": BATCH}),
        validation=dataset.validation,
        epochs=rounds + 1,
        seed=0,
        callbacks=[Turns()],
    )
    results.put((floors[1:], loops[1:]))  # the first epoch traces the graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # for the processes that are started here
    context = multiprocessing.get_context("spawn")
    print("| processes | floor s | loop s | loop s, fastest to slowest | floor / loop |")
    print("|---|---|---|---|---|")
    for count in sorted({1, os.cpu_count() or 1}):
        barrier, results = context.Barrier(count), context.Queue()
        processes = [
            context.Process(target=measure, args=(barrier, rounds, results)) for _ in range(count)
        ]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
        floors = [seconds for floor, _ in found for seconds in floor]
        loops = [seconds for _, loop in found for seconds in loop]
        floor, loop = median(floors), median(loops)
        print(
            f"| {count} | {floor:.2f} | {loop:.2f} | {min(loops):.2f} to {max(loops):.2f} "
            f"| {floor / loop:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
