"""The winner on the test examples: its confusion matrix and its worst mistakes."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.dataset import Dataset, is_image
from search.data.task import MOST_OUTPUTS
from search.errors import one_line
from search.promotion.residuals import RESIDUALS, Residuals, draw_residuals, residuals_of

DATA, MATRIX, MISTAKES = "evaluation.json", "confusion_matrix.png", "mistakes.png"
CONFUSIONS = "confusions.png"
_SHOWN = 12  # mistakes
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
    """One class on the test examples.

    precision: share of those called `label` that are of it; recall: share of its `examples` that
    are called so. None where there are none.
    """

    label: int
    precision: float | None
    recall: float | None
    examples: int


@dataclass(frozen=True)
class Evaluation:
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

    def name(self, label: int) -> str:
        """The class `label`, by its name if it has one."""
        return self.class_names[label] if self.class_names else str(label)

    def called(self, case: Mistake | Confusion) -> str:
        """Which class was called which."""
        return f"{self.name(case.label)} called {self.name(case.predicted)}"


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
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_SHOWN]
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
        confusion, scores = matrix.tolist(), _scores(matrix)
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


def _scores(matrix: NDArray[Any]) -> list[ClassScore]:
    called, there, right = matrix.sum(axis=0), matrix.sum(axis=1), np.diag(matrix)

    def share(of: NDArray[Any], label: int) -> float | None:
        return float(right[label] / of[label]) if of[label] else None

    return [
        ClassScore(label, share(called, label), share(there, label), int(there[label]))
        for label in range(len(matrix))
    ]


def outputs_of(model: Any, dataset: Dataset) -> NDArray[Any] | None:
    """What `model` gives for all test examples; None if it is too much for the memory."""
    if len(dataset.x_test) * dataset.task.outputs > MOST_OUTPUTS:
        return None
    return np.concatenate(list(_outputs(model, dataset)))


def save_evaluation(
    model: Any, dataset: Dataset, folder: Path, outputs: NDArray[Any] | None = None
) -> str | None:
    """Evaluate `model` on the test examples and write data and pictures into `folder`.

    outputs: what `outputs_of` gave, if it was called. Mistakes are drawn if the examples are
    images. Nothing depends on these files, so an error is not raised: returns which file could not
    be written, and why.
    """
    path = folder / DATA
    try:
        found = _evaluate(model, dataset, outputs)
        path.write_text(found.as_json())
        for name, draw in _pictures(found, dataset):
            path = folder / name
            _figure(path, draw)
    except Exception as error:
        path.unlink(missing_ok=True)  # it may be incomplete
        return f"{path.name} could not be written ({type(error).__name__}: {one_line(error)})"
    return None


def _evaluate(model: Any, dataset: Dataset, outputs: NDArray[Any] | None) -> Evaluation | Residuals:
    if not dataset.task.classes:
        outputs = outputs_of(model, dataset) if outputs is None else outputs
        assert outputs is not None  # one number an example
        return residuals_of(dataset.y_test, outputs)
    if outputs is None:
        called = predict(model, dataset)
    else:
        called = outputs.argmax(axis=1), outputs.max(axis=1)
    found = evaluate_predictions(*called, dataset.y_test, dataset.classes)
    return replace(found, class_names=dataset.task.class_names)


def _pictures(evaluation: Evaluation | Residuals, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    if isinstance(evaluation, Residuals):
        yield RESIDUALS, partial(draw_residuals, evaluation)
        return
    if evaluation.confusion is not None:
        yield MATRIX, partial(_draw_matrix, evaluation, evaluation.confusion)
    elif evaluation.confusions:
        yield CONFUSIONS, partial(_draw_confusions, evaluation)
    if evaluation.mistakes and is_image(dataset.sample_shape):
        yield MISTAKES, partial(_draw_mistakes, evaluation, dataset)


def load_evaluation(text: str) -> Evaluation | Residuals:
    """Read what this or an earlier version's `save_evaluation` wrote into DATA."""
    read = json.loads(text)
    if "residuals" in read:
        return Residuals.read(read["residuals"])
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


def _figure(path: Path, draw: Any) -> None:
    from matplotlib.figure import Figure  # not pyplot, which keeps its figures

    figure = Figure(figsize=(6, 5), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=100)


def _draw_matrix(evaluation: Evaluation, confusion: list[list[int]], figure: Any) -> None:
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix, test images")
    if len(counts) < MANY:
        names = [_short(evaluation.name(label)) for label in range(len(counts))]
        axes.set_xticks(range(len(counts)), names, rotation=90 * (max(map(len, names)) > 3))
        axes.set_yticks(range(len(counts)), names)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)


def _short(name: str) -> str:
    """A class name as it fits into a picture, where a $ would begin a formula."""
    return (name if len(name) <= 20 else name[:19] + "…").replace("$", r"\$")


def _draw_confusions(evaluation: Evaluation, figure: Any) -> None:
    axes, confusions = figure.add_subplot(), evaluation.confusions
    labels = [_short(evaluation.called(confusion)) for confusion in confusions]
    axes.barh(range(len(labels)), [confusion.count for confusion in confusions])
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(
        xlabel="test examples", title="Most frequent confusions: true class called predicted class"
    )


def _draw_mistakes(evaluation: Evaluation, dataset: Dataset, figure: Any) -> None:
    figure.suptitle("Most confident mistakes on the test images")
    grid = figure.subplots(3, _SHOWN // 3).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, mistake in zip(grid, evaluation.mistakes, strict=False):
        image = dataset.x_test[mistake.index].reshape(dataset.sample_shape)
        if image.dtype != np.uint8:  # any range: scaled from its minimum to its maximum
            image = (image - image.min()) / max(float(np.ptp(image)), 1e-9)
        axes.imshow(image, cmap="gray")
        label, predicted = (_short(evaluation.name(i)) for i in (mistake.label, mistake.predicted))
        between = "\ncalled " if len(label + predicted) > 10 else " called "
        axes.set_title(f"{label}{between}{predicted}\n{mistake.probability:.0%}", fontsize=9)
