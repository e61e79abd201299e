"""Choose the default sampler and pruner: python tests/benchmarks/replay.py --seeds 100

Replays whole studies on the learning curves in curves.csv instead of training. A row for each
sampler and pruner holds means over the seeds: the epochs spent, how many of the 50 trials complete,
the winner's val accuracy and expected test accuracy, and what the latter gains or loses against
the same sampler without pruning.
"""

import argparse
import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.trial import TrialState

from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.study import sampling
from search.study.trials import SlottedStudy

TABLE = Path(__file__).with_name("curves.csv")
EPOCHS = 5
Curve = tuple[list[float], list[float]]

PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "none": NopPruner,
    "median, 5 startup": lambda: MedianPruner(5, 0),
    "median, 5 startup, 1 warm-up": lambda: MedianPruner(5, 1),
    "median, 10 startup": lambda: MedianPruner(10, 0),
    "median, 10 startup, 1 warm-up": lambda: MedianPruner(10, 1),
    "median, 10 startup, 2 warm-up": lambda: MedianPruner(10, 2),
    "percentile 75, 5 startup": lambda: PercentilePruner(75, 5, 0),
    "percentile 25, 5 startup": lambda: PercentilePruner(25, 5, 0),
    "percentile 25, 10 startup": lambda: PercentilePruner(25, 10, 0),
    "halving, factor 3": lambda: SuccessiveHalvingPruner(1, 3),
    "halving, factor 2": lambda: SuccessiveHalvingPruner(1, 2),
    "hyperband, factor 3": lambda: HyperbandPruner(1, EPOCHS, 3),
}


Point = tuple[int, float, float]  # hidden units, dropout rate, learning rate


def load() -> tuple[dict[Point, Curve], list[Curve]]:
    """The random configurations' curves, and the reference's on many seeds."""
    curves, reference = {}, []
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            curve = (
                [float(row[f"val_{i}"]) for i in range(1, EPOCHS + 1)],
                [float(row[f"test_{i}"]) for i in range(1, EPOCHS + 1)],
            )
            if row["name"].startswith("reference"):
                reference.append(curve)
            else:
                point = (
                    int(row["hidden_units"]),
                    float(row["dropout_rate"]),
                    float(row["learning_rate"]),
                )
                curves[point] = curve
    return curves, reference


class Landscape:
    """What a configuration would have reached, estimated from the recorded curves.

    The mean curve of the three nearest recorded configurations of the same width, and on top of it
    the deviation of a random seed of the reference from the reference's mean: training's own noise.
    """

    def __init__(self, curves: dict[Point, Curve], reference: list[Curve]) -> None:
        self._curves = curves
        vals = np.array([val for val, _ in reference])
        self._noise = vals - vals.mean(axis=0)

    def draw(self, wanted: Mapping[str, Value], random: np.random.Generator) -> tuple[Any, float]:
        """A val_accuracy curve with noise, and the expected final test accuracy."""

        def distance(point: Point) -> float:
            dropout = (point[1] - float(wanted["dropout_rate"])) / 0.5
            rate = math.log10(point[2] / float(wanted["learning_rate"])) / 2
            return dropout**2 + rate**2

        same = [point for point in self._curves if point[0] == wanted["hidden_units"]]
        near = [self._curves[point] for point in sorted(same, key=distance)[:3]]
        val = np.mean([val for val, _ in near], axis=0) + random.choice(self._noise)
        return val, mean(test[-1] for _, test in near)


def replay(
    landscape: Landscape, sampler: str, pruner: BasePruner, seed: int, trials: int
) -> tuple[int, int, float, float]:
    """One study; returns epochs spent, trials completed, and the winner's val and test accuracy."""
    study, spent, test = search(landscape, sampler, pruner, seed, trials)
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    best = study.best_trial
    assert best.value is not None
    return spent, complete, best.value, test[best.number]


def search(
    landscape: Landscape, sampler: str, pruner: BasePruner, seed: int, trials: int
) -> tuple[optuna.Study, int, dict[int, float]]:
    """One study; returns it, the epochs spent, and every trial's expected test accuracy."""
    config = StudyConfig(sampler=sampler, seed=seed)
    random = np.random.default_rng(seed)
    study = SlottedStudy(
        study_name="replay",
        storage=optuna.create_study(study_name="replay", direction="maximize")._storage,
        pruner=pruner,
    )
    spent = 0
    test: dict[int, float] = {}

    def objective(trial: optuna.Trial) -> float:
        nonlocal spent
        val, test[trial.number] = landscape.draw(config.space.suggest(trial), random)
        for epoch in range(EPOCHS):
            spent += 1
            trial.report(val[epoch], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(val[-1])

    for place in range(trials):
        study.attrs = {"place": place}
        study.sampler = sampling.sampler(config, place)
        study.optimize(objective, n_trials=1)
    return study, spent, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--samplers", default="tpe,random,qmc")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    curves, reference = load()
    landscape = Landscape(curves, reference)
    finals = [test[-1] for _, test in reference]
    print(f"{len(curves)} configurations; the reference on {len(finals)} seeds: ", end="")
    print(f"test {mean(finals):.4f}, seed-to-seed standard deviation {stdev(finals):.5f}\n")
    print("| sampler | pruner | epochs of 250 | complete | val | test | test - unpruned |")
    print("|---|---|---|---|---|---|---|")
    for sampler in arguments.samplers.split(","):
        unpruned = None
        for name, make in PRUNERS.items():
            found = [
                replay(landscape, sampler, make(), seed, arguments.trials)
                for seed in range(arguments.seeds)
            ]
            epochs, complete, val, test = (mean(column) for column in zip(*found, strict=True))
            unpruned = test if unpruned is None else unpruned
            print(
                f"| {sampler} | {name} | {epochs:.0f} | {complete:.0f} | {val:.4f} | {test:.4f} "
                f"| {test - unpruned:+.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
