from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from search import StudyConfig
from search.data.dataset import Dataset
from search.data.load import load_for_study
from search.errors import InputError

ROWS = 200


def people(rows: int = ROWS) -> pd.DataFrame:
    """A table with everything that a file may hold."""
    random = np.random.default_rng(0)
    age = random.integers(18, 80, rows).astype(float)
    age[::7] = np.nan
    return pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(rows)],
            "age": age,
            "city": random.choice([f"city {i}" for i in range(60)], rows),
            "job": random.choice(["nurse", "pilot", None], rows),
            "since": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(rows), unit="D"),
            "house": np.arange(rows) // 5,
            "town": ["one"] * rows,
            "answer": np.where(np.nan_to_num(age, nan=40) > 45, "yes", "no"),
        }
    )


@pytest.fixture
def load(in_folder: Path) -> Callable[..., Dataset]:
    """Load a table, written to people.csv; its target is `answer` unless another is given."""

    def write_and_load(frame: pd.DataFrame | None = None, **settings: Any) -> Dataset:
        (people() if frame is None else frame).to_csv("people.csv", index=False)
        given = {"dataset": "people.csv", "target": "answer", **settings}
        return load_for_study(StudyConfig(**given), None)

    return write_and_load


def test_a_csv_and_a_parquet_file_are_the_same_data(load: Callable[..., Dataset]) -> None:
    from_csv = load()
    people().to_parquet("people.parquet")
    from_parquet = load(dataset="people.parquet")
    np.testing.assert_array_equal(from_csv.x_all, from_parquet.x_all)
    np.testing.assert_array_equal(from_csv.y_all, from_parquet.y_all)
    assert from_csv.task.class_names == ("no", "yes")
    assert (from_csv.train_size, len(from_csv.x_all), len(from_csv.x_test)) == (144, 160, 40)
    assert "left out id (a different word in nearly every row)" in str(from_csv)


def test_columns_are_adapted_to_the_training_part_alone(load: Callable[..., Dataset]) -> None:
    frame = people()
    plain = load(frame, split="last")
    frame.loc[ROWS - 56 :, "age"] = 1e6  # validation and test rows
    frame.loc[ROWS - 56 :, "job"] = "astronaut"
    changed = load(frame, split="last")
    np.testing.assert_array_equal(plain.x_all[:144], changed.x_all[:144])
    assert plain.columns is not None and changed.columns is not None
    assert plain.columns.vocabularies == changed.columns.vocabularies


def test_a_test_file_is_the_test_set(load: Callable[..., Dataset]) -> None:
    people(50).to_csv("test.csv", index=False)
    data = load(test="test.csv")
    assert (len(data.x_all), len(data.x_test)) == (ROWS, 50)


def test_a_group_is_never_on_both_sides(load: Callable[..., Dataset]) -> None:
    data = load(split="group:house")
    assert data.columns is not None and data.test_rows is not None
    assert "house" not in data.columns.sources
    # every house has five rows, so whole houses are in each part
    sizes = data.train_size, len(data.x_all) - data.train_size, len(data.x_test)
    assert all(size % 5 == 0 and size > 0 for size in sizes)
    assert sum(sizes) == ROWS


def test_a_time_split_validates_and_tests_on_the_latest(load: Callable[..., Dataset]) -> None:
    frame = people()
    ordered = load(frame, split="time:since")
    shuffled = load(frame.sample(frac=1, random_state=1), split="time:since")
    as_given = load(frame, split="last")
    assert sorted(map(bytes, ordered.x_test)) == sorted(map(bytes, shuffled.x_test))
    np.testing.assert_array_equal(ordered.y_test, as_given.y_test)
    np.testing.assert_array_equal(ordered.validation[1], as_given.validation[1])


def test_classes_that_are_numbers_are_in_their_order(load: Callable[..., Dataset]) -> None:
    frame = people().assign(answer=np.arange(ROWS) % 12)
    assert load(frame).task.class_names == tuple(map(str, range(12)))


def labelled() -> pd.DataFrame:
    """A table with three columns of labels, of numbers, booleans and decimals."""
    flags = np.random.default_rng(1).random((ROWS, 3)) < 0.4
    return people().assign(
        sick=flags[:, 0].astype(int), old=flags[:, 1], rich=flags[:, 2].astype(float)
    )


@pytest.mark.parametrize("settings", [{}, {"task": "multilabel"}])
def test_several_columns_are_labels(load: Callable[..., Dataset], settings: dict[str, str]) -> None:
    data = load(labelled(), target="sick, old,rich", **settings)
    assert (data.task.kind, data.task.class_names) == ("multilabel", ("sick", "old", "rich"))
    assert (data.split, data.y_test.dtype, data.y_test.shape) == ("random", np.float32, (40, 3))
    assert "random split" in str(data) and "3 labels" in str(data)
    assert data.columns is not None and not {"sick", "old", "rich"} & set(data.columns.sources)
    every = np.concatenate([data.y_all, data.y_test])
    assert every.sum(axis=0).tolist() == labelled()[["sick", "old", "rich"]].sum().tolist()
    with_file = load(labelled(), target="sick,old,rich", test="people.csv")
    np.testing.assert_array_equal(with_file.y_test[:, 1], labelled().old)


def test_a_column_whose_name_has_a_comma_is_one_target(load: Callable[..., Dataset]) -> None:
    frame = people().rename(columns={"answer": "sick,old"})
    assert load(frame, target="sick,old").task.class_names == ("no", "yes")


@pytest.mark.parametrize(
    ("change", "settings", "found"),
    [
        ({"old": 2}, {}, "--target old must hold 0 or 1, or false or true, .* but has '2'"),
        ({"old": "yes"}, {}, "--target old must hold 0 or 1, .* but has 'yes'; name a single"),
        ({"old": [1, None] * 100}, {}, "--target old must have a value in every row.* 100 of 200"),
        ({"old": 1}, {}, "--target sick,old must hold 0 and 1 for each label, .* only 1 in old"),
        ({}, {"target": "sick,oldd"}, "it has no 'oldd'; did you mean old"),
        ({}, {"target": ","}, "--target must name columns of people.csv, but it has no ','"),
        ({}, {"ignore": "old"}, "by one of --target and --ignore, but 'old' is named by both"),
        ({}, {"task": "regression"}, "--task regression must have one target, but --target sick"),
        ({}, {"target": "sick", "task": "multilabel"}, "must have a column for each label, but"),
        ({}, {"split": "stratified"}, "--split stratified needs classes, but the task of people"),
        ({}, {"class_weight": "balanced"}, "--class-weight balanced needs classes, but the task"),
        ({}, {"label_smoothing": "0.1"}, "--label-smoothing needs classes, but the task of people"),
    ],
)
def test_labels_that_can_not_be_learnt_are_refused(
    load: Callable[..., Dataset], change: dict[str, Any], settings: dict[str, str], found: str
) -> None:
    with pytest.raises(InputError, match=found) as error:
        load(labelled().assign(**change), **{"target": "sick,old", **settings})
    assert "\n" not in str(error.value)


def test_a_test_file_without_a_label_is_refused(load: Callable[..., Dataset]) -> None:
    labelled().drop(columns="old").to_csv("test.csv", index=False)
    with pytest.raises(InputError, match="it lacks 'old'"):
        load(labelled(), target="sick,old", test="test.csv")


def test_the_delimiter_may_be_a_semicolon(load: Callable[..., Dataset]) -> None:
    plain = load()
    people().to_csv("semicolon.csv", sep=";", index=False)
    np.testing.assert_array_equal(load(dataset="semicolon.csv").x_all, plain.x_all)


# ---- what is refused -----------------------------------------------------------------------------


def _duplicate(path: Path) -> None:
    path.write_text("a,a,answer\n1,2,no\n3,4,yes\n")


def _ragged(path: Path) -> None:
    path.write_text("a,answer\n1,no\n2,yes,3\n")


def _latin(path: Path) -> None:
    path.write_bytes("a,answer\nMünchen,no\nKöln,yes\n".encode("latin-1"))


def _empty(path: Path) -> None:
    path.write_text("")


def _header_only(path: Path) -> None:
    path.write_text("a,answer\n")


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (_duplicate, "must have different names, but 'a' occurs twice"),
        (_ragged, "as many values in every other one, but CSV parse error: Expected 2 columns"),
        (_latin, "must be a whole CSV file, UTF-8"),
        (_empty, "Empty CSV file"),
        (_header_only, "must have rows, but has none"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    in_folder: Path, write: Callable[[Path], None], found: str
) -> None:
    write(Path("bad.csv"))
    with pytest.raises(InputError, match=found) as error:
        load_for_study(StudyConfig(dataset="bad.csv", target="answer"), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"target": None}, "must have a target, the column to predict, but --target is not given"),
        ({"target": "anwser"}, "it has no 'anwser'; did you mean answer?"),
        ({"ignore": "idd"}, "--ignore must name columns.*it has no 'idd'"),
        ({"numeric": "age", "categorical": "age"}, "'age' is named by both"),
        ({"numeric": "city"}, "column 'city' must hold numbers"),
        ({"split": "time:job"}, "--split time:job must have a time in every row"),
        ({"split": "time:city"}, "must name a column of numbers or dates"),
        ({"split": "group:town"}, "--split group:town must leave groups to train, .* too few"),
        ({"split": "group:hous"}, "--split must name columns.*did you mean house?"),
        ({"ignore": "id,age,city,job,since,house,town"}, "must have a column to learn from"),
        ({"test": "nowhere.csv"}, "--test must be a readable file.*no such file"),
        ({"test_split": 0.999}, "--test-split must leave examples to train and to test"),
    ],
)
def test_settings_that_do_not_fit_the_table_are_refused(
    load: Callable[..., Dataset], settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(InputError, match=found) as error:
        load(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (["yes"] * ROWS, "must have two classes or more, but all rows have 'yes'"),
        (["yes", None] * (ROWS // 2), "must have a value in every row.*100 of 200 are missing"),
    ],
)
def test_a_target_that_can_not_be_learnt_is_refused(
    load: Callable[..., Dataset], answers: list[Any], found: str
) -> None:
    with pytest.raises(InputError, match=found):
        load(people().assign(answer=answers))


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([7.5] * ROWS, "must hold numbers that differ, but has only 7.5"),
        ([1.5, float("inf")] * (ROWS // 2), "must hold finite numbers .float32., but has NaN or"),
        ([1.5, 1e300] * (ROWS // 2), "must hold finite numbers .float32., but has NaN or"),
    ],
)
def test_numbers_that_can_not_be_learnt_are_refused(
    load: Callable[..., Dataset], answers: list[float], found: str
) -> None:
    with pytest.raises(InputError, match=found) as error:
        load(people().assign(answer=answers))
    assert "--target answer" in str(error.value)


def test_a_class_in_the_test_set_alone_is_refused(load: Callable[..., Dataset]) -> None:
    people(50).assign(answer="maybe").to_csv("test.csv", index=False)
    with pytest.raises(InputError, match="'maybe' is in the test set alone"):
        load(test="test.csv")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda frame: frame.drop(columns="age"), "it lacks 'age'"),
        (lambda frame: frame.rename(columns={"age": "ages"}), "it lacks 'age'; did you mean ages?"),
        (lambda frame: frame.assign(more=1), "it also has 'more'"),
        (lambda frame: frame.assign(age="old"), "column 'age' must hold numbers"),
    ],
)
def test_a_test_file_of_other_columns_is_refused(
    load: Callable[..., Dataset], change: Callable[[pd.DataFrame], pd.DataFrame], found: str
) -> None:
    change(people(50)).to_csv("test.csv", index=False)
    with pytest.raises(InputError, match=found.replace("?", r"\?")):
        load(test="test.csv")


def test_a_table_that_does_not_fit_into_memory_is_refused(in_folder: Path) -> None:
    with open("huge.csv", "wb") as file:
        file.write(b"a,answer\n")
        file.truncate(8 * 10**12)  # sparse: takes no place
    with pytest.raises(InputError, match=r"it needs 28,800\.0 GB and .* GB are free"):
        load_for_study(StudyConfig(dataset="huge.csv", target="answer"), None)


def test_a_column_of_lists_is_refused(in_folder: Path) -> None:
    people().assign(tags=[[1, 2]] * ROWS).to_parquet("lists.parquet")
    with pytest.raises(InputError, match="'tags' must hold single values"):
        load_for_study(StudyConfig(dataset="lists.parquet", target="answer"), None)


def test_a_damaged_parquet_file_is_refused(in_folder: Path) -> None:
    Path("bad.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match="must be a whole PARQUET file"):
        load_for_study(StudyConfig(dataset="bad.parquet", target="answer"), None)


@pytest.mark.parametrize("settings", [{"target": "y"}, {"test": "a.csv"}, {"split": "time:day"}])
def test_a_setting_of_tables_is_refused_with_other_data(settings: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"needs a table, .* but --dataset is mnist"):
        load_for_study(StudyConfig(**settings), None)
