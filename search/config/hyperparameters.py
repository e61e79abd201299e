"""The hyperparameters: what each means, what it may be, and its value in the plain network.

All but the first three are fixed at the plain network's value unless the user opens them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.config.options import flag
from search.config.parameter import SWITCH, Domain, Parameter, Value, parse, words
from search.config.space import Condition, Space

AUGMENTATIONS = ("shift", "affine", "elastic")


@dataclass(frozen=True)
class Hyperparameter:
    """One of the recipe.

    help: what it is. default: what it may be unless the user says otherwise, in the notation.
    plain: its value in the plain network. label: what the terminal's lines call it.
    condition: where it matters, if not always. network: it is the network's, which a model of the
    user's own does without; the others are the training's.
    """

    help: str
    domain: Domain
    default: str
    plain: Value
    label: str
    condition: Condition | None = None
    network: bool = False


HYPERPARAMETERS = {
    "hidden_units": Hyperparameter(
        "Width of a hidden layer.",
        Domain(int, "whole numbers from 1 to 65536", "128,256,512,1024", lambda v: 1 <= v <= 65536),
        "128,256,512,1024",
        512,
        "units",
        network=True,
    ),
    "dropout_rate": Hyperparameter(
        "Share of hidden activations dropped.",
        Domain(float, "numbers from 0 to below 1", "0.0:0.5", lambda v: 0 <= v < 1),
        "0.0:0.5",
        0.2,
        "dropout",
        network=True,
    ),
    "learning_rate": Hyperparameter(
        "The optimizer's step size; a schedule's highest.",
        Domain(float, "numbers above 0, at most 10", "1e-4:1e-2:log", lambda v: 0 < v <= 10),
        "1e-4:1e-2:log",
        0.001,
        "lr",
    ),
    "architecture": Hyperparameter(
        "dense: hidden layers alone; cnn: convolutions before them, for images.",
        words("dense", "cnn"),
        "dense",
        "dense",
        "",
        network=True,
    ),
    "conv_blocks": Hyperparameter(
        "Blocks of a 3x3 convolution and a 2x2 max-pooling; cnn only.",
        Domain(int, "whole numbers, 2 or 3", "2,3", lambda v: 2 <= v <= 3),
        "2",
        2,
        "blocks",
        Condition("architecture", ("cnn",)),
        network=True,
    ),
    "filters": Hyperparameter(
        "Filters of the first block, every later one has twice as many; cnn only.",
        Domain(int, "whole numbers from 1 to 1024", "16,32,64", lambda v: 1 <= v <= 1024),
        "32",
        32,
        "filters",
        Condition("architecture", ("cnn",)),
        network=True,
    ),
    "hidden_layers": Hyperparameter(
        "How many hidden layers, each of hidden-units and with the dropout.",
        Domain(int, "whole numbers from 1 to 5", "1:5", lambda v: 1 <= v <= 5),
        "1",
        1,
        "layers",
        network=True,
    ),
    "activation": Hyperparameter(
        "relu, leaky_relu, elu, gelu or silu, of convolutions and hidden layers.",
        words("relu", "leaky_relu", "elu", "gelu", "silu"),
        "relu",
        "relu",
        "",
        network=True,
    ),
    "batch_normalization": Hyperparameter(
        "true: normalize over the batch before every activation.",
        SWITCH,
        "false",
        False,
        "batch norm",
        network=True,
    ),
    "optimizer": Hyperparameter(
        "adam, adamw, nadam, or sgd with Nesterov momentum 0.9.",
        words("adam", "adamw", "nadam", "sgd"),
        "adam",
        "adam",
        "",
    ),
    "weight_decay": Hyperparameter(
        "Decoupled weight decay, of whichever optimizer; adam with it is adamw.",
        Domain(float, "numbers from 0 to 1", "1e-4:1e-1:log", lambda v: 0 <= v <= 1),
        "0",
        0.0,
        "decay",
    ),
    "label_smoothing": Hyperparameter(
        "Share of a label's probability spread over all classes in training.",
        Domain(float, "numbers from 0 to below 1", "0.0:0.2", lambda v: 0 <= v < 1),
        "0",
        0.0,
        "smoothing",
    ),
    "batch_size": Hyperparameter(
        "Examples in a step.",
        Domain(int, "whole numbers from 1 to 1000000000", "64,128,256", lambda v: 1 <= v <= 10**9),
        "128",
        128,
        "batch",
    ),
    "schedule": Hyperparameter(
        "Of the learning rate: constant, cosine with warm-up, one_cycle, or plateau.",
        words("constant", "cosine", "one_cycle", "plateau"),
        "constant",
        "constant",
        "",
    ),
    "early_stopping": Hyperparameter(
        "Epochs without a better val_accuracy after which a trial ends, with its best weights.",
        Domain(int, "off or whole numbers, 1 or more", "3", lambda v: 0 <= v <= 10**6, {"off": 0}),
        "off",
        0,
        "stopping",
    ),
    "augmentation": Hyperparameter(
        "Distort the training images anew in every epoch: none, shift, affine or elastic.",
        words("none", *AUGMENTATIONS),
        "none",
        "none",
        "",
    ),
    "augmentation_strength": Hyperparameter(
        "How strongly, 1 being usual for digits; with an augmentation only.",
        Domain(float, "numbers above 0, at most 4", "0.3:1.5", lambda v: 0 < v <= 4),
        "1",
        1.0,
        "strength",
        Condition("augmentation", AUGMENTATIONS),
    ),
}
REFERENCE: dict[str, Value] = {"hidden_units": 512, "dropout_rate": 0.2, "learning_rate": 0.001}


"""The configuration that most MNIST tutorials use: what a search has to beat."""
LOSS = "sparse_categorical_crossentropy"
OUTPUT_ACTIVATION = "softmax"
_RECORDED = ("optimizer", "activation")  # even where they are plain


def complete(params: Mapping[str, Value], shared: Mapping[str, Any] | None = None) -> Any:
    """Everything that a trial tried: its `params`, what all trials share, and what is plain.

    shared: what the study's runs have in common, `facts["params"]`.
    """
    everything = {name: known.plain for name, known in HYPERPARAMETERS.items()}
    everything.update((k, v) for k, v in (shared or {}).items() if k in HYPERPARAMETERS)
    everything.update(params)
    return everything


def space_of(notation: Mapping[str, str], own: Mapping[str, Parameter] | None = None) -> Space:
    """The space that these options, in the notation, describe.

    own: the space of a model of the user's own, which takes the place of the network's part.
    Raises ValueError, which begins with the option's name.
    """
    parameters: dict[str, Parameter] = dict(own or {})
    known = {name: h for name, h in HYPERPARAMETERS.items() if own is None or not h.network}
    for name, hyperparameter in known.items():
        try:
            parameters[name] = parse(hyperparameter.domain, notation[name])
        except ValueError as error:
            raise ValueError(f"{flag(name)} {error}") from None
    return Space(
        parameters,
        {name: h.condition for name, h in known.items() if h.condition is not None},
        frozenset({*REFERENCE, *(own or {})} & set(parameters)),
        {name: REFERENCE.get(name, h.plain) for name, h in known.items()},
    )


def differing(space: Space) -> dict[str, Parameter]:
    """What of `space` is searched, or fixed at another than the plain network's value."""
    return {
        name: parameter
        for name, parameter in space.parameters.items()
        if space.asks(name)
        or (
            space.can_matter(name)
            and (name in space.conditions or HYPERPARAMETERS[name].plain not in parameter)
        )
    }


def shared(space: Space) -> dict[str, Value]:
    """What the runs of all trials have in common, as far as it is worth a line."""
    shown = {*differing(space), *_RECORDED, "batch_size"}
    return {name: value for name, value in space.fixed().items() if name in shown}


def unusual(shared: Mapping[str, Any]) -> dict[str, Value]:
    """What of `facts["params"]` a plain network has not."""
    return {
        name: value
        for name, value in shared.items()
        if name == "model" or (name in HYPERPARAMETERS and value != HYPERPARAMETERS[name].plain)
    }


def needs_images(space: Space) -> list[str]:
    """What of `space` can be used with images only, each as on the command line."""
    found = []
    for child in ("filters", "augmentation_strength"):
        condition = space.conditions.get(child)
        if condition is not None:
            allowed = space.parameters[condition.parent]
            needy = [value for value in condition.values if value in allowed]
            found += [f"{flag(condition.parent)} {value}" for value in needy]
    return found


def describe(params: Mapping[str, Value]) -> str:
    """What a trial tried, for a line of the terminal; what is plain there is left out."""
    own = not set(REFERENCE) <= set(params)  # of a network of the user's own
    shown = (_shown(name, v) for name, v in params.items() if not _is_plain(name, v, own))
    return "  ".join(shown)


def _is_plain(name: str, value: Value, own: bool) -> bool:
    known = HYPERPARAMETERS.get(name)
    if known is None or name in REFERENCE or (own and known.network):
        return False
    return value == known.plain


def _shown(name: str, value: Value) -> str:
    fixed = {
        "hidden_units": "units {:4d}",
        "dropout_rate": "dropout {:.3f}",
        "learning_rate": "lr {:.2e}",
    }
    if name in fixed:
        try:
            return fixed[name].format(value)
        except ValueError:  # a namesake of a model of the user's own
            pass
    label = HYPERPARAMETERS[name].label if name in HYPERPARAMETERS else name
    return label if value is True else f"{label} {short(value)}".strip()


def short(value: Value | None) -> str:
    """`value` in four digits at most, empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else f"{value:.4g}"
