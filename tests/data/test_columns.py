import numpy as np
import pandas as pd
import pytest

from search.data.columns import FEW, MANY, adapt

FRAME = pd.DataFrame(
    {
        "age": [20.5, 30.0, np.nan, 50.0] * 25,
        "rooms": [1, 2, 3, 3] * 25,
        "city": ["Rome", "Oslo", None, "Rome"] * 25,
        "member": [True, False, True, True] * 25,
        "since": ["2024-01-01T10:00", "2024-02-03T12:00", "2025-07-09T00:30", "2026-01-01T01:00"]
        * 25,
        "name": [f"person {i}" for i in range(100)],
        "country": ["Norway"] * 100,
    }
)


def test_every_column_gets_its_kind() -> None:
    columns = adapt(FRAME)
    assert columns.numbers == (("age", None),)
    assert [column for column, part in columns.words if part is None] == ["rooms", "city", "member"]
    assert [part for column, part in columns.words if part] == ["year", "month", "weekday", "hour"]
    assert columns.left_out == {
        "name": "a different word in nearly every row",
        "country": "one value",
    }
    assert str(columns).startswith("1 number, 3 categories, 1 date, left out name (a different")


def test_the_user_overrules_a_kind() -> None:
    columns = adapt(FRAME[["rooms", "name"]], numeric=["rooms"], categorical=["name"])
    assert columns.numbers == (("rooms", None),)
    assert columns.words == (("name", None),)
    assert columns.embeddings == (101,)


@pytest.mark.parametrize(("different", "is_number"), [(FEW, False), (FEW + 1, True)])
def test_few_whole_numbers_are_categories(different: int, is_number: bool) -> None:
    columns = adapt(pd.DataFrame({"a": np.arange(200) % different}))
    assert bool(columns.numbers) is is_number


def test_fractions_are_numbers_however_few() -> None:
    assert adapt(pd.DataFrame({"a": [0.5, 1.0] * 20})).numbers


@pytest.mark.parametrize(("different", "embedded"), [(MANY, 0), (MANY + 1, 1)])
def test_many_words_are_embedded(different: int, embedded: int) -> None:
    columns = adapt(pd.DataFrame({"a": [f"w{i % different}" for i in range(400)]}))
    assert len(columns.embeddings) == embedded
    assert columns.features == (1 if embedded else different + 1)


def test_numbers_are_normalized_and_missing_ones_are_the_median_and_indicated() -> None:
    frame = pd.DataFrame({"a": [1.5, 2.5, np.nan, 6.5], "b": [0.25, 0.5, 0.75, 1.0]})
    columns = adapt(frame)
    encoded = columns.encode(columns.rows(frame))
    filled = np.array([1.5, 2.5, 2.5, 6.5])
    np.testing.assert_allclose(encoded[:, 0], (filled - filled.mean()) / filled.std(), rtol=1e-6)
    assert encoded[:, 2].tolist() == [0, 0, 1, 0]
    assert encoded.shape == (4, 3)
    later = columns.encode(columns.rows(pd.DataFrame({"a": [np.inf], "b": [np.nan]})))
    assert later[0, 2] == 1  # infinity counts as missing
    assert later[0, 1] == pytest.approx(0, abs=1e-6)  # b was never missing: only the median


def test_an_unknown_word_and_a_missing_one_have_places_of_their_own() -> None:
    frame = pd.DataFrame({"city": ["Rome", "Oslo", None] * 10})
    columns = adapt(frame)
    assert columns.vocabularies == (("", "Oslo", "Rome"),)
    asked = pd.DataFrame({"city": ["Oslo", "Paris", None]})
    encoded = columns.encode(columns.rows(asked))
    assert encoded.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_a_word_is_the_same_from_a_file_and_from_json() -> None:
    columns = adapt(pd.DataFrame({"a": [1, 2, 3] * 10, "b": [True, False, True] * 10}))
    given = pd.DataFrame({"a": [3.0, "3", 3], "b": ["true", True, np.True_]}, dtype=object)
    encoded = columns.encode(columns.rows(given))
    assert (encoded == encoded[0]).all()
    assert encoded[0].tolist() == [0, 0, 0, 1, 0, 0, 1]


def test_rows_without_a_column_are_rows_that_miss_its_values() -> None:
    columns = adapt(FRAME)
    assert len(columns.rows(FRAME[["age"]])) == 100
    assert columns.encode(columns.rows(pd.DataFrame({"x": [1]}))).shape == (1, columns.features)


def test_what_is_no_number_is_refused_by_name() -> None:
    columns = adapt(FRAME)
    with pytest.raises(ValueError, match=r"column 'age' must hold numbers.*old"):
        columns.rows(pd.DataFrame({"age": ["old"]}))
    with pytest.raises(ValueError, match="column 'since' must hold dates"):
        columns.rows(pd.DataFrame({"since": ["yesterday"]}))


def test_times_with_a_zone_are_in_utc() -> None:
    frame = pd.DataFrame({"t": [f"2026-01-01T{hour:02d}:00+02:00" for hour in range(2, 22)]})
    columns = adapt(frame)
    (hour,) = (i for i, (_, part) in enumerate(columns.numbers) if part == "hour")
    assert columns.rows(frame).numbers[:, hour].tolist() == list(range(20))
