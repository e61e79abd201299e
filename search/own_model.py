"""A network of the user's own, `--model MODULE:FUNCTION`, and the space declared beside it.

    SPACE = {"units": "32,64,128", "kernel": "3,5", "pooling": "max,average"}

    def build(hyperparameters, shape, classes):
        ...  # an uncompiled keras.Sequential or functional keras.Model

FUNCTION gets the hyperparameters by name, the shape of one example, such as (28, 28), and the
number of classes; its model takes examples of that shape and gives a probability for every class.
"""

import functools
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import InputError
from search.imports import silent_stderr
from search.parameter import SWITCH, Domain, Parameter, Value, parse, text_of
from search.recipe import HYPERPARAMETERS

NAME = r"(?!.*\.py:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
_TAKEN = {
    *(name for name, known in HYPERPARAMETERS.items() if not known.network),
    *("epochs", "seed", "validation_split", "dataset", "train_samples", "validation_samples"),
    *("test_samples", "num_classes", "trainable_parameters", "loss", "model", "grid"),
    *("experiment", "output_activation", "split", "normalize"),
}
"""What the ledgers or the options call something else."""


class ModelError(InputError):
    """The model can't be used here."""


@dataclass(frozen=True)
class OwnModel:
    """A function that makes networks, its search space, and the digest of its module's source."""

    name: str
    build: Callable[[dict[str, Value], tuple[int, ...], int], Any]
    space: dict[str, Parameter]
    digest: str

    @property
    def fingerprint(self) -> str:
        """Its name, and what tells one version of its source from another."""
        return f"{self.name} ({self.digest[:12]})"


@functools.cache
def load(name: str) -> OwnModel:
    """Import the model that `--model` names. Raises ModelError, in one line."""
    module_name, function_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: no namesake there shall hide a package
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for threads in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(threads, "1")  # its code may start TensorFlow before a worker does
    try:
        with silent_stderr():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever its code raises
        raise _refusal(
            name,
            f"a module that can be imported ({type(error).__name__}: {error})",
            "mend it, or run the command in its folder",
        ) from None
    build = getattr(module, function_name, None)
    if not callable(build):
        raise _refusal(
            name, f"a function, but {module_name} has no function {function_name}", "define it"
        )
    declared = getattr(module, "SPACE", None)
    if not isinstance(declared, dict):
        raise _refusal(
            name,
            f"a function beside its search space, but {module_name} has no SPACE",
            'declare it, for example SPACE = {"units": "32,64,128"}',
        )
    space = {key: _parameter(name, key, value) for key, value in declared.items()}
    source = Path(str(module.__file__)).read_bytes()
    return OwnModel(name, build, space, hashlib.sha256(source).hexdigest())


def check(name: str, fingerprint: str) -> None:
    """Raise ModelError where the model's source is no longer the one with this fingerprint."""
    found = load(name).fingerprint
    if found != fingerprint:
        raise ModelError(
            f"{name} must be the model of the study, {fingerprint}, but is now {found}; "
            "bring back its source as it was"
        )


def _parameter(model: str, name: Any, value: Any) -> Parameter:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w{0,99}", name) or name in _TAKEN:
        raise _refusal(
            model,
            f"a model whose SPACE has names that are free, but {name!r} is not",
            "give it another name",
        )
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str | int | float) for item in items):
        raise _refusal(
            model,
            f"a model whose SPACE holds texts, numbers or lists of them, but {name} is {value!r}",
            'write it in the notation, for example "32,64,128"',
        )
    text = ",".join(map(text_of, items))
    try:
        return parse(_domain(text), text)
    except ValueError as error:
        raise _refusal(model, f"a model whose SPACE is valid: {name} {error}", "mend it") from None


def _domain(text: str) -> Domain:
    """What kind of values `text` is about: whole numbers, numbers, true and false, or words."""
    words = [word.strip() for word in re.split("[,:]", text)]
    if ":" in text and words[-1] == "log":
        words.pop()
    for kind, rule, example in ((int, "whole numbers", "32,64"), (float, "numbers", "0.0:0.5")):
        try:
            for word in words:
                kind(word)
        except ValueError:
            continue
        return Domain(kind, rule, example)
    if set(words) <= set(SWITCH.words):
        return SWITCH
    named = {word: word for word in words if word}
    return Domain(None, "words or numbers, not both", "max,average", words=named)


def _refusal(name: str, rule: str, remedy: str) -> ModelError:
    return ModelError(f"--model must name {rule}, but got {name!r}; {remedy}")
