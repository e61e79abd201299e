"""Settings from the command line, the environment, TOML files and presets."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.config.hyperparameters import HYPERPARAMETERS
from search.config.options import flag
from search.config.parameter import in_notation
from search.config.settings import StudyConfig, options
from search.errors import InputError, nearest, one_line

_PRESETS = Path(__file__).parent / "presets"


def read_file(path: str) -> dict[str, Any]:
    """The settings in a TOML file, its keys the options' names with - or _.

    A list is read as the list notation, a number as a fixed hyperparameter. Raises InputError.
    """
    try:
        loaded = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "--config must name a readable TOML file",
            f"{path!r} is not: {error.strerror}",
            "check the path",
        ) from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits
        raise InputError(
            "--config must name a TOML file",
            f"{path!r} is not: {one_line(error)}",
            "write lines like n-trials = 50",
        ) from None
    known = options()
    settings = {}
    for key, value in loaded.items():
        name = key.replace("-", "_")
        if name not in known:
            remedy = nearest(name, known, cutoff=0).replace("_", "-")
            if name in ("preset", "config"):
                remedy = f"give --{name} on the command line"
            rule = f"--config {path}: every key must be a setting's name"
            raise InputError(rule, f"got {key!r}", remedy)
        if name in HYPERPARAMETERS:
            value = in_notation(value)
        settings[name] = known[name].parse(value) if isinstance(value, str) else value
    return settings


def presets() -> dict[str, str]:
    """The presets by name, each with its one-line description."""
    files = sorted(_PRESETS.glob("*.toml"))
    return {f.stem: f.read_text(encoding="utf-8").split("\n")[0].strip("# ") for f in files}


def read_preset(name: str) -> dict[str, Any]:
    """The settings of the preset `name`. Raises InputError."""
    known = presets()
    if name not in known:
        remedy = nearest(name, known, "list them with python study.py presets")
        raise InputError(f"--preset must be one of {', '.join(known)}", f"got {name!r}", remedy)
    return read_file(str(_PRESETS / f"{name}.toml"))


def build_config(given: Mapping[str, str | None]) -> StudyConfig:
    """The settings. The command line takes precedence over environment, file, preset and defaults.

    given: the texts on the command line by setting, and its `preset` and `config`.
    Raises InputError, also for a hyperparameter on the command line that would have no effect.
    """
    preset, file = given.get("preset"), given.get("config")
    values: dict[str, Any] = {} if preset is None else read_preset(preset)
    values.update({} if file is None else read_file(file))
    for name, option in options().items():
        text = given.get(name)
        if text is None and option.env:
            text = os.environ.get(option.env) or None
        if text is not None:
            values[name] = option.parse(text)
    if "model" not in given:  # a verb, which does not need it; importing it takes time
        values.pop("model", None)
    config = StudyConfig(**values)
    for name in HYPERPARAMETERS:
        if given.get(name) is not None:
            _check_matters(name, config)
    return config


def _check_matters(name: str, config: StudyConfig) -> None:
    space = config.space
    if name not in space.parameters or (config.model and HYPERPARAMETERS[name].network):
        raise InputError(
            f"{flag(name)} must be left out with --model, whose network has only what its "
            f"SPACE declares, but got {getattr(config, name)!r}; declare it there"
        )
    if not space.can_matter(name):
        condition = space.conditions[name]
        raise InputError(
            f"{flag(name)} matters only with {condition}, but got "
            f"{getattr(config, name)!r} and {condition.parent} "
            f"{space.parameters[condition.parent]}; give "
            f"{flag(condition.parent)} {condition.values[-1]}, too"
        )
