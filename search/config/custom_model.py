"""A custom model, `--model MODULE:FUNCTION`, and the search space that its module declares.

    SPACE = {"units": "32,64,128", "kernel": "3,5", "pooling": "max,average"}

    def build(hyperparameters, shape, classes):
        ...  # an uncompiled keras.Sequential or functional keras.Model

FUNCTION gets the hyperparameters by name, the shape of one example, such as (28, 28), and the
number of classes or labels; its model takes examples of that shape and returns a probability for
each.
"""

import hashlib
import importlib.util
import linecache
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from search.config.hyperparameters import HYPERPARAMETERS
from search.config.parameter import SWITCH, Domain, Parameter, Value, parse, text_of
from search.errors import InputError, printable
from search.imports import prepare_tensorflow, silent_stderr

NAME = r"(?!.*\.py:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
_TAKEN = {  # names with another meaning in Optuna, in MLflow or as an option
    *(name for name, known in HYPERPARAMETERS.items() if not known.network),
    *("epochs", "seed", "validation_split", "dataset", "train_samples", "validation_samples"),
    *("test_samples", "num_classes", "trainable_parameters", "loss", "model", "grid"),
    *("experiment", "output_activation", "split", "normalize", "image_size", "test_split"),
}


class ModelError(InputError):
    """A function of the user's can't be used in this process, or is not the one of the run."""


@dataclass(frozen=True)
class Function:
    """A function of the user's, its module, and the module source's SHA-256 digest."""

    name: str
    call: Callable[..., Any]
    module: ModuleType
    digest: str

    @property
    def fingerprint(self) -> str:
        """Its name and the start of its digest: different for every version of the source."""
        return _fingerprint(self.name, self.digest)


@dataclass(frozen=True)
class CustomModel:
    """A function that builds networks, its search space, and its module source's SHA-256 digest."""

    name: str
    build: Callable[[dict[str, Value], tuple[int, ...], int], Any]
    space: dict[str, Parameter]
    digest: str

    @property
    def fingerprint(self) -> str:
        """As of a function."""
        return _fingerprint(self.name, self.digest)


_functions: dict[tuple[str, str], Function] = {}  # by name and digest
_loaded: dict[tuple[str, str], CustomModel] = {}  # by name and digest


def _fingerprint(name: str, digest: str) -> str:
    return f"{name} ({digest[:12]})"


def load(name: str) -> CustomModel:
    """The custom model `name`, from its present source. Raises ModelError, in one line."""
    found = load_function(name)
    key = name, found.digest
    if key not in _loaded:
        _loaded[key] = _checked(found)
    return _loaded[key]


def load_function(name: str, option: str = "--model") -> Function:
    """The function `name`, MODULE:FUNCTION, which `option` names, from its present source.

    Raises InputError, in one line; ModelError for a model.
    """
    module_name, function_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides a package
    prepare_tensorflow()  # which its code may start first
    before = sys.modules.get(module_name)
    try:
        with silent_stderr():
            spec = _find(module_name)
            source = Path(str(spec.origin)).read_bytes()
            key = name, hashlib.sha256(source).hexdigest()
            if key not in _functions:
                module = _run(spec, source)
                call = getattr(module, function_name, None)
                if not callable(call):
                    rule = f"a function, but {module_name} has no function {function_name}"
                    raise _refusal(name, rule, "define it", option)
                _functions[key] = Function(name, call, module, key[1])
    except (Exception, SystemExit) as error:  # anything that its code raises
        _restore(module_name, before)
        if isinstance(error, InputError):
            raise
        why = printable(" ".join(str(error).split()))
        raise _refusal(
            name,
            f"a module that can be imported ({type(error).__name__}: {why})",
            "fix it, or run the command in its folder",
            option,
        ) from None
    return _functions[key]


def same_function(name: str, digest: str, option: str) -> Function:
    """The function whose module's source has this digest, loaded already or from its source.

    Raises ModelError if the source is not there or another one.
    """
    if (name, digest) in _functions:
        return _functions[name, digest]
    try:
        found = load_function(name, option)
    except InputError as error:
        raise ModelError(str(error)) from None
    if found.digest != digest:
        expected = _fingerprint(name, digest)
        raise ModelError(
            f"{option} must be as it was when the run began, {expected}",
            f"is now {found.fingerprint}",
            "run the same command again",
        )
    return found


def find(name: str, fingerprint: str) -> CustomModel:
    """The model with this fingerprint: already loaded in this process, or from its present source.

    Raises ModelError if the source has another fingerprint.
    """
    for found in list(_loaded.values()):
        if found.fingerprint == fingerprint:
            return found
    return check(name, fingerprint)


def _find(name: str) -> ModuleSpec:
    """The module's spec, even if the module is already imported."""
    if name == "__main__":
        raise ImportError("__main__ is a script, not a module; write it in its own file")
    importlib.invalidate_caches()
    known = sys.modules.pop(name, None)
    try:
        spec = importlib.util.find_spec(name)
    finally:
        _restore(name, known)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    return spec


def _run(spec: ModuleSpec, source: bytes) -> ModuleType:
    """Import the module again, from exactly this source.

    Python's own import would return the module imported earlier in this process, or use stale
    bytecode if an edit kept the modification time, in seconds, and the size.
    """
    linecache.checkcache(str(spec.origin))  # TensorFlow reads the code of a lambda there
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if isinstance(spec.loader, SourceFileLoader):
        exec(spec.loader.source_to_code(source, str(spec.origin)), module.__dict__)
    elif spec.loader is not None:
        spec.loader.exec_module(module)
    package, _, last = spec.name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)
    return module


def _restore(name: str, module: ModuleType | None) -> None:
    sys.modules.pop(name, None)
    if module is not None:
        sys.modules[name] = module


def _checked(found: Function) -> CustomModel:
    declared = getattr(found.module, "SPACE", None)
    if not isinstance(declared, dict):
        raise _refusal(
            found.name,
            f"a function beside its search space, but {found.module.__name__} has no SPACE",
            'declare it, for example SPACE = {"units": "32,64,128"}',
        )
    space = {key: _parameter(found.name, key, value) for key, value in declared.items()}
    return CustomModel(found.name, found.call, space, found.digest)


def check(name: str, fingerprint: str) -> CustomModel:
    """The model from its present source. Raises ModelError if its fingerprint is another."""
    found = load(name)
    if found.fingerprint != fingerprint:
        raise ModelError(
            f"{name} must be the model of the study, {fingerprint}, but is now "
            f"{found.fingerprint}; restore its source"
        )
    return found


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
    words = [str(item) if type(item) is int else text_of(item) for item in items]
    text = ",".join(words)
    kinds = {kind for kind in (bool, int, float, str) for i in items if isinstance(i, kind)}
    domain = _NUMBERS if float in kinds <= {int, float} else _domain(text)  # 1.0 stays a float
    try:
        return parse(domain, text)
    except ValueError as error:
        raise _refusal(model, f"a model whose SPACE is valid: {name} {error}", "fix it") from None


_WHOLE_NUMBERS = Domain(int, "whole numbers", "32,64")
_NUMBERS = Domain(float, "numbers", "0.0:0.5")


def _domain(text: str) -> Domain:
    """The kind of the values in `text`: whole numbers, numbers, true and false, or words."""
    words = [word.strip() for word in re.split("[,:]", text)]
    if ":" in text and words[-1] == "log":
        words.pop()
    for domain, kind in ((_WHOLE_NUMBERS, int), (_NUMBERS, float)):
        try:
            for word in words:
                kind(word)
        except ValueError:
            continue
        return domain
    if set(words) <= set(SWITCH.words):
        return SWITCH
    named = {word: word for word in words if word}
    return Domain(None, "words or numbers, not both", "max,average", words=named)


def _refusal(name: str, rule: str, remedy: str, option: str = "--model") -> InputError:
    kind = ModelError if option == "--model" else InputError
    return kind(f"{option} must name {rule}", f"got {name!r}", remedy)
