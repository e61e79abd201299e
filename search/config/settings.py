"""StudyConfig: every setting of a run, checked when it is built and never changed afterwards."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, get_args

from search.config import custom_model
from search.config.hyperparameters import HYPERPARAMETERS, differing, space_of
from search.config.options import Option, flag, refusal
from search.config.parameter import Range, is_fixed
from search.config.space import Space
from search.config.urls import is_postgresql, same_database
from search.errors import InputError, Interrupted, RunError, printable, redact

__all__ = ["InputError", "Interrupted", "RunError", "StudyConfig", "flag", "printable"]
KERAS_DATASETS = ("fashion_mnist", "cifar10", "cifar100")


"""The modules of keras.datasets, beside mnist, that hold images with integer labels."""
EPOCHS = 5


"""Of a trial, where the user names none: enough for MNIST."""


def _option(default: Any, group: str, help: str, **rules: Any) -> Any:
    return field(default=default, metadata={"option": Option(group, help, **rules)})


def _hyperparameter(name: str) -> Any:
    known = HYPERPARAMETERS[name]
    return _option(known.default, _NETWORK if known.network else _RECIPE, known.help)


def _name(default: str, group: str, help: str) -> Any:
    """Part of file names; MLflow stores up to 256 characters."""
    rule = "letters, digits, '.', '_' and '-' only, at most 200, and no folder's name"
    pattern = r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,200}"
    return _option(default, group, help, pattern=pattern, rule=rule)


_STUDY, _DATA, _NETWORK, _RECIPE, _TRAINING, _WINNER, _MLFLOW = (
    "Study",
    "Data",
    "Search space, the network: V, V,V,V, LOW:HIGH, LOW:HIGH:STEP or LOW:HIGH:log",
    "Search space, the training: the same notation",
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
        "Total number of finished trials (complete, pruned, or failed twice on their own).",
        low=1,
        high=10**6,
    )
    study_name: str = _name("mnist-dnn", _STUDY, "Name of the study.")
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
        example="tcp://HOST:8786",
    )
    max_failures: int = _option(
        5, _STUDY, "Stop after so many configurations in a row have failed.", low=1
    )
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
        0.1, _DATA, "Fraction of the training data used for validation.", low=0, below=1
    )
    split: str | None = _option(
        None,
        _DATA,
        "Which training examples validate: the last, or a random choice with the same share of "
        "every class, seeded by --seed. auto: stratified for your own file, last for the others.",
        choices=("last", "stratified"),
        none="auto",
    )
    normalize: str = _option(
        "auto",
        _DATA,
        "Scale every feature of your own file to mean 0 and variance 1 by a Normalization layer, "
        "adapted to the training part and saved with the model. auto: unless examples are images.",
        choices=("auto", "none"),
    )
    epochs: int | None = _option(
        None,
        _TRAINING,
        "Passes over the training data in a trial. auto: 5; up to 20 for a small file of your own.",
        low=1,
        high=10**6,
        none="auto",
        example="5",
    )
    model: str | None = _option(
        None,
        _NETWORK,
        "Search your own network, which FUNCTION of the Python module MODULE makes, in its SPACE.",
        pattern=custom_model.NAME,
        rule="MODULE:FUNCTION, a module that Python finds from here and a function of it",
        example="mine:build",
    )
    hidden_units: str = _hyperparameter("hidden_units")
    dropout_rate: str = _hyperparameter("dropout_rate")
    learning_rate: str = _hyperparameter("learning_rate")
    architecture: str = _hyperparameter("architecture")
    conv_blocks: str = _hyperparameter("conv_blocks")
    filters: str = _hyperparameter("filters")
    hidden_layers: str = _hyperparameter("hidden_layers")
    activation: str = _hyperparameter("activation")
    batch_normalization: str = _hyperparameter("batch_normalization")
    optimizer: str = _hyperparameter("optimizer")
    weight_decay: str = _hyperparameter("weight_decay")
    label_smoothing: str = _hyperparameter("label_smoothing")
    batch_size: str = _hyperparameter("batch_size")
    schedule: str = _hyperparameter("schedule")
    early_stopping: str = _hyperparameter("early_stopping")
    augmentation: str = _hyperparameter("augmentation")
    augmentation_strength: str = _hyperparameter("augmentation_strength")
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
        "When the winner goes to production: if its accuracy on the test images is higher than the "
        "accuracy of the model there, always, or never.",
        choices=("if-better", "always", "never"),
    )
    tracking_uri: str = _option(
        "sqlite:///mlflow.db",
        _MLFLOW,
        "MLflow's database or tracking server.",
        env="MLFLOW_TRACKING_URI",
    )
    experiment: str = _name("MNIST_Classification", _MLFLOW, "Experiment that holds the runs.")
    model_name: str = _name("MNIST_DNN_Model", _MLFLOW, "Registered model that the winner becomes.")

    def __post_init__(self) -> None:
        for name, option in options().items():
            if name in HYPERPARAMETERS:
                object.__setattr__(self, name, in_notation(getattr(self, name)))
            wrong = refusal(name, option, _kind(name), getattr(self, name), defaults()[name])
            if wrong is not None:
                raise InputError(wrong)
        optimizer, decay = (self.space.parameters[n] for n in ("optimizer", "weight_decay"))
        if "adamw" in optimizer and is_fixed(decay) and 0.0 in decay:
            raise InputError(
                "--optimizer adamw must have a weight decay, without which it is adam, but "
                f"--weight-decay is {decay}; give one, for example --weight-decay 1e-4:1e-1:log"
            )
        if self.sampler == "grid":
            try:
                self.space.grid_size()
            except ValueError as error:
                lists = " ".join(
                    f"{flag(name)} {p.low:.12g},{p.high:.12g}"
                    for name, p in self.space.searched().items()
                    if isinstance(p, Range) and name in HYPERPARAMETERS
                )
                remedy = f"give lists, for example {lists}" if lists else "write a list in SPACE"
                raise InputError(f"--sampler grid: {error}; {remedy}") from None
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

    def with_epochs(self, epochs: int) -> "StudyConfig":
        """The same settings with so many epochs; the model stays the one they were made with."""
        changed = copy(self)
        object.__setattr__(changed, "epochs", epochs)
        return changed

    @property
    def trial_epochs(self) -> int:
        """`epochs`, or 5 where they were left open."""
        return EPOCHS if self.epochs is None else self.epochs

    @cached_property
    def _fingerprint(self) -> str:
        """Of the user's own model, as its source was when these settings were made."""
        return custom_model.load(str(self.model)).fingerprint

    @property
    def custom_model(self) -> custom_model.CustomModel | None:
        """The user's own model, whatever has become of its source since, if there is one.

        Raises ModelError where this process has to import it and its source is another one now.
        """
        return None if self.model is None else custom_model.find(self.model, self._fingerprint)

    @cached_property
    def space(self) -> Space:
        """The search space that the hyperparameters' options describe, or the user's own model."""
        notation = {name: getattr(self, name) for name in HYPERPARAMETERS}
        own = self.custom_model
        try:
            return space_of(notation, None if own is None else own.space)
        except ValueError as error:
            raise InputError(str(error)) from None

    def settings(
        self, dataset_digest: str, *, split: str = "last", normalized: bool = False
    ) -> dict[str, Any]:
        """What must stay the same for as long as a study lives: its fingerprint.

        The sampler and the pruner may change, but a grid stays a grid. split, normalized: how the
        dataset was prepared; kept only where they are not what every study before them had.
        """
        model = {}
        if self.model is not None:
            model = {"model": custom_model.load(self.model).fingerprint}
            if model["model"] != self._fingerprint:
                raise InputError(
                    f"--model {self.model} must be as it was when these settings were made, "
                    f"{self._fingerprint}, but is now {model['model']}; make the StudyConfig again"
                )
        size = str(self.space.parameters["batch_size"])
        return {
            **{name: str(parameter) for name, parameter in differing(self.space).items()},
            **model,
            "grid": self.sampler == "grid",
            "dataset": dataset_digest,
            "experiment": self.experiment,
            "validation_split": self.validation_split,
            "epochs": self.trial_epochs,
            "batch_size": self.space.fixed().get("batch_size", size),
            "seed": self.seed,
            **({} if split == "last" else {"split": split}),
            **({"normalize": "auto"} if normalized else {}),
        }


def options() -> dict[str, Option]:
    """Every setting's option, in the order that help shows them."""
    return {f.name: f.metadata["option"] for f in fields(StudyConfig)}


def defaults() -> dict[str, Any]:
    """Every setting's default."""
    return {f.name: f.default for f in fields(StudyConfig)}


def in_notation(value: Any) -> Any:
    """A list, a number, True or False as the text that means the same to a hyperparameter.

    All else stays as it is.
    """

    def text(item: Any) -> str:
        return str(item).lower() if isinstance(item, bool) else str(item)

    if isinstance(value, list | tuple):
        return ",".join(map(text, value))
    return text(value) if isinstance(value, int | float) else value


def _kind(name: str) -> type:
    """The type of the setting `name`: int, float or str."""
    annotation = next(f.type for f in fields(StudyConfig) if f.name == name)
    return next(kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type))


def from_text(name: str, text: str) -> Any:
    """The value of the setting `name` that the command line or the environment gives as text."""
    kind = _kind(name)
    if defaults()[name] is None and text == options()[name].none:
        return None
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        return text  # StudyConfig refuses it and names the rule


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, as `name: stored -> given`."""
    names = [*given, *(name for name in stored if name not in given)]
    return [
        f"{name}: {stored.get(name)} -> {given.get(name)}"
        for name in names
        if stored.get(name) != given.get(name)
    ]
