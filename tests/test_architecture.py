"""The architecture: contracts on what may import what, and what loads at once."""

import ast
import itertools
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
WAY = (  # from the command to the step that trains
    *("study.py", "search/cli.py", "search/pipeline.py", "search/workers/trial.py"),
    *("search/training/train.py", "search/training/epoch.py"),
)


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


def test_on_the_way_to_the_step_that_trains_each_file_imports_the_next() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    _, described = page.split("From the command to the step that trains", 1)
    places = [described.index(f"`{file.removeprefix('search/')}") for file in WAY]
    assert places == sorted(places)
    for here, there in itertools.pairwise(WAY):
        imports = [
            f"{node.module}.{name.name}"
            for node in ast.walk(ast.parse((ROOT / here).read_text()))
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        ]
        module = there.removesuffix(".py").replace("/", ".")
        assert any(f"{imported}.".startswith(f"{module}.") for imported in imports), (here, there)


STAGES = """
import json, sys

loaded = {}

def note(stage):
    loaded[stage] = sorted({name.split(".")[0] for name in sys.modules})

import search; note("search")
import search.cli; note("cli")
assert search.cli.main(["show"]) == 0; note("show")
assert search.cli.main(["doctor"]) == 0; note("doctor")
import search.pipeline; note("pipeline")
json.dump(loaded, open(sys.argv[1], "w"))
"""


def test_what_is_imported_and_the_verbs_load_nothing_that_they_do_not_need(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    """One after the other in a new process, so that each finds what those before it loaded."""
    subprocess.run(
        [sys.executable, "-c", STAGES, str(tmp_path / "loaded.json")],
        capture_output=True,
        check=True,
        cwd=finished["folder"],
    )
    loaded = {k: set(v) for k, v in json.loads((tmp_path / "loaded.json").read_text()).items()}
    assert "search" in loaded["search"]
    assert not loaded["search"] & HEAVY
    assert not loaded["cli"] & HEAVY
    assert "optuna" in loaded["show"]
    assert "mlflow" not in loaded["show"]
    assert "mlflow" in loaded["doctor"]
    assert not loaded["doctor"] & {*KERAS, "sklearn", "pandas", "matplotlib", "plotly"}
    assert not loaded["pipeline"] & KERAS  # the main process leaves the training to its workers
