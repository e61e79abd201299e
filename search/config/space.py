"""The search space: which hyperparameters matter where, and how a trial samples them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from search.config.parameter import (
    Choice,
    Parameter,
    Range,
    Suggests,
    Value,
    is_fixed,
    only,
    text_of,
)


@dataclass(frozen=True)
class Condition:
    """A hyperparameter matters only where the one named `parent` has one of `values`."""

    parent: str
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{self.parent} {' or '.join(map(text_of, self.values))}"


@dataclass(frozen=True)
class Space:
    """What each hyperparameter may be, parents before the children that depend on them.

    asked: those that a trial is asked for in any case. The others are asked for only where they
    may be more than one thing or matter in some trials only: what is fixed for all needs no asking.
    start: the configuration to begin with, of those that have a usual value.
    """

    parameters: Mapping[str, Parameter]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    start: Mapping[str, Value] = field(default_factory=dict)

    def suggest(self, trial: Suggests) -> dict[str, Value]:
        """Let `trial` choose what is searched; returns that and what is fixed, where it matters."""
        tried: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if self._matters(name, tried):
                tried[name] = parameter.suggest(trial, name) if self.asks(name) else only(parameter)
        return tried

    def asks(self, name: str) -> bool:
        """Whether a trial is asked for `name`, where it matters."""
        return self.can_matter(name) and (
            name in self.asked
            or not is_fixed(self.parameters[name])
            or not self.always_matters(name)
        )

    def can_matter(self, name: str) -> bool:
        """Whether `name` matters in some trial."""
        condition = self.conditions.get(name)
        return condition is None or (
            self.can_matter(condition.parent)
            and any(value in self.parameters[condition.parent] for value in condition.values)
        )

    def always_matters(self, name: str) -> bool:
        """Whether `name` matters in every trial."""
        condition = self.conditions.get(name)
        if condition is None:
            return True
        parent = self.parameters[condition.parent]
        return (
            self.always_matters(condition.parent)
            and isinstance(parent, Choice)
            and all(value in condition.values for value in parent.values)
        )

    def _matters(self, name: str, tried: Mapping[str, Value]) -> bool:
        condition = self.conditions.get(name)
        return condition is None or tried.get(condition.parent) in condition.values

    def searched(self) -> dict[str, Parameter]:
        """What trials are asked for, by name."""
        return {name: p for name, p in self.parameters.items() if self.asks(name)}

    def fixed(self) -> dict[str, Value]:
        """What is the same for all trials and matters in all of them, by name."""
        return {
            name: only(parameter)
            for name, parameter in self.parameters.items()
            if self.always_matters(name) and not self.asks(name)
        }

    def is_conditional(self) -> bool:
        """Whether trials are asked for different things."""
        return not all(self.always_matters(name) for name in self.searched())

    def __contains__(self, params: Mapping[str, Value]) -> bool:
        """Whether a trial may have been asked for just `params`."""
        everything = {**self.fixed(), **params}
        wanted = [name for name in self.searched() if self._matters(name, everything)]
        return sorted(params) == sorted(wanted) and all(
            params[name] in self.parameters[name] for name in wanted
        )

    def reference(self) -> dict[str, Value] | None:
        """What a trial is asked for in the configuration to begin with; None: it is not in here.

        What is fixed stays as it is fixed.
        """
        tried: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if not self._matters(name, tried):
                continue
            if name in self.asked or not is_fixed(parameter):
                if name not in self.start or self.start[name] not in parameter:
                    return None
                tried[name] = self.start[name]
            else:
                tried[name] = only(parameter)
        return {name: value for name, value in tried.items() if self.asks(name)}

    def grid_size(self) -> int:
        """How many different things a trial may be asked for.

        Raises ValueError where a parameter is a range.
        """
        return self._grid.size

    def grid_point(self, index: int) -> dict[str, Value]:
        """One of the `grid_size` things that a trial may be asked for, the reference first.

        The others follow in the order of a product, the last parameter changing fastest.
        Raises ValueError where a parameter is a range.
        """
        first = self._grid_start
        if index == 0 and first is not None:
            return self._grid.point(first)
        return self._grid.point(index - 1 if first is not None and index <= first else index)

    @cached_property
    def _grid(self) -> "_Grid":
        choices: dict[str, tuple[Value, ...]] = {}
        for name, parameter in self.searched().items():
            if isinstance(parameter, Range):
                raise ValueError(
                    f"a grid takes lists and values only, but {name} is the range {parameter}"
                )
            choices[name] = parameter.values
        return _Grid(choices, self.conditions, self.fixed())

    @cached_property
    def _grid_start(self) -> int | None:
        reference = self.reference()
        return None if reference is None else self._grid.index(reference)


class _Grid:
    """All combinations of choices, by index: a number whose digits are the parameters' values.

    What a digit is worth depends on the digits before it, because some parameters matter only for
    some values of an earlier one. No combination is made until it is asked for.
    """

    def __init__(
        self,
        choices: Mapping[str, tuple[Value, ...]],
        conditions: Mapping[str, Condition],
        fixed: Mapping[str, Value],
    ) -> None:
        self._choices = choices
        self._children: dict[str, list[tuple[str, Condition]]] = {name: [] for name in choices}
        roots = []
        for name in choices:
            condition = conditions.get(name)
            if condition is not None and condition.parent in choices:
                self._children[condition.parent].append((name, condition))
            elif condition is None or fixed.get(condition.parent) in condition.values:
                roots.append(name)
        self._roots = frozenset(roots)
        self._below: dict[str, int] = {}  # combinations of a parameter and all that hang from it
        for name in reversed(list(choices)):  # children before their parents
            self._below[name] = sum(self._worth(name, value) for value in choices[name])
        self.size = math.prod(self._below[name] for name in roots)

    def _worth(self, name: str, value: Value) -> int:
        """How many combinations hang from `name` where it is `value`."""
        return math.prod(self._below[child] for child in self._matter(name, value))

    def _matter(self, name: str, value: Value) -> list[str]:
        return [child for child, condition in self._children[name] if value in condition.values]

    def _walk(self, choose: Callable[[str, list[int]], int]) -> dict[str, Value]:
        """A combination. `choose` picks a value of a parameter by its place.

        It gets the number of combinations that go on from each of the values.
        """
        point: dict[str, Value] = {}
        matter, left = set(self._roots), self.size
        for name, values in self._choices.items():
            if name in matter:
                left //= self._below[name]
                sizes = [left * self._worth(name, value) for value in values]
                chosen = choose(name, sizes)
                point[name] = values[chosen]
                matter.update(self._matter(name, values[chosen]))
                left = sizes[chosen]
        return point

    def point(self, index: int) -> dict[str, Value]:
        """The combination at `index`."""
        if not 0 <= index < self.size:
            raise IndexError(index)

        def choose(_: str, sizes: list[int]) -> int:
            nonlocal index
            for place, size in enumerate(sizes):
                if index < size:
                    return place
                index -= size
            raise AssertionError("the sizes add up to what is left")

        return self._walk(choose)

    def index(self, point: Mapping[str, Value]) -> int:
        """Where the combination `point` is."""
        found = 0

        def choose(name: str, sizes: list[int]) -> int:
            nonlocal found
            place = self._choices[name].index(point[name])
            found += sum(sizes[:place])
            return place

        self._walk(choose)
        return found
