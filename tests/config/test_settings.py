"""The settings: checked when built, and what of them decides a trial."""

import dataclasses
from typing import Any

import pytest

from search.config.settings import StudyConfig, defaults, differences, options
from search.errors import InputError

DIGEST = "mnist (0123456789ab)"


def test_the_defaults_are_valid() -> None:
    assert StudyConfig() == StudyConfig(**defaults())


def test_a_configuration_never_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StudyConfig().epochs = 3  # type: ignore[misc]


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
        ({"batch_size": 0}, "--batch-size must be auto, or whole numbers from 1 to"),
        ({"batch_size": "auto,64"}, "--batch-size must be auto, or whole numbers from 1 to"),
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
