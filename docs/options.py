"""Write options.md, beside this file, from the settings in the code: python docs/options.py"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import typer

from search.cli import app
from search.config.hyperparameters import HYPERPARAMETERS
from search.config.options import Option, flag
from search.config.settings import StudyConfig, options

PAGE = Path(__file__).with_suffix(".md")
DEFAULTS = {setting.name: setting.default for setting in fields(StudyConfig)}
HEAD = """\
<!-- Written by `python docs/options.py`; change the code, not this page. -->
# Options

    python study.py --n-trials 20 --epochs 3
    python study.py --help

A setting on the command line wins over the environment variable, which wins over the file given
with `--config`, which wins over the `--preset`. The file is TOML, with the options' names as keys:

```toml
n-trials = 100
hidden-units = [256, 512]
dropout-rate = "0.1:0.4"
```

Options of the search space take a value (`0.2`: fixed), a list (`128,256,512`: one of these), a
range (`0.0:0.5`), a range with a step (`64:1024:64`) or on a logarithmic scale (`1e-4:1e-2:log`).
[The search space](search-space.md) says what each hyperparameter does.

A value that cannot be used is refused in one line, with exit code 2, before anything is created.
"""
VERBS = """
## Verbs

Without a verb, the study is run; only then `--quiet` may be given, which prints nothing but the
summary. The other verbs take the options that say which study is meant, after the verb:

    python study.py show --study-name mine

| verb | own options | what it does |
|---|---|---|
"""


def page() -> str:
    """The page as Markdown."""
    return HEAD + "".join(f"\n## {group}\n\n{table}" for group, table in tables()) + verbs()


def tables() -> Iterator[tuple[str, str]]:
    """A title and a table for each group of options, in the order of the settings."""
    groups = dict.fromkeys(option.group for option in options().values())
    for group in groups:
        rows = ["| option | default | may be | meaning |", "|---|---|---|---|"]
        rows += [row(name, option) for name, option in options().items() if option.group == group]
        yield group.partition(":")[0], "\n".join(rows) + "\n"


def row(name: str, option: Option) -> str:
    """One line of a table."""
    shown = option.none if DEFAULTS[name] is None else DEFAULTS[name]
    help_text = option.help + (f" Environment: `{option.env}`." if option.env else "")
    return f"| `{flag(name)}` | {shown} | {allowed(name, option)} | {help_text} |"


def allowed(name: str, option: Option) -> str:
    """What the setting `name` may be, in words."""
    words = [] if DEFAULTS[name] is not None else [option.none]
    if name in HYPERPARAMETERS:
        known = HYPERPARAMETERS[name]
        only = f"; only with {known.condition}" if known.condition else ""
        return f"{known.domain.rule}{only}"
    if option.choices:
        return ", ".join([*words, *option.choices])
    if option.rule:
        words.append(option.rule)
    elif option.below is not None:
        words.append(f"between {option.low:g} and {option.below:g}")
    elif option.high is not None:
        words.append(f"{option.low:g} to {option.high:.10g}")
    elif option.low is not None:
        words.append(f"{option.low:g} or more")
    else:
        placeholder = option.metavar.replace("|", " or ")
        words.append(option.example if "://" in option.example else placeholder)
    return " or ".join(words)


def verbs() -> str:
    """The table of verbs, as the command line describes them."""
    lines = []
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        own = [p for p in verb.params if p.name not in {*options(), "help", "preset", "config"}]
        shown = ", ".join(f"`{p.opts[0]}`: {p.help}" for p in own)
        lines.append(f"| `{name}` | {shown} | {' '.join(verb.help.split())} |\n")
    return VERBS + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
