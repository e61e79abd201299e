"""StudyConfig: every setting of a run, checked when it is built and never changed afterwards."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

from search.config import custom_model
from search.config.data_settings import OBJECTIVES, DataSettings
from search.config.hyperparameters import HYPERPARAMETERS, check_space, differing, space_of
from search.config.options import Option, name_setting, page_setting, setting
from search.config.parameter import in_notation
from search.config.space import Space
from search.config.urls import check_stores
from search.errors import InputError

EPOCHS = 5  # of a trial unless --epochs is given: enough for MNIST
AUTO = "auto"  # as a batch size: it depends on the number of examples

_NETWORK = "Search space of the network: V, V,V,V, LOW:HIGH, LOW:HIGH:STEP or LOW:HIGH:log"
_TRAINING = "Search space of the training: the same notation"
_study, _winner, _mlflow = (partial(setting, group) for group in ("Study", "Winner", "MLflow"))


def _hyperparameter(name: str) -> Any:
    known = HYPERPARAMETERS[name]
    group = _NETWORK if known.network else _TRAINING
    return setting(group, known.space, known.help, metavar="SPACE")


@dataclass(frozen=True)
class StudyConfig(DataSettings):
    """The settings of a study. Raises InputError, in one line, for a value that breaks its rule."""

    n_trials: int = _study(
        50,
        "Total number of finished trials in the study (complete, pruned, or failed twice on their "
        "own).",
        low=1,
        high=10**6,
    )
    study_name: str = name_setting("Study", "mnist-dnn", "Name of the study.")
    storage: str = _study(
        "sqlite:///study.db",
        "Database URL of Optuna's storage.",
        metavar="URL",
        env="OPTUNA_STORAGE",
    )
    optuna_page: str | None = page_setting("Study", "an optuna-dashboard", env="OPTUNA_PAGE")
    sampler: str = _study(
        "tpe",
        "Sampler that suggests the hyperparameters of a trial.",
        choices=("tpe", "random", "qmc", "grid"),
    )
    pruner: str = _study(
        "percentile",
        "Pruner that stops unpromising trials early.",
        choices=("percentile", "median", "halving", "hyperband", "none"),
    )
    timeout: float | None = _study(
        None,
        "Start no new trials after this many seconds; then retrain the winner.",
        float,
        metavar="SECONDS",
        low=0,
    )
    patience: int | None = _study(
        None,
        "Start no new trials after this many without improvement; then retrain the winner.",
        int,
        metavar="TRIALS",
        low=1,
    )
    workers: int | None = _study(
        None,
        "Number of trials to run in parallel, each in a process of one thread; auto: one per core. "
        "With 1, trials run in the main process and the study is reproducible.",
        int,
        metavar="auto|N",
        low=1,
        high=256,
        none="auto",
    )
    scheduler: str | None = _study(
        None,
        "Run the trials on the Dask cluster of this scheduler, as many in parallel as it has "
        "worker threads (at most --workers); storage and tracking must then be servers.",
        metavar="ADDRESS",
        example="tcp://HOST:8786",
    )
    max_failures: int = _study(
        5, "Stop after this many configurations in a row have failed.", low=1
    )
    report: str = _study(
        "report.html",
        "File that the report is written to at the end; none: no report.",
        metavar="FILE.html",
    )
    objective: str = _study(
        "auto",
        "Metric of the validation data that the search goes by: pruner, sampler, early stopping, "
        "the best trial, the gate. auto: val_accuracy for classes, val_auc for labels, val_rmse "
        "for numbers.",
        choices=("auto", *OBJECTIVES),
    )
    seed: int = _study(
        0,
        "Random seed of the sampler, initial weights, shuffling and dropout.",
        low=0,
        high=2**31 - 1,
    )
    epochs: int | None = setting(
        "Training",
        None,
        "Number of epochs to train a trial. auto: 5; up to 20 for a small file of your own.",
        int,
        low=1,
        high=10**6,
        none="auto",
        example="5",
    )
    model: str | None = setting(
        _NETWORK,
        None,
        "Search a custom model: FUNCTION of the Python module MODULE builds it, and the module's "
        "SPACE declares its search space.",
        metavar="MODULE:FUNCTION",
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
    finalists: int = _winner(
        0,
        "Number of best trials that are retrained with fresh seeds, together with the reference, "
        "before the winner is chosen by the mean of the objective; 0: the best trial wins.",
        low=0,
        high=1000,
    )
    repeats: int = _winner(3, "Fresh seeds per finalist.", low=1, high=1000)
    promote: str = _winner(
        "if-better",
        "When to promote the winner to production: if it is better on the test examples than the "
        "model in production (by --objective), always, or never.",
        choices=("if-better", "always", "never"),
    )
    tracking_uri: str = _mlflow(
        "sqlite:///mlflow.db",
        "URI of MLflow's database or tracking server.",
        metavar="URL",
        env="MLFLOW_TRACKING_URI",
    )
    mlflow_page: str | None = page_setting("MLflow", "the MLflow server", env="MLFLOW_PAGE")
    experiment: str = name_setting("MLflow", "MNIST_Classification", "Experiment of the runs.")
    model_name: str = name_setting("MLflow", "MNIST_DNN_Model", "Name of the registered model.")

    def __post_init__(self) -> None:
        for name, option in options().items():
            if name in HYPERPARAMETERS:
                object.__setattr__(self, name, in_notation(getattr(self, name)))
            option.check(name, getattr(self, name))
        check_space(self.space, grid=self.sampler == "grid")
        check_stores(self.storage, self.tracking_uri, cluster=self.scheduler is not None)

    def resolved(self, **means: Any) -> "StudyConfig":
        """A copy with what `auto` means, and the custom model as it is loaded, not read again.

        means: for each setting that may be auto its value, or in the notation its space.
        """
        changed = copy(self)
        changed.__dict__.pop("space", None)  # cached; it may depend on them
        for name, value in means.items():
            object.__setattr__(changed, name, value)
        return changed

    @property
    def trial_epochs(self) -> int:
        """`epochs`, or 5 if it is None."""
        return EPOCHS if self.epochs is None else self.epochs

    @cached_property
    def _fingerprint(self) -> str:
        """Of the custom model's source when these settings were created."""
        return custom_model.load(str(self.model)).fingerprint

    @property
    def custom_model(self) -> custom_model.CustomModel | None:
        """The custom model as it was when these settings were created; None without --model.

        Raises ModelError if this process must import it and its source has changed since.
        """
        return None if self.model is None else custom_model.find(self.model, self._fingerprint)

    @cached_property
    def space(self) -> Space:
        """The search space that the hyperparameters' options and the custom model describe."""
        notation = {name: getattr(self, name) for name in HYPERPARAMETERS}
        if notation["batch_size"] == AUTO:  # until it is `resolved`
            notation["batch_size"] = HYPERPARAMETERS["batch_size"].space
        custom = self.custom_model
        try:
            return space_of(notation, None if custom is None else custom.space)
        except ValueError as error:
            raise InputError(str(error)) from None

    def settings(
        self,
        dataset_digest: str,
        *,
        split: str = "last",
        normalized: bool = False,
        source: Mapping[str, Any] | None = None,
        task: str = "classification",
    ) -> dict[str, Any]:
        """The settings that must not change during a study, stored with it.

        Sampler and pruner may change, except to or from a grid. split, normalized, task: how the
        dataset was prepared and what is predicted; stored only if it differs from what older
        studies, without the choice, used. source: settings that the dataset's arrays depend on.
        """
        model = {}
        if self.model is not None:
            model = {"model": custom_model.load(self.model).fingerprint}
            if model["model"] != self._fingerprint:
                raise InputError(
                    f"--model {self.model} must be as it was when these settings were created, "
                    f"{self._fingerprint}",
                    f"is now {model['model']}",
                    "create the StudyConfig again",
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
            **({} if self.objective in ("auto", "val_accuracy") else {"objective": self.objective}),
            **({} if task == "classification" else {"task": task}),
            **({} if split == "last" else {"split": split}),
            **({} if self.class_weight == "none" else {"class_weight": self.class_weight}),
            **({"normalize": "auto"} if normalized else {}),
            **(source or {}),
        }


def options() -> dict[str, Option]:
    """The option of every setting, in the order of --help."""
    known = {f.name: f.metadata["option"] for f in fields(StudyConfig)}
    study = [name for name, option in known.items() if option.group == "Study"]
    return {name: known[name] for name in (*study, *(n for n in known if n not in study))}


def defaults() -> dict[str, Any]:
    """The default of every setting."""
    return {name: option.default for name, option in options().items()}


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, as `name: stored -> given`."""
    names = [*given, *(name for name in stored if name not in given)]
    return [
        f"{name}: {stored.get(name)} -> {given.get(name)}"
        for name in names
        if stored.get(name) != given.get(name)
    ]
