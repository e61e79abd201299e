"""The search space: which hyperparameters exist, when they matter, and the grid of all choices."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from search.config.parameter import (
    Choice,
    Parameter,
    Range,
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
    """The space of each hyperparameter, parents before the children that depend on them.

    always: hyperparameters that are suggested, and so recorded, even if they are fixed. The others
    are suggested only if they have several values or matter in some trials only.
    start: the values of the first trial, for hyperparameters that have a usual value.
    """

    parameters: Mapping[str, Parameter]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    start: Mapping[str, Value] = field(default_factory=dict)

    def suggest(self, trial: Any) -> dict[str, Value]:
        """All hyperparameters that matter in `trial`: those it suggests, and the fixed ones."""
        values: dict[str, Value] = {}
        for name, p in self.parameters.items():
            if self._matters(name, values):
                values[name] = p.suggest(trial, name) if self.suggests(name) else only(p)
        return values

    def suggests(self, name: str) -> bool:
        """Whether trials in which `name` matters suggest a value for it."""
        return self.can_matter(name) and (
            name in self.always
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

    def _matters(self, name: str, values: Mapping[str, Value]) -> bool:
        condition = self.conditions.get(name)
        return condition is None or values.get(condition.parent) in condition.values

    def searched(self) -> dict[str, Parameter]:
        """The spaces of the hyperparameters that trials suggest, by name."""
        return {name: p for name, p in self.parameters.items() if self.suggests(name)}

    def fixed(self) -> dict[str, Value]:
        """The values that are the same in all trials and matter in all of them, by name."""
        return {
            name: only(parameter)
            for name, parameter in self.parameters.items()
            if self.always_matters(name) and not self.suggests(name)
        }

    def is_conditional(self) -> bool:
        """Whether trials differ in the hyperparameters that they suggest."""
        return not all(self.always_matters(name) for name in self.searched())

    def __contains__(self, params: Mapping[str, Value]) -> bool:
        """Whether a trial can have exactly the parameters `params`."""
        everything = {**self.fixed(), **params}
        wanted = [name for name in self.searched() if self._matters(name, everything)]
        return sorted(params) == sorted(wanted) and all(
            params[name] in self.parameters[name] for name in wanted
        )

    def reference(self) -> dict[str, Value] | None:
        """The parameters of the first trial: `start`, as far as it is searched.

        None if one of its values is missing or outside the space.
        """
        values: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if not self._matters(name, values):
                continue
            if name in self.always or not is_fixed(parameter):
                if name not in self.start or self.start[name] not in parameter:
                    return None
                values[name] = self.start[name]
            else:
                values[name] = only(parameter)
        return {name: value for name, value in values.items() if self.suggests(name)}

    def grid_size(self) -> int:
        """The number of points of the grid. Raises ValueError if a parameter is a range."""
        return self._grid.size

    def grid_point(self, index: int) -> dict[str, Value]:
        """The parameters of point `index` of the grid; the reference, if it is in it, comes first.

        The others follow in the order of `itertools.product`, the last parameter changing fastest.
        Raises ValueError if a parameter is a range.
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

    The weight of a digit depends on the digits before it, because some parameters matter only for
    some values of an earlier one. Combinations are computed on demand.
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
        self._below: dict[str, int] = {}  # combinations of a parameter and its descendants
        for name in reversed(list(choices)):  # children before their parents
            self._below[name] = sum(self._combinations(name, value) for value in choices[name])
        self.size = math.prod(self._below[name] for name in roots)

    def _combinations(self, name: str, value: Value) -> int:
        """The number of combinations of the descendants of `name` when it is `value`."""
        return math.prod(self._below[child] for child in self._matter(name, value))

    def _matter(self, name: str, value: Value) -> list[str]:
        return [child for child, condition in self._children[name] if value in condition.values]

    def _walk(self, choose: Callable[[str, list[int]], int]) -> dict[str, Value]:
        """One combination. `choose` returns the position of a parameter's value.

        It gets the parameter's name and the number of combinations with each of its values.
        """
        point: dict[str, Value] = {}
        matter, left = set(self._roots), self.size
        for name, values in self._choices.items():
            if name in matter:
                left //= self._below[name]
                sizes = [left * self._combinations(name, value) for value in values]
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
            for position, size in enumerate(sizes):
                if index < size:
                    return position
                index -= size
            raise AssertionError("the sizes add up to what is left")

        return self._walk(choose)

    def index(self, point: Mapping[str, Value]) -> int:
        """The index of the combination `point`."""
        found = 0

        def choose(name: str, sizes: list[int]) -> int:
            nonlocal found
            position = self._choices[name].index(point[name])
            found += sum(sizes[:position])
            return position

        self._walk(choose)
        return found
