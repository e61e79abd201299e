"""Measure what a trial costs beside its training: python tests/benchmarks/overhead.py --trials 1000

A whole study on 150 points in four dimensions, in this process, five epochs a trial, no pruning.
Prints, for the trials around each milestone, the median milliseconds of a whole trial, of it inside
Keras' fit (without the callbacks that write to the stores), the rest, which is the overhead, and
the process's memory.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from search import StudyConfig, run
from search.report.progress import Progress
from search.study.trials import TrialSummary


def write_points(path: Path) -> None:
    """Three clouds of points, as a dataset file."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 4)) * 3

    def draw(count: int) -> tuple[Any, Any]:
        y = np.arange(count) % 3
        return (centres[y] + random.normal(size=(count, 4))).astype("float32"), y

    (x_train, y_train), (x_test, y_test) = draw(150), draw(30)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


class Clock(Progress):
    """Notes the whole time of every trial, the part in `fit` and the memory after it."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float]] = []
        self.stores = self.fit = 0.0
        self.began = time.perf_counter()

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        now = time.perf_counter()
        memory = psutil.Process().memory_info().rss / 1e6
        self.rows.append((1e3 * (now - self.began), 1e3 * (self.fit - self.stores), memory))
        self.began, self.fit, self.stores = now, 0.0, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

    from optuna_integration import KerasPruningCallback

    from search.training import train
    from search.workers.trial import Attempt

    clock = Clock()

    def timed(owner: Any, name: str, total: str) -> None:
        function = getattr(owner, name)

        def measured(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                setattr(clock, total, getattr(clock, total) + time.perf_counter() - began)

        setattr(owner, name, measured)

    timed(train, "train", "fit")
    timed(Attempt, "_record", "ledgers")
    timed(KerasPruningCallback, "on_epoch_end", "ledgers")

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_points(Path("points.npz"))
        run(
            StudyConfig(
                dataset="points.npz",
                hidden_units="8,16",
                n_trials=trials,
                workers=1,
                pruner="none",
            ),
            clock,
        )
        os.chdir("/")

    print("| trial | whole ms | training ms | overhead ms | memory MB |")
    print("|---|---|---|---|---|")
    for milestone in (10, 30, 100, 300, 1000, 3000):
        if milestone <= trials:
            near = clock.rows[max(5, milestone - 10) : milestone + 10]
            whole, fit = median(row[0] for row in near), median(row[1] for row in near)
            print(
                f"| {milestone} | {whole:.0f} | {fit:.0f} | {whole - fit:.0f} | {near[-1][2]:.0f} |"
            )


if __name__ == "__main__":
    main()
