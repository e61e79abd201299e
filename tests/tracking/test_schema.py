"""What the runs of a study say of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from search import StudyConfig
from search.data.dataset import OWN_SPLIT
from search.data.load import load_dataset
from search.tracking.schema import study_metadata


@pytest.mark.parametrize("split", ["stratified", OWN_SPLIT])
def test_the_fraction_for_validation_is_a_param_only_if_it_was_used(
    clouds: Path, split: str
) -> None:
    dataset = replace(load_dataset(str(clouds), 0.1), split=split)
    params = study_metadata(StudyConfig(dataset=str(clouds)), dataset)["params"]
    assert params["split"] == split
    assert params.get("validation_split") == (None if split == OWN_SPLIT else 0.1)
