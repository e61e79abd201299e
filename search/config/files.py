"""Settings in TOML files: the user's own, and the presets that come with the package."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from search.config.hyperparameters import HYPERPARAMETERS
from search.config.settings import from_text, in_notation, options
from search.errors import InputError, one_line

_PRESETS = Path(__file__).parent / "presets"


def read_file(path: str) -> dict[str, Any]:
    """The settings in a TOML file, its keys the options' names with - or _.

    A list is read as the list notation, a number as a fixed hyperparameter. Raises InputError.
    """
    try:
        loaded = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--config must name a readable TOML file, but {path!r} is not: {error.strerror}; "
            "check the path"
        ) from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits
        raise InputError(
            f"--config must name a TOML file, but {path!r} is not: {one_line(error)}; "
            "write lines like n-trials = 50"
        ) from None
    known = options()
    settings = {}
    for key, value in loaded.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0].replace("_", "-")
            remedy = f"did you mean {near}?"
            if name in ("preset", "config"):
                remedy = f"give --{name} on the command line"
            raise InputError(
                f"--config {path}: every key must be a setting's name, but got {key!r}; {remedy}"
            )
        if name in HYPERPARAMETERS:
            value = in_notation(value)
        settings[name] = from_text(name, value) if isinstance(value, str) else value
    return settings


def presets() -> dict[str, str]:
    """The presets by name, each with the line that says what it is for."""
    files = sorted(_PRESETS.glob("*.toml"))
    return {f.stem: f.read_text(encoding="utf-8").split("\n")[0].strip("# ") for f in files}


def read_preset(name: str) -> dict[str, Any]:
    """The settings of the preset `name`. Raises InputError."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "look with python study.py presets"
        raise InputError(f"--preset must be one of {', '.join(known)}, but got {name!r}; {remedy}")
    return read_file(str(_PRESETS / f"{name}.toml"))
