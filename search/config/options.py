"""What a setting may be: its type and rule, and the error for a value that breaks the rule."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from search.errors import InputError, nearest


@dataclass(frozen=True)
class Option:
    """One setting, as the command line, the settings file and docs/options.md describe it.

    kind: int, float or str. A setting whose default is None may be left open: `none` is the word
    for that, and `example` one of its other values. low, high: the ends of the allowed range;
    below: with low, an open interval instead. choices, pattern: the allowed texts; rule: the
    pattern in words. env: its environment variable. metavar: its value's placeholder in --help.
    """

    group: str
    help: str
    default: Any
    kind: type
    metavar: str = "N"
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    rule: str = ""
    env: str = ""
    none: str = "none"
    example: str = "2"

    def parse(self, text: str) -> Any:
        """The value that a text from the command line, a file or the environment stands for."""
        if self.default is None and text == self.none:
            return None
        try:
            return self.kind(text)
        except ValueError:
            return text  # `check` raises and names the rule

    def check(self, name: str, value: Any) -> None:
        """Raise InputError if `value` is not allowed for the setting `name`."""
        if value is None and self.default is None:
            return
        accepted = (int, float) if self.kind is float else (self.kind,)
        if isinstance(value, accepted) and not isinstance(value, bool) and self._allows(value):
            return
        example = self.example if self.default is None else self.default
        remedy = f"for example {flag(name)} {example}"
        if isinstance(value, str):
            remedy = nearest(value, self.choices, remedy)
        raise InputError(f"{flag(name)} must be {self._rule()}", f"got {value!r}", remedy)

    def _allows(self, value: Any) -> bool:
        if isinstance(value, str):
            return (
                value.strip() != ""
                and "\0" not in value
                and (not self.choices or value in self.choices)
                and (not self.pattern or re.fullmatch(self.pattern, value) is not None)
            )
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.below is None or self.low is None or self.low < value < self.below)
        )

    def _rule(self) -> str:
        if self.choices:
            words = self.choices if self.none == "none" else (self.none, *self.choices)
            return "one of " + ", ".join(words)
        if self.pattern:
            return self.rule
        if self.kind is str:
            return "text, not empty"
        noun = "a whole number" if self.kind is int else "a number"
        if self.none != "none":
            noun = f"{self.none} or {noun}"
        if self.below is not None:
            return f"{noun} between {self.low:g} and {self.below:g}"
        if self.high is not None:
            return f"{noun} from {self.low:g} to {self.high:.10g}"
        return f"{noun}, {self.low:g} or more"


def flag(name: str) -> str:
    """The command-line option of the setting `name`: n_trials -> --n-trials."""
    return "--" + name.replace("_", "-")


def setting(group: str, default: Any, help: str, kind: type | None = None, **rules: Any) -> Any:
    """A setting in a panel of --help; kind: its type where the default is None, if not str."""
    kind = kind or (str if default is None else type(default))
    return field(default=default, metadata={"option": Option(group, help, default, kind, **rules)})


def name_setting(group: str, default: str, help: str) -> Any:
    """A setting that becomes part of file names; MLflow stores up to 256 characters."""
    rule = "letters, digits, '.', '_' and '-' only, at most 200, and no folder's name"
    pattern = r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,200}"
    return setting(group, default, help, metavar="NAME", pattern=pattern, rule=rule)


def page_setting(group: str, what: str, env: str) -> Any:
    """Where a browser finds a server that this process knows by another address, or not at all."""
    return setting(
        group,
        None,
        f"Address of {what} in a reader's browser: what a run prints and notes as where to look.",
        metavar="URL",
        pattern=r"https?://[^\s/@]+(/\S*)?",
        rule="an address of a browser, http(s)://HOST, without a user's name or password",
        env=env,
        example="http://localhost:5000",
    )
