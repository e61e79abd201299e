"""The winner's evaluation as files: its data, and the pictures of each task."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.data.dataset import Dataset, is_image
from search.errors import one_line
from search.promotion.evaluation import (
    MANY,
    SHOWN,
    Evaluation,
    Found,
    Labels,
    Residuals,
    evaluate,
    most_frequent,
)

DATA, MATRIX, MISTAKES = "evaluation.json", "confusion_matrix.png", "mistakes.png"
CONFUSIONS, LABELS, RESIDUALS = "confusions.png", "labels.png", "residuals.png"


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
        found = evaluate(model, dataset, outputs)
        path.write_text(found.as_json())
        for name, draw in _pictures(found, dataset):
            path = folder / name
            _figure(path, draw)
    except Exception as error:
        path.unlink(missing_ok=True)  # it may be incomplete
        return f"{path.name} could not be written ({type(error).__name__}: {one_line(error)})"
    return None


def _pictures(evaluation: Found, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    if isinstance(evaluation, Residuals):
        yield RESIDUALS, partial(_draw_residuals, evaluation)
        return
    if isinstance(evaluation, Labels):
        yield LABELS, partial(_draw_labels, evaluation)
        return
    if evaluation.confusion is not None:
        yield MATRIX, partial(_draw_matrix, evaluation, evaluation.confusion)
    elif evaluation.confusions:
        yield CONFUSIONS, partial(_draw_confusions, evaluation)
    if evaluation.mistakes and is_image(dataset.sample_shape):
        yield MISTAKES, partial(_draw_mistakes, evaluation, dataset)


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
    grid = figure.subplots(3, SHOWN // 3).ravel()
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


def _draw_labels(evaluation: Labels, figure: Any) -> None:
    """Precision and recall of the labels, or of the most frequent ones."""
    axes, scores = figure.add_subplot(), most_frequent(evaluation)
    rows = np.arange(len(scores))
    axes.barh(rows - 0.2, [score.precision or 0 for score in scores], 0.4, label="precision")
    axes.barh(rows + 0.2, [score.recall or 0 for score in scores], 0.4, label="recall")
    axes.set_yticks(rows, [_short(evaluation.name(score.label)) for score in scores])
    axes.invert_yaxis()
    some = f" (the {MANY} most frequent)" if len(scores) < len(evaluation.classes) else ""
    axes.set(xlim=(0, 1), title=f"Labels of the test examples{some}")
    figure.legend(loc="outside lower center", ncols=2)


def _draw_residuals(residuals: Residuals, figure: Any) -> None:
    """Draw the predictions over the true numbers, and the diagonal where both are equal."""
    axes = figure.add_subplot()
    axes.scatter(residuals.true, residuals.predicted, s=8, alpha=0.5)
    both = residuals.true + residuals.predicted
    axes.axline((min(both), min(both)), slope=1, color="grey", linewidth=1)
    axes.set(
        xlabel="true", ylabel="predicted", title="Predictions of the test examples over the truth"
    )
