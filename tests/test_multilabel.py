"""A study of several labels: the page's example, to the served model."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import invariants
import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, mlflow_at
from in_process import command
from sklearn import metrics

from search import StudyConfig
from search.data.load import load_for_study

PAGE = (ROOT / "docs" / "your-data.md").read_text().split("### Several labels")[1]
WRITE, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
COMMAND = shlex.split(re.findall(r"^    python study.py (.*)$", PAGE, re.MULTILINE)[0])
SMALL = ("--epochs", "3", "--hidden-units", "8", "--learning-rate", "0.01", "--workers", "1")
TOPICS = ["sport", "politics", "art"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A folder in which the page's command ran, what it printed, and the model from MLflow."""
    folder = tmp_path_factory.mktemp("articles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(WRITE, {})
    code, out, err = command(folder, *COMMAND, *SMALL, "--n-trials", "1")
    assert (code, err) == (0, "")
    with mlflow_at(folder) as client:
        model = mlflow.pyfunc.load_model("models:/Articles@production")
        yield {"folder": folder, "out": out, "model": model, "client": client}


def test_it_is_searched_registered_and_shown(articles: dict[str, Any]) -> None:
    folder, out = articles["folder"], articles["out"]
    found = invariants.check(folder, 1, study_name="articles", model_name="Articles")
    assert "(random split); 12 " in out and ", 3 labels; " in out
    assert re.search(r"baselines: majority labels 0\.5000, logistic regression 0\.\d+ .*AUC", out)
    assert found["study"].metric_names == ["val_auc"]
    settings = found["study"].user_attrs["settings"]
    assert (settings["task"], settings["target"]) == ("multilabel", "sport,politics,art")
    params = found["runs"][0].data.params
    assert (params["loss"], params["num_classes"]) == ("binary_crossentropy", "3")
    assert params["output_activation"] == "sigmoid"
    (last,) = found["trials"][0].user_attrs["history"][-1:]
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auc", "val_f1")
    assert tuple(last)[2:] == names
    page = (folder / "report.html").read_text()
    assert "Labels of the winner" in page and "Each label on the test examples" in page
    assert "Confusion matrix" not in page
    run_id = found["winner"].info.run_id
    files = {entry.path for entry in articles["client"].list_artifacts(run_id)}
    assert files == {"evaluation.json", "labels.png"}
    assert command(folder, "doctor", "--study-name", "articles")[0] == 0
    said = command(folder, "reproduce", "--study-name", "articles")[1]
    assert "the same to the last digit: val_auc" in said
    code, out, err = command(folder, *COMMAND, *SMALL, "--n-trials", "1")
    assert (code, err) == (0, "")
    assert "Already registered as Articles version 1" in out


def test_the_model_answers_raw_rows_with_its_labels_as_it_was_tested(
    articles: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    folder, model = articles["folder"], articles["model"]
    table = pd.read_csv(folder / "articles.csv")
    answers = model.predict(table.drop(columns=TOPICS))
    columns = ["prediction", *(f"probability_{topic}" for topic in TOPICS)]
    assert list(answers) == model.metadata.signature.outputs.input_names() == columns
    given = answers[columns[1:]].to_numpy()
    for row, labels in zip(given, answers.prediction, strict=True):
        assert labels == [topic for topic, p in zip(TOPICS, row, strict=True) if p > 0.5]

    monkeypatch.chdir(folder)
    data = load_for_study(StudyConfig(dataset="articles.csv", target=",".join(TOPICS)), None)
    assert data.columns is not None
    encoded = data.columns.encode(data.columns.rows(table))
    rows = [int(np.flatnonzero((encoded == row).all(axis=1))[0]) for row in data.x_test]
    np.testing.assert_array_equal(table[TOPICS].to_numpy()[rows], data.y_test)
    version = articles["client"].get_model_version_by_alias("Articles", "production")
    tested = articles["client"].get_run(version.run_id).data.metrics
    y, called = data.y_test, given[rows] > 0.5
    expected = {
        "test_loss": np.mean([metrics.log_loss(y[:, k], given[rows][:, k]) for k in range(3)]),
        "test_accuracy": metrics.accuracy_score(y, called),
        "test_auc": metrics.roc_auc_score(y, given[rows]),
        "test_f1": metrics.f1_score(y, called, average="macro"),
    }
    assert {name: tested[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    records = json.loads(table.drop(columns=[*TOPICS, "word 3"]).head(5).to_json(orient="records"))
    answer = invocations(
        json.dumps({"dataframe_records": records}),
        "application/json",
        model,
        model.metadata.get_input_schema(),
    )
    assert answer.status == 200, answer.response
    served = pd.DataFrame(json.loads(answer.response)["predictions"])
    alone = model.predict(pd.DataFrame(records))
    assert served.prediction.tolist() == alone.prediction.tolist()
    np.testing.assert_allclose(served[columns[1:]], alone[columns[1:]], rtol=0, atol=1e-5)
    exec(USE, {})
    assert "probability_politics" in capsys.readouterr().out


def test_arrays_are_compared_by_the_examples_with_all_labels_right(in_folder: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(160, 4)).astype(np.float32)
    y = x[:, :3] + random.normal(size=(160, 3)) > 0
    np.savez("mine.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:])
    small = ("--n-trials", "1", "--report", "none", "--hidden-units", "8")
    options = ("--dataset", "mine.npz", *SMALL, *small, "--objective", "val_accuracy")
    assert command(in_folder, *options, "--baselines", "none")[0] == 0
    code, out, err = command(in_folder, *options, "--study-name", "again", "--seed", "1")
    assert (code, err) == (0, "")
    invariants.check(in_folder, 1, study_name="again")
    assert re.search(r"test accuracy 0\.\d+ against 0\.\d+ of version 1, exact McNemar p = ", out)
    assert re.search(r"than .* on the test examples: accuracy .*, exact McNemar p = ", out)
    with mlflow_at(in_folder):
        model = mlflow.pyfunc.load_model("models:/MNIST_DNN_Model/2")
        answers = np.asarray(model.predict(x[120:]))
        tested = mlflow.get_run(model.metadata.run_id).data.metrics["test_accuracy"]
    assert answers.shape == (40, 3)
    assert ((answers > 0.5) == y[120:]).all(axis=1).mean() == pytest.approx(tested, abs=1e-5)
