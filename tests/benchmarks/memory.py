"""Measure a worker's memory: python tests/benchmarks/memory.py --trials 110

Trains one epoch of MNIST a trial, of four widths in turn, as a worker does. Prints megabytes after
some of the trials: what is resident; the part of it that is files, mostly TensorFlow's libraries,
which all workers share; and the rest, which is the worker's own.
"""

import argparse
import os
from pathlib import Path


def megabytes() -> tuple[float, float]:
    """Shared files and own memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(found["RssFile"]) / 1e3, int(found["RssAnon"]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=110)
    trials = parser.parse_args().trials
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

    import search.workers.trial  # noqa: F401  all that a worker imports
    from search.config.hyperparameters import complete
    from search.data.load import load_dataset
    from search.training.network import build_network
    from search.training.train import train, use_one_thread_each

    use_one_thread_each(1)
    print("| after | resident MB | shared files | own |")
    print("|---|---|---|---|")

    def report(when: str) -> None:
        files, own = megabytes()
        print(f"| {when} | {files + own:.0f} | {files:.0f} | {own:.0f} |", flush=True)

    report("imports")
    dataset = load_dataset("mnist", 0.1)
    for trial in range(1, trials + 1):
        width = (128, 256, 512, 1024)[trial % 4]
        tried = complete({"hidden_units": width})
        network = build_network(tried, dataset.sample_shape, dataset.task, trial)
        train(
            network,
            dataset.train,
            tried,
            validation=dataset.validation,
            epochs=1,
            seed=trial,
        )
        if trial in (1, 10, 30, 100, 300, 1000):
            report(f"trial {trial}")


if __name__ == "__main__":
    main()
