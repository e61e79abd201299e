"""Do finalists pay? python tests/benchmarks/finalists.py --studies 10, then with --table

Runs whole studies of 50 trials on MNIST with the command's defaults, trains their three best trials
and the reference again on four fresh seeds, and then every one of these configurations on all
training data, on three seeds, with the test images, so that a choice is judged by its expected test
accuracy and not by one more noisy result. Rows are appended to finalists.csv; --table prints what
fewer finalists or repeats would have chosen. --replayed 100 does so for that many studies on the
learning curves of curves.csv, without training.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import optuna
import replay

from search.config.hyperparameters import complete
from search.config.settings import StudyConfig
from search.report.progress import Progress
from search.study import ranking, sampling, storage
from search.task import METRICS

TABLE = Path(__file__).with_name("finalists.csv")
FINALISTS, REPEATS, JUDGES = 3, 4, 3
COLUMNS = (
    *("study", "trial", "is_reference", "search_seconds", "finalist_seconds"),
    *("hidden_units", "dropout_rate", "learning_rate", "val_accuracy", "repeats", "tests"),
)


class Clock(Progress):
    """When each stage of a run began."""

    def start(self, *_: Any) -> None:
        self.began = time.monotonic()

    def finalists(self, *_: Any) -> None:
        self.searched = time.monotonic()

    def retraining(self, *_: Any) -> None:
        self.compared = time.monotonic()


def judge(params: dict[str, Any], seed: int) -> float:
    """The test accuracy of a configuration, trained on all training data."""
    from search.data.load import load_dataset
    from search.training.network import build_network
    from search.training.train import evaluate, train, use_one_thread_each

    use_one_thread_each(1)
    dataset = load_dataset("mnist", 0.1)
    tried = complete(params)
    network = build_network(tried, dataset.sample_shape, dataset.task, seed)
    train(network, (dataset.x_all, dataset.y_all), tried, epochs=5, seed=seed)
    return evaluate(network, (dataset.x_test, dataset.y_test))["accuracy"]


def study(seed: int) -> list[dict[str, Any]]:
    """One whole study; a row for each of its finalists."""
    from search.pipeline import run

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        config = StudyConfig(seed=seed, finalists=FINALISTS, repeats=REPEATS, report="none")
        result = run(config, clock)
        trials = storage.load_study(config).trials
        os.chdir("/")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        judged = [
            [
                pool.submit(judge, trials[f.number].params, 10_000 + 100 * seed + i)
                for i in range(JUDGES)
            ]
            for f in result.finalists
        ]
        tests = [[future.result() for future in futures] for futures in judged]
    reference = result.reference
    return [
        {
            "study": seed,
            "trial": finalist.number,
            "is_reference": int(reference is not None and finalist.number == reference.number),
            "search_seconds": round(clock.searched - clock.began, 1),
            "finalist_seconds": round(clock.compared - clock.searched, 1),
            **trials[finalist.number].params,
            "val_accuracy": trials[finalist.number].value,
            "repeats": json.dumps(finalist.values),
            "tests": json.dumps(accuracies),
        }
        for finalist, accuracies in zip(result.finalists, tests, strict=True)
    ]


def chosen(rows: list[dict[str, Any]], count: int, repeats: int) -> dict[str, Any]:
    """What `count` finalists on so many fresh seeds would have chosen."""
    ranked = sorted(rows, key=lambda row: (-row["val_accuracy"], row["trial"]))
    best = ranked[: max(count, 1)]
    if count == 0:
        return best[0]
    candidates = best + [row for row in ranked if row["is_reference"] and row not in best]
    return max(candidates, key=lambda row: mean(row["repeats"][:repeats]))


def table() -> None:
    """Print what every number of finalists and repeats would have chosen."""
    studies: dict[int, list[dict[str, Any]]] = {}
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            read: dict[str, Any] = {key: json.loads(value) for key, value in row.items()}
            studies.setdefault(read["study"], []).append(read)
    # The reference is the same configuration in every study, so all of its tests tell of it.
    everywhere = [
        t for rows in studies.values() for r in rows if r["is_reference"] for t in r["tests"]
    ]
    print(f"{len(studies)} studies; the reference: test {mean(everywhere):.4f} ", end="")
    print(f"on {len(everywhere)} seeds\n")
    print("| finalists | repeats | test | gain over none | standard error | extra time |")
    print("|---|---|---|---|---|---|")

    def expected(row: dict[str, Any]) -> float:
        return mean(everywhere if row["is_reference"] else row["tests"])

    without = [expected(chosen(rows, 0, 0)) for rows in studies.values()]
    print(f"| 0 | | {mean(without):.4f} | | | |")
    for count in range(1, FINALISTS + 1):
        for repeats in range(1, REPEATS + 1):
            with_them = [expected(chosen(rows, count, repeats)) for rows in studies.values()]
            gains = [a - b for a, b in zip(with_them, without, strict=True)]
            share = [
                rows[0]["finalist_seconds"]
                / rows[0]["search_seconds"]
                * (count + 1)
                * repeats
                / ((FINALISTS + 1) * REPEATS)
                for rows in studies.values()
            ]
            error = stdev(gains) / len(gains) ** 0.5
            print(
                f"| {count} | {repeats} | {mean(with_them):.4f} | {mean(gains):+.5f} | {error:.5f} "
                f"| {mean(share):+.0%} |"
            )


def replayed(studies: int) -> None:
    """The same for studies replayed on recorded curves, more of them and more finalists."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    curves, reference = replay.load()
    landscape = replay.Landscape(curves, reference)
    finals = [val[-1] for val, _ in reference]
    certain = mean(test[-1] for _, test in reference)
    counts, repeats = (0, 1, 2, 3, 5), (1, 2, 3, 5)
    tests: dict[tuple[int, int], list[float]] = {}
    epochs: dict[tuple[int, int], list[float]] = {}
    for seed in range(studies):
        study, spent, test = replay.search(
            landscape, "tpe", sampling.pruner(StudyConfig()), seed, 50
        )
        random = np.random.default_rng([seed, 1])
        trials = study.get_trials(deepcopy=False)
        first = ranking.reference(study)
        known = -1 if first is None else first.number
        test[known] = certain  # the reference was recorded on many seeds
        values = {
            trial.number: [
                random.choice(finals)
                if trial.number == known
                else landscape.draw(trial.params, random)[0][-1]
                for _ in range(max(repeats))
            ]
            for trial in ranking.candidates(study, StudyConfig(finalists=max(counts)))
        }
        for count in counts:
            chosen = ranking.candidates(study, StudyConfig(finalists=count))
            for repeat in repeats if count else (0,):
                best = ranking.ranked(trials, METRICS["val_accuracy"])[0]
                if count:
                    best = max(chosen, key=lambda t: mean(values[t.number][:repeat]))
                tests.setdefault((count, repeat), []).append(test[best.number])
                share = len(chosen) * repeat * replay.EPOCHS / spent
                epochs.setdefault((count, repeat), []).append(share)
    print(f"{studies} replayed studies; the reference: test {certain:.4f}\n")
    print("| finalists | repeats | test | gain over none | standard error | extra epochs |")
    print("|---|---|---|---|---|---|")
    for key, found in tests.items():
        gains = [a - b for a, b in zip(found, tests[0, 0], strict=True)]
        print(
            f"| {key[0]} | {key[1]} | {mean(found):.5f} | {mean(gains):+.5f} "
            f"| {stdev(gains) / len(gains) ** 0.5:.5f} | {mean(epochs[key]):+.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--replayed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.table:
        return table()
    if arguments.replayed:
        return replayed(arguments.replayed)
    new = not TABLE.exists()
    for seed in range(arguments.first, arguments.first + arguments.studies):
        rows = study(seed)
        with TABLE.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        new = False
        print(rows, flush=True)


if __name__ == "__main__":
    main()
