"""How the winner does on the test examples: matrix or most frequent confusions, worst mistakes."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import small_dataset

from search.data.dataset import Dataset
from search.data.load import load_dataset
from search.promotion import evaluation, pictures
from search.promotion.evaluation import (
    MOST,
    Confusion,
    Evaluation,
    Labels,
    Mistake,
    evaluate_predictions,
    load_evaluation,
    most_frequent,
    right_of,
)
from search.promotion.pictures import save_evaluation
from search.task import Task

LABELS = np.array([0, 0, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 1, 1, 1, 0, 0, 2])
CONFIDENCE = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.95, 0.4], np.float32)
MATRIX = [[1, 1, 0], [0, 2, 0], [2, 0, 1]]


def evaluated(classes: int) -> Evaluation:
    return evaluate_predictions(PREDICTED, CONFIDENCE, LABELS, classes)


def sparse(matrix: list[list[int]]) -> Evaluation:
    """What becomes of a matrix that an earlier version has written."""
    return load_evaluation(json.dumps({"confusion": matrix, "mistakes": []}))


def test_few_classes_have_a_matrix() -> None:
    found = evaluated(3)
    assert found.confusion == MATRIX
    assert (found.right, found.total) == (4, 7)
    assert found.confusions == [Confusion(2, 0, 2), Confusion(0, 1, 1)]
    assert [mistake.index for mistake in found.mistakes] == [5, 1, 4]
    assert found.mistakes[0] == Mistake(5, 2, 0, pytest.approx(0.95))


def test_a_file_of_few_classes_holds_the_matrix_and_the_mistakes_as_ever() -> None:
    found = evaluated(3)
    kept = json.loads(found.as_json())
    assert list(kept) == ["confusion", "mistakes", "classes"]
    assert kept["classes"][0] == {
        "label": 0,
        "precision": pytest.approx(1 / 3),
        "recall": 0.5,
        "examples": 2,
    }
    assert kept["confusion"] == MATRIX
    assert list(kept["mistakes"][0]) == ["index", "label", "predicted", "probability"]
    assert load_evaluation(found.as_json()) == found


def test_many_classes_have_their_most_frequent_confusions_and_no_matrix() -> None:
    assert evaluated(MOST).confusion is not None
    found = evaluated(MOST + 1)
    assert found == replace(evaluated(3), confusion=None, classes=[])
    assert load_evaluation(found.as_json()) == found
    assert "confusion" not in json.loads(found.as_json())


def test_a_hundred_thousand_classes_need_little_memory() -> None:
    classes, examples = 100_000, 300_000
    labels = np.arange(examples) % classes
    predicted = np.where(labels < 3_000, (labels + 7) % classes, labels)
    tracemalloc.start()
    try:
        found = evaluate_predictions(
            predicted, np.full(examples, 0.5, np.float32), labels.astype(np.int32), classes
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert (found.right, found.total) == (examples - 9_000, examples)
    assert found.confusions[0] == Confusion(0, 7, 3)
    assert len(found.as_json()) < 10_000


def test_a_large_matrix_that_an_earlier_version_wrote_is_read_as_its_most_frequent_confusions() -> (
    None
):
    matrix = np.eye(300, dtype=int) * 2
    matrix[298, 3] = 5
    matrix[4, 299] = 9
    found = sparse(matrix.tolist())
    assert found.confusion is None
    assert (found.right, found.total) == (600, 614)
    assert found.confusions == [Confusion(4, 299, 9), Confusion(298, 3, 5)]


def test_predictions_of_many_classes_are_made_a_few_examples_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(30, "softmax")])
    x = np.random.default_rng(0).normal(size=(25, 4)).astype("float32")
    whole = network.predict(x, verbose=0)
    monkeypatch.setattr(evaluation, "_AT_ONCE", 300)
    asked = []
    original = network.predict

    def predict(rows: Any, **named: Any) -> Any:
        asked.append((len(rows), named["batch_size"]))
        return original(rows, **named)

    monkeypatch.setattr(network, "predict", predict)
    predicted, confidence = evaluation.predict(
        network, small_dataset(x_test=x, y_test=np.zeros(25, np.int32))
    )
    assert asked == [(10, 10), (10, 10), (5, 10)]
    assert predicted.tolist() == whole.argmax(axis=1).tolist()
    assert confidence == pytest.approx(whole.max(axis=1), abs=1e-6)


def test_labels_have_their_scores_and_a_picture(tmp_path: Path) -> None:
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], np.float32)
    outputs = np.array([[0.9, 0, 0], [0.2, 0.8, 0], [0.6, 0.7, 0], [0.8, 0, 0]], np.float32)
    data = small_dataset(
        x_test=np.zeros((4, 5), np.float32), y_test=y, task=Task("multilabel", 3, tuple("abc"))
    )
    assert save_evaluation(None, data, tmp_path, outputs) is None
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "labels.png"}
    found = load_evaluation((tmp_path / "evaluation.json").read_text())
    assert isinstance(found, Labels)
    assert (found.right, found.total, found.name(1)) == (2, 4, "b")
    assert [(score.precision, score.recall, score.examples) for score in found.classes] == [
        (pytest.approx(2 / 3), pytest.approx(2 / 3), 3),
        (1, 1, 2),
        (None, None, 0),
    ]
    assert right_of(None, data, outputs).tolist() == [True, False, False, True]
    many = replace(found, classes=[replace(found.classes[0], examples=i) for i in range(30)])
    assert [score.examples for score in most_frequent(many)] == list(range(29, 9, -1))


@pytest.fixture
def dataset(clouds: Path) -> Dataset:
    return load_dataset(str(clouds), 0.1)


@pytest.fixture
def network(dataset: Dataset) -> Any:
    return keras.Sequential(
        [keras.layers.Input((dataset.features,)), keras.layers.Dense(dataset.classes, "softmax")]
    )


def test_it_is_saved_as_data_and_as_a_picture(
    dataset: Dataset, network: Any, tmp_path: Path
) -> None:
    assert save_evaluation(network, dataset, tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "confusion_matrix.png"}
    found = load_evaluation((tmp_path / "evaluation.json").read_text())
    assert found.total == len(dataset.x_test)


def test_many_classes_are_saved_without_a_matrix(
    dataset: Dataset, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MOST", 2)
    assert save_evaluation(network, dataset, tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "confusions.png"}
    assert (tmp_path / "confusions.png").read_bytes().startswith(b"\x89PNG")
    assert load_evaluation((tmp_path / "evaluation.json").read_text()).confusion is None


def test_what_cannot_be_made_is_named_and_the_rest_is_kept(
    dataset: Dataset, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_draw_matrix", fail)
        why = save_evaluation(network, dataset, tmp_path)
        assert why == "confusion_matrix.png could not be written (MemoryError: MemoryError)"
        assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    with monkeypatch.context() as patch:
        patch.setattr(network, "predict", lambda *_, **__: np.zeros((10**9, 10**9)))
        why = save_evaluation(network, dataset, tmp_path / "absent")
        assert why is not None
        assert why.startswith("evaluation.json could not be written (")
        assert "\n" not in why
