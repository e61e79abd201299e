"""The search space: which hyperparameters matter where, and how a trial samples them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from search.parameter import Choice, Parameter, Range, Suggests, Value, is_fixed, only, text_of


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

    def grid(self) -> list[dict[str, Value]]:
        """Everything that a trial may be asked for, the reference first where it is one of them.

        Raises ValueError where a parameter is a range.
        """
        points: list[dict[str, Value]] = [self.fixed()]
        for name, parameter in self.searched().items():
            if isinstance(parameter, Range):
                raise ValueError(
                    f"a grid takes lists and values only, but {name} is the range {parameter}"
                )
            points = list(_extended(points, name, parameter.values, self._matters))
        searched = self.searched()
        asked = [{k: v for k, v in point.items() if k in searched} for point in points]
        reference = self.reference()
        return sorted(asked, key=lambda point: point != reference)


def _extended(
    points: list[dict[str, Value]],
    name: str,
    values: tuple[Value, ...],
    matters: Callable[[str, Mapping[str, Value]], bool],
) -> Iterator[dict[str, Value]]:
    for point in points:
        if matters(name, point):
            yield from ({**point, name: value} for value in values)
        else:
            yield point
