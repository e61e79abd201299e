"""The architecture: contracts on what may import what, and what loads at once."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PACKAGE = ROOT / "search"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
HEAVY = {"tensorflow", "keras", "mlflow", "optuna", "numpy"}
KERAS = {"keras", "tensorflow"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml on the package in `folder`."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )


def test_the_contracts_on_imports_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_folders_are_there() -> None:
    names = ["config", "data", "promotion", "report", "study", "tracking", "training", "workers"]
    assert [folder.name for folder in FOLDERS] == names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_has_nine_modules_at_most(folder: Path) -> None:
    assert 1 < len(list(folder.glob("*.py"))) <= 9 + 1  # and __init__.py


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_300_lines(module: str) -> None:
    assert len((PACKAGE / module).read_text().splitlines()) <= 300


def test_only_the_study_builds_optunas_storages() -> None:
    def names(module: str) -> set[str]:
        nodes = list(ast.walk(ast.parse((PACKAGE / module).read_text())))
        return {node.id for node in nodes if isinstance(node, ast.Name)} | {
            node.attr for node in nodes if isinstance(node, ast.Attribute)
        }

    found = {module for module in MODULES if "RDBStorage" in names(module)}
    assert found == {"study/storage.py", "study/postgres.py", "study/outline.py"}


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
