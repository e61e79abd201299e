"""How the winner does on the test images: its confusion matrix and its worst mistakes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data import Dataset, is_image

DATA, MATRIX, MISTAKES = "evaluation.json", "confusion_matrix.png", "mistakes.png"
_SHOWN = 12  # mistakes
MANY = 20  # classes, from which the cells of the matrix are too small for numbers


@dataclass(frozen=True)
class Mistake:
    """Test example `index`, of class `label`, called `predicted` with this probability."""

    index: int
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Evaluation:
    """confusion: row: the true class, column: the predicted one; counts of test examples.

    mistakes: the worst first, that is, the most confident.
    """

    confusion: list[list[int]]
    mistakes: list[Mistake]


def evaluate(probabilities: NDArray[Any], labels: NDArray[Any], classes: int) -> Evaluation:
    """Compare predictions of shape (n, classes) with the true classes of shape (n,)."""
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_SHOWN]
    return Evaluation(
        confusion.tolist(),
        [Mistake(int(i), int(labels[i]), int(predicted[i]), float(confidence[i])) for i in worst],
    )


def save(evaluation: Evaluation, dataset: Dataset, folder: Path) -> None:
    """Write the evaluation into `folder`, as data and as pictures.

    The mistakes are drawn where an example is a grey or a colour image.
    """
    (folder / DATA).write_text(json.dumps(asdict(evaluation)))
    _figure(folder / MATRIX, lambda figure: _draw_matrix(figure, evaluation))
    if evaluation.mistakes and is_image(dataset.sample_shape):
        _figure(folder / MISTAKES, lambda figure: _draw_mistakes(figure, evaluation, dataset))


def load(text: str) -> Evaluation:
    """What `save` wrote into DATA."""
    read = json.loads(text)
    return Evaluation(read["confusion"], [Mistake(**mistake) for mistake in read["mistakes"]])


def _figure(path: Path, draw: Any) -> None:
    from matplotlib.figure import Figure  # not pyplot, whose figures are global and stay

    figure = Figure(figsize=(6, 5), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=100)


def _draw_matrix(figure: Any, evaluation: Evaluation) -> None:
    counts = np.array(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix, test images")
    if len(counts) < MANY:
        axes.set_xticks(range(len(counts)))
        axes.set_yticks(range(len(counts)))
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)


def _draw_mistakes(figure: Any, evaluation: Evaluation, dataset: Dataset) -> None:
    figure.suptitle("The most confident mistakes on the test images")
    grid = figure.subplots(3, _SHOWN // 3).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, mistake in zip(grid, evaluation.mistakes, strict=False):
        image = dataset.x_test[mistake.index].reshape(dataset.sample_shape)
        if image.dtype != np.uint8:  # any range: each from its darkest to its brightest
            image = (image - image.min()) / max(float(np.ptp(image)), 1e-9)
        axes.imshow(image, cmap="gray")
        axes.set_title(
            f"{mistake.label} called {mistake.predicted}\n{mistake.probability:.0%}", fontsize=9
        )
