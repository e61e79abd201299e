import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import mlflow_at
from in_process import command

OPTIONS = (
    *("--dataset", "people.csv", "--target", "answer", "--study-name", "people"),
    *("--model-name", "People", "--n-trials", "1", "--epochs", "3", "--workers", "1"),
    *("--hidden-units", "8", "--report", "none", "--baselines", "none"),
)
ROWS = 300


def people() -> pd.DataFrame:
    random = np.random.default_rng(0)
    age = np.where(random.random(ROWS) < 0.1, np.nan, random.integers(18, 80, ROWS))
    return pd.DataFrame(
        {
            "age": age,
            "children": random.integers(0, 4, ROWS),
            "city (now)": random.choice([f"city {i}" for i in range(60)], ROWS),
            "job/title": random.choice(["nurse", "pilot", None], ROWS),
            "since": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(ROWS), unit="D"),
            "member": random.random(ROWS) < 0.5,
            "answer": np.where(np.nan_to_num(age, nan=40) > 45, "ja", "nein"),
        }
    )


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A folder in which a study of a table ran to its end, and the model as MLflow loads it."""
    folder = tmp_path_factory.mktemp("table")
    people().to_csv(folder / "people.csv", index=False)
    code, _, err = command(folder, *OPTIONS)
    assert (code, err) == (0, "")
    with mlflow_at(folder) as client:
        model = mlflow.pyfunc.load_model("models:/People/Production")
        version = client.get_model_version_by_alias("People", "production")
        run = client.get_run(version.run_id)
        yield {"folder": folder, "model": model, "run": run, "client": client}


@pytest.mark.slow
def test_the_model_answers_raw_rows_as_it_was_tested(registered: dict[str, Any]) -> None:
    from search import StudyConfig
    from search.data.load import load_for_study

    table = pd.read_csv(registered["folder"] / "people.csv")
    answers = registered["model"].predict(table)
    assert list(answers) == ["prediction", "probability_ja", "probability_nein"]
    np.testing.assert_allclose(answers.iloc[:, 1:].sum(axis=1), 1, rtol=0, atol=1e-5)
    path = str(registered["folder"] / "people.csv")
    data = load_for_study(StudyConfig(dataset=path, target="answer"), None)
    assert data.columns is not None
    encoded = data.columns.encode(data.columns.rows(table))
    tested = np.array([(encoded == row).all(axis=1).any() for row in data.x_test])
    assert tested.all()
    rows = [int(np.flatnonzero((encoded == row).all(axis=1))[0]) for row in data.x_test]
    right = (answers.prediction == table.answer)[rows].mean()
    assert right == pytest.approx(registered["run"].data.metrics["test_accuracy"], abs=1e-5)


def test_the_signature_names_the_columns_and_the_answers(registered: dict[str, Any]) -> None:
    signature = registered["model"].metadata.signature
    assert set(signature.inputs.input_names()) == set(people()) - {"answer"}
    assert not any(column.required for column in signature.inputs)
    assert signature.outputs.input_names() == ["prediction", "probability_ja", "probability_nein"]


def test_the_requirements_name_all_that_the_model_imports(registered: dict[str, Any]) -> None:
    path = mlflow.pyfunc.get_model_dependencies("models:/People/Production")
    names = {line.partition("==")[0] for line in Path(path).read_text().splitlines()}
    assert names == {"mlflow", "tensorflow", "keras", "numpy", "pandas"}


def test_columns_and_values_may_be_missing_and_words_unknown(registered: dict[str, Any]) -> None:
    model = registered["model"]
    rows = pd.DataFrame([{"age": 30, "city (now)": "nowhere"}, {"age": None, "job/title": None}])
    answers = model.predict(rows)
    assert set(answers.prediction) <= {"ja", "nein"}
    assert np.isfinite(answers.iloc[:, 1:]).all(axis=None)
    with pytest.raises(Exception, match="column 'age' must hold numbers"):
        model.predict(pd.DataFrame({"age": ["old"]}))


@pytest.mark.parametrize("form", ["dataframe_records", "dataframe_split"])
def test_the_server_answers_json_as_python_does(registered: dict[str, Any], form: str) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    table = people().drop(columns="answer").head(20)
    given = json.loads(table.to_json(orient=form.split("_")[1], date_format="iso"))
    model = registered["model"]
    schema = model.metadata.get_input_schema()
    answer = invocations(json.dumps({form: given}), "application/json", model, schema)
    assert answer.status == 200, answer.response
    served = pd.DataFrame(json.loads(answer.response)["predictions"])
    expected = model.predict(table)
    assert served.prediction.tolist() == expected.prediction.tolist()
    np.testing.assert_allclose(served.iloc[:, 1:], expected.iloc[:, 1:], rtol=0, atol=1e-5)


def test_keras_loads_the_model_alone_and_it_takes_arrays(registered: dict[str, Any]) -> None:
    import mlflow.keras

    model = mlflow.keras.load_model("models:/People/Production")
    assert [value.name for value in model.inputs] == ["numbers", "words"]
    assert model.output_shape == (None, 2)


def test_the_same_command_again_changes_nothing_and_a_trial_reproduces(
    registered: dict[str, Any],
) -> None:
    folder = registered["folder"]
    code, out, err = command(folder, *OPTIONS)
    assert (code, err) == (0, "")
    assert "Already registered as People version 1" in out
    assert command(folder, "doctor", "--study-name", "people")[0] == 0
    code, out, err = command(folder, "reproduce", "--study-name", "people")
    assert (code, err) == (0, "")
    assert "the same to the last digit" in out


def test_another_target_needs_another_study(registered: dict[str, Any]) -> None:
    code, _, err = command(registered["folder"], *OPTIONS, "--target", "member")
    assert code == 2
    assert "exists with other settings (stored -> given): target: answer -> member" in err
