"""The settings: checked when built, read from text and files, printed without secrets."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from search.config import files
from search.config.settings import StudyConfig, defaults, differences, options
from search.config.urls import same_database, sqlite_path
from search.errors import InputError, RunError, one_line, printable, redact

DIGEST = "mnist (0123456789ab)"


def test_the_defaults_are_valid() -> None:
    assert StudyConfig() == StudyConfig(**defaults())


def test_a_configuration_never_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StudyConfig().epochs = 3  # type: ignore[misc]


def test_the_two_errors_have_two_exit_codes() -> None:
    assert (InputError.exit_code, RunError.exit_code) == (2, 1)


@pytest.mark.parametrize("name", options())
def test_every_setting_says_what_it_is_for(name: str) -> None:
    option = options()[name]
    assert option.help.endswith(".")
    assert option.group


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"n_trials": 0}, "--n-trials must be a whole number"),
        ({"n_trials": 1.0}, "--n-trials must be a whole number"),
        ({"n_trials": True}, "--n-trials must be a whole number"),
        ({"n_trials": None}, "--n-trials must be a whole number"),
        ({"n_trials": "5"}, "--n-trials must be a whole number"),
        ({"epochs": -1}, "--epochs must be auto or a whole number"),
        ({"batch_size": 0}, "--batch-size must be whole numbers from 1 to 1000000000"),
        ({"seed": -1}, "--seed must be a whole number from 0 to 2147483647"),
        ({"seed": 2**31}, "--seed must be a whole number from 0 to 2147483647"),
        ({"timeout": -0.1}, "--timeout must be a number, 0 or more"),
        ({"timeout": float("nan")}, "--timeout must be a number, 0 or more"),
        ({"patience": 0}, "--patience must be a whole number"),
        ({"validation_split": 0.0}, "--validation-split must be a number between 0 and 1"),
        ({"validation_split": 1}, "--validation-split must be a number between 0 and 1"),
        ({"sampler": "TPE"}, "--sampler must be one of tpe, random, qmc, grid"),
        ({"pruner": ""}, "--pruner must be one of percentile, median, halving, hyperband, none"),
        ({"study_name": "a b"}, "--study-name must be letters, digits"),
        ({"study_name": "a\n"}, "--study-name must be letters, digits"),
        ({"dataset": " "}, "--dataset must be text, not empty"),
        ({"dataset": "a\0b"}, "--dataset must be text, not empty"),
        ({"storage": 3}, "--storage must be text, not empty"),
        ({"hidden_units": None}, "--hidden-units must be text, not empty"),
        ({"hidden_units": [64, 0]}, "--hidden-units must be whole numbers from 1 to 65536"),
        ({"model": "mine.build"}, "--model must be MODULE:FUNCTION"),
        ({"dropout_rate": "1"}, "--dropout-rate must be numbers from 0 to below 1"),
    ],
)
def test_a_value_outside_its_rule_is_refused(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError) as refusal:
        StudyConfig(**given)
    assert str(refusal.value).startswith(rule)
    assert "but got" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"n_trials": 1, "epochs": 1, "batch_size": 1, "seed": 0, "patience": 1, "timeout": 0},
        {"seed": 2**31 - 1},
        {"timeout": 1},
        {"timeout": None, "patience": None},
        {"validation_split": 0.999},
        {"study_name": "A-z_0.9"},
        {"sampler": "grid", "dropout_rate": "0.1,0.3", "learning_rate": "0.001"},
    ],
)
def test_the_ends_of_the_rules_are_allowed(given: dict[str, Any]) -> None:
    StudyConfig(**given)


def test_a_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean median"):
        StudyConfig(pruner="medain")


def test_a_grid_of_ranges_is_refused() -> None:
    with pytest.raises(InputError, match=r"--sampler grid: .*dropout_rate.*give lists"):
        StudyConfig(sampler="grid")


def test_the_space_is_what_the_options_describe() -> None:
    space = StudyConfig(hidden_units="64", dropout_rate="0:0.5", learning_rate="1e-3").space
    assert {name: str(parameter) for name, parameter in space.searched().items()} == {
        "hidden_units": "64",
        "dropout_rate": "0:0.5",
        "learning_rate": "0.001",
    }


def test_hyperparameters_may_be_given_as_python_values() -> None:
    given = StudyConfig(
        hidden_units=[64, 128],  # type: ignore[arg-type]
        dropout_rate=0.2,  # type: ignore[arg-type]
        batch_normalization=(False, True),  # type: ignore[arg-type]
    )
    assert given == StudyConfig(
        hidden_units="64,128", dropout_rate="0.2", batch_normalization="false,true"
    )


def fingerprint(**given: Any) -> dict[str, Any]:
    return StudyConfig(**given).settings(DIGEST)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_units": "128"},
        {"dropout_rate": "0.0:0.4"},
        {"learning_rate": "1e-4:1e-2"},
        {"validation_split": 0.2},
        {"epochs": 6},
        {"batch_size": 64},
        {"batch_size": "64,128"},
        {"hidden_layers": "1:3"},
        {"optimizer": "sgd"},
        {"early_stopping": 3},
        {"seed": 1},
    ],
)
def test_what_decides_a_trial_changes_the_fingerprint(changed: dict[str, Any]) -> None:
    assert len(differences(fingerprint(), fingerprint(**changed))) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"n_trials": 51},
        {"sampler": "random"},
        {"pruner": "none"},
        {"timeout": 60.0},
        {"patience": 3},
        {"hidden_units": "128, 256,512,1024"},
        {"learning_rate": "0.0001:0.01:log"},
        {"model_name": "other"},
        {"optimizer": "adam", "hidden_layers": 1, "early_stopping": "off"},
        {"filters": "8,16"},  # of a dense network
    ],
)
def test_what_may_change_leaves_the_fingerprint(changed: dict[str, Any]) -> None:
    assert fingerprint() == fingerprint(**changed)


def test_a_study_of_before_all_hyperparameters_were_searched_has_the_same_fingerprint() -> None:
    assert fingerprint() == {
        "hidden_units": "128,256,512,1024",
        "dropout_rate": "0:0.5",
        "learning_rate": "0.0001:0.01:log",
        "grid": False,
        "dataset": DIGEST,
        "experiment": "MNIST_Classification",
        "validation_split": 0.1,
        "epochs": 5,
        "batch_size": 128,
        "seed": 0,
    }


def test_a_grid_has_a_fingerprint_of_its_own() -> None:
    lists = {"dropout_rate": "0.1,0.3", "learning_rate": "0.001"}
    assert differences(fingerprint(**lists), fingerprint(sampler="grid", **lists)) == [
        "grid: False -> True"
    ]


def test_the_fingerprint_holds_the_dataset() -> None:
    assert DIGEST in fingerprint().values()


def test_differences_name_what_was_stored_and_what_is_given() -> None:
    assert differences({"a": 1, "b": 2, "old": 3}, {"a": 1, "b": 5, "new": 4}) == [
        "b: 2 -> 5",
        "new: None -> 4",
        "old: 3 -> None",
    ]
    assert differences({"a": 1}, {"a": 1}) == []


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n_trials", "50", 50),
        ("n_trials", "1.5", "1.5"),
        ("n_trials", "", ""),
        ("timeout", "1.5", 1.5),
        ("patience", "3", 3),
        ("validation_split", "0.2", 0.2),
        ("study_name", "7", "7"),
        ("hidden_units", "512", "512"),
    ],
)
def test_text_becomes_a_settings_own_type_or_stays_to_be_refused(
    name: str, text: str, value: Any
) -> None:
    read = options()[name].parse(text)
    assert (read, type(read)) == (value, type(value))


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


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("sqlite:///a.db", "sqlite:///./a.db"),
        ("sqlite:///a.db", "sqlite:///folder/../a.db"),
        ("sqlite+pysqlite:///a.db", "sqlite:///a.db"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_one_database_for_both_is_recognized(storage: str, tracking: str) -> None:
    assert same_database(storage, tracking)


def test_one_database_is_recognized_through_links_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.db").touch()
    Path("symbolic.db").symlink_to("a.db")
    Path("hard.db").hardlink_to("a.db")
    for other in (f"sqlite:///{tmp_path}/a.db", "sqlite:///symbolic.db", "sqlite:///hard.db"):
        assert same_database("sqlite:///a.db", other)


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("sqlite:///a.db", "sqlite:///b.db"),
        ("sqlite:///a.db", "postgresql://host/a.db"),
        ("postgresql://host/optuna", "postgresql://host/mlflow"),
        ("sqlite:///a.db", "http://localhost:5000"),
    ],
)
def test_two_databases_are_told_apart(storage: str, tracking: str) -> None:
    assert not same_database(storage, tracking)


def test_the_file_behind_a_url_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert sqlite_path("sqlite:///a.db") == tmp_path / "a.db"
    assert sqlite_path("sqlite:////var/a.db") == Path("/var/a.db")
    assert sqlite_path("postgresql://host/a") is None


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql+psycopg://me:hunter2@host:5432/db?sslmode=require",
        "http://me:hunter2@host:5000/path",
        "postgresql://host/db?user=me&password=hunter2",
        "postgresql://me:p@hunter2@host/db",
        "postgresql://me:p:hunter2@host/db",
        "http://:hunter2@host",
        "https://host/?token=hunter2&x=1",
        "cannot open 'mysql://me:hunter2@host/db': refused",
        "from postgresql://me:hunter2@one/db to http://you:hunter2@two/",
        "postgresql://me:it's hunter2@host/db",
        'postgresql://me:a"hunter2@host/db',
        "postgresql://me:12/hunter2@host:5432/db?sslmode=require",
        "postgresql://me:a?hunter2@host/db",
        "postgresql://me:a?b=hunter2@host/db",
        "postgresql://me:a#hunter2@host/db",
        "postgresql://me@host/db?sslpassword=hunter2",
        "postgresql://me@host/db?x=1&sslpassword=it's hunter2&y=2",
        "postgresql://me@host/db?sslpassword=a?b#hunter2",
        "postgresql://me@host/db?ssl%70assword=hunter2",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Dhunter2%3BUID%3Dme",
        "https://hunter2@host/x",
        "https://hunter2:@host/x",
        "http://me:pa ss'w\"hunter2@host:5000",
        "http://me@host:5000/a?client_secret=hunter2&x=1",
        "https://host/x#access_token=hunter2",
        'but http://me:it\'s "my" hunter2@host:5000 is not: refused',
        "'postgresql://me:it\\'s hunter2@host/db' cannot: refused by me@corp",
        "open https://hunter2@host/x: failed",
        "to 'postgresql://me@host/db?sslpassword=hunter2', which failed",
        "to 'postgresql://me@host/db?sslpassword=a'hunter2', which failed",
        "PGPASSWORD=hunter2 psql",
    ],
)
def test_no_password_is_printed(text: str) -> None:
    assert "hunter2" not in redact(text)
    assert "***" in redact(text)


def test_only_what_is_secret_is_masked() -> None:
    url = 'postgresql+psycopg://me:it\'s "hunter2"@host:5432/db?sslmode=require&sslpassword=a b&x=1'
    assert make_url(url).password == 'it\'s "hunter2"'
    assert make_url(url).query["sslpassword"] == "a b"
    masked = "postgresql+psycopg://me:***@host:5432/db?sslmode=require&sslpassword=***&x=1"
    assert redact(url) == masked
    assert redact(f"from {masked!r} to {masked}") == f"from {masked!r} to {masked}"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///study.db",
        "http://localhost:5000",
        "postgresql://me@host/db",
        "sqlite:///a@b.db",
        "--study-name a exists (stored -> given): epochs: 5 -> 6",
        "sqlite:////my runs@home/a:b@c.db",
        "http://localhost:5000/a@b",
        "postgresql://host/db?options=a@b",
        "cannot reach http://localhost:5000/a?b=1 of models:/X@production",
        "cannot reach 'http://localhost:5000': ask a@b",
        "http://me:***@host:5000 and https://***@x/y?token=***",
        "the token is wrong: none",
    ],
)
def test_what_is_no_secret_is_printed_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_control_characters_and_lone_surrogates_are_escaped_and_letters_stay() -> None:
    letters = "größer, 模型, مثال, मॉडल, naïve, 🎉, no-break\u00a0space"
    assert printable(letters) == letters
    assert printable("a\x1b[2J\x00\r\n\x7f\x9b\udcff") == r"a\x1b[2J\x00\r\n\x7f\x9b\udcff"
    assert one_line(ValueError("two\nlines\x1b")) == r"two lines\x1b"
