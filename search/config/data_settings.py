"""The settings of the data: where examples come from and how they are prepared."""

from dataclasses import dataclass
from functools import partial

from search.config.options import setting

# The modules of keras.datasets, beside mnist, that hold images with integer labels:
KERAS_DATASETS = ("fashion_mnist", "cifar10", "cifar100")
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
        "Which training examples are used for validation: the last ones, or a stratified random "
        "sample, seeded by --seed. auto: stratified for your own file, last for the others.",
        choices=("last", "stratified"),
        none="auto",
    )
    normalize: str = _data(
        "auto",
        "Scale every feature of your own file to mean 0 and variance 1 by a Normalization layer, "
        "adapted to the training part and saved with the model. auto: unless examples are images.",
        choices=("auto", "none"),
    )
    baselines: str = _data(
        "auto",
        "Simple models that the network is compared with: the majority class and scikit-learn's "
        "logistic regression, on the same data. auto: for your own file; none for MNIST and "
        "Keras' datasets.",
        choices=("auto", "none"),
    )
