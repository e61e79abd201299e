"""StudyConfig: every setting of a run, checked when it is built and never changed afterwards."""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from search import space
from search.urls import is_postgresql, redact, same_database

KERAS_DATASETS = ("fashion_mnist", "cifar10", "cifar100")
"""The modules of keras.datasets, beside mnist, that hold images with integer labels."""


class InputError(Exception):
    """Something the user gave cannot be used; nothing was created or changed. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The run had to stop; what it had finished is kept. Exit code 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; `exit_code` is 128 + the signal's number."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Option:
    """What the command line, the settings file and the README say of a setting.

    low, high: the ends of the allowed range; below: with low, an open interval instead.
    choices, pattern: what a text may be. env: the environment's variable for it.
    none: the word for None, of a setting that may be None.
    """

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    env: str = ""
    none: str = "none"


def _option(default: Any, group: str, help: str, **rules: Any) -> Any:
    return field(default=default, metadata={"option": Option(group, help, **rules)})


_NAME = r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,200}"  # part of file names; MLflow stores up to 256
_STUDY, _DATA, _SPACE, _TRAINING, _WINNER, _MLFLOW = (
    "Study",
    "Data",
    "Search space: V, V,V,V, LOW:HIGH, LOW:HIGH:STEP or LOW:HIGH:log",
    "Training",
    "Winner",
    "MLflow",
)


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study. Raises InputError, in one line, for a value outside its rule."""

    n_trials: int = _option(
        50,
        _STUDY,
        "Finished trials (complete or pruned) the study shall have in all.",
        low=1,
        high=10**6,
    )
    study_name: str = _option("mnist-dnn", _STUDY, "Name of the study.", pattern=_NAME)
    storage: str = _option("sqlite:///study.db", _STUDY, "Optuna's database.", env="OPTUNA_STORAGE")
    sampler: str = _option(
        "tpe", _STUDY, "How trials are proposed.", choices=("tpe", "random", "qmc", "grid")
    )
    pruner: str = _option(
        "percentile",
        _STUDY,
        "How hopeless trials are ended early.",
        choices=("percentile", "median", "halving", "hyperband", "none"),
    )
    timeout: float | None = _option(
        None,
        _STUDY,
        "Start no more trials after so many seconds, go on to the retraining.",
        low=0,
    )
    patience: int | None = _option(
        None,
        _STUDY,
        "Start no more trials after so many without a better one, go on to the retraining.",
        low=1,
    )
    workers: int | None = _option(
        None,
        _STUDY,
        "Trials at once, each a process of one thread; auto: one per core. 1 runs in the main "
        "process and is reproducible.",
        low=1,
        high=256,
        none="auto",
    )
    scheduler: str | None = _option(
        None,
        _STUDY,
        "Run the trials on the Dask cluster of this scheduler, as many at once as it has worker "
        "threads (at most --workers); storage and tracking must be servers then.",
    )
    max_failures: int = _option(5, _STUDY, "Stop after so many trials in a row have failed.", low=1)
    report: str = _option(
        "report.html", _STUDY, "Where the report is written at the end; none: nowhere."
    )
    seed: int = _option(
        0, _STUDY, "What proposals, weights, shuffles and dropout depend on.", low=0, high=2**31 - 1
    )
    dataset: str = _option(
        "mnist",
        _DATA,
        f"mnist, a Keras dataset ({', '.join(KERAS_DATASETS)}), or the path of an .npz file.",
    )
    validation_split: float = _option(
        0.1, _DATA, "Share of the training data, its end, that validates.", low=0, below=1
    )
    hidden_units: str = _option("128,256,512,1024", _SPACE, "Width of the hidden layer.")
    dropout_rate: str = _option("0.0:0.5", _SPACE, "Share of hidden activations dropped.")
    learning_rate: str = _option("1e-4:1e-2:log", _SPACE, "Adam's step size.")
    epochs: int = _option(
        5, _TRAINING, "Passes over the training data in a trial.", low=1, high=10**6
    )
    batch_size: int = _option(128, _TRAINING, "Examples in a step.", low=1, high=10**9)
    finalists: int = _option(
        0,
        _WINNER,
        "Best trials that are trained again, with the reference, on fresh seeds, before the winner "
        "is chosen by their mean; 0: the best trial wins.",
        low=0,
        high=1000,
    )
    repeats: int = _option(3, _WINNER, "Fresh seeds of every finalist.", low=1, high=1000)
    promote: str = _option(
        "if-better",
        _WINNER,
        "When the winner goes to production: unless the model there has the higher accuracy on the "
        "test images, always, or never.",
        choices=("if-better", "always", "never"),
    )
    tracking_uri: str = _option(
        "sqlite:///mlflow.db",
        _MLFLOW,
        "MLflow's database or tracking server.",
        env="MLFLOW_TRACKING_URI",
    )
    experiment: str = _option(
        "MNIST_Classification", _MLFLOW, "Experiment that holds the runs.", pattern=_NAME
    )
    model_name: str = _option(
        "MNIST_DNN_Model", _MLFLOW, "Registered model that the winner becomes.", pattern=_NAME
    )

    def __post_init__(self) -> None:
        for name in options():
            _check(name, getattr(self, name))
        _ = self.space
        if self.sampler == "grid":
            try:
                self.space.grid()
            except ValueError as error:
                raise InputError(
                    f"--sampler grid: {error}; give a list, for example "
                    "--dropout-rate 0.1,0.3 --learning-rate 0.001"
                ) from None
        if self.scheduler is not None:
            self._check_reach()
        if same_database(self.storage, self.tracking_uri):
            raise InputError(
                "--storage and --tracking-uri must be two databases (Optuna and MLflow cannot "
                f"share one), but both are {redact(self.storage)}; give one another file name"
            )

    def _check_reach(self) -> None:
        """Raise InputError where other machines can't reach what both ledgers are kept in."""
        if not is_postgresql(self.storage):
            raise InputError(
                "--storage must be PostgreSQL's with --scheduler, because the workers of a "
                f"cluster share no disk, but got {redact(self.storage)}; for example "
                "--storage postgresql+psycopg://USER@HOST/DATABASE"
            )
        if not self.tracking_uri.startswith("http"):
            raise InputError(
                "--tracking-uri must be an MLflow server with --scheduler, because the workers of "
                f"a cluster share no disk, but got {redact(self.tracking_uri)}; start one with "
                "mlflow server and give --tracking-uri http://HOST:5000"
            )

    @cached_property
    def space(self) -> space.Space:
        """The search space that the three hyperparameter options describe."""
        parameters = {}
        for name in space.DOMAINS:
            try:
                parameters[name] = space.parse(name, getattr(self, name))
            except ValueError as error:
                raise InputError(f"{flag(name)} {error}") from None
        return space.Space(**parameters)

    def settings(self, dataset_digest: str) -> dict[str, Any]:
        """What must stay the same for as long as a study lives: its fingerprint.

        The sampler and the pruner may change, but a grid stays a grid.
        """
        return {
            **{name: str(parameter) for name, parameter in self.space.as_dict().items()},
            "grid": self.sampler == "grid",
            "dataset": dataset_digest,
            "experiment": self.experiment,
            "validation_split": self.validation_split,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def options() -> dict[str, Option]:
    """Every setting's option, in the order that help shows them."""
    return {f.name: f.metadata["option"] for f in fields(StudyConfig)}


def defaults() -> dict[str, Any]:
    """Every setting's default."""
    return {f.name: f.default for f in fields(StudyConfig)}


def flag(name: str) -> str:
    """The command line's word for the setting `name`."""
    return "--" + name.replace("_", "-")


def _kind(name: str) -> type:
    """The type of the setting `name`: int, float or str."""
    annotation = next(f.type for f in fields(StudyConfig) if f.name == name)
    return next(kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type))


def _check(name: str, value: Any) -> None:
    """Raise InputError where `value` breaks the rule of the setting `name`."""
    option, kind, default = options()[name], _kind(name), defaults()[name]
    if value is None and default is None:
        return
    remedy = f"; for example {flag(name)} {2 if default is None else default}"
    if isinstance(value, str) and option.choices:
        near = difflib.get_close_matches(value, option.choices, n=1)
        remedy = f"; did you mean {near[0]}?" if near else remedy
    accepted = (int, float) if kind is float else (kind,)
    fits = isinstance(value, accepted) and not isinstance(value, bool)
    if not fits or not _holds(value, option):
        raise InputError(f"{flag(name)} must be {_rule(option, kind)}, but got {value!r}{remedy}")


def _holds(value: Any, option: Option) -> bool:
    if isinstance(value, str):
        return (
            value.strip() != ""
            and "\0" not in value
            and (not option.choices or value in option.choices)
            and (not option.pattern or re.fullmatch(option.pattern, value) is not None)
        )
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (option.low is None or value >= option.low)
        and (option.high is None or value <= option.high)
        and (option.below is None or option.low is None or option.low < value < option.below)
    )


def _rule(option: Option, kind: type) -> str:
    if option.choices:
        return "one of " + ", ".join(option.choices)
    if option.pattern:
        return "letters, digits, '.', '_' and '-' only, at most 200, and no folder's name"
    if kind is str:
        return "text, not empty"
    noun = "a whole number" if kind is int else "a number"
    if option.none != "none":
        noun = f"{option.none} or {noun}"
    if option.below is not None:
        return f"{noun} between {option.low:g} and {option.below:g}"
    if option.high is not None:
        return f"{noun} from {option.low:g} to {option.high:.10g}"
    return f"{noun}, {option.low:g} or more"


def from_text(name: str, text: str) -> Any:
    """The value of the setting `name` that the command line or the environment gives as text."""
    kind = _kind(name)
    if kind is str:
        return text
    if defaults()[name] is None and text == options()[name].none:
        return None
    try:
        return kind(text)
    except ValueError:
        return text  # StudyConfig refuses it and names the rule


def read_file(path: str) -> dict[str, Any]:
    """The settings in a TOML file, its keys the options' names with - or _.

    A list is read as the list notation, a number as a fixed hyperparameter. Raises InputError.
    """
    try:
        loaded = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--config must name a readable TOML file, but {path!r} is not: {error.strerror}; "
            "check the path"
        ) from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits
        raise InputError(
            f"--config must name a TOML file, but {path!r} is not: {_one_line(error)}; "
            "write lines like n-trials = 50"
        ) from None
    known = options()
    settings = {}
    for key, value in loaded.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(
                f"--config {path}: every key must be an option's name, but got {key!r}; "
                f"did you mean {near.replace('_', '-')}?"
            )
        if name in space.DOMAINS:
            value = _as_notation(value)
        settings[name] = from_text(name, value) if isinstance(value, str) else value
    return settings


def _as_notation(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def one_line(error: BaseException) -> str:
    """What went wrong, in one line of at most 300 characters, passwords masked."""
    text = redact(_one_line(error))
    return text if len(text) <= 300 else text[:297] + "..."


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, as `name: stored -> given`."""
    names = [*given, *(name for name in stored if name not in given)]
    return [
        f"{name}: {stored.get(name)} -> {given.get(name)}"
        for name in names
        if stored.get(name) != given.get(name)
    ]
