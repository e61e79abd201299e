"""The settings of the data: where examples come from and how they are prepared."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from search.config.options import setting

# The modules of keras.datasets, beside mnist, that hold images with integer labels:
KERAS_DATASETS = ("fashion_mnist", "cifar10", "cifar100")
TABLE_SETTINGS = ("target", "ignore", "numeric", "categorical", "test_split")
# What --objective may name; `data.task` says what each is, and of which task.
OBJECTIVES = (
    *("val_accuracy", "val_loss", "val_auc", "val_f1", "val_balanced_accuracy"),
    *("val_mae", "val_rmse", "val_r2"),
)
_data = partial(setting, "Data")


def _columns(help: str) -> Any:
    return _data(None, help, metavar="COLUMN,...", example="name,id")


@dataclass(frozen=True)
class DataSettings:
    """The settings in the panel Data of --help."""

    dataset: str = _data(
        "mnist",
        f"mnist, a Keras dataset ({', '.join(KERAS_DATASETS)}), the path of a table (CSV or "
        "Parquet), of an .npz file, or of a folder with a folder of images for each class, or "
        "FUNCTION of the Python module MODULE, which returns arrays or tf.data.Datasets.",
        metavar="NAME|FILE|FOLDER|MODULE:FUNCTION",
    )
    image_size: int | None = _data(
        None,
        "Height and width that the images of a folder are resized to; auto: theirs if they are of "
        "one size, else 64.",
        int,
        low=2,
        high=4096,
        none="auto",
        example="64",
    )
    target: str | None = _data(
        None,
        "Column of the table to predict; or several, each a label that a row has (1) or not (0).",
        metavar="COLUMN,...",
        example="species",
    )
    ignore: str | None = _columns("Columns of the table to leave out, for example identifiers.")
    numeric: str | None = _columns("Columns of the table to take as numbers.")
    categorical: str | None = _columns("Columns of the table to take as categories.")
    test: str | None = _data(
        None,
        "Table of the test set, with the same columns. none: --test-split of the rows.",
        metavar="FILE",
        example="test.csv",
    )
    test_split: float = _data(
        0.2,
        "Fraction of the examples used as the test set where none is given.",
        metavar="FRACTION",
        low=0,
        below=1,
    )
    validation_split: float = _data(
        0.1,
        "Fraction of the training data used for validation.",
        metavar="FRACTION",
        low=0,
        below=1,
    )
    split: str | None = _data(
        None,
        "Which examples are used for validation, and of a table for the test: the last ones; a "
        "random or stratified random sample, seeded by --seed; whole groups, which have the same "
        "value in a column of the table; or the latest by a column of the table. auto: for your "
        "own data stratified, random without classes; last for the others.",
        metavar="SPLIT",
        pattern=r"last|random|stratified|(group|time):.+",
        rule="last, random, stratified, group:COLUMN or time:COLUMN",
        none="auto",
        example="stratified",
    )
    task: str = _data(
        "auto",
        "What is predicted: a class, a number, or any of several labels. auto: a number if the "
        "targets of your own file are not whole numbers; labels if they are several columns.",
        choices=("auto", "classification", "regression", "multilabel"),
    )
    class_weight: str = _data(
        "none",
        "Weight of a training example in the loss. balanced: n / (classes * examples of its "
        "class), counted in the training part, so that all classes weigh the same.",
        choices=("none", "balanced"),
    )
    normalize: str = _data(
        "auto",
        "Scale every feature of your own file to mean 0 and variance 1 by a Normalization layer, "
        "adapted to the training part and saved with the model. auto: unless examples are images.",
        choices=("auto", "none"),
    )
    baselines: str = _data(
        "auto",
        "Simple models that the network is compared with, on the same data: the majority class and "
        "scikit-learn's logistic regression (for labels one of each), or the mean and ridge "
        "regression. auto: for your own data; none for MNIST and Keras' datasets.",
        choices=("auto", "none"),
    )

    @property
    def table(self) -> dict[str, Any]:
        """The settings of a table that must not change during a study; empty for other data."""
        if not is_table(self.dataset):
            return {}
        unused = () if self.test is None else ("test_split",)
        given = {name: getattr(self, name) for name in TABLE_SETTINGS if name not in unused}
        return {name: value for name, value in given.items() if value is not None}


def is_table(name: str) -> bool:
    """Whether the dataset `name` is a CSV or Parquet file."""
    return name.lower().endswith((".csv", ".parquet"))


def targets_in(text: str, columns: Collection[str]) -> list[str]:
    """The columns that `--target` names: one of the table's `columns`, or COLUMN,COLUMN."""
    named = [] if text in columns else list(dict.fromkeys(names_in(text)))
    return named or [text]


def names_in(text: str | None) -> list[str]:
    """The columns in the notation COLUMN,COLUMN."""
    return [] if text is None else [name.strip() for name in text.split(",") if name.strip()]
