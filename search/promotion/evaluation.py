"""The winner on the test examples, by its task: what is right, and what is called what.

Of classes the confusion matrix and the worst mistakes, of labels the scores of each, of numbers the
predictions over the truth.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.dataset import Dataset
from search.promotion.measures import is_right
from search.task import MOST_OUTPUTS, THRESHOLD, Named

SHOWN = 12  # mistakes
_POINTS = 2_000  # residuals kept and drawn
_FREQUENT = 20  # most frequent confusions kept
MANY = 20  # classes from which on the cells of the matrix are too small for numbers
MOST = 200  # classes up to which there is a matrix
_AT_ONCE = 25_000_000  # numbers in memory, 100 MB
_BATCH = 2_000


@dataclass(frozen=True)
class Mistake:
    """Test example `index`, of class `label`, called `predicted` with this probability."""

    index: int
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Confusion:
    """`count` test examples of class `label` were called `predicted`."""

    label: int
    predicted: int
    count: int


@dataclass(frozen=True)
class ClassScore:
    """One class or label on the test examples.

    precision: share of those called `label` that are of it, or have it; recall: share of its
    `examples` that are called so. None where there are none.
    """

    label: int
    precision: float | None
    recall: float | None
    examples: int


@dataclass(frozen=True)
class Evaluation(Named):
    """A model on the test examples: it classifies `right` of `total` correctly.

    confusion: counts of test examples by true class (row) and predicted class (column), None above
    `MOST` classes, and then `classes`, the scores of each, is empty. confusions: the most frequent
    ones first. mistakes: the most confident first. class_names: empty, or the name of each class.
    """

    right: int
    total: int
    confusion: list[list[int]] | None
    confusions: list[Confusion]
    mistakes: list[Mistake]
    classes: list[ClassScore]
    class_names: tuple[str, ...] = ()

    def as_json(self) -> str:
        """The content of DATA: the matrix, from which the counts follow, or the counts."""
        kept = asdict(self)
        large = ("right", "total", "confusions", "mistakes")
        names = [*(large if self.confusion is None else ("confusion", "mistakes", "classes"))]
        names += ["class_names"] if self.class_names else []
        return json.dumps({name: kept[name] for name in names})

    def called(self, case: Mistake | Confusion) -> str:
        """Which class was called which."""
        return f"{self.name(case.label)} called {self.name(case.predicted)}"


@dataclass(frozen=True)
class Labels(Named):
    """A model on the test examples: it predicts all labels of `right` of `total` correctly.

    classes: the scores of each label. class_names: empty, or the name of each.
    """

    right: int
    total: int
    classes: list[ClassScore]
    class_names: tuple[str, ...] = ()

    def as_json(self) -> str:
        """What `load_evaluation` reads."""
        return json.dumps({"labels": asdict(self)})


@dataclass(frozen=True)
class Residuals:
    """True and predicted numbers, in the target's unit, of at most 2,000 of `total` test examples.

    Those kept are spread evenly over all, in their order.
    """

    total: int
    true: list[float]
    predicted: list[float]

    def as_json(self) -> str:
        """What `load_evaluation` reads."""
        return json.dumps({"residuals": asdict(self)})


Found = Evaluation | Labels | Residuals


def most_frequent(labels: Labels) -> list[ClassScore]:
    """The scores that a picture has room for: of all, or of the `MANY` most frequent labels."""
    if len(labels.classes) <= MANY:
        return labels.classes
    return sorted(labels.classes, key=lambda score: -score.examples)[:MANY]


def predict(model: Any, dataset: Dataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """The class that `model` predicts for each test example, and its probability."""
    predicted, confidence = [], []
    for probabilities in _outputs(model, dataset):
        predicted.append(probabilities.argmax(axis=1))
        confidence.append(probabilities.max(axis=1))
    return np.concatenate(predicted), np.concatenate(confidence)


def _outputs(model: Any, dataset: Dataset) -> Iterator[NDArray[Any]]:
    """What `model` gives for the test examples, in parts that fit in memory as float32."""
    rows = max(1, _AT_ONCE // max(model.output_shape[-1], dataset.features))
    rows -= rows % _BATCH if rows > _BATCH else 0  # whole batches
    for first in range(0, len(dataset.y_test), rows):
        part = dataset.test_inputs(slice(first, first + rows))
        yield model.predict(part, batch_size=min(rows, _BATCH), verbose=0)


def evaluate_predictions(
    predicted: NDArray[Any], confidence: NDArray[Any], labels: NDArray[Any], classes: int
) -> Evaluation:
    """Compare the result of `predict` with the true classes; all are of shape (n,)."""
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
    mistakes = [
        Mistake(int(i), int(labels[i]), int(predicted[i]), float(confidence[i])) for i in worst
    ]
    cells, counts = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    return _of_cells(*np.divmod(cells, classes), counts, classes, mistakes)


def _of_cells(
    rows: NDArray[Any],
    columns: NDArray[Any],
    counts: NDArray[Any],
    classes: int,
    mistakes: list[Mistake],
) -> Evaluation:
    """The evaluation whose confusion matrix has these nonzero cells."""
    confusion, scores = None, []
    if classes <= MOST:
        matrix = np.zeros((classes, classes), dtype=int)
        matrix[rows, columns] = counts
        parts = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
        confusion, scores = matrix.tolist(), _scores(*parts)
    wrong = np.flatnonzero(rows != columns)
    frequent = wrong[np.argsort(-counts[wrong], kind="stable")][:_FREQUENT]
    return Evaluation(
        right=int(counts[rows == columns].sum()),
        total=int(counts.sum()),
        confusion=confusion,
        confusions=[Confusion(int(rows[i]), int(columns[i]), int(counts[i])) for i in frequent],
        mistakes=mistakes,
        classes=scores,
    )


def _scores(right: NDArray[Any], called: NDArray[Any], there: NDArray[Any]) -> list[ClassScore]:
    """Of how many examples of each class or label are called so, are called so, and there are."""

    def share(of: NDArray[Any], label: int) -> float | None:
        return float(right[label] / of[label]) if of[label] else None

    return [
        ClassScore(label, share(called, label), share(there, label), int(there[label]))
        for label in range(len(there))
    ]


def evaluate_labels(y: NDArray[Any], outputs: NDArray[Any], names: tuple[str, ...]) -> Labels:
    """Compare probabilities with the true labels, 0 or 1; both are of shape (n, labels)."""
    called, there = outputs > THRESHOLD, y > THRESHOLD
    scores = _scores(*(flags.sum(axis=0) for flags in (called & there, called, there)))
    return Labels(int((called == there).all(axis=1).sum()), len(y), scores, names)


def evaluate_numbers(y: NDArray[Any], outputs: NDArray[Any]) -> Residuals:
    """y of shape (n,), outputs of shape (n, 1), both in the target's unit."""
    kept = np.unique(np.linspace(0, len(y) - 1, min(len(y), _POINTS)).astype(int))
    true, predicted = (values[kept].astype(float).tolist() for values in (y, outputs[:, 0]))
    return Residuals(len(y), true, predicted)


def right_of(model: Any, dataset: Dataset, outputs: NDArray[Any] | None = None) -> NDArray[Any]:
    """Which test examples `model` predicts right; outputs: what `outputs_of` gave, if known."""
    if outputs is None and dataset.classes:
        return np.asarray(predict(model, dataset)[0] == dataset.y_test)
    given = outputs_of(model, dataset) if outputs is None else outputs
    assert given is not None
    return is_right(dataset.task, dataset.y_test, given)


def outputs_of(model: Any, dataset: Dataset) -> NDArray[Any] | None:
    """What `model` gives for all test examples; None if it is too much for the memory.

    Of labels and numbers it is not: the targets have the same size.
    """
    return np.concatenate(list(_outputs(model, dataset))) if outputs_fit(dataset) else None


def outputs_fit(dataset: Dataset) -> bool:
    """Whether what a model gives for all test examples fits in the memory."""
    return len(dataset.x_test) * dataset.classes <= MOST_OUTPUTS


def evaluate(model: Any, dataset: Dataset, outputs: NDArray[Any] | None) -> Found:
    """Evaluate `model` on the test examples; outputs: what `outputs_of` gave, if known."""
    y, task = dataset.y_test, dataset.task
    if task.classes:
        if outputs is None:
            called, sure = predict(model, dataset)
        else:
            called, sure = outputs.argmax(axis=1), outputs.max(axis=1)
        found = evaluate_predictions(called, sure, y, task.classes)
        return replace(found, class_names=task.class_names)
    outputs = outputs_of(model, dataset) if outputs is None else outputs
    assert outputs is not None
    if task.is_number:
        return evaluate_numbers(y, outputs)
    return evaluate_labels(y, outputs, task.class_names)


def load_evaluation(text: str) -> Found:
    """Read the JSON of an evaluation, as this or an earlier version wrote it."""
    read = json.loads(text)
    if "residuals" in read:
        return Residuals(**read["residuals"])
    if "labels" in read:
        kept = read["labels"]
        scores = [ClassScore(**score) for score in kept["classes"]]
        return Labels(kept["right"], kept["total"], scores, tuple(kept["class_names"]))
    mistakes = [Mistake(**mistake) for mistake in read.pop("mistakes")]
    names = tuple(read.pop("class_names", ()))
    if "confusion" not in read:
        confusions = [Confusion(**confusion) for confusion in read.pop("confusions")]
        return Evaluation(
            **read,
            confusion=None,
            confusions=confusions,
            mistakes=mistakes,
            classes=[],
            class_names=names,
        )
    matrix = np.array(read["confusion"])
    rows, columns = np.nonzero(matrix)
    found = _of_cells(rows, columns, matrix[rows, columns], len(matrix), mistakes)
    return replace(found, class_names=names)
