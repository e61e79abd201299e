"""Settings files and presets: how they are read, and what wins over them."""

from pathlib import Path
from typing import Any

import pytest

from search import cli
from search.config import files
from search.config.hyperparameters import HYPERPARAMETERS, REFERENCE
from search.config.parameter import is_fixed
from search.config.settings import StudyConfig
from search.errors import InputError

FILE = 'n-trials = 11\nstorage = "sqlite:///file.db"\nseed = 3\nhidden-units = [8, 16]\n'


@pytest.fixture
def file(in_folder: Path) -> str:
    (in_folder / "study.toml").write_text(FILE)
    return "study.toml"


def test_the_command_line_wins_over_the_environment_the_file_and_the_default(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, str | None] = {"storage": "sqlite:///given.db"}
    assert files.build_config({}).storage == "sqlite:///study.db"
    assert files.build_config({"config": file}).storage == "sqlite:///file.db"
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///environment.db")
    assert files.build_config({"config": file}).storage == "sqlite:///environment.db"
    assert files.build_config({"config": file, **given}).storage == "sqlite:///given.db"


def test_an_empty_environment_variable_is_ignored(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "")
    assert files.build_config({"config": file}).storage == "sqlite:///file.db"


def test_the_file_gives_what_the_command_line_does_not(file: str) -> None:
    config = files.build_config({"config": file, "n_trials": "7", "workers": "auto"})
    assert (config.n_trials, config.seed, config.workers) == (7, 3, None)
    assert str(config.space.parameters["hidden_units"]) == "8,16"


def test_a_preset_is_overruled_by_the_file_and_both_by_the_command_line(file: str) -> None:
    config = files.build_config({"preset": "cnn"})
    assert (config.study_name, config.n_trials, config.hidden_units) == ("mnist-cnn", 10, "128,256")
    config = files.build_config({"preset": "cnn", "config": file, "n_trials": "3"})
    assert (config.study_name, config.n_trials, config.hidden_units) == ("mnist-cnn", 3, "8,16")
    assert config.space.fixed()["architecture"] == "cnn"


@pytest.mark.parametrize("name", files.presets())
def test_every_preset_is_valid_and_has_a_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = files.build_config({"preset": name})
    names = {"default": "mnist-dnn", "table": "table"}
    assert config.study_name == names.get(name, f"mnist-{name}")
    assert cli.main(["presets"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name]
    assert len(line.split()) > 5


def test_the_default_preset_is_what_the_command_does_without_one() -> None:
    assert files.build_config({"preset": "default"}) == StudyConfig()


def test_the_grid_preset_is_the_classic_table() -> None:
    space = files.build_config({"preset": "grid"}).space
    grid = [space.grid_point(index) for index in range(space.grid_size())]
    assert {(p["hidden_units"], p["dropout_rate"]) for p in grid} == {
        (units, dropout) for units in (128, 256, 512, 1024) for dropout in (0.1, 0.2, 0.3, 0.5)
    }
    assert len(grid) == 16
    assert {p["learning_rate"] for p in grid} == {0.001}
    assert grid[0] == REFERENCE


def test_the_wide_preset_searches_everything_of_a_dense_network() -> None:
    config = files.build_config({"preset": "wide"})
    opened = {name for name, known in config.space.searched().items() if not is_fixed(known)}
    of_a_cnn = {"architecture", "conv_blocks", "filters"}
    assert set(HYPERPARAMETERS) - opened - of_a_cnn == {"early_stopping"}
    assert config.space.reference() is not None


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return files.read_file(str(path))


def test_a_file_gives_settings_with_either_spelling_of_a_key(tmp_path: Path) -> None:
    assert read(tmp_path, 'n-trials = 7\nbatch_size = 64\nstudy-name = "a"\n') == {
        "n_trials": 7,
        "batch_size": "64",
        "study_name": "a",
    }


def test_a_file_may_write_hyperparameters_as_lists_numbers_or_text(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        'hidden-units = [64, 128]\ndropout-rate = 0.2\nlearning-rate = "1e-4:1e-2:log"\n'
        'batch-normalization = [false, true]\nactivation = ["relu", "gelu"]\n',
    )
    assert settings == {
        "hidden_units": "64,128",
        "dropout_rate": "0.2",
        "learning_rate": "1e-4:1e-2:log",
        "batch_normalization": "false,true",
        "activation": "relu,gelu",
    }
    StudyConfig(**settings)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("key", "near"),
    [("n-trails", "n-trials"), ("batchsize", "batch-size"), ("learnig-rate", "learning-rate")],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, key: str, near: str) -> None:
    with pytest.raises(InputError) as refusal:
        read(tmp_path, f"{key} = 5\n")
    assert repr(key) in str(refusal.value)
    assert near in str(refusal.value)
