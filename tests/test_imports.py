"""The architecture, read from the sources: what each module may import, and what loads at once."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command, start_anew

from search import config

PACKAGE = ROOT / "search"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
HEAVY = {"tensorflow", "keras", "mlflow", "optuna", "numpy"}
KERAS = {"keras", "tensorflow"}


@dataclass(frozen=True)
class Import:
    """One imported name, as `search.data` or `optuna.trial.TrialState`; `late`: in a function."""

    name: str
    late: bool

    @property
    def library(self) -> str:
        return self.name.split(".")[0]


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str) -> set[Import]:
    """What `module` imports when it runs; what only type checkers see is left out."""
    found = set()

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child, late)
            return
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, late) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found.update(Import(f"{node.module}.{alias.name}", late) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, late or inside)

    visit(tree(module), late=False)
    return found


def siblings(module: str, *, late: bool = True) -> set[str]:
    """The modules of the package that `module` imports."""
    own = {i for i in imports(module) if i.library == "search" and (late or not i.late)}
    names = {i.name.split(".")[1] for i in own}
    assert names <= {*MODULES, "run", "__version__"}
    return names & set(MODULES)


def importers(libraries: set[str], *, late: bool = True) -> set[str]:
    """The modules that import one of `libraries`."""
    return {
        module
        for module in MODULES
        if any(i.library in libraries and (late or not i.late) for i in imports(module))
    }


def test_the_sources_are_read() -> None:
    assert {"cli", "config", "pipeline", "training", "__init__"} <= set(MODULES)
    assert siblings("pipeline") >= {"data", "engine", "registry", "sampling", "storage"}
    assert Import("keras", late=True) in imports("registry") | imports("data")


LIGHT = {"config", "errors", "files", "imports", "options", "outcome", "own_model", "recipe"}
LIGHT |= {"parameter", "space", "urls"}


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_the_light_modules_know_nothing_of_the_rest(module: str) -> None:
    assert siblings(module) <= LIGHT
    assert {i.library for i in imports(module)} <= {*sys.stdlib_module_names, "search"}


TRAIN = {"data", "preprocessing", "model", "augmentation", "fused", "graph", "training"}


def test_only_the_modules_that_train_import_keras() -> None:
    assert importers(KERAS, late=False) <= TRAIN | {"trial"}
    assert importers(KERAS) <= TRAIN | {"trial", "registry"}


@pytest.mark.parametrize("module", sorted(TRAIN))
def test_the_modules_that_train_know_neither_ledger(module: str) -> None:
    assert not {i.library for i in imports(module)} & {"optuna", "optuna_integration", "mlflow"}
    assert siblings(module) <= TRAIN | {"config", "errors", "space", "recipe", "own_model"}


def test_only_the_modules_of_the_study_import_optuna() -> None:
    allowed = {"storage", "server", "sampling", "pipeline", "trial", "reconcile", "tracking"}
    allowed |= {"ranking", "reproduce", "outline", "tpe"}
    shown = {"overview", "presentation", "report", "display", "panel"}
    shown |= {"listener", "contract", "cli"}
    assert importers({"optuna", "optuna_integration"}) <= allowed | shown


def test_only_storage_builds_optunas_storages() -> None:
    def names(module: str) -> set[str]:
        nodes = list(ast.walk(tree(module)))
        return {node.id for node in nodes if isinstance(node, ast.Name)} | {
            node.attr for node in nodes if isinstance(node, ast.Attribute)
        }

    found = {module for module in MODULES if "RDBStorage" in names(module)}
    assert found == {"storage", "server", "outline"}  # the last one names it as a type


def test_only_the_modules_of_the_mirror_import_mlflow() -> None:
    mirror = {"address", "tracking", "registry", "promotion", "reconcile", "preload"}
    assert importers({"mlflow"}, late=False) <= mirror
    assert importers({"mlflow"}) <= {*mirror, "facts", "production", "environment"}


def test_the_command_line_imports_no_heavy_part_at_its_top() -> None:
    light = {"config", "files", "imports", "recipe", "signals", "urls"}
    assert siblings("cli", late=False) == light
    libraries = {i.library for i in imports("cli") if not i.late}
    assert libraries <= {*sys.stdlib_module_names, "typer", "search"}


def test_imports_form_no_cycle() -> None:
    graph = {module: siblings(module, late=False) - {"__init__"} for module in MODULES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_400_lines(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import search", HEAVY),
        ("import search.cli", HEAVY),
        ("import search.pipeline", KERAS),  # the main process leaves the training to its workers
    ],
)
def test_an_import_loads_nothing_that_it_does_not_need(
    statement: str, unwanted: set[str], tmp_path: Path
) -> None:
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "search" in loaded
    assert not loaded & unwanted


@pytest.mark.parametrize("verb", ["show", "doctor"])
def test_a_verb_loads_nothing_that_it_does_not_need(verb: str, finished: dict[str, Any]) -> None:
    code = (
        f"import sys; from search.cli import main; code = main([{verb!r}]); "
        "print(*sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=finished["folder"],
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "optuna" in loaded
    assert ("mlflow" in loaded) == (verb == "doctor")
    assert not loaded & {*KERAS, "sklearn", "pandas", "matplotlib", "plotly"}


def test_help_names_every_option(tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "--help", by=start_anew)
    assert (code, err) == (0, "")
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", out))
    assert {config.flag(name) for name in config.options()} | {"--config", "--help"} <= shown
    assert list(tmp_path.iterdir()) == []
