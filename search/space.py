"""The search space: what each hyperparameter may be, and how a trial samples it.

Every hyperparameter option takes one notation:

    0.2                 a value: fixed
    128,256,512,1024    a list: one of these
    0.0:0.5             a range, both ends included
    1e-4:1e-2:log       a range sampled on a logarithmic scale
    64:1024:64          a range with a step
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol, cast

Number = int | float


class Suggests(Protocol):
    """The part of `optuna.Trial` that sampling needs; its arguments are Optuna's."""

    def suggest_categorical(self, name: str, choices: tuple[Number, ...]) -> Number:
        """One of `choices`."""

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """A whole number from `low` to `high`."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number from `low` to `high`."""


@dataclass(frozen=True)
class Choice:
    """One of `values`; a single value is a fixed hyperparameter."""

    values: tuple[Number, ...]

    def suggest(self, trial: Suggests, name: str) -> Number:
        """Let `trial` choose."""
        return trial.suggest_categorical(name, self.values)

    def __contains__(self, value: Number) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(f"{value:.12g}" for value in self.values)


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included, on a grid of `step` where one is given."""

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    def suggest(self, trial: Suggests, name: str) -> Number:
        """Let `trial` choose: an integer where the ends are integers, else a float."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(name, self.low, self.high, step=step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def __contains__(self, value: Number) -> bool:
        if not self.low <= value <= self.high:
            return False
        return self.step is None or _divides(self.step, value - self.low)

    def __str__(self) -> str:
        ends = f"{self.low:.12g}:{self.high:.12g}"
        if self.log:
            return f"{ends}:log"
        return ends if self.step is None else f"{ends}:{self.step:.12g}"


Parameter = Choice | Range


def _divides(step: Number, length: Number) -> bool:
    ratio = length / step
    return math.isfinite(ratio) and math.isclose(ratio, round(ratio), rel_tol=0, abs_tol=1e-9)


@dataclass(frozen=True)
class Domain:
    """The values for which a hyperparameter means anything, whatever the user searches."""

    kind: type[int] | type[float]
    rule: str
    holds: Callable[[Number], bool]
    example: str


DOMAINS = {
    "hidden_units": Domain(
        int, "whole numbers from 1 to 65536", lambda v: 1 <= v <= 65536, "128,256,512,1024"
    ),
    "dropout_rate": Domain(float, "numbers from 0 to below 1", lambda v: 0 <= v < 1, "0.0:0.5"),
    "learning_rate": Domain(
        float, "numbers above 0, at most 10", lambda v: 0 < v <= 10, "1e-4:1e-2:log"
    ),
}


@dataclass(frozen=True)
class Hyperparameters:
    """What one trial tries.

    hidden_units: width of the hidden layer, >= 1.
    dropout_rate: share of hidden activations dropped in training, in [0, 1).
    learning_rate: Adam's step size, > 0.
    """

    hidden_units: int
    dropout_rate: float
    learning_rate: float

    def as_dict(self) -> dict[str, Number]:
        """The hyperparameters by name, as both ledgers record them."""
        return cast(dict[str, Number], asdict(self))

    def __str__(self) -> str:
        return f"units {self.hidden_units:4d}  dropout {self.dropout_rate:.3f}  " + (
            f"lr {self.learning_rate:.2e}"
        )


REFERENCE = Hyperparameters(hidden_units=512, dropout_rate=0.2, learning_rate=0.001)
"""The configuration that most MNIST tutorials use: what a search has to beat."""


RECIPE = {
    "optimizer": "adam",
    "activation": "relu",
    "output_activation": "softmax",
    "loss": "sparse_categorical_crossentropy",
}
"""What every network of the search has in common."""


@dataclass(frozen=True)
class Space:
    """What each hyperparameter may be."""

    hidden_units: Parameter
    dropout_rate: Parameter
    learning_rate: Parameter

    def suggest(self, trial: Suggests) -> Hyperparameters:
        """Let `trial` choose every hyperparameter."""
        return Hyperparameters(
            hidden_units=int(self.hidden_units.suggest(trial, "hidden_units")),
            dropout_rate=float(self.dropout_rate.suggest(trial, "dropout_rate")),
            learning_rate=float(self.learning_rate.suggest(trial, "learning_rate")),
        )

    def as_dict(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in DOMAINS}

    def __contains__(self, hyperparameters: Hyperparameters) -> bool:
        values = hyperparameters.as_dict()
        return all(values[name] in parameter for name, parameter in self.as_dict().items())

    def grid(self) -> list[Hyperparameters]:
        """Every combination, the reference first where it is one of them.

        Raises ValueError where a parameter is a range.
        """
        for name, parameter in self.as_dict().items():
            if isinstance(parameter, Range):
                raise ValueError(
                    f"a grid takes lists and values only, but {name} is the range {parameter}"
                )
        choices = [cast(Choice, parameter).values for parameter in self.as_dict().values()]
        points = [
            Hyperparameters(int(units), float(dropout), float(rate))
            for units, dropout, rate in itertools.product(*choices)
        ]
        return sorted(points, key=lambda point: point != REFERENCE)


def parse(name: str, text: str) -> Parameter:
    """Read `text`, in the notation above, as the parameter `name`.

    Raises ValueError with the rule, the value and an example.
    """
    domain = DOMAINS[name]

    def fail(rule: str) -> ValueError:
        return ValueError(f"{rule}, but got {text!r}; for example {domain.example}")

    def number(word: str) -> Number:
        try:
            value = domain.kind(word)
        except ValueError:
            raise fail(f"must be {domain.rule} (a value, a list or a range)") from None
        if not domain.holds(value):
            raise fail(f"must be {domain.rule}")
        return value

    words = [word.strip() for word in text.split(":")]
    if len(words) == 1:
        values = tuple(number(word.strip()) for word in text.split(","))
        if len(set(values)) < len(values):
            raise fail("must not name a value twice")
        return Choice(values)
    if len(words) > 3 or "," in text:
        raise fail("must be a value, a list a,b,c or a range low:high, low:high:step, low:high:log")

    low, high = number(words[0]), number(words[1])
    if low >= high:
        raise fail("must be a range from low to high")
    if len(words) == 2:
        return Range(low, high)
    if words[2] == "log":
        if low <= 0:
            raise fail("must start above 0 on a log scale")
        return Range(low, high, log=True)
    try:
        step = domain.kind(words[2])
    except ValueError:
        raise fail("must end in a step or in log") from None
    if not 0 < step <= high - low or not _divides(step, high - low):
        raise fail("must have a step above 0 that divides the range")
    return Range(low, high, step=step)
