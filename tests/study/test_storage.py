"""A study is created once, with its settings, and those of others are left alone."""

from pathlib import Path

import optuna
import pytest
from test_sqlite import SETTINGS, dump

from search.config.settings import StudyConfig
from search.errors import InputError
from search.study import storage


def test_a_study_keeps_its_settings_and_a_uid_and_opening_it_again_changes_nothing(
    in_folder: Path,
) -> None:
    config = StudyConfig()
    study = storage.open_study(config, SETTINGS)
    assert study.study_name == "mnist-dnn"
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.user_attrs["settings"] == SETTINGS
    assert len(study.user_attrs["study_uid"]) == 32
    before = dump(in_folder / "study.db")
    storage.check(config)
    storage.check_same(config, SETTINGS)
    assert storage.open_study(config, SETTINGS).user_attrs == study.user_attrs
    assert dump(in_folder / "study.db") == before


def test_another_study_in_the_database_has_another_uid(in_folder: Path) -> None:
    uids = {
        storage.open_study(StudyConfig(study_name=name), SETTINGS).user_attrs["study_uid"]
        for name in ("one", "other")
    }
    assert len(uids) == 2


def test_a_study_of_other_settings_is_refused_and_left_alone(in_folder: Path) -> None:
    storage.open_study(StudyConfig(), SETTINGS)
    before = dump(in_folder / "study.db")
    with pytest.raises(InputError, match="epochs: 5 -> 6"):
        storage.open_study(StudyConfig(), {**SETTINGS, "epochs": 6})
    assert dump(in_folder / "study.db") == before


def test_a_study_whose_creation_was_killed_before_it_had_settings_is_adopted(
    in_folder: Path,
) -> None:
    optuna.create_study(
        study_name="mnist-dnn",
        storage=storage.open_storage("sqlite:///study.db"),
        direction="maximize",
    )
    storage.check_same(StudyConfig(), SETTINGS)
    study = storage.open_study(StudyConfig(), SETTINGS)
    assert study.user_attrs["settings"] == SETTINGS
    assert study.user_attrs["study_uid"]


def test_a_study_has_the_direction_of_its_objective(in_folder: Path) -> None:
    loss = {**SETTINGS, "objective": "val_loss"}
    study = storage.open_study(StudyConfig(), loss)
    assert study.direction is optuna.study.StudyDirection.MINIMIZE
    assert study.metric_names == ["val_loss"]
    assert storage.objective(study).name == "val_loss"
    assert storage.stored_settings(StudyConfig()) == loss
    with pytest.raises(InputError, match="objective: val_loss -> val_accuracy"):
        storage.check_same(StudyConfig(), SETTINGS)


def test_a_study_of_another_program_is_not_adopted(in_folder: Path) -> None:
    study = optuna.create_study(
        study_name="mnist-dnn",
        storage=storage.open_storage("sqlite:///study.db"),
        direction="maximize",
    )
    study.optimize(lambda trial: 1.0, n_trials=1)
    before = dump(in_folder / "study.db")
    for refuse in (storage.check_same, storage.open_study):
        with pytest.raises(InputError, match="created by another program"):
            refuse(StudyConfig(), SETTINGS)
    assert dump(in_folder / "study.db") == before


def test_the_schemas_version_is_what_optuna_says() -> None:
    assert storage._alembic_head() == optuna.storages.RDBStorage("sqlite://").get_head_version()
