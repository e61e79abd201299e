"""What a setting may be: the rule, and the one line for a value that breaks it."""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """What the command line, the settings file and docs/options.md say of a setting.

    low, high: the ends of the allowed range; below: with low, an open interval instead.
    choices, pattern: what a text may be; rule: the pattern in words. env: the environment's
    variable for it. none: the word for None, of a setting that may be None, and example: one of
    its other values.
    """

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    rule: str = ""
    env: str = ""
    none: str = "none"
    example: str = "2"


def flag(name: str) -> str:
    """The command line's word for the setting `name`."""
    return "--" + name.replace("_", "-")


def refusal(name: str, option: Option, kind: type, value: Any, default: Any) -> str | None:
    """What is wrong with `value` of the setting `name`, if anything.

    kind: int, float or str. default: the setting's own, which serves as an example.
    """
    if value is None and default is None:
        return None
    remedy = f"; for example {flag(name)} {option.example if default is None else default}"
    if isinstance(value, str) and option.choices:
        near = difflib.get_close_matches(value, option.choices, n=1)
        remedy = f"; did you mean {near[0]}?" if near else remedy
    accepted = (int, float) if kind is float else (kind,)
    fits = isinstance(value, accepted) and not isinstance(value, bool)
    if fits and _holds(value, option):
        return None
    return f"{flag(name)} must be {_rule(option, kind)}, but got {value!r}{remedy}"


def _holds(value: Any, option: Option) -> bool:
    if isinstance(value, str):
        return (
            value.strip() != ""
            and "\0" not in value
            and (not option.choices or value in option.choices)
            and (not option.pattern or re.fullmatch(option.pattern, value) is not None)
        )
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (option.low is None or value >= option.low)
        and (option.high is None or value <= option.high)
        and (option.below is None or option.low is None or option.low < value < option.below)
    )


def _rule(option: Option, kind: type) -> str:
    if option.choices:
        words = option.choices if option.none == "none" else (option.none, *option.choices)
        return "one of " + ", ".join(words)
    if option.pattern:
        return option.rule
    if kind is str:
        return "text, not empty"
    noun = "a whole number" if kind is int else "a number"
    if option.none != "none":
        noun = f"{option.none} or {noun}"
    if option.below is not None:
        return f"{noun} between {option.low:g} and {option.below:g}"
    if option.high is not None:
        return f"{noun} from {option.low:g} to {option.high:.10g}"
    return f"{noun}, {option.low:g} or more"
