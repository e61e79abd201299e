"""The search space of one hyperparameter, and the notation that its option takes:

0.2                 a fixed value
128,256,512,1024    a list of choices
0.0:0.5             a range, both ends included
1e-4:1e-2:log       a range, sampled on a logarithmic scale
64:1024:64          a range with a step
relu,gelu           words: a value or a list
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from search.errors import nearest

Number = int | float
Value = Number | str  # bool is an int


def text_of(value: Value) -> str:
    """`value` in the notation. Stored settings are compared by it, so it must not change."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    text = f"{value:.12g}"
    return str(value) if isinstance(value, int) and float(text) != value else text


def in_notation(value: Any) -> Any:
    """A list, a number, True or False in the notation; any other value unchanged."""

    def text(item: Any) -> str:
        return str(item).lower() if isinstance(item, bool) else str(item)

    if isinstance(value, list | tuple):
        return ",".join(map(text, value))
    return text(value) if isinstance(value, int | float) else value


@dataclass(frozen=True)
class Choice:
    """One of `values`; with a single value, the hyperparameter is fixed."""

    values: tuple[Value, ...]

    def suggest(self, trial: Any, name: str) -> Value:
        """Suggest a value for `trial`."""
        return cast(Value, trial.suggest_categorical(name, self.values))

    def __contains__(self, value: Value) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(map(text_of, self.values))


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included, or those in steps of `step`."""

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    def suggest(self, trial: Any, name: str) -> Number:
        """Suggest a value for `trial`: an integer if both ends are integers, else a float."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = 1 if self.step is None else int(self.step)
            return cast(int, trial.suggest_int(name, self.low, self.high, step=step, log=self.log))
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return cast(float, value)

    def __contains__(self, value: Value) -> bool:
        if isinstance(value, str) or not self.low <= value <= self.high:
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


def is_fixed(parameter: Parameter) -> bool:
    """Whether it has a single value."""
    return isinstance(parameter, Choice) and len(parameter.values) == 1


def only(parameter: Parameter) -> Value:
    """The value of a fixed parameter."""
    return cast(Choice, parameter).values[0]


# ---- reading the notation ----------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """All valid values of a hyperparameter, of which the user searches a part.

    kind: the type of its numbers, None if it has none. rule: the valid values in words. holds:
    whether a number is valid. words: the values that are written as words.
    """

    kind: type[int] | type[float] | None
    rule: str
    example: str
    holds: Callable[[Number], bool] = lambda value: math.isfinite(value)
    words: Mapping[str, Value] = field(default_factory=dict)


def words(*names: str) -> Domain:
    """The domain of a hyperparameter that is one of these words."""
    rule = f"one of {', '.join(names)}"
    return Domain(None, rule, ",".join(names[:2]), words={name: name for name in names})


SWITCH = Domain(None, "true or false", "true,false", words={"false": False, "true": True})


def parse(domain: Domain, text: str) -> Parameter:
    """Read `text` in the notation. Raises ValueError with the rule, the value and an example."""
    return _Notation(domain, text).parameter()


@dataclass(frozen=True)
class _Notation:
    """`text`, which is to name values of `domain`."""

    domain: Domain
    text: str

    def parameter(self) -> Parameter:
        words = [word.strip() for word in self.text.split(":")]
        if len(words) == 1 or self.domain.kind is None:
            values = tuple(self.value(word.strip()) for word in self.text.split(","))
            if len(set(values)) < len(values):
                raise self.error("must not name a value twice")
            return Choice(values)
        if len(words) > 3 or "," in self.text:
            raise self.error(
                "must be a value, a list a,b,c or a range low:high, low:high:step, low:high:log"
            )
        return self.range(*words)

    def range(self, first: str, last: str, step_or_log: str | None = None) -> Range:
        low, high = self.number(first), self.number(last)
        if low >= high:
            raise self.error("must be a range from low to high")
        if step_or_log is None:
            return Range(low, high)
        if step_or_log == "log":
            if low <= 0:
                raise self.error("must start above 0 on a log scale")
            return Range(low, high, log=True)
        assert self.domain.kind is not None
        try:
            step = self.domain.kind(step_or_log)
        except ValueError:
            raise self.error("must end in a step or in log") from None
        if not 0 < step <= high - low or not _divides(step, high - low):
            raise self.error("must have a step above 0 that divides the range")
        return Range(low, high, step=step)

    def value(self, word: str) -> Value:
        if word in self.domain.words:
            return self.domain.words[word]
        remedy = nearest(word, self.domain.words)
        if self.domain.kind is None:
            raise self.error(f"must be {self.domain.rule} (a value or a list)", remedy)
        return self.number(word, remedy)

    def number(self, word: str, near: str = "") -> Number:
        assert self.domain.kind is not None
        try:
            value = self.domain.kind(word)
        except ValueError:
            raise self.error(
                f"must be {self.domain.rule} (a value, a list or a range)", near
            ) from None
        if not self.domain.holds(value):
            raise self.error(f"must be {self.domain.rule}")
        return value

    def error(self, rule: str, near: str = "") -> ValueError:
        found = f"{self.text!r}, {near}" if near else repr(self.text)
        return ValueError(f"{rule}, but got {found}; for example {self.domain.example}")
