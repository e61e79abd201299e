"""The winner on the test examples: its confusion matrix and its worst mistakes."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.dataset import Dataset, is_image, scaled
from search.data.sources import Images
from search.errors import one_line

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
class Evaluation:
    """A model on the test examples: it classifies `right` of `total` correctly.

    confusion: counts of test examples by true class (row) and predicted class (column), None above
    `MOST` classes. confusions: the most frequent ones first. mistakes: the most confident first.
    class_names: empty, or the name of each class.
    """

    right: int
    total: int
    confusion: list[list[int]] | None
    confusions: list[Confusion]
    mistakes: list[Mistake]
    class_names: tuple[str, ...] = ()

    def as_json(self) -> str:
        """The content of DATA: the matrix, from which the counts follow, or the counts."""
        kept = asdict(self)
        counts = ("right", "total", "confusions") if self.confusion is None else ("confusion",)
        names = ("class_names",) if self.class_names else ()
        return json.dumps({name: kept[name] for name in (*counts, "mistakes", *names)})

    def name(self, label: int) -> str:
        """The class `label`, by its name if it has one."""
        return self.class_names[label] if self.class_names else str(label)

    def called(self, case: Mistake | Confusion) -> str:
        """Which class was called which."""
        return f"{self.name(case.label)} called {self.name(case.predicted)}"


def predict(model: Any, x: Images) -> tuple[NDArray[Any], NDArray[Any]]:
    """The class that `model` predicts for each example in `x`, and its probability.

    x: as in a dataset; scaled here. In parts, so that the scaled examples and the probabilities of
    all classes fit in memory.
    """
    widest = max(model.output_shape[-1], math.prod(x.shape[1:]))
    rows = max(1, _AT_ONCE // widest)
    rows -= rows % _BATCH if rows > _BATCH else 0  # whole batches
    predicted, confidence = [], []
    for first in range(0, len(x), rows):
        part = scaled(x[first : first + rows])
        probabilities = model.predict(part, batch_size=min(rows, _BATCH), verbose=0)
        predicted.append(probabilities.argmax(axis=1))
        confidence.append(probabilities.max(axis=1))
    return np.concatenate(predicted), np.concatenate(confidence)


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
    confusion = None
    if classes <= MOST:
        matrix = np.zeros((classes, classes), dtype=int)
        matrix[rows, columns] = counts
        confusion = matrix.tolist()
    wrong = np.flatnonzero(rows != columns)
    frequent = wrong[np.argsort(-counts[wrong], kind="stable")][:_FREQUENT]
    return Evaluation(
        right=int(counts[rows == columns].sum()),
        total=int(counts.sum()),
        confusion=confusion,
        confusions=[Confusion(int(rows[i]), int(columns[i]), int(counts[i])) for i in frequent],
        mistakes=mistakes,
    )


def save_evaluation(model: Any, dataset: Dataset, folder: Path) -> str | None:
    """Evaluate `model` on the test examples and write data and pictures into `folder`.

    Mistakes are drawn if the examples are images. Nothing depends on these files, so an error is
    not raised: returns which file could not be written, and why.
    """
    path = folder / DATA
    try:
        found = evaluate_predictions(
            *predict(model, dataset.raw_test), dataset.y_test, dataset.classes
        )
        found = replace(found, class_names=dataset.class_names)
        path.write_text(found.as_json())
        for name, draw in _pictures(found, dataset):
            path = folder / name
            _figure(path, draw)
    except Exception as error:
        path.unlink(missing_ok=True)  # it may be incomplete
        return f"{path.name} could not be written ({type(error).__name__}: {one_line(error)})"
    return None


def _pictures(evaluation: Evaluation, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    if evaluation.confusion is not None:
        yield MATRIX, partial(_draw_matrix, evaluation, evaluation.confusion)
    elif evaluation.confusions:
        yield CONFUSIONS, partial(_draw_confusions, evaluation)
    if evaluation.mistakes and is_image(dataset.sample_shape):
        yield MISTAKES, partial(_draw_mistakes, evaluation, dataset)


def load_evaluation(text: str) -> Evaluation:
    """Read what this or an earlier version's `save_evaluation` wrote into DATA."""
    read = json.loads(text)
    mistakes = [Mistake(**mistake) for mistake in read.pop("mistakes")]
    names = tuple(read.pop("class_names", ()))
    if "confusion" not in read:
        confusions = [Confusion(**confusion) for confusion in read.pop("confusions")]
        return Evaluation(
            **read, confusion=None, confusions=confusions, mistakes=mistakes, class_names=names
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
