"""The hyperparameters: what each means, its search space, and its value in the default network.

All but the first three are fixed at that value unless the user gives a search space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.config.options import flag
from search.config.parameter import SWITCH, Domain, Parameter, Range, Value, parse, text_of, words
from search.config.space import Condition, Space
from search.errors import InputError

AUGMENTATIONS = ("shift", "affine", "elastic")


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter.

    domain: the values that it allows. default: its value in the default network. label: its name in
    the terminal. searched: its search space unless the user gives one, in the notation; empty where
    it is fixed at its default. condition: where it matters, if not always. network: it belongs to
    the network, so a custom model does not use it; the others belong to the training.
    """

    help: str
    domain: Domain
    default: Value
    label: str = ""
    searched: str = ""
    condition: Condition | None = None
    network: bool = False

    @property
    def space(self) -> str:
        """Its default search space, in the notation."""
        return self.searched or text_of(self.default)


HYPERPARAMETERS = {
    "hidden_units": Hyperparameter(
        "Units of a hidden layer.",
        Domain(int, "whole numbers from 1 to 65536", "128,256,512,1024", lambda v: 1 <= v <= 65536),
        512,
        "units",
        searched="128,256,512,1024",
        network=True,
    ),
    "dropout_rate": Hyperparameter(
        "Fraction of the hidden units to drop.",
        Domain(float, "numbers from 0 to below 1", "0.0:0.5", lambda v: 0 <= v < 1),
        0.2,
        "dropout",
        searched="0.0:0.5",
        network=True,
    ),
    "learning_rate": Hyperparameter(
        "Learning rate of the optimizer; with a schedule, the highest.",
        Domain(float, "numbers above 0, at most 10", "1e-4:1e-2:log", lambda v: 0 < v <= 10),
        0.001,
        "lr",
        searched="1e-4:1e-2:log",
    ),
    "architecture": Hyperparameter(
        "dense: hidden layers only; cnn: convolutional blocks before them, for images.",
        words("dense", "cnn"),
        "dense",
        network=True,
    ),
    "conv_blocks": Hyperparameter(
        "Number of blocks of a 3x3 convolution and 2x2 max pooling; cnn only.",
        Domain(int, "whole numbers, 2 or 3", "2,3", lambda v: 2 <= v <= 3),
        2,
        "blocks",
        condition=Condition("architecture", ("cnn",)),
        network=True,
    ),
    "filters": Hyperparameter(
        "Filters of the first block, doubled in each later block; cnn only.",
        Domain(int, "whole numbers from 1 to 1024", "16,32,64", lambda v: 1 <= v <= 1024),
        32,
        "filters",
        condition=Condition("architecture", ("cnn",)),
        network=True,
    ),
    "hidden_layers": Hyperparameter(
        "Number of hidden layers, each with hidden-units and dropout.",
        Domain(int, "whole numbers from 1 to 5", "1:5", lambda v: 1 <= v <= 5),
        1,
        "layers",
        network=True,
    ),
    "activation": Hyperparameter(
        "Activation of convolutions and hidden layers: relu, leaky_relu, elu, gelu or silu.",
        words("relu", "leaky_relu", "elu", "gelu", "silu"),
        "relu",
        network=True,
    ),
    "batch_normalization": Hyperparameter(
        "true: batch normalization before every activation.",
        SWITCH,
        False,
        "batch norm",
        network=True,
    ),
    "optimizer": Hyperparameter(
        "Optimizer: adam, adamw, nadam, or sgd with Nesterov momentum 0.9.",
        words("adam", "adamw", "nadam", "sgd"),
        "adam",
    ),
    "weight_decay": Hyperparameter(
        "Decoupled weight decay, with any optimizer; adam with it is adamw.",
        Domain(float, "numbers from 0 to 1", "1e-4:1e-1:log", lambda v: 0 <= v <= 1),
        0.0,
        "decay",
    ),
    "label_smoothing": Hyperparameter(
        "Label smoothing in training: the fraction of a label spread over all classes.",
        Domain(float, "numbers from 0 to below 1", "0.0:0.2", lambda v: 0 <= v < 1),
        0.0,
        "smoothing",
    ),
    "batch_size": Hyperparameter(
        "Number of examples per gradient update. auto: 32, of large data up to 1024.",
        Domain(
            *(int, "auto, or whole numbers from 1 to 1000000000", "64,128,256"),
            lambda v: 1 <= v <= 10**9,
        ),
        128,
        "batch",
    ),
    "schedule": Hyperparameter(
        "Learning rate schedule: constant, cosine with warm-up, one_cycle, or plateau.",
        words("constant", "cosine", "one_cycle", "plateau"),
        "constant",
    ),
    "early_stopping": Hyperparameter(
        "Epochs without a better objective after which training stops, with its best weights.",
        Domain(int, "off or whole numbers, 1 or more", "3", lambda v: 0 <= v <= 10**6, {"off": 0}),
        0,
        "stopping",
        searched="off",
    ),
    "augmentation": Hyperparameter(
        "Random distortion of the training images in every epoch: none, shift, affine or elastic.",
        words("none", *AUGMENTATIONS),
        "none",
    ),
    "augmentation_strength": Hyperparameter(
        "Strength of the augmentation; 1 is usual for digits.",
        Domain(float, "numbers above 0, at most 4", "0.3:1.5", lambda v: 0 < v <= 4),
        1.0,
        "strength",
        condition=Condition("augmentation", AUGMENTATIONS),
    ),
}
# The configuration that most MNIST tutorials use: what a search has to beat.
REFERENCE: dict[str, Value] = {"hidden_units": 512, "dropout_rate": 0.2, "learning_rate": 0.001}
_RECORDED = ("optimizer", "activation", "batch_size")  # even at their defaults


def complete(params: Mapping[str, Value], shared: Mapping[str, Any] | None = None) -> Any:
    """All hyperparameters of a trial: its `params`, those that all trials share, and defaults.

    shared: the parameters that the study's runs have in common, `facts["params"]`.
    """
    everything = {name: known.default for name, known in HYPERPARAMETERS.items()}
    everything.update((k, v) for k, v in (shared or {}).items() if k in HYPERPARAMETERS)
    return {**everything, **params}


def space_of(notation: Mapping[str, str], custom: Mapping[str, Parameter] | None = None) -> Space:
    """The search space that these options, in the notation, describe.

    custom: the space of a custom model, which replaces the network's hyperparameters.
    Raises ValueError, which begins with the option's name.
    """
    parameters: dict[str, Parameter] = dict(custom or {})
    known = {name: h for name, h in HYPERPARAMETERS.items() if custom is None or not h.network}
    for name, hyperparameter in known.items():
        try:
            parameters[name] = parse(hyperparameter.domain, notation[name])
        except ValueError as error:
            raise ValueError(f"{flag(name)} {error}") from None
    return Space(
        parameters,
        {name: h.condition for name, h in known.items() if h.condition is not None},
        frozenset({*REFERENCE, *(custom or {})} & set(parameters)),
        {name: REFERENCE.get(name, h.default) for name, h in known.items()},
    )


def check_space(space: Space, *, grid: bool) -> None:
    """Raise InputError for adamw without a weight decay, and for a range in a grid search."""
    decay = space.parameters["weight_decay"]
    if "adamw" in space.parameters["optimizer"] and str(decay) == "0":
        raise InputError(
            "--optimizer adamw must have a weight decay, without which it is adam, but "
            f"--weight-decay is {decay}; give one, for example --weight-decay 1e-4:1e-1:log"
        )
    try:
        if grid:
            space.grid_size()
    except ValueError as error:
        lists = " ".join(
            f"{flag(name)} {p.low:.12g},{p.high:.12g}"
            for name, p in space.searched().items()
            if isinstance(p, Range) and name in HYPERPARAMETERS
        )
        remedy = f"give lists, for example {lists}" if lists else "write a list in SPACE"
        raise InputError(f"--sampler grid: {error}; {remedy}") from None


def differing(space: Space) -> dict[str, Parameter]:
    """The part of `space` that is searched, or fixed at another value than the default."""
    return {
        name: parameter
        for name, parameter in space.parameters.items()
        if space.suggests(name)
        or (
            space.can_matter(name)
            and (name in space.conditions or HYPERPARAMETERS[name].default not in parameter)
        )
    }


def shared(space: Space) -> dict[str, Value]:
    """The parameters that the runs of all trials have in common and that are worth recording."""
    shown = {*differing(space), *_RECORDED}
    return {name: value for name, value in space.fixed().items() if name in shown}


def unusual(shared: Mapping[str, Any]) -> dict[str, Value]:
    """The part of `facts["params"]` that differs from the default network."""
    return {
        name: value
        for name, value in shared.items()
        if name in ("model", "class_weight")
        or (name in HYPERPARAMETERS and value != HYPERPARAMETERS[name].default)
    }


def needs_images(space: Space) -> list[str]:
    """The options in `space` that work with images only, each as on the command line."""
    conditions = (space.conditions.get(child) for child in ("filters", "augmentation_strength"))
    return [
        f"{flag(condition.parent)} {value}"
        for condition in conditions
        if condition is not None
        for value in condition.values
        if value in space.parameters[condition.parent]
    ]


# ---- values as text ------------------------------------------------------------------------------

_FORMATS = {
    "hidden_units": "units {:4d}",
    "dropout_rate": "dropout {:.3f}",
    "learning_rate": "lr {:.2e}",
}


def describe(params: Mapping[str, Value]) -> str:
    """A trial's parameters for a line of the terminal, without those at their defaults."""
    custom = not set(REFERENCE) <= set(params)  # of a custom model, which may reuse a name

    def is_default(name: str, value: Value) -> bool:
        known = HYPERPARAMETERS.get(name)
        if known is None or name in REFERENCE or (custom and known.network):
            return False
        return value == known.default

    return "  ".join(_shown(*item) for item in params.items() if not is_default(*item))


def _shown(name: str, value: Value) -> str:
    if name in _FORMATS:
        try:
            return _FORMATS[name].format(value)
        except ValueError:  # a custom model's parameter of that name, in another type
            pass
    label = HYPERPARAMETERS[name].label if name in HYPERPARAMETERS else name
    return label if value is True else f"{label} {short(value)}".strip()


def short(value: Value | None) -> str:
    """`value` with at most four significant digits, empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else f"{value:.4g}"
