"""How good is a search on tables? The test scores of the default command with --preset table beside
scikit-learn's logistic (ridge) regression and gradient boosting, on the same split.

    python tests/benchmarks/tables.py --seeds 3 [NAME ...]

Each table is written as a CSV file, as a user would have it. A table per line is printed, in
Markdown: means over the seeds, each of which splits the rows differently, too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

STUDY = Path(__file__).parents[2] / "study.py"
ROWS = 50_000


def of_sklearn(name: str) -> pd.DataFrame:
    """A table that scikit-learn ships, its classes by their names."""
    from sklearn import datasets

    loaded = getattr(datasets, f"load_{name}")(as_frame=True)
    frame: pd.DataFrame = loaded.frame
    if name in ("breast_cancer", "wine"):
        frame["target"] = [loaded.target_names[label] for label in frame["target"]]
    return frame


def mixed() -> pd.DataFrame:
    """50,000 rows of 9 columns, words and numbers, with missing values; three classes.

    The class follows from products and thresholds of the columns, so that linear models miss part
    of it, and one row in ten gets a random class.
    """
    random = np.random.default_rng(0)
    age = random.integers(18, 90, ROWS).astype(float)
    income = random.lognormal(10, 0.8, ROWS)
    balance = random.normal(0, 5000, ROWS)
    duration = random.exponential(300, ROWS)
    visits = random.poisson(3, ROWS)
    job = random.choice(["nurse", "pilot", "cook", "clerk", "farmer"], ROWS)
    city = random.integers(0, 80, ROWS)
    channel = random.choice(["web", "phone", "shop"], ROWS, p=[0.6, 0.3, 0.1])
    since = pd.Timestamp("2020-01-01") + pd.to_timedelta(random.integers(0, 2000, ROWS), unit="D")
    rich = np.log(income) - 10
    score = (
        1.2 * rich * np.where(job == "pilot", -1, 1)
        + np.where((age > 35) & (age < 60), 1.0, -0.6)
        + 0.8 * np.sin(city)
        + np.where(channel == "shop", 1.5, 0) * (balance > 0)
        - 0.5 * (duration > 400) * (visits > 2)
        + 0.4 * (since.day_of_week >= 5)
    )
    classes = np.digitize(score, np.quantile(score, [0.4, 0.75]))
    noisy = random.random(ROWS) < 0.1
    classes[noisy] = random.integers(0, 3, noisy.sum())
    age[random.random(ROWS) < 0.05] = np.nan
    return pd.DataFrame(
        {
            "age": age,
            "income": income,
            "balance": balance,
            "duration": duration,
            "visits": visits,
            "job": np.where(random.random(ROWS) < 0.05, None, job),
            "city": [f"city {i}" for i in city],
            "channel": channel,
            "since": since,
            "target": np.array(["low", "middle", "high"])[classes],
        }
    )


TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "breast_cancer": lambda: of_sklearn("breast_cancer"),
    "wine": lambda: of_sklearn("wine"),
    "digits": lambda: of_sklearn("digits"),
    "diabetes": lambda: of_sklearn("diabetes"),
    "mixed": mixed,
}


def searched(folder: Path, seed: int, options: list[str]) -> tuple[float, float]:
    """The test score of the search's winner, and the seconds that the command took."""
    command = [sys.executable, str(STUDY), "--dataset", "table.csv", "--target", "target"]
    command += ["--preset", "table", "--seed", str(seed), "--study-name", f"seed-{seed}"]
    command += ["--model-name", f"M{seed}", *options]
    started = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    verb = [sys.executable, str(STUDY), "show", "--study-name", f"seed-{seed}", "--json"]
    verb += ["--model-name", f"M{seed}"]
    shown = subprocess.run(verb, cwd=folder, check=True, capture_output=True, text=True)
    return test_score(json.loads(shown.stdout)), seconds


def test_score(shown: dict[str, Any]) -> float:
    """Accuracy, or R2 in regression, of the model in production on the test rows."""
    metrics = shown["production"]["metrics"]
    return float(metrics.get("test_accuracy", metrics.get("test_r2")))


def by_sklearn(folder: Path, seed: int) -> tuple[float, float]:
    """The test scores of a linear model and of gradient boosting on the same split."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression, RidgeCV

    from search import StudyConfig
    from search.config import files
    from search.data.load import load_for_study

    preset = {k: v for k, v in files.read_preset("table").items() if k == "validation_split"}
    config = StudyConfig(dataset=str(folder / "table.csv"), target="target", seed=seed, **preset)
    data = load_for_study(config, None)
    if data.task.kind == "regression":
        models = RidgeCV(np.logspace(-3, 3, 13)), HistGradientBoostingRegressor(random_state=seed)
    else:
        models = (
            LogisticRegression(max_iter=2000),
            HistGradientBoostingClassifier(random_state=seed),
        )
    unit = data.task.mean, data.task.deviation  # of a regression's target, which is standardized
    y_all = data.y_all if data.task.classes else data.y_all * unit[1] + unit[0]
    x_all, x_test = (one_hot(x, data.embeddings) for x in (data.x_all, data.x_test))
    linear, boosted = (
        float(model.fit(x_all, y_all).score(x_test, data.y_test)) for model in models
    )
    return linear, boosted


def one_hot(x: NDArray[Any], sizes: tuple[int, ...]) -> NDArray[Any]:
    """The features with those that are indices, the last ones, as one column per index."""
    first = x.shape[1] - len(sizes)
    columns = [np.eye(size)[x[:, first + i].astype(int)] for i, size in enumerate(sizes)]
    return np.concatenate([x[:, :first], *columns], axis=1)


def speed(folder: Path, turns: int = 3, epochs: int = 3) -> str:
    """Seconds of one configuration's training and of Keras' plain `fit` on the same arrays."""
    import keras

    from search import StudyConfig
    from search.config.hyperparameters import complete
    from search.data.load import load_for_study
    from search.training.network import network_for
    from search.training.train import train, use_one_thread_each

    use_one_thread_each(1)
    config = StudyConfig(dataset=str(folder / "table.csv"), target="target")
    data = load_for_study(config, None)
    hp = complete({"hidden_units": 128, "hidden_layers": 2, "batch_size": 32})
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for seed in range(turns + 1):
        network = network_for(data, hp, seed, None)
        plain = keras.models.clone_model(network)
        plain.compile(keras.optimizers.Adam(0.001), network.loss, metrics=["accuracy"])
        (x, y), validation = data.train, data.validation
        started = time.monotonic()
        train(network, (x, y), hp, epochs=epochs, seed=seed, validation=validation)
        between = time.monotonic()
        plain.fit(x, y, 32, epochs, verbose=0, validation_data=validation)
        if seed:  # the first one traces the graphs
            seconds["ours"].append(between - started)
            seconds["plain"].append(time.monotonic() - between)
    ours, theirs = (median(values) for values in seconds.values())
    return f"{ours:.2f} s beside {theirs:.2f} s of Keras' fit, ratio {ours / theirs:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TABLES), choices=[*TABLES, []])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speed", action="store_true", help="compare with Keras' plain fit")
    given, options = parser.parse_known_args()
    print("| table | linear | boosting | search | each seed | seconds |\n|---|---|---|---|---|---|")
    for name in given.names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            TABLES[name]().to_csv(folder / "table.csv", index=False)
            if given.speed:
                print(f"| {name} | {speed(folder)} |", flush=True)
                continue
            found = [searched(folder, seed, options) for seed in range(given.seeds)]
            linear, boosted = zip(*(by_sklearn(folder, s) for s in range(given.seeds)), strict=True)
        scores = [score for score, _ in found]
        each = ", ".join(f"{score:.4f}" for score in scores)
        print(
            f"| {name} | {mean(linear):.4f} | {mean(boosted):.4f} | {mean(scores):.4f} | {each} | "
            f"{mean(seconds for _, seconds in found):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
