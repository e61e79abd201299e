"""An option of the settings: how its text is read, and what is said of a wrong value."""

from typing import Any

import pytest

from search.config.settings import StudyConfig, options
from search.errors import InputError


def test_a_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean median"):
        StudyConfig(pruner="medain")


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
