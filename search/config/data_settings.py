"""The settings of the data: where examples come from and how they are prepared."""

from dataclasses import dataclass
from functools import partial

from search.config.options import setting

# The modules of keras.datasets, beside mnist, that hold images with integer labels:
KERAS_DATASETS = ("fashion_mnist", "cifar10", "cifar100")
# What --objective may name; `data.task` says what each is, and of which task.
OBJECTIVES = (
    *("val_accuracy", "val_loss", "val_auc", "val_f1", "val_balanced_accuracy"),
    *("val_mae", "val_rmse", "val_r2"),
)
_data = partial(setting, "Data")


@dataclass(frozen=True)
class DataSettings:
    """The settings in the panel Data of --help."""

    dataset: str = _data(
        "mnist",
        f"mnist, a Keras dataset ({', '.join(KERAS_DATASETS)}), or the path of an .npz file.",
        metavar="NAME|FILE.npz",
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
        "Which training examples are used for validation: the last ones, or a random sample, "
        "seeded by --seed, stratified by class or not. auto: for your own file stratified, random "
        "for a regression; last for the others.",
        choices=("last", "random", "stratified"),
        none="auto",
    )
    task: str = _data(
        "auto",
        "What is predicted: a class or a number. auto: a number if the targets of your own file "
        "are not whole numbers.",
        choices=("auto", "classification", "regression"),
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
