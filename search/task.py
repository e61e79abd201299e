"""The tasks, and the metrics that each is measured by: each is decided here and nowhere else."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from search.errors import InputError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """A metric of the validation data; `test_` in place of `val_` is that of the test data.

    name: as it is stored, and the value of --objective. label: in a sentence. maximize: whether
    more is better. own_unit: whether it has the unit of the target, so that its size may be any.
    """

    name: str
    label: str
    maximize: bool = True
    own_unit: bool = False

    @property
    def stem(self) -> str:
        """The name without `val_`."""
        return self.name.removeprefix("val_")

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """As Optuna names it: maximize or minimize."""
        return "maximize" if self.maximize else "minimize"

    @property
    def sign(self) -> int:
        """1 or -1: `sign * value` is higher if the value is better."""
        return 1 if self.maximize else -1

    def best(self, values: Iterable[float]) -> float:
        """The best of `values`, of which there is at least one."""
        return max(values) if self.maximize else min(values)

    def text(self, value: float) -> str:
        """`value` for people: with four decimals, or in a unit with five significant digits."""
        return f"{value:.5g}" if self.own_unit else f"{value:.4f}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("val_loss", "loss", maximize=False),
        Metric("val_accuracy", "accuracy"),
        Metric("val_auc", "AUC"),
        Metric("val_f1", "macro F1"),
        Metric("val_balanced_accuracy", "balanced accuracy"),
        Metric("val_mae", "MAE", maximize=False, own_unit=True),
        Metric("val_rmse", "RMSE", maximize=False, own_unit=True),
        Metric("val_r2", "R2"),
    )
}


@dataclass(frozen=True)
class Kind:
    """What a kind of task decides.

    target: what an example has: one of several classes, any of several labels, or a number. loss,
    output_activation, compiled: as Keras names them, the latter the metric of the saved model.
    output: what the network gives. metrics: those of every epoch, in order; the first two are also
    computed of the training data. objective: the default.
    """

    target: Literal["class", "labels", "number"]
    loss: str
    output: str
    output_activation: str
    compiled: str
    metrics: tuple[str, ...]
    objective: str

    @property
    def has_classes(self) -> bool:
        """Whether the target is one of several classes."""
        return self.target == "class"


KINDS = {
    "classification": Kind(
        target="class",
        loss="sparse_categorical_crossentropy",
        output="probabilities",
        output_activation="softmax",
        compiled="accuracy",
        metrics=("val_loss", "val_accuracy", "val_auc", "val_f1", "val_balanced_accuracy"),
        objective="val_accuracy",
    ),
    "multilabel": Kind(
        target="labels",
        loss="binary_crossentropy",
        output="probabilities",
        output_activation="sigmoid",
        compiled="binary_accuracy",
        metrics=("val_loss", "val_accuracy", "val_auc", "val_f1"),
        objective="val_auc",
    ),
    "regression": Kind(
        target="number",
        loss="mean_squared_error",
        output="standardized",
        output_activation="linear",
        compiled="mae",
        metrics=("val_loss", "val_mae", "val_rmse", "val_r2"),
        objective="val_rmse",
    ),
}
THRESHOLD = 0.5  # of the probability of a label, above which it is predicted
MOST_OUTPUTS = 100_000_000  # of all test examples that fit into memory
_SIMPLE = ("val_accuracy", "val_rmse")  # metrics that every model of a task has
DEFAULT_OBJECTIVE = METRICS["val_accuracy"]  # of studies that did not store another one


def objective_of(settings: Mapping[str, Any]) -> Metric:
    """The objective of the study with these stored settings."""
    return METRICS.get(str(settings.get("objective")), DEFAULT_OBJECTIVE)


class Named:
    """What knows its classes or labels by `class_names`; these are empty if there are none."""

    class_names: tuple[str, ...]

    def name(self, label: int) -> str:
        """A class or label by its name, or its number."""
        return self.class_names[label] if self.class_names else str(label)


@dataclass(frozen=True)
class Task(Named):
    """What is predicted.

    kind: a key of KINDS. outputs: the number of the network's outputs: of classes, of labels, or 1.
    class_names: one for each class or label, in order; empty if these are only numbered.
    mean, deviation: those of the target in the training part. In regression the network learns the
    target minus `mean`, divided by `deviation`, and the registered model undoes that.
    """

    kind: str = "classification"
    outputs: int = 1
    class_names: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def decides(self) -> Kind:
        """What its kind decides."""
        return KINDS[self.kind]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the validation data after every epoch, in order."""
        return tuple(METRICS[name] for name in self.decides.metrics)

    def measured(self, logs: Mapping[str, float]) -> dict[str, float]:
        """What Keras measured in an epoch, by the names that are stored and in their order.

        logs: by Keras' names; those of the validation data may be missing.
        """
        trained = (f"train_{metric.stem}" for metric in self.metrics[:2])
        names = dict(zip(("loss", self.metrics[1].stem), trained, strict=True))
        names.update((metric.name, metric.name) for metric in self.metrics)
        return {ours: float(logs[name]) for name, ours in names.items() if name in logs}

    @property
    def classes(self) -> int:
        """The number of classes; 0 if the target is not a class."""
        return self.outputs if self.decides.has_classes else 0

    @property
    def labels(self) -> int:
        """The number of labels, of which an example has any; 0 if the target is another."""
        return self.outputs if self.decides.target == "labels" else 0

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of the target of one example."""
        return (self.outputs,) if self.labels else ()

    @property
    def is_number(self) -> bool:
        """Whether the target is a number."""
        return self.decides.target == "number"

    def __str__(self) -> str:
        if self.is_number:
            return f"a number to predict ({self.mean:.5g} ± {self.deviation:.5g})"
        return f"{self.outputs} {'labels' if self.labels else 'classes'}"

    def objective(self, name: str) -> Metric:
        """The metric that --objective `name` means; auto: the default of the kind.

        Raises InputError, in one line, if it is not a metric of the task.
        """
        if name == "auto":
            return METRICS[self.decides.objective]
        if name in self.decides.metrics:
            return METRICS[name]
        listed = ", ".join(self.decides.metrics)
        raise InputError(
            f"--objective must be a metric of the task, for {self.kind} {listed}",
            f"got {name!r}",
            nearest(
                name, self.decides.metrics, f"for example --objective {self.decides.objective}"
            ),
        )


def metric_among(names: Collection[str], objective: Metric) -> Metric:
    """The objective if it is among `names`, or else accuracy or RMSE, whichever is."""
    return METRICS[next(name for name in (objective.name, *_SIMPLE) if name in names)]


def describe(
    kind: str, y: "NDArray[Any]", train_size: int, class_names: tuple[str, ...] = ()
) -> "tuple[Task, NDArray[Any]]":
    """The task with the targets `y`, and `y` as the network learns it.

    y: of shape (n,), or of labels (n, labels). Numbers are standardized by the mean and the
    deviation of the first `train_size` of them; where those are all equal, they are divided by 1.
    """
    if KINDS[kind].has_classes:
        return Task(kind, int(y.max()) + 1, class_names), y
    if KINDS[kind].target == "labels":
        return Task(kind, y.shape[1], class_names), y
    train = y[:train_size].astype(float)
    task = Task(kind, 1, mean=float(train.mean()), deviation=float(train.std()) or 1.0)
    return task, ((y.astype(float) - task.mean) / task.deviation).astype("float32")


# ---- classes ---------------------------------------------------------------------------------


def class_names(labels: "NDArray[Any]") -> tuple[str, ...]:
    """The classes in order: numbers by size, words by alphabet."""
    different = sorted(set(labels))
    if all(_is_number(name) for name in different):
        different.sort(key=float)
    return tuple(different)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_classes(target: str, names: tuple[str, ...], tested: "NDArray[Any]") -> None:
    """Raise InputError for a single class, and for one that is only in the test set."""
    if len(names) < 2:
        raise InputError(
            f"--target {target} must have two classes or more",
            f"all rows have {names[0]!r}",
            "name another column",
        )
    new = sorted(set(tested) - set(names))
    if new:
        raise InputError(
            f"--target {target}: every class must be in the training data",
            f"{new[0]!r} is in the test set alone",
            "give more rows of it, or leave these out",
        )
